"""The condition of one batch without a runtime or a host: features once a batch, rows mapped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_unet import SmallUNet, inputs, randomise

from vlmfilm_plugin.errors import ConditionError
from vlmfilm_plugin.forward.attach import install
from vlmfilm_plugin.forward.context import in_force
from vlmfilm_plugin.forward.handle import FilmHandle
from vlmfilm_plugin.run.film_state import FilmStates
from vlmfilm_plugin.run.log_lines import Diagnostics
from vlmfilm_plugin.run.running_batch import HostBatch, RunningBatch
from vlmfilm_plugin.settings.layers import resolve

IMAGE = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(5))


def parts(folder: Path, mode: str = "on", **given: object) -> tuple[FilmHandle, FilmStates, Diagnostics]:
    settings = resolve([("argument", {"encoder": "descriptor", "cache_dir": str(folder), "feature_transform": "none", **given})])
    handle = install(SmallUNet(), settings, mode)
    randomise(handle.film)
    return handle, FilmStates(lambda: settings), Diagnostics(settings)


def running(states: FilmStates, diagnostics: Diagnostics, image: torch.Tensor = IMAGE, phase: str = "val") -> RunningBatch:
    return RunningBatch(HostBatch({"image": image}, phase, (0.0, 1.0), step=1, batch_idx=1), states, diagnostics, {})


def test_features_are_looked_up_once_a_batch_and_every_forward_has_a_context_of_its_own(tmp_path: Path) -> None:
    handle, states, diagnostics = parts(tmp_path)
    handle.unet.eval()
    batch = running(states, diagnostics)
    with torch.no_grad(), in_force(batch):
        outputs = [handle.unet(*inputs(2)) for _ in range(3)]
    assert torch.equal(outputs[0], outputs[2]) and states.of(handle.film).provider.stats.total == 2
    x = torch.zeros(2, 1, 8, 8)
    assert batch.open_context(handle.film, x, None, None) is not batch.open_context(handle.film, x, None, None)


def _change_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return another value for each element: a projection's LayerNorm takes out what is the same for all of them, but for rounding."""
    return torch.linspace(-0.5, 0.5, parameter.numel()).view_as(parameter).sin()


def _replaced(parameter: torch.nn.Parameter) -> None:
    parameter.data = parameter.data + _change_of(parameter)


def _without_a_trace(parameter: torch.nn.Parameter) -> None:
    parameter.data.add_(_change_of(parameter))


def _in_place(parameter: torch.nn.Parameter) -> None:
    with torch.no_grad():
        parameter.add_(_change_of(parameter))


@pytest.mark.parametrize("change", [_replaced, _without_a_trace, _in_place])
@pytest.mark.parametrize("part", ["", "weight", "bias", "image_to_cond.proj.weight", "heads.0.mlp.2.weight"])
def test_weights_that_change_inside_a_batch_act_at_once(tmp_path: Path, change: Callable[[torch.nn.Parameter], None], part: str) -> None:
    handle, states, diagnostics = parts(tmp_path)
    handle.unet.eval()
    with torch.no_grad(), in_force(running(states, diagnostics)):
        before = handle.unet(*inputs(2))
        changed = [parameter for name, parameter in handle.film.named_parameters() if name.endswith(part)]
        assert changed
        for parameter in changed:
            change(parameter)
        assert (before - handle.unet(*inputs(2))).abs().max() > 1e-4


def test_it_tells_its_own_images_from_others(tmp_path: Path) -> None:
    _, states, diagnostics = parts(tmp_path)
    batch = running(states, diagnostics)
    assert batch.is_of({"image": IMAGE}) and batch.is_of({"image": IMAGE.clone()})
    assert not batch.is_of({"image": IMAGE + 1}) and not batch.is_of({"image": IMAGE[:1]})
    with pytest.raises(ConditionError, match="cannot find the images"):
        batch.is_of({"image": None})


def test_shuffle_exchanges_the_rows_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handle, states, diagnostics = parts(tmp_path, "shuffle")
    x = torch.zeros(2, 1, 8, 8)
    shuffled = running(states, diagnostics).open_context(handle.film, x, None, None).features
    handle.film.mode = "on"
    plain = running(states, diagnostics).open_context(handle.film, x, None, None).features
    assert shuffled is not None and plain is not None and torch.equal(shuffled, plain[[1, 0]])
    assert "[FILM-SHUFFLE] perm_first10=[1, 0]" in capsys.readouterr().out


def test_mode_off_looks_nothing_up(tmp_path: Path) -> None:
    handle, states, diagnostics = parts(tmp_path / "cache", "off")
    context = running(states, diagnostics).open_context(handle.film, torch.zeros(2, 1, 8, 8), None, None)
    assert context.features is None and not (tmp_path / "cache").exists()
