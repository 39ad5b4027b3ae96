"""Networks; importing this package registers them."""

from src.archs.components import gaussian_diffusion, medsegdiff_flow, medsegdiff_flow_multitask  # noqa: F401
