"""The page for people who come from the port names every file and every option that its own text names."""

from __future__ import annotations

from pathlib import Path

import pytest

import vlmfilm_plugin
from vlmfilm_plugin.settings.junctions import ENTRIES
from vlmfilm_plugin.settings.layers import resolve
from vlmfilm_plugin.settings.port_names import ACCEPTED
from vlmfilm_plugin.settings.record import ALIASES

PAGE = Path(vlmfilm_plugin.__file__).parent / "docs" / "from_the_port.md"
README = Path(__file__).parents[2] / "README.md"
FILES = [
    "src/archs/components/vlm_conditioner.py",
    "src/archs/components/vlm_film.py",
    "src/archs/components/diffusion_unet_vlm_film.py",
    "src/archs/components/medsegdiff_flow_vlm_film.py",
    "src/archs/flow_model_vlm_film.py",
    "src/conditioning/",
    "vlm_film_conditioner.py",
    "INTEGRATION_GUIDE.md",
    "integration_example.py",
    "src/utils/vlm_cache_warmup.py",
    "src/runner/train_runner_vlm_film.py",
    "src/runner/eval_runner_vlm_film.py",
    "scripts/train_vlm_film.py",
    "scripts/evaluate_vlm_film.py",
    "minimal_smoke_test.py",
    "requirements_addition.txt",
]
OPTIONS = [
    *("model_name", "cond_dim", "cache_dir", "prompt_template", "dtype", "device_map", "max_new_tokens", "pool", "text_mlp_hidden_dim"),
    *("embedding_dtype", "use_text_prompt_cond", "verbose", "verbose_debug", "update_interval_steps_train", "update_interval_steps_eval"),
    *("batch_strategy", "reuse_policy", "log_every_n_steps", "vlm_cache_stats_enabled", "vlm_cache_stats_every_n_steps"),
    *("gamma_scale", "beta_scale", "cond_layernorm"),
]
CONFIGURED = ["use_vlm_film", "prompt_templates", "film_debug_enabled", "mem_cache_size", "vlm_response_debug_enabled", *ALIASES, *ACCEPTED]


@pytest.mark.parametrize("name", [*FILES, *OPTIONS, "enabled", *CONFIGURED, "junction_gating_config"])
def test_the_page_says_what_stands_for_it(name: str) -> None:
    assert f"`{name}`" in PAGE.read_text(encoding="utf-8") or f"`{name}" in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_a_setting_of_that_name(name: str) -> None:
    assert name in resolve([]).as_dict()


@pytest.mark.parametrize("name", sorted(ENTRIES))
def test_the_readme_shows_every_entry_of_junction_gating(name: str) -> None:
    assert f"{name}: " in README.read_text(encoding="utf-8")


def test_the_readme_leads_to_the_page() -> None:
    assert "vlmfilm_plugin/docs/from_the_port.md" in README.read_text(encoding="utf-8")
