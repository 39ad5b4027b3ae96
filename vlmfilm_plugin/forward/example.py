"""One forward of a UNet on example inputs, before FiLM is attached: which blocks ran, in which order, and what they returned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from vlmfilm_plugin.errors import HostError, TargetMatchError
from vlmfilm_plugin.film.kept import undisturbed
from vlmfilm_plugin.film.layout import AXES, RANKS, Layout, convolutions_in, rank_of
from vlmfilm_plugin.film.stage_order import by_size, sizes_text
from vlmfilm_plugin.forward.axis_probe import AxisProbe
from vlmfilm_plugin.host_spec import UNet

Example = Sequence[Any] | Mapping[str, Any] | Tensor


def outputs_of(unet: nn.Module, example: Example, blocks: Mapping[str, nn.Module], probe: AxisProbe) -> dict[str, Any]:
    """Return what each block returned, with features by shape alone, in order of execution.

    Random streams, buffers and training flags are afterwards what they were.

    Args:
        example: arguments of the forward: a tuple or a list, a mapping by name, or the one tensor.
        probe: watches what runs inside the blocks.

    Raises:
        HostError: the forward failed, a block ran twice or did not run.
    """
    owner = type(unet).__name__
    seen: dict[str, Any] = {}
    twice: list[str] = []

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if path in seen:
                twice.append(path)
            seen[path] = output

        return hook

    args: Sequence[Any] = (example,) if isinstance(example, Tensor) else () if isinstance(example, Mapping) else example
    kwargs = example if isinstance(example, Mapping) else {}
    handles = [module.register_forward_hook(watch(path)) for path, module in blocks.items()]
    try:
        with undisturbed(unet), probe.watching(blocks):
            unet(*args, **kwargs)
    except Exception as error:
        facts = {"error": f"{type(error).__name__}: {error}"}
        raise HostError(f"cannot run {owner} on the example", facts, "give the arguments of one call: `example=(x, timesteps)`") from error
    finally:
        for handle in handles:
            handle.remove()
    idle = [path for path in blocks if path not in seen]
    if twice or idle:
        found = f"{', '.join(twice or idle)} " + ("ran twice" if twice else "did not run")
        raise HostError(f"cannot attach FiLM to {owner}: its blocks do not each run once", {"found": found}, "take them out of `targets`")
    return seen


def stages_by_size(sizes: Mapping[str, tuple[int, ...]], owner: str) -> list[list[str]]:
    """Return the blocks in groups of one spatial size, in order of execution.

    Raises:
        TargetMatchError: sizes become smaller on the way, or are all the same.
    """
    groups = by_size(sizes.items())
    written = {"ran": sizes_text(groups)}
    counts = [math.prod(size) for size, _ in groups]
    if any(before >= after for before, after in pairwise(counts)):
        raise TargetMatchError(f"the FiLM targets of {owner} are no decoder: sizes do not grow", written, "narrow `targets`, or state `stages`")
    if len(groups) == 1 and len(sizes) > 1:
        raise TargetMatchError(
            f"the FiLM targets of {owner} are blocks of one resolution only", written, "widen `targets` to the whole decoder, or state `stages`"
        )
    return [paths for _, paths in groups]


def layouts_seen(blocks: Mapping[str, nn.Module], seen: Mapping[str, Any], spec: UNet, probe: AxisProbe) -> dict[str, tuple[Layout, Tensor]]:
    """Return the layout of each block as an example shows it, and its features.

    Raises:
        HostError: no tensor is where it should be, or its rank or the axis of its channels cannot be told.
    """
    features = {path: Layout(output=spec.output).take(output, path) for path, output in seen.items()}
    for path, x in features.items():
        _check_rank(blocks[path], x, path, spec.rank)
    axis = spec.channel_axis or _axis_in(blocks, features, probe)
    return {path: (Layout(x.dim() - 2, axis, spec.output), x) for path, x in features.items()}


def _axis_in(blocks: Mapping[str, nn.Module], features: Mapping[str, Tensor], probe: AxisProbe) -> int:
    """Return where the channels are: at the one axis whose sizes are, in every block, channels that its convolutions give; else by the probe."""
    given = {path: {int(convolution.out_channels) for convolution in convolutions_in(blocks[path])} for path in features}  # type: ignore[arg-type]
    fitting = [axis for axis in AXES if all(x.shape[axis] in given[path] for path, x in features.items())]
    if len(fitting) == 1:
        return fitting[0]
    for path, x in features.items():
        probe.judge(path, x)
    if fitting and probe.is_first:
        return 1
    path, x = next(iter(features.items()))
    facts = {"block": path, "found": f"a tensor {tuple(x.shape)}", "its convolutions give": sorted(given[path]) or "nothing: there are none"}
    other = ", or give an example of another size" if fitting else ""
    raise HostError("cannot tell where the channels of a block are", facts, f"state `channel_axis`: 1 for (B, C, ...), -1 for (B, ..., C){other}")


def _check_rank(block: nn.Module, features: Tensor, path: str, rank: int | None) -> None:
    shape, ranks = tuple(features.shape), {rank_of(convolution) for convolution in convolutions_in(block)}
    wanted = {rank} if rank is not None else ranks if len(ranks) == 1 else set(RANKS)
    if len(shape) - 2 not in wanted:
        expected = " or ".join(str(each + 2) for each in sorted(wanted)) + " dimensions, rows first"
        facts = {"block": path, "found": f"a tensor {shape}", "expected": expected}
        raise HostError("cannot tell the rank of a block", facts, "correct `rank`, or give an example with a batch dimension")
