"""What a run keeps for each FiLM module: its own settings, shared providers, strategies that are not shared."""

from __future__ import annotations

import copy
import gc
from pathlib import Path

import pytest
from small_unet import SmallUNet

from vlmfilm_plugin.errors import EncoderError
from vlmfilm_plugin.film.module import FilmModule
from vlmfilm_plugin.forward.attach import install
from vlmfilm_plugin.run.film_state import FilmStates
from vlmfilm_plugin.settings.layers import resolve
from vlmfilm_plugin.settings.record import Settings


def settings(folder: Path, **given: object) -> Settings:
    return resolve([("argument", {"encoder": "descriptor", "cache_dir": str(folder), **given})])


def built(states: FilmStates, given: Settings) -> FilmModule:
    film = install(SmallUNet(), given, "on").film
    states.built(film, given)
    return film


def test_modules_of_equal_settings_share_a_provider_and_nothing_that_a_strategy_holds(tmp_path: Path) -> None:
    states = FilmStates(lambda: settings(tmp_path / "now"))
    same = [built(states, settings(tmp_path / "a")) for _ in range(2)]
    other = built(states, settings(tmp_path / "b"))
    first, second, third = (states.of(film) for film in (*same, other))
    assert first.provider is second.provider and third.provider is not first.provider
    assert first.lookup is not second.lookup and first.lookup.strategy is not second.lookup.strategy
    assert states.of(same[0]) is first


def test_a_copy_has_the_settings_of_its_original_and_a_stranger_those_of_the_run(tmp_path: Path) -> None:
    states = FilmStates(lambda: settings(tmp_path / "now", batch_strategy="first"))
    film = built(states, settings(tmp_path / "a", batch_strategy="random"))
    twin = copy.deepcopy(film)
    stranger = install(SmallUNet(), settings(tmp_path / "a"), "on").film
    assert states.settings_of(twin).batch_strategy == states.of(twin).lookup.strategy.batch_strategy == "random"
    assert states.of(twin) is not states.of(film)
    assert states.of(stranger).lookup.strategy.batch_strategy == "first"


def test_a_state_ends_with_its_module(tmp_path: Path) -> None:
    states = FilmStates(lambda: settings(tmp_path))
    film = built(states, settings(tmp_path))
    states.of(film)
    del film
    gc.collect()
    assert len(states._states) == 0


def test_an_encoder_other_than_the_one_film_was_built_for_is_refused(tmp_path: Path) -> None:
    states = FilmStates(lambda: settings(tmp_path))
    film = install(SmallUNet(), settings(tmp_path), "on", feature_dim=3).film
    with pytest.raises(EncoderError, match="not the one FiLM was built for"):
        states.of(film)
