"""The gate: torch calls `torch_backend` at the end of `import torch`. Dormant, it looks at the names of variables and returns.

Standard library only. If this module raised, or were gone while its entry point is there, `import torch` would fail for every user of the
environment: its name sorts behind the package's metadata, since pip removes files in that order.
"""

import os
import sys

MODE = "VLM_FILM_MODE"
PREFIX = "VLM_FILM_"
INSPECT = "VLM_FILM_INSPECT"
# Variables that are no settings: of a run, of the encoders, and of the tests.
OTHERS = (
    *(MODE, "VLM_FILM_CONFIG", "VLM_FILM_HOSTS", "VLM_FILM_STRICT", INSPECT, "VLM_FORCE_NO_ACCELERATE"),
    *("VLMFILM_HOST_REPO", "VLMFILM_PORT_REPO", "VLMFILM_MEDSEGDIFF_REPO", "VLMFILM_SOFT_SEG_REPO"),
)
# Files of the package that list the settings, one at the start of a line each.
_LISTS = (("settings", "record.py"), ("settings", "port_names.py"))
# Closer than this to the mode's own name, whatever it begins with, is a slip of the finger: VML_FILM_MODE.
_SLIP = 0.86

_is_said = False


def torch_backend():
    """Activate VLM-FiLM when `VLM_FILM_MODE` is set, else do nothing but name variables that were meant for it and are none."""
    _say_strangers()
    if INSPECT in os.environ:
        # Set by `vlmfilm inspect` alone; an error is for its user.
        from vlmfilm_plugin.inspection.host_run import start

        start(os.environ[INSPECT])
        return
    if MODE not in os.environ:
        return
    try:
        from vlmfilm_plugin.hosts.activation import activate
    except Exception as error:
        _block(error)
        return
    activate()


def strangers(environ):
    """Return the variables that look like ours and are none, each with the closest legal name or None.

    With the mode set, unknown names behind the right prefix are left to the settings, which refuse them.
    """
    found = {}
    for name in environ:
        upper = name.upper()
        if ("FILM" in upper or "VLM" in upper) and name not in OTHERS and not (name.startswith(PREFIX) and MODE in environ):
            found[name] = _squeezed(upper)
    return dict(_judged(found)) if found else {}


def settings_names():
    """Return the names of all settings, read from the package's source: nothing of it is imported; none where it is not there."""
    import re
    from importlib.util import find_spec

    spec = find_spec("vlmfilm_plugin")
    if spec is None or not spec.origin:
        return set()
    names = set()
    for parts in _LISTS:
        try:
            with open(os.path.join(os.path.dirname(spec.origin), *parts), encoding="utf-8") as file:
                names.update(re.findall(r'^    (?:(\w+): .*= setting\(|"(\w+)": )', file.read(), re.M))
        except (OSError, ValueError):
            return set()
    return {plain or quoted for plain, quoted in names}


def _judged(found):
    from difflib import SequenceMatcher, get_close_matches

    ours = {name for name, text in found.items() if text.startswith(("VLMFILM", "VLMFORCE"))}
    settings = settings_names() if ours else set()
    if not settings:
        # A package that is not there, or cannot be read: a setting cannot be told from a slip.
        ours = {name for name in ours if not name.startswith(PREFIX)}
    legal = {_tail(_squeezed(name.upper())): name for name in [*OTHERS, *(PREFIX + name.upper() for name in settings)]}
    for name, text in found.items():
        if name in ours:
            if not (name.startswith(PREFIX) and name[len(PREFIX) :].lower() in settings):
                closest = get_close_matches(_tail(text), legal, n=1)
                yield name, legal[closest[0]] if closest else None
        elif SequenceMatcher(None, text, _squeezed(MODE)).ratio() >= _SLIP:
            yield name, MODE


def _squeezed(name):
    return "".join(letter for letter in name if letter.isalnum())


def _tail(text):
    # What nearly every name begins with would make them all alike.
    return text[len("VLMFILM") :] if text.startswith("VLMFILM") else text


def _say_strangers():
    """Write one line for each such variable, once, in the process that its user started."""
    global _is_said
    try:
        found = {} if _is_said else strangers(os.environ)
        if not found or _is_a_child():
            return
        _is_said = True
        state = "" if MODE in os.environ else f", and without {MODE} VLM-FiLM is not active"
        for name, closest in found.items():
            hint = f"did you mean {closest}?" if closest else f"names begin with {PREFIX}"
            sys.stderr.write(f"vlmfilm: {ascii(name)[1:-1]} is no variable of vlmfilm-plugin{state}; {hint}\n")
    except Exception:
        # A hint must never cost anyone their `import torch`.
        return


def _is_a_child():
    """Tell whether this is another rank of a launcher, or a worker of another process: the first one has said it."""
    if any(os.environ.get(name, "0") not in ("", "0") for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID")):
        return True
    processes = sys.modules.get("multiprocessing.process")
    return processes is not None and processes.parent_process() is not None


def _block(error):
    """Asked for, but broken: say so, and let no host train as a baseline. A process without a host goes on."""
    from importlib.abc import MetaPathFinder
    from importlib.metadata import entry_points

    message = (
        f"vlmfilm: {MODE}={os.environ[MODE]} is set, but vlmfilm-plugin cannot be imported ({type(error).__name__}: {error}); "
        f"reinstall it (pip install --force-reinstall vlmfilm-plugin), or unset {MODE}"
    )
    sys.stderr.write(message + "\n")
    hosts = {entry.name for entry in entry_points(group="vlmfilm.hosts")}

    class Blocker(MetaPathFinder):
        def find_spec(self, fullname, path=None, target=None):
            if fullname in hosts:
                raise SystemExit(message)
            return None

    sys.meta_path.insert(0, Blocker())
    if os.environ.get("VLM_FILM_STRICT") == "0":
        return

    def refuse(optimizer, args, kwargs):
        # A repo without a host adapter would train as a baseline.
        raise SystemExit(message)

    optimizers = sys.modules.get("torch.optim.optimizer")
    if optimizers is not None:
        optimizers.register_optimizer_step_pre_hook(refuse)
