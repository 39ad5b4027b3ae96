"""A process that has imported torch, lightning and transformers once, and forks a child for each Python command it is told.

A child is a process of its own: environment, working directory, arguments, output, exit code. What it does not do is `import torch` from the
start: where that very moment is what is tested, start a real process. The end of that import, at which torch calls the gate, is made up for:
the gate is called before the command's first line.

Protocol: one JSON object a line on stdin, {argv, cwd, env, stdout, stderr}; answered by {pid} at once and by {pid, returncode} at its end.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import sys
import threading
from importlib.metadata import entry_points

# What commands and the hosts under test import anyway. Nothing of ours, and no host: both must be imported by the child itself.
HEAVY = (
    "lightning.pytorch",
    "PIL.Image",
    "torch.utils.data",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch._dynamo",
    "torchmetrics",
    "accelerate.utils",
    "transformers",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "transformers.models.auto.image_processing_auto",
    "transformers.models.auto.tokenization_auto",
    "skimage.morphology",
    "scipy.ndimage",
    "einops.layers.torch",
    "beartype",
    "yaml",
    "wrapt",
)


def prepare() -> None:
    """Import the heavy packages that are installed, and check that a child starts as a process that has just imported torch."""
    import torch

    for name in HEAVY:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            continue  # a package that an extra brings; who needs it says so
    torch.set_num_threads(1)
    hosts = {entry.name for entry in entry_points(group="vlmfilm.hosts")}
    assert hosts, "the package is not installed"
    ours = [name for name in sys.modules if name in hosts or name.split(".")[0] in {"vlmfilm_plugin", "src", *map(_root, hosts)}]
    assert not ours, f"a child could not be activated before these: {ours}"
    assert threading.active_count() == 1, "a fork would lose these threads"


def _root(name: str) -> str:
    return name.split(".")[0]


def command(order: dict[str, object]) -> int:
    """Run one command as `python` would: `-c CODE`, `-m MODULE` or a script."""
    argv: list[str] = order["argv"]  # type: ignore[assignment]
    environ: dict[str, str] = order["env"]  # type: ignore[assignment]
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(str(order["cwd"]))
    # Only what the interpreter itself puts first; this file's folder is not part of a command's path.
    sys.path[:] = [entry for entry in environ.get("PYTHONPATH", "").split(os.pathsep) if entry] + BASE_PATH
    import numpy
    import torch

    # Two processes draw other numbers, unless they are seeded; `random` does so by itself at a fork.
    torch.seed()
    numpy.random.seed()
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "1":
        # As torch does, which called it in this very process when nothing was set.
        (gate,) = (entry for entry in entry_points(group="torch.backends") if entry.dist is not None and entry.dist.name == "vlmfilm-plugin")
        gate.load()()
    if argv[0] == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *argv[2:]]
        module = type(sys)("__main__")
        sys.modules["__main__"] = module
        exec(compile(argv[1], "<string>", "exec"), module.__dict__)
    elif argv[0] == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(argv[0])))
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")
    return 0


def child(order: dict[str, object]) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(str(order[name]), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        code = command(order)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if not isinstance(stop.code, int | None):
            print(stop.code, file=sys.stderr)
    except BaseException:
        # As the interpreter does, whose last exception is read at exit.
        sys.last_type, sys.last_value, sys.last_traceback = sys.exc_info()
        sys.excepthook(*sys.exc_info())
        code = 1
    try:
        # As at the end of an interpreter: threads, then what was registered.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    prepare()
    # What is here now is never garbage: no child's collector goes through it.
    gc.collect()
    gc.freeze()
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready, _, _ = select.select([0, ended], [], [])
        if ended in ready:
            os.read(ended, 4096)
            for pid, status in iter(_reap, (0, 0)):
                print(json.dumps({"pid": pid, "returncode": os.waitstatus_to_exitcode(status)}), file=answers, flush=True)
        if 0 in ready:
            if not (line := _read_line()):
                return
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for end in (ended, wake, answers.fileno()):
                    os.close(end)
                child(json.loads(line))
            print(json.dumps({"pid": pid}), file=answers, flush=True)


def _reap() -> tuple[int, int]:
    """Return a child that has ended and its status, or zeros."""
    try:
        return os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return 0, 0


def _read_line() -> bytes:
    # Byte by byte: a buffer that was read ahead would be inherited by every child.
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return b""
        line += byte
    return line


if __name__ == "__main__":
    BASE_PATH = sys.path[1:]
    sys.path[:] = BASE_PATH
    main()
