"""The gate under the name that it had in the first version.

Metadata of that version which a killed pip left behind, or which an upgrade is about to remove, names it; `import torch` must not fail for that.
"""

from vlmfilm_startup import torch_backend

__all__ = ["torch_backend"]
