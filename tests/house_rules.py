"""The rules of the house, as functions of source text: each returns what breaks it. Files are named as `folder/file.py`."""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator, Mapping

PACKAGE = "vlmfilm_plugin"
# Lowest first: a folder imports itself and what stands above it in this list.
FOLDERS = [
    "errors",
    "log",
    "files",
    "entry_points",
    "host_spec",
    "settings",
    "encoders",
    "film",
    "rows",
    "features",
    "checkpoints",
    "forward",
    "run",
    "hosts",
    "soft_seg",
    "warmup",
    "inspection",
    "evidence",
    "docs",
    "demo",
    "cli",
    "__main__",
]
# Rooms that the plan of the house names and that may not be built yet.
PLANNED = {"rows", "inspection", "evidence", "docs"}
HEAVY = {"torch", "transformers", "accelerate", "lightning"}
HOOKS_MAY = {"host_spec", "settings.mode", "errors", "wrapt", "pluggy"}

HOST_WORDS = ("sofl", "med_seg_diff", "src.")

MOST_POSITIONAL = 8
# A word that had two meanings, and now has a name for each.
LEFT_WORDS = {
    "frame": "ForwardContext",
    "frames": "ForwardContext",
    "slot": "CompiledInputs",
    "slots": "CompiledInputs",
    "family": "film_id",
    "families": "film_id",
    "witness": "change probe",
    "witnesses": "change probes",
    "policy": "batch_strategy",
    "policies": "batch_strategy",
    "partner": "shuffle donor",
    "partners": "shuffle donors",
    "explicit": "given features",
}
# Names that are not ours to choose: settings of the port, and a question about a setting.
KEPT_NAMES = {"reuse_policy", "is_explicit"}
_ADAPTER = re.compile(r"(?<!host )\badapters?\b(?!`)", re.IGNORECASE)


# Imports


def _dotted(text: object) -> str | None:
    """Return a string that names a module of ours, such as `vlmfilm_plugin.encoders.hf:from_settings`, as a dotted name."""
    found = re.fullmatch(rf"({PACKAGE}(?:\.\w+)+)(?::(\w+))?", text) if isinstance(text, str) else None
    return None if found is None else ".".join(part for part in found.groups() if part)


def imports(source: str) -> Iterator[str]:
    """Yield the dotted name of everything imported, at any level, `if TYPE_CHECKING` included; `from a import b` as `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and (named := _dotted(node.value)):
            yield named


def folder_of(dotted: str) -> str | None:
    """Return the part of the package that a dotted name belongs to: `film`, `encoders`, ..., or None."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else None


def wrong_imports(folder: str, source: str) -> list[str]:
    """Return what `source`, as a file of `folder`, must not import: what stands below it, and host adapters by name."""
    layer = {name: number for number, name in enumerate(FOLDERS)}
    wrong = []
    for name in imports(source):
        target = folder_of(name)
        if name.startswith("."):
            wrong.append(f"{name}: relative import")
        elif name.split(".")[0] == "hooks" or target == "hooks":
            wrong.append(f"{name}: only entry points name host adapters")
        elif target in layer and layer[target] > layer[folder]:
            wrong.append(f"{name}: {target} stands below {folder}")
        elif target is not None and target not in layer and target != "__version__":
            wrong.append(f"{name}: no such folder")
    return wrong


def wrong_hook_imports(source: str) -> list[str]:
    """Return what a host adapter must not import."""
    ours = tuple(f"{PACKAGE}.{name}" for name in HOOKS_MAY)
    outside = HOOKS_MAY | set(sys.stdlib_module_names)
    return [name for name in imports(source) if not (name.startswith(ours) if folder_of(name) else name.split(".")[0] in outside)]


def graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Return which modules each module imports, of `sources`: text by dotted module name."""
    found: dict[str, set[str]] = {}
    for module, source in sources.items():
        targets = {name if name in sources else name.rpartition(".")[0] for name in imports(source)}
        found[module] = {target for target in targets if target in sources}
    return found


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components of more than one module, and modules that import themselves."""
    reached = {module: _reached_from(module, edges) for module in edges}
    groups = {frozenset({module, *(other for other in reached[module] if module in reached[other])}) for module in edges if module in reached[module]}
    return sorted(sorted(group) for group in groups)


def _reached_from(module: str, edges: Mapping[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = list(edges[module])
    while waiting:
        if (now := waiting.pop()) not in seen:
            seen.add(now)
            waiting += edges[now]
    return seen


# Hosts and files that cannot be read safely


def host_names(source: str) -> list[str]:
    """Return the texts that name a host or a module of it."""
    literals = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [text for text in literals if any(word in text.lower() for word in HOST_WORDS)]


def unsafe_loads(source: str) -> list[str]:
    """Return calls that may unpickle objects: `torch.load` without a literal `weights_only=True`, `weights_only=False`, and pickle's own."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            flag = next((keyword.value for keyword in node.keywords if keyword.arg == "weights_only"), None)
            is_true, is_false = isinstance(flag, ast.Constant) and flag.value is True, isinstance(flag, ast.Constant) and flag.value is False
            if is_false or (called == "torch.load" and not is_true) or called in {"pickle.load", "pickle.loads", "pickle.Unpickler"}:
                wrong.append(f"{node.lineno}: {ast.unparse(node)}")
    return wrong


# Files that are written

_WRITERS = ("write_text", "write_bytes", "save_file", "mkstemp", "NamedTemporaryFile", "copyfile")


def loose_writes(source: str) -> list[str]:
    """Return calls that make a file otherwise than by `files.new_file`: half of it may be left, or another file lost."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        last = called.rpartition(".")[2]
        constants = [argument.value for argument in [*node.args, *(word.value for word in node.keywords)] if isinstance(argument, ast.Constant)]
        is_opened = last in {"open", "fdopen"} and any(
            isinstance(text, str) and re.fullmatch(r"[rwaxbt+]*[wax+][rwaxbt+]*", text) for text in constants
        )
        # A name alone is an open file, such as `new_file` gives.
        is_saved = called == "torch.save" and not (len(node.args) == 2 and isinstance(node.args[1], ast.Name) and node.args[1].id.endswith("file"))
        if is_opened or is_saved or last in _WRITERS or "O_CREAT" in ast.unparse(node):
            wrong.append(f"{node.lineno}: {ast.unparse(node)}")
    return wrong


# Types


def numbered_columns(source: str) -> list[str]:
    """Return subscripts of a row by a number or a slice: `row[4]`, `rows[0][4]`, `row[:4]`, `item.row[1]`."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Subscript) and _is_row(node.value) and _is_number(node.slice):
            wrong.append(f"{node.lineno}: {ast.unparse(node)}")
    return wrong


def _is_row(node: ast.AST) -> bool:
    if isinstance(node, ast.Subscript):  # one of `rows`
        return ast.unparse(node.value).split(".")[-1].endswith("rows")
    return isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node).split(".")[-1].endswith("row")


def _is_number(node: ast.AST) -> bool:
    plain = node.operand if isinstance(node, ast.UnaryOp) else node
    return isinstance(node, ast.Slice) or (isinstance(plain, ast.Constant) and isinstance(plain.value, int))


def crowded_calls(source: str) -> list[str]:
    """Return functions with, and calls of, more than 8 arguments by position."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            names = [argument.arg for argument in [*node.args.posonlyargs, *node.args.args] if argument.arg not in {"self", "cls"}]
            if len(names) > MOST_POSITIONAL:
                wrong.append(f"{node.lineno}: {getattr(node, 'name', 'lambda')}({', '.join(names)})")
        elif isinstance(node, ast.Call) and len(node.args) > MOST_POSITIONAL:
            wrong.append(f"{node.lineno}: {ast.unparse(node.func)} with {len(node.args)} arguments by position")
    return wrong


def untyped_settings(source: str) -> list[str]:
    """Return arguments named `settings` that are `object` or `Any`, `**settings` included."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.arg) and node.arg == "settings" and node.annotation is not None and ast.unparse(node.annotation) in {"object", "Any"}:
            wrong.append(f"{node.lineno}: {ast.unparse(node)}")
    return wrong


# Words


def words_of(name: str) -> list[str]:
    """Return the words of an identifier: `FrameStack_of2` has frame, stack, of."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def left_words(source: str) -> list[str]:
    """Return identifiers that hold a word of the old house."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = [getattr(node, field, None) for field in ("id", "name", "arg", "attr", "asname")]
        for name in names:
            if isinstance(name, str) and name not in KEPT_NAMES and any(word in LEFT_WORDS for word in words_of(name)):
                found.add(f"{getattr(node, 'lineno', 0)}: {name}: say {next(LEFT_WORDS[word] for word in words_of(name) if word in LEFT_WORDS)}")
    return sorted(found)


def lonely_adapters(source: str) -> list[str]:
    """Return comments and texts in which `adapter` stands without `host` before it: to others an adapter is weights."""
    texts = [(node.lineno, node.value) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    texts += [(token.start[0], token.string) for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == tokenize.COMMENT]
    # A text without a space is a name, such as that of a command's argument.
    return [f"{line}: {text.strip()[:100]}" for line, text in texts if " " in text and _ADAPTER.search(" ".join(text.split()))]
