"""The gate: torch calls `torch_backend` at the end of `import torch`. Dormant, it reads one variable and returns.

Standard library only. If this module raised, `import torch` would fail for every user of the environment.
"""

import os


def torch_backend():
    """Activate VLM-FiLM when `VLM_FILM_MODE` is set, else do nothing."""
    if "VLM_FILM_MODE" not in os.environ:
        return
    try:
        from vlmfilm_plugin.hosts.activation import activate
    except Exception as error:
        _block(error)
        return
    activate()


def _block(error):
    """Asked for, but broken: say so, and let no host train as a baseline. A process without a host goes on."""
    import sys
    from importlib.abc import MetaPathFinder
    from importlib.metadata import entry_points

    message = (
        f"vlmfilm: VLM_FILM_MODE={os.environ['VLM_FILM_MODE']} is set, but vlmfilm-plugin cannot be imported ({type(error).__name__}: {error}); "
        "reinstall it (pip install --force-reinstall vlmfilm-plugin), or unset VLM_FILM_MODE"
    )
    sys.stderr.write(message + "\n")
    hosts = {entry.name for entry in entry_points(group="vlmfilm.hosts")}

    class Blocker(MetaPathFinder):
        def find_spec(self, fullname, path=None, target=None):
            if fullname in hosts:
                raise SystemExit(message)
            return None

    sys.meta_path.insert(0, Blocker())
