"""A process that has imported torch, lightning and transformers once, and forks a child for each Python command it is told.

A child is a process of its own: environment, working directory, arguments, output, exit code. What it does not do is `import torch` from the
start: where that very moment is what is tested, start a real process. The end of that import, at which torch calls the gate, is made up for:
the gate is called before the command's first line.

Protocol: one JSON object a line on stdin, {argv, cwd, env, stdout, stderr}; the answers are {pid} and {returncode}.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import sys
import threading
import traceback


def prepare() -> None:
    """Import what the commands' hosts import anyway; nothing of ours, and no host."""
    import lightning.pytorch
    import numpy
    import PIL.Image
    import torch
    import torch._dynamo
    import torch.utils.data
    import torchmetrics
    import transformers
    import yaml
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

    torch.set_num_threads(1)
    assert (
        lightning.pytorch and numpy and PIL.Image and torchmetrics and yaml and transformers and AutoConfig and AutoImageProcessor and AutoTokenizer
    )
    assert threading.active_count() == 1, "a fork would lose these threads"
    assert not [name for name in sys.modules if name.split(".")[0] in {"vlmfilm_plugin", "src"}]


def command(order: dict[str, object]) -> int:
    """Run one command as `python` would: `-c CODE`, `-m MODULE` or a script."""
    argv: list[str] = order["argv"]  # type: ignore[assignment]
    environ: dict[str, str] = order["env"]  # type: ignore[assignment]
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(str(order["cwd"]))
    # Only what the interpreter itself puts first; this file's folder is not part of a command's path.
    sys.path[:] = [entry for entry in environ.get("PYTHONPATH", "").split(os.pathsep) if entry] + BASE_PATH
    import vlmfilm_startup

    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "1":
        vlmfilm_startup.torch_backend()
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
        traceback.print_exc()
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
    for line in iter(_read_line, b""):
        pid = os.fork()
        if pid == 0:
            child(json.loads(line))
        print(json.dumps({"pid": pid}), file=answers, flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"returncode": os.waitstatus_to_exitcode(status)}), file=answers, flush=True)


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
