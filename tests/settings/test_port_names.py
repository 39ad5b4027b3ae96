"""Configurations written for the port: each of its names is honoured or is named in one line, and what is wrong is named at once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from stand_in import StandIn
from vlmfilm_plugin.hooks.sofl_seg import read_config

from vlmfilm_plugin import SettingsError, attach
from vlmfilm_plugin.settings.junctions import JunctionGating
from vlmfilm_plugin.settings.layers import layers_of, resolve
from vlmfilm_plugin.settings.port_names import ACCEPTED, without_effect
from vlmfilm_plugin.settings.record import Settings

# Every name of the port's last configuration, with values of our own.
PORT = """
use_vlm_film: true
vlm_film_decoder_stages: [0, 1]
vlm_film_config:
  model_name: some/model
  cond_dim: 24
  cache_dir: features
  batch_strategy: per_sample
  update_interval_steps_train: 7
  update_interval_steps_eval: 9
  use_text_prompt_cond: true
  use_logits_feature_cond: true
  logits_feature_mode: logit
  logits_logit_temp: 2.0
  logits_center: true
  logits_l2norm: true
  logits_include_unknown: false
  max_new_tokens: 11
  mem_cache_size: 33
  prompt_templates: ['first?', 'second?', 'third?']
  input_mode: overlay
  overlay_alpha: 0.4
  pred_threshold: 0.6
  pred_update_interval_steps: 5
  pred_warmup_epochs: 2
  gamma_scale: 0.2
  beta_scale: 0.3
  cond_layernorm: false
  film_debug_enabled: false
  film_debug_every_n_steps_train: 3
  film_debug_every_n_steps_val: 4
  vlm_response_debug_enabled: true
  vlm_response_debug_every_n_steps: 6
junction_gating_config:
  enabled: true
  warmup_epochs: 2
  source: gt
  threshold: 0.25
  degree_threshold: 2
  radius_px: 4
  gate_value_in_junction: 0.5
  apply_stages: [1]
  interp: bilinear
"""


def port(**config: Any) -> dict[str, Any]:
    """Return the `model:` block of a configuration of the port that says raw instead of overlay."""
    model: dict[str, Any] = yaml.safe_load(PORT)
    model["vlm_film_config"] |= {"input_mode": "raw", **config}
    return model


def settings_of(model: dict[str, Any], **environ: str) -> Settings:
    return resolve(layers_of(environ, host=read_config({"config": {"model": model}})))


def test_every_name_of_the_port_is_a_setting_or_stands_in_the_line() -> None:
    settings = settings_of(port())
    for name, value in port()["vlm_film_config"].items():
        if name in ACCEPTED or name == "logits_l2norm":
            continue
        own = {"film_debug_every_n_steps_train": "film_log_every_n_steps_train", "film_debug_every_n_steps_val": "film_log_every_n_steps_val"}.get(
            name, name
        )
        found = getattr(settings, own)
        assert (list(found) if isinstance(found, tuple) else found) == (value if name != "cache_dir" else found), name
    assert settings.junction_gating_config == JunctionGating(True, "gt", 0.25, 2, 4, 0.5, (1,), "bilinear", 2)
    assert settings.gate_name == "vessel_junctions" and settings.are_answers_asked and settings.decoder_stages == (0, 1)
    line = without_effect(settings)
    assert line is not None and "\n" not in line
    named = set(re.findall(r"\w+", re.sub(r"\([^()]*\)", "", line)))
    assert named == {*ACCEPTED, "update_interval_steps_eval", "update_interval_steps_train"} - {"p2_fallback", "p2_prior_probs"}


def test_the_ports_centring_and_norm_are_steps_of_the_transform() -> None:
    both = settings_of(port())
    assert both.feature_transform == ("center", "l2norm") and not both.logits_l2norm and both.origin("feature_transform").endswith("logits_center")
    norm_first = settings_of(port(logits_center=False))
    assert norm_first.feature_transform == () and norm_first.logits_l2norm
    unset = port()
    del unset["vlm_film_config"]["logits_center"]
    assert settings_of(unset).feature_transform == ("center",) and settings_of(unset).logits_l2norm
    chosen = settings_of(port(), VLM_FILM_FEATURE_TRANSFORM="none")
    assert chosen.feature_transform == () and chosen.logits_l2norm
    assert "logits_center (`feature_transform` says what is done to features)" in str(without_effect(chosen))
    # Where no answers are asked these names say nothing, as before.
    assert settings_of(port(use_logits_feature_cond=False)).feature_transform == ("center",)


def test_a_configuration_without_idle_names_says_nothing() -> None:
    assert without_effect(resolve([])) is None
    assert without_effect(resolve([("a", {"preset": "soft-seg", "cond_dim": 8}), ("checkpoint x", {"max_new_tokens": 3})])) is None


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"use_logits_feature_cond": True, "logits_l2norm": True}, {"use_logits_feature_cond", "logits_l2norm"}),
        ({"use_logits_feature_cond": True, "use_text_prompt_cond": True, "encoder": "descriptor"}, {"use_logits_feature_cond"}),
        ({"use_text_prompt_cond": True, "logits_l2norm": True, "logits_center": False}, {"logits_l2norm", "logits_center"}),
        ({"max_new_tokens": 3, "verbose": True}, {"max_new_tokens", "verbose"}),
        ({"batch_strategy": "first", "reuse_policy": "image_id", "update_interval_steps_train": 3}, set()),
        ({"p2_fallback": "prior", "p2_prior_probs": [1]}, {"p2_fallback", "p2_prior_probs"}),
    ],
)
def test_what_has_no_effect_depends_on_the_other_settings(values: dict[str, Any], names: set[str]) -> None:
    line = without_effect(resolve([("a", values)])) or ""
    assert set(re.findall(r"\w+", re.sub(r"\([^()]*\)", "", line))) == names


@pytest.mark.parametrize("mode", ["overlay", "mask_only"])
def test_drawing_the_prediction_is_refused_with_its_reason_and_a_stronger_layer_takes_it_back(mode: str) -> None:
    with pytest.raises(SettingsError, match=f"`input_mode` {mode} is not supported") as caught:
        settings_of(port(input_mode=mode))
    assert "host config" in str(caught.value.facts["found"]) and "stored" in str(caught.value.facts["reason"])
    assert settings_of(port(input_mode=mode), VLM_FILM_INPUT_MODE="raw").input_mode == "raw"


# All at once


def many_wrong(folder: Path, where: str) -> Any:
    if where == "host":
        return lambda: settings_of(port(cond_dmi=1, gama_scale=2, pool="max"))
    if where == "file":
        (folder / "f.yaml").write_text("cond_dmi: 1\ngama_scale: 2\npool: max\n", encoding="utf-8")
        return lambda: layers_resolved({"VLM_FILM_CONFIG": str(folder / "f.yaml")})
    if where == "environment":
        return lambda: layers_resolved({"VLM_FILM_COND_DMI": "1", "VLM_FILM_GAMA_SCALE": "2", "VLM_FILM_POOL": "max"})
    from torch import nn

    return lambda: attach(nn.Identity(), cond_dmi=1, gama_scale=2, pool="max")  # type: ignore[call-arg]


def layers_resolved(environ: dict[str, str]) -> Settings:
    return resolve(layers_of(environ))


@pytest.mark.parametrize("where", ["host", "file", "environment", "argument"])
def test_all_that_is_wrong_is_named_at_once_with_its_origin(where: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot use 3 settings") as caught:
        many_wrong(tmp_path, where)()
    text = str(caught.value).lower()
    for word in ("cond_dmi", "cond_dim", "gama_scale", "gamma_scale", "pool", "'max'", "mean, last"):
        assert word in text, word
    assert text.count("(from ") == 3


def test_the_same_wrong_name_in_two_layers_is_named_twice() -> None:
    with pytest.raises(SettingsError) as caught:
        resolve([("one", {"cond_dmi": 1}), ("two", {"cond_dmi": 1})])
    assert "one" in str(caught.value) and "two" in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("enabled", "yes"),
        ("enabled", 1),
        ("source", "guess"),
        ("threshold", 1.5),
        ("threshold", "x"),
        ("threshold", float("nan")),
        ("degree_threshold", 0),
        ("degree_threshold", 9),
        ("degree_threshold", 2.0),
        ("radius_px", -1),
        ("radius_px", True),
        ("radius_px", None),
        ("gate_value_in_junction", -0.1),
        ("apply_stages", "all"),
        ("apply_stages", [-1]),
        ("apply_stages", []),
        ("interp", "cubic"),
        ("warmup_epochs", 1.5),
        ("warmup_epochs", -1),
        ("radius", 3),
    ],
)
def test_a_bad_entry_of_the_junction_block_is_named_with_what_is_expected(entry: str, value: object) -> None:
    model = port()
    model["junction_gating_config"] = {"enabled": True, entry: value}
    with pytest.raises(SettingsError, match="junction_gating_config") as caught:
        settings_of(model)
    text = str(caught.value.facts[f"junction_gating_config.{entry}"])
    assert "expected" in text or "closest 'radius_px'" in text
    assert "host config" in str(caught.value.facts["from"])


def test_all_bad_entries_of_the_block_are_named_and_it_must_be_one() -> None:
    with pytest.raises(SettingsError) as caught:
        resolve([("a", {"junction_gating_config": {"enabled": 1, "sourec": "pred", "threshold": 2}})])
    assert {"junction_gating_config.enabled", "junction_gating_config.sourec", "junction_gating_config.threshold"} <= set(caught.value.facts)
    for block in ([], "on", 3, True):
        with pytest.raises(SettingsError, match="bad value"):
            resolve([("a", {"junction_gating_config": block})])
    with pytest.raises(SettingsError, match="another spatial gate"):
        resolve([("a", {"junction_gating_config": {"enabled": True}, "spatial_gate": "mine"})])


def test_the_block_is_written_as_json_in_the_environment_and_goes_through_plain_values() -> None:
    settings = resolve(layers_of({"VLM_FILM_JUNCTION_GATING_CONFIG": '{"enabled": true, "radius_px": 2}'}))
    assert settings.junction_gating_config == JunctionGating(True, radius_px=2)
    assert resolve([("a", settings.as_dict())]) == settings
    assert resolve([("a", {"junction_gating_config": None})]).gate_name is None
    off = resolve([("a", {"junction_gating_config": {"enabled": False}, "spatial_gate": "mine"})])
    assert off.gate_name == "mine"


# Through a host's own scripts


def test_the_stand_in_runs_a_configuration_of_the_port_and_says_what_had_no_effect(tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    host = StandIn(tmp_path)
    model = port(film_debug_enabled=True, film_debug_every_n_steps_train=1)
    model["junction_gating_config"] |= {"source": "pred", "warmup_epochs": 1}
    output = host.train("port", "on", model)
    lines = [line for line in output.splitlines() if "without effect" in line]
    assert len(lines) == 1 and "pred_warmup_epochs" in lines[0] and "use_logits_feature_cond" in lines[0]
    assert "[FILM-DBG]" in output
    gates = [line for line in output.splitlines() if line.startswith("[VLM] spatial gate: ")]
    assert len(gates) == 1 and "source=pred" in gates[0] and "made twice" in gates[0] and "before epoch 1 of a training" in gates[0]
    # Evaluation is told nothing: the gate is the checkpoint's.
    import torch

    held = torch.load(host.checkpoint("port"), weights_only=False)["vlm_film"]["settings"]
    assert held["junction_gating_config"]["radius_px"] == 4 and held["use_logits_feature_cond"] is True
