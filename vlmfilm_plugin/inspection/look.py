"""Look at a UNet by one forward. What the forward could change is afterwards as it was: random streams, buffers, training flags, hooks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vlmfilm_plugin.errors import HostError, some_of
from vlmfilm_plugin.film.kept import undisturbed
from vlmfilm_plugin.inspection.blocks import blocks_in
from vlmfilm_plugin.inspection.calls import Call, CallRecorder
from vlmfilm_plugin.inspection.decoder import Decoder, find_decoder, unet_around
from vlmfilm_plugin.inspection.report import Inspection, SeenStage, SeenUNet, size_text

_MOST = 8


def inspect(unet: nn.Module, *example: Any, **named: Any) -> Inspection:
    """Run a UNet once on example arguments, without gradients and in evaluation, and return what its decoder is.

    Nothing is attached, and nothing of the net or of random streams is changed, also where the forward raises.

    Args:
        unet: the net; a compiled one runs uncompiled.
        example: arguments of its forward, such as `x` (R, C, H, W) and time steps (R,); `named` those that are given by name.

    Returns:
        The stages with their blocks, bottleneck first, and what to look at before FiLM is attached there.

    Raises:
        HostError: it is no module, its forward raised, or nothing in it looks like a UNet.
    """
    if not isinstance(unet, nn.Module):
        facts = {"found": f"a {type(unet).__name__}", "expected": "a torch.nn.Module"}
        raise HostError("cannot inspect what is no module", facts, "give the built UNet, and the arguments of one call")
    # A compiled net is a module around the net.
    unet = getattr(unet, "_orig_mod", unet)
    root = call_of(unet, example, named)
    decoder = find_decoder(root)
    if decoder is None:
        raise nothing_found(type(unet).__name__, [root])
    is_wrapper = type(unet).__module__.split(".")[0] == "torch"
    return Inspection((seen_unet(decoder, unet_around(decoder) if is_wrapper else root),))


def call_of(unet: nn.Module, example: tuple[Any, ...], named: dict[str, Any]) -> Call:
    """Return the tree of the calls of one forward.

    Raises:
        HostError: the forward raised; its own error, and the shapes that it was given.
    """
    found: list[Call] = []
    try:
        with undisturbed(unet), CallRecorder(lambda module: module is unet and not found, lambda call, output: found.append(call)):
            unet(*example, **named)
    except Exception as error:
        shapes = [_shown(value) for value in example] + [f"{name}={_shown(value)}" for name, value in named.items()]
        facts = {"error": f"{type(error).__name__}: {error}", "given": ", ".join(shapes) or "nothing"}
        raise HostError(f"cannot inspect {type(unet).__name__}: its forward raised", facts, "give the arguments of one call of the net") from error
    if not found:
        facts = {"found": "its call ran no forward that torch's hooks see", "expected": "a module in Python: no compiled or scripted file"}
        raise HostError(f"cannot inspect {type(unet).__name__}", facts, "build the net from its class")
    return found[0]


def seen_unet(decoder: Decoder, unet: Call) -> SeenUNet:
    """Return what the decoder within a call of a UNet is."""
    strip = len(unet.path) + 1 if unet.path else 0
    stages = tuple(
        SeenStage(
            index=index,
            paths=tuple(block.path[strip:] for block in stage),
            channels=tuple(block.channels for block in stage),
            size=stage[0].size,
        )
        for index, stage in enumerate(decoder.stages)
    )
    cls = type(unet.module)
    places = list(dict.fromkeys(block.call.place for block in decoder.blocks))
    is_here = f"{unet.path}." if unet.path else ""
    others = {name[strip:]: tuple(block.path[strip:] for block in group) for name, group in decoder.others if group[0].path.startswith(is_here)}
    return SeenUNet(
        cls=f"{cls.__module__}:{cls.__qualname__}",
        path=unet.path,
        pattern=decoder.pattern[strip:] if decoder.pattern.startswith(is_here) else decoder.pattern,
        stages=stages,
        rank=len(decoder.blocks[0].size),
        output=places[0],
        others=others,
        after=tuple(block.path[strip:] for block in decoder.after),
        uncovered=tuple(decoder.uncovered),
        warnings=tuple(_warnings(decoder, others, strip)),
        refusal=_refusal(decoder, strip),
    )


def _warnings(decoder: Decoder, others: dict[str, tuple[str, ...]], strip: int) -> list[str]:
    found = []
    if decoder.uncovered:
        sizes = ", ".join(map(size_text, decoder.uncovered))
        found.append(f"no block of {decoder.pattern} is at {sizes}: FiLM does not act there")
    for name, paths in others.items():
        found.append(f"another decoder, kept apart: {name} ({len(paths)} blocks: {some_of(paths)}); name it in `targets` if FiLM shall act there")
    if any(block.call.place is not None for block in decoder.blocks):
        held = decoder.blocks[0].call.place
        found.append(f"blocks return several values: the features are taken from {held!r}")
    if decoder.after:
        found.append(f"behind the decoder: {some_of([block.path[strip:] for block in decoder.after])}")
    if "*" not in decoder.pattern:
        found.append(f"the blocks have no common path, only the class {decoder.pattern}: check that each is the end of its stage")
    return found


def _refusal(decoder: Decoder, strip: int) -> str:
    """Return why these blocks are no decoder that FiLM can be attached to by stages; empty where they are."""
    if decoder.is_nested:
        return (
            f"{decoder.pattern} builds several decoders, one inside the other (as UNet++ does): which of its blocks FiLM shall act on is yours to say"
        )
    if decoder.twice:
        paths = some_of([path[strip:] for path in decoder.twice])
        return f"{paths} ran more than once in one forward: one head would act at two places"
    if len({block.call.place for block in decoder.blocks}) > 1:
        return "its blocks return their features at different places"
    if any(block.path[strip:].startswith("<") for block in decoder.blocks):
        return "its blocks are no submodules: they are built in the forward"
    smaller = [block.path[strip:] for block in decoder.after if block.area < decoder.blocks[-1].area]
    if smaller:
        return f"{some_of(smaller)} runs at a smaller size behind it, so it is no decoder that ends the net"
    return ""


def nothing_found(owner: str, roots: list[Call]) -> HostError:
    """Return the error that says what was seen instead of a UNet."""
    seen = {}
    for root in roots[-_MOST:]:
        blocks = blocks_in(root)
        sizes = [f"{block.path or type(block.call.module).__name__} {size_text(block.size)}" for block in blocks]
        shown = "; ".join(sizes[:_MOST]) + (f"; and {len(sizes) - _MOST} more" if len(sizes) > _MOST else "")
        seen[f"seen in {type(root.module).__name__}"] = shown or _without_blocks(root)
    expected = "blocks of convolutions whose sizes grow, of one pattern at two resolutions at least"
    fix = "state the blocks by hand: `UNet(targets=..., stages=...)` in a host adapter"
    return HostError(f"nothing in {owner} looks like a UNet", {**seen, "expected": expected}, fix)


def _without_blocks(root: Call) -> str:
    tokens = [call for call in root.walk() if call.output is not None and len(call.output) == 3 and call.children]
    if tokens:
        shapes = list(dict.fromkeys(f"{call.path or type(call.module).__name__} {call.output}" for call in tokens))
        return f"tokens (B, N, C), whose resolution no shape tells: {some_of(shapes, _MOST)}"
    return f"no convolution with a kernel above 1; its output is {root.output}"


def _shown(value: Any) -> str:
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}" if isinstance(value, Tensor) else repr(value)[:60]
