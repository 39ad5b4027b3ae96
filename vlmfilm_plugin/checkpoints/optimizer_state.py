"""Optimizer state of a checkpoint, matched to parameters by name when an optimizer loads it.

Between a checkpoint and a run parameters may have come (FiLM, on a plain baseline), gone or been frozen (`freeze_host`), so positions shift.
A state dict holds positions alone; the host's own `configure_optimizers` says which names they stand for. Evaluation never comes here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn
from torch.optim import Optimizer

from vlmfilm_plugin.errors import CheckpointError
from vlmfilm_plugin.film.module import MARKER
from vlmfilm_plugin.log import film_logger

Groups = Sequence[Sequence[str]]
"""Names of parameters, by parameter group."""

# What an optimizer keeps of a parameter, in the parameter's own shape.
_SHAPED = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "sum")


@dataclass
class _SavedNames:
    order: list[str]
    is_of_port: bool


_saved: WeakKeyDictionary[nn.Module, _SavedNames] = WeakKeyDictionary()


def remember_names(model: nn.Module, order: Sequence[str], *, is_of_port: bool) -> None:
    """Note the names of the state dict that comes with the optimizer state a model is about to resume, in the file's order.

    Args:
        is_of_port: they were renamed from the port's layout, whose parameters stand in an order of their own.
    """
    _saved[model] = _SavedNames(list(order), is_of_port)


def names_by_group(model: nn.Module, optimizer: Optimizer) -> Groups:
    """Return the names of an optimizer's parameters, as it holds them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names.get(id(parameter), "?") for parameter in group["params"]] for group in optimizer.param_groups]


def match_at_load(model: nn.Module, optimizer: Optimizer, configured: Groups) -> None:
    """Let an optimizer match what it loads by name.

    Args:
        configured: the names that the host put into its groups, those that have been taken out since because they are frozen included.
    """
    held = ref(model)

    def before_load(optimizer: Optimizer, state: Any) -> Any:
        model = held()
        saved = None if model is None else _saved.get(model)
        return None if model is None or saved is None else _matched(model, optimizer, state, saved, configured)

    optimizer.register_load_state_dict_pre_hook(before_load)


def _matched(model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any], saved: _SavedNames, configured: Groups) -> dict[str, Any] | None:
    """Return a state dict for the parameters of this run; None where it fits as it is.

    Raises:
        CheckpointError: it cannot be told which parameters the state is of.
    """
    groups = state["param_groups"]
    parameters = dict(model.named_parameters())
    then = _names_then(groups, state["state"], parameters, saved, configured)
    now = names_by_group(model, optimizer)
    if then is None or len(groups) != len(now):
        raise CheckpointError(
            "cannot resume from this checkpoint: its optimizer state cannot be matched to the parameters of this run",
            {
                "found": f"{len(groups)} parameter groups of {', '.join(str(len(group['params'])) for group in groups)} parameters",
                "expected": f"{len(now)} of {', '.join(str(len(names)) for names in configured)}, FiLM's included or not",
            },
            "start a new run from its weights instead of resuming",
        )
    if then == [list(names) for names in now]:
        return None
    kept = {name: state["state"][index] for group, names in zip(groups, then, strict=True) for index, name in zip(group["params"], names, strict=True)
            if index in state["state"]}  # fmt: skip
    position = {name: index for index, name in enumerate(name for names in now for name in names)}
    fresh = [name for name in position if name not in kept]
    gone = [name for name in kept if name not in position]
    film_logger().info(
        "[VLM] optimizer state resumed by name: %d parameters%s%s",
        len(position) - len(fresh),
        _counted("new, start fresh", fresh),
        _counted("no longer trained", gone),
    )
    return {
        "state": {position[name]: value for name, value in kept.items() if name in position},
        "param_groups": [{**group, "params": [position[name] for name in names]} for group, names in zip(groups, now, strict=True)],
    }


def _names_then(
    groups: Sequence[Mapping[str, Any]], state: Mapping[int, Any], parameters: Mapping[str, Tensor], saved: _SavedNames, configured: Groups
) -> list[list[str]] | None:
    """Return the names that the saved groups were of, or None."""
    had_film = any(MARKER in name for name in saved.order)
    in_order = [name for name in saved.order if name in parameters]
    if saved.is_of_port:
        return [in_order] if len(groups) == 1 and _fits(groups[0], in_order, state, parameters) else None
    if len(groups) == len(configured):
        then = []
        for group, names in zip(groups, configured, strict=True):
            film = [name for name in names if MARKER in name]
            host = [name for name in names if MARKER not in name]
            # As they are; before FiLM came; while the host was frozen.
            readings = [list(names), host, film] if had_film else [host]
            fitting = [names for names in readings if _fits(group, names, state, parameters)]
            if not fitting or any(names != fitting[0] for names in fitting):
                break
            then.append(fitting[0])
        else:
            return then
    if len(groups) == 1 and _fits(groups[0], in_order, state, parameters):
        return [in_order]
    return None


def _fits(group: Mapping[str, Any], names: Sequence[str], state: Mapping[int, Any], parameters: Mapping[str, Tensor]) -> bool:
    if len(group["params"]) != len(names):
        return False
    for index, name in zip(group["params"], names, strict=True):
        kept = state.get(index, {})
        shapes = {tuple(kept[key].shape) for key in _SHAPED if isinstance(kept.get(key), Tensor)}
        if name not in parameters or not shapes <= {tuple(parameters[name].shape)}:
            return False
    return True


def _counted(what: str, names: Sequence[str]) -> str:
    return f"; {len(names)} {what} ({names[0]}{', ...' if len(names) > 1 else ''})" if names else ""
