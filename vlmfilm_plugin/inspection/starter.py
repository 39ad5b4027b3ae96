"""The text of a starter host adapter: what was seen, as a file that runs and that its owner corrects."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import indent

from vlmfilm_plugin.inspection.batches import window_text
from vlmfilm_plugin.inspection.callers import lightning_steps
from vlmfilm_plugin.inspection.report import SeenUNet, size_text
from vlmfilm_plugin.inspection.sighting import NONE, Facts, Sighting

SCRIPT = "__main__"
# Where `placed` puts what only whoever started the script knows.
COMMAND, FILE = "<command>", "<file>"

_HEAD = '''"""Host adapter for {name}, written by `vlmfilm inspect` after one forward of

    {command}

Read it once: it says what that one forward showed. It is used by

    VLM_FILM_HOSTS={file} VLM_FILM_MODE=on {command}

{seen}
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

{torch}from vlmfilm_plugin import {imports}

# The modules of the host that this is about.
vlmfilm_modules = {modules}

# The decoder's stages, bottleneck first: the blocks of one resolution, in order of execution.
STAGES = [
{stages}
]

# Channels of each block's output. Stages and channels are those of this configuration of the net; the first forward verifies them.
CHANNELS = {{
{channels}
}}


@hookimpl
def vlmfilm_host(module: ModuleType) -> HostSpec | None:
    """Called when one of `vlmfilm_modules` has been imported."""
'''
_PLAIN_CALL = '''
def in_call(arguments: Mapping[str, Any], name: str, place: int) -> Any:
    """Return an argument of a call of the UNet, given by name or by position."""
    given = arguments.get("kwargs", {})
    return given[name] if name in given else arguments["args"][place]
'''


def adapter_for(sighting: Sighting) -> dict[str, str]:
    """Return the text of the host adapter as `adapter`, or, as `no_adapter`, why there is none."""
    why = sighting.unet.refusal or _unreachable(sighting.unet)
    return {"no_adapter": why} if why else {"adapter": adapter_text(sighting)}


def _unreachable(unet: SeenUNet) -> str:
    """Return why a host adapter could not wait for the class of a UNet; empty where it could."""
    module, _, name = unet.cls.partition(":")
    if module != SCRIPT and "<locals>" not in name:
        return ""
    where = "in the script itself" if module == SCRIPT else "inside a function"
    return f"{name} is defined {where}, and nothing is imported that a host adapter could wait for: move the class into a module, and import it"


def adapter_text(sighting: Sighting) -> str:
    """Return the file. One for a UNet alone has no steps, where nothing was seen of a run."""
    unet, facts = sighting.unet, sighting.facts
    module, _, name = unet.cls.partition(":")
    body, functions = _steps(sighting)
    specs: dict[str, list[str]] = {module: [f"unets=[\n{indent(_unet(sighting, functions), ' ' * 4)}\n],"]}
    if body is not None:
        specs.setdefault(body[0], []).append(f"steps=[\n{indent(body[1], ' ' * 4)}\n],")
    if facts.step is not None and facts.step.cls is not None and lightning_steps(facts.step.cls) and body is not None:
        # Its checkpoints then say what their FiLM is.
        specs[body[0]].append(f"models=[module.{facts.step.cls.__qualname__}],")
    blocks = [(path, channels) for stage in unet.stages for path, channels in zip(stage.paths, stage.channels, strict=True)]
    text = _HEAD.format(
        name=name,
        command=COMMAND,
        file=FILE,
        seen=_in_docstring("\n".join(_seen(unet, facts))),
        imports="HostSpec, Steps, UNet, hookimpl" if body is not None else "HostSpec, UNet, hookimpl",
        torch="import torch\n\n" if "torch." in "".join(functions) else "",
        modules=repr(list(specs)).replace("'", '"'),
        stages="\n".join(f"    {_list(stage.paths)},  # stage {stage.index}: {size_text(stage.size)}" for stage in unet.stages),
        channels="\n".join(f'    "{path}": {channels},' for path, channels in blocks),
    )
    for where, parts in specs.items():
        inner = indent("\n".join([f'name="{name}",', *parts]), " " * 12)
        text += f'    if module.__name__ == "{where}":\n        return HostSpec(\n{inner}\n        )\n'
    text += "    return None\n"
    return text + "".join(f"\n{function}" for function in functions)


def placed(text: str, command: str, file: str) -> str:
    """Return the file with the command of the run and its own path in it."""
    return text.replace(COMMAND, _in_docstring(command)).replace(FILE, _in_docstring(file))


def _in_docstring(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"""', "'''")


def _unet(sighting: Sighting, functions: list[str]) -> str:
    unet, found = sighting.unet, sighting.facts.condition
    condition = "None"
    if found is not None and found.channels is not None:
        condition = "condition_of"
        functions.append(
            "\ndef condition_of(arguments: Mapping[str, Any]) -> Any:\n"
            '    """Return the condition image in what the UNet is called with: these channels held the images of the batch."""\n'
            f'    return arguments["{found.argument}"]{window_text(found.channels)}\n'
        )
    elif found is not None:
        condition = f'"{found.argument}"'
    known = "" if found is None or found.is_proved else "  # by its name: it was not compared with the batch"
    output = "" if unet.output is None else f"    output={unet.output!r},\n"
    return (
        "UNet(\n"
        f"    cls=module.{unet.cls.partition(':')[2]},\n"
        '    targets={"post_block2": [path for stage in STAGES for path in stage]},\n'
        "    stages=STAGES,\n"
        "    channels=CHANNELS,\n"
        f"    rank={unet.rank},\n"
        "    channel_axis=1,\n"
        f"{output}"
        f"    condition={condition},{known}\n"
        ")"
    )


def _steps(sighting: Sighting) -> tuple[tuple[str, str] | None, list[str]]:
    """Return the module and the text of the `Steps` record, and the functions that it names."""
    facts = sighting.facts
    if facts.image is None:
        return None, []
    keys = "".join(f"[{key!r}]".replace("'", '"') for key in facts.image.keys)
    functions: list[str] = []
    if facts.step is not None:
        module, _, method = facts.step.text.partition(":")
        holder = method.rpartition(".")[0]
        raw = f'arguments["{facts.image.argument}"]'
        phases = "{" + ", ".join(f'"{name}": "{phase}"' for name, phase in facts.phases.items()) + "}"
        if len(facts.phases) > 1:
            raw = "next(iter(arguments.values()))"  # the first argument, whatever each step calls it
    else:
        module, _, holder = sighting.unet.cls.partition(":")
        place = list(facts.arguments).index(facts.image.argument) if facts.image.argument in facts.arguments else 0
        raw = f'in_call(arguments, "{facts.image.argument}", {place})'
        phases = '{"__call__": phase_of}'
        functions.append(_PLAIN_CALL)
        functions.append(
            "\ndef phase_of(unet: Any) -> str:\n"
            '    """Return the phase of a forward: the loop around it is no method that could say more."""\n'
            '    return "train" if unet.training and torch.is_grad_enabled() else "test"\n'
        )
    images, low, high = _as_an_encoder_sees(facts)
    window = window_text(facts.image.channels)
    functions.append(
        "\ndef images_of(arguments: Mapping[str, Any]) -> Any:\n"
        '    """Return the images of the batch as the data loader gave them (B, C, ...): by them the rows get their names."""\n'
        f"    return {raw}{keys}{window}\n"
    )
    rest = f"**{raw}, " if facts.is_mapping else ""
    functions.append(
        "\ndef batch_of(arguments: Mapping[str, Any]) -> Mapping[str, Any]:\n"
        '    """Return the batch, with its images (B, C, H, W) for the encoder where a row has no file."""\n'
        f"    images = images_of(arguments)\n{images}"
        f'    return {{{rest}"image": images}}\n'
    )
    record = (
        "Steps(\n"
        f"    cls=module.{holder},\n"
        f"    phases={phases},\n"
        f"    value_range=({low}, {high}),  # of `image`; seen: {_number(facts.value_range, 0)} to {_number(facts.value_range, 1)}\n"
        "    batch=batch_of,\n"
        "    loaded=images_of,\n"
        ")"
    )
    return (module, record), functions


def _as_an_encoder_sees(facts: Facts) -> tuple[str, str, str]:
    """Return the lines that make an image of what the batch holds, and the range of the result."""
    lines = []
    shape = facts.shape
    if len(shape) == 5:
        lines.append(
            "    images = images[:, :, images.shape[2] // 2]  # of a volume the middle slice: which one an encoder shall see is yours to say\n"
        )
    elif len(shape) == 3:
        lines.append("    images = images[:, :, None]  # a signal, as an image one pixel high\n")
    if len(shape) > 1 and shape[1] not in (1, 3):
        lines.append("    images = images[:, :1]  # of several channels the first: which one an encoder shall see is yours to say\n")
    low, high = facts.value_range or (0.0, 1.0)
    for bounds in ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)):
        if bounds[0] <= low and high <= bounds[1]:
            return "".join(lines), str(bounds[0]), str(bounds[1])
    lines += [
        "    images = images.float()\n",
        "    low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)\n",
        "    images = (images - low) / (high - low).clamp(min=1e-8)  # by its own range\n",
    ]
    return "".join(lines), "0.0", "1.0"


def _seen(unet: SeenUNet, facts: Facts) -> list[str]:
    lines = [f"Step: {facts.step.text if facts.step is not None else 'none was found: the call of the UNet itself is taken for one'}."]
    if facts.image is not None:
        how = "a data loader gave them" if facts.image.is_loaded else "by their name alone"
        lines.append(f"Images: {facts.image.text} ({how}).")
    lines.append(f"Rows are named by: {facts.rows}; {facts.why}.")
    if facts.rows == NONE:
        lines.append("Features are then of the pixels that the host passes, which must be asked for: VLM_FILM_UNNAMED_ROWS=content.")
    lines += [f"Optimizer: {text}." for text in facts.optimizers]
    lines += [f"Checkpoints: {text}." for text in facts.files]
    lines += [f"Look at: {text}." for text in unet.warnings]
    return lines


def _list(paths: Sequence[str]) -> str:
    return "[" + ", ".join(f'"{path}"' for path in paths) + "]"


def _number(bounds: tuple[float, float] | None, place: int) -> str:
    return "?" if bounds is None else f"{bounds[place]:.4g}"
