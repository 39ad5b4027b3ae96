"""Settings: layers and their origins, spellings, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from vlmfilm_plugin.errors import SettingsError
from vlmfilm_plugin.settings.layers import layers_of, resolve
from vlmfilm_plugin.settings.mode import MODES, read_mode
from vlmfilm_plugin.settings.parsing import EnvText
from vlmfilm_plugin.settings.record import Settings

NAMES = sorted(Settings().as_dict())


def from_env(base_dir: Path | None = None, **values: str) -> Settings:
    return resolve(layers_of({f"VLM_FILM_{name}": value for name, value in values.items()}, base_dir), base_dir)


def refused(**values: Any) -> SettingsError:
    with pytest.raises(SettingsError) as caught:
        resolve([("host config", values)])
    return caught.value


# Layers


def test_a_later_layer_wins_and_each_value_knows_its_origin() -> None:
    settings = resolve([("host config", {"cond_dim": 8, "pool": "last"}), ("film.yaml", {"cond_dim": 16}), ("argument", {"encoder": "descriptor"})])
    assert (settings.cond_dim, settings.pool, settings.encoder) == (16, "last", "descriptor")
    assert settings.origin("cond_dim").startswith("film.yaml")
    assert settings.origin("pool").startswith("host config")
    assert settings.origin("beta_scale") == "default"


def test_a_value_set_to_its_default_counts_as_explicit() -> None:
    assert resolve([("argument", {"cond_dim": 256})]).is_explicit("cond_dim")
    assert not resolve([]).is_explicit("cond_dim")


def test_file_is_weaker_than_environment_and_read_from_base_dir(tmp_path: Path) -> None:
    (tmp_path / "film.yaml").write_text("cond_dim: 8\npool: last\n", encoding="utf-8")
    settings = from_env(tmp_path, CONFIG="film.yaml", COND_DIM="16")
    assert (settings.cond_dim, settings.pool) == (16, "last")
    assert settings.origin("pool").startswith("film.yaml")
    assert settings.origin("cond_dim") == "environment: VLM_FILM_COND_DIM"


def test_mode_and_foreign_variables_are_no_settings() -> None:
    assert layers_of({"VLM_FILM_MODE": "nonsense", "VLM_FORCE_NO_ACCELERATE": "1", "PATH": "/bin"}) == []


def test_settings_are_frozen_and_two_equal_ones_differ_in_origin_only() -> None:
    settings = resolve([("a", {"cond_dim": 8})])
    with pytest.raises(AttributeError):
        settings.cond_dim = 9  # type: ignore[misc]
    assert settings == resolve([("b", {"cond_dim": 8})])


def test_resolve_leaves_the_callers_mapping_alone() -> None:
    values = {"preset": "soft-seg", "decoder_stages": [1, 0]}
    resolve([("a", values)])
    assert values == {"preset": "soft-seg", "decoder_stages": [1, 0]}


# Presets


def test_preset_gives_the_seeds_literal_defaults() -> None:
    settings = resolve([("a", {"preset": "soft-seg"})])
    assert (settings.batch_strategy, settings.reuse_policy) == ("first", "step_interval")
    assert (settings.update_interval_steps_train, settings.update_interval_steps_eval) == (100, 1)
    assert settings.origin("batch_strategy") == "preset soft-seg"


def test_our_own_default_is_per_sample() -> None:
    assert resolve([]).batch_strategy == "per_sample"


@pytest.mark.parametrize("layers", [[{"batch_strategy": "random"}, {"preset": "soft-seg"}], [{"preset": "soft-seg"}, {"batch_strategy": "random"}]])
def test_an_explicit_value_wins_over_a_preset_from_any_layer(layers: list[dict[str, object]]) -> None:
    settings = resolve([(str(i), layer) for i, layer in enumerate(layers)])
    assert settings.batch_strategy == "random"
    assert settings.update_interval_steps_train == 100


def test_a_stronger_layer_takes_a_preset_back() -> None:
    assert resolve([("a", {"preset": "soft-seg"}), ("b", {"preset": None})]).batch_strategy == "per_sample"


def test_unknown_preset_is_refused() -> None:
    assert "soft-seg" in str(refused(preset="softseg"))


# Names


def test_alias_of_the_port_is_the_same_setting_in_every_layer() -> None:
    assert resolve([("a", {"decoder_stages": [0]}), ("b", {"vlm_film_decoder_stages": [2, 1]})]).decoder_stages == (1, 2)
    assert resolve([("a", {"vlm_film_decoder_stages": [0]}), ("b", {"decoder_stages": None})]).decoder_stages is None
    assert from_env(VLM_FILM_DECODER_STAGES="1").decoder_stages == (1,)


@pytest.mark.parametrize(("name", "closest"), [("cond_dmi", "cond_dim"), ("gama_scale", "gamma_scale"), ("vlm_film_decoder_stage", "decoder_stages")])
def test_unknown_name_shows_the_closest_and_the_origin(name: str, closest: str) -> None:
    error = refused(**{name: 1})
    assert closest in str(error.facts["closest"])
    assert "host config" in str(error)


def test_unknown_variable_shows_the_closest_variable() -> None:
    with pytest.raises(SettingsError, match="VLM_FILM_COND_DIM"):
        from_env(COND_DMI="8")


def test_a_name_like_nothing_lists_the_legal_ones() -> None:
    assert "cache_dir" in str(refused(qqqqqqqq=1))


# Values


@pytest.mark.parametrize(("text", "value"), [("1", True), ("TRUE", True), (" yes ", True), ("on", True), ("0", False), ("No", False), ("off", False)])
def test_bools_in_the_environment(text: str, value: bool) -> None:
    assert from_env(USE_TEXT_PROMPT_COND=text).use_text_prompt_cond is value


@pytest.mark.parametrize("text", ["none", "NULL", "~", " None "])
def test_none_in_the_environment(text: str) -> None:
    settings = from_env(GAMMA_SCALE=text, DEVICE_MAP=text, DECODER_STAGES=text)
    assert (settings.gamma_scale, settings.device_map, settings.decoder_stages) == (None, None, None)
    assert settings.is_explicit("gamma_scale")


@pytest.mark.parametrize("text", ["2,0", "[2, 0]", "(0,2,)", " 2 , 0 , 2 "])
def test_lists_in_the_environment(text: str) -> None:
    assert from_env(DECODER_STAGES=text).decoder_stages == (0, 2)


@pytest.mark.parametrize("text", ["", "a", "1;2", "-1", "1.0", "[[0]]x"])
def test_bad_lists_in_the_environment(text: str) -> None:
    with pytest.raises(SettingsError, match="VLM_FILM_DECODER_STAGES"):
        from_env(DECODER_STAGES=text)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_vlm_film", "true"),
        ("use_vlm_film", 1),
        ("use_vlm_film", None),
        ("cond_dim", True),
        ("cond_dim", 8.0),
        ("cond_dim", "8"),
        ("cond_dim", 0),
        ("cond_dim", None),
        ("gamma_scale", -0.1),
        ("gamma_scale", float("nan")),
        ("beta_scale", float("inf")),
        ("beta_scale", True),
        ("beta_scale", []),
        ("encoder", ""),
        ("encoder", True),
        ("pool", "max"),
        ("dtype", "fp16"),
        ("decoder_stages", []),
        ("decoder_stages", [True]),
        ("decoder_stages", [-1]),
        ("decoder_stages", [0, None]),
        ("decoder_stages", "0,1"),
        ("decoder_stages", {0: 1}),
        ("cache_dir", 3),
        ("cache_dir", " "),
    ],
)
def test_bad_value_names_setting_value_origin_and_what_is_expected(name: str, value: object) -> None:
    error = refused(**{name: value})
    assert name in error.headline
    assert repr(value) in str(error.facts["found"])
    assert "host config" in str(error.facts["found"])
    assert error.facts["expected"]


def test_yaml_floats_that_yaml_reads_as_text_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text("gamma_scale: 1e-3\nbeta_scale: null\ndecoder_stages: 1\n", encoding="utf-8")
    settings = from_env(tmp_path, CONFIG="f.yaml")
    assert (settings.gamma_scale, settings.beta_scale, settings.decoder_stages) == (0.001, None, (1,))


@pytest.mark.parametrize("value", [10**400, -(10**400)], ids=["positive", "negative"])
def test_a_number_too_large_for_a_float_is_a_settings_error(value: int) -> None:
    assert "gamma_scale" in str(refused(gamma_scale=value))


# Paths


def test_relative_paths_are_relative_to_base_dir_and_absolute_ones_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    settings = resolve([("a", {"cache_dir": "c", "dataset_root": "/data"})], tmp_path)
    assert settings.cache_dir == str(tmp_path / "c")
    assert settings.dataset_root == "/data"


def test_the_default_cache_dir_is_under_base_dir_and_no_dataset_root_stays_none(tmp_path: Path) -> None:
    settings = resolve([], tmp_path)
    assert settings.cache_dir == str(tmp_path / "cache/vlm_profiles")
    assert settings.dataset_root is None


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve([("a", {"cache_dir": Path("~/c")})], "/elsewhere").cache_dir == str(tmp_path / "c")


def test_the_home_of_an_unknown_user_is_a_settings_error(tmp_path: Path) -> None:
    refused(cache_dir="~no_such_user_here/cache")
    with pytest.raises(SettingsError):
        from_env(tmp_path, CONFIG="~no_such_user_here/film.yaml")


# Files


@pytest.mark.parametrize(
    "content",
    [
        "a: [",
        "- 1\n- 2\n",
        "just text",
        "42",
        "a: 1\n\tb: 2",
        "? {a: 1}\n: 2",
        "revision: 2020-13-45",
        "cond_dim: 0x_",
        "x: !!python/object:os.system 1",
    ],
)
def test_a_bad_file_is_a_settings_error_that_names_it(tmp_path: Path, content: str) -> None:
    (tmp_path / "bad.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(SettingsError, match=r"bad\.yaml"):
        from_env(tmp_path, CONFIG="bad.yaml")


def test_missing_file_folder_and_binary_file_are_settings_errors(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    for name in ("missing.yaml", ".", "binary.yaml"):
        with pytest.raises(SettingsError, match="VLM_FILM_CONFIG"):
            from_env(tmp_path, CONFIG=name)


def test_an_empty_file_is_no_settings(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n", encoding="utf-8")
    assert from_env(tmp_path, CONFIG="empty.yaml") == resolve([], tmp_path)


@pytest.mark.parametrize("key", ["3", "null", "true", "1.5", "2020-01-01"])
def test_a_key_that_is_no_text_is_an_unknown_name(tmp_path: Path, key: str) -> None:
    (tmp_path / "odd.yaml").write_text(f"{key}: 1\n", encoding="utf-8")
    with pytest.raises(SettingsError, match="unknown name"):
        from_env(tmp_path, CONFIG="odd.yaml")


# Mode


def test_mode_unset_is_none_and_the_three_modes_are_themselves() -> None:
    assert read_mode({}) is None
    assert [read_mode({"VLM_FILM_MODE": mode}) for mode in MODES] == list(MODES)


@pytest.mark.parametrize("value", ["", " ", "On", "ON", "of", "shufle", "1", "true", "on ", "none"])
def test_any_other_mode_is_refused_never_read_as_on(value: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read_mode({"VLM_FILM_MODE": value})
    assert caught.value.facts["found"] == repr(value)
    assert caught.value.facts["expected"] == "on, off or shuffle"


@pytest.mark.parametrize(("value", "closest"), [("On", "on"), ("of", "off"), ("shufle", "shuffle"), ("on ", "on")])
def test_a_typo_in_the_mode_shows_the_closest(value: str, closest: str) -> None:
    with pytest.raises(SettingsError, match=f"VLM_FILM_MODE={closest}$"):
        read_mode({"VLM_FILM_MODE": value})


# Anything at all

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.dates()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2), max_leaves=5)
FREE_OF_TILDE = st.text().filter(lambda text: not text.strip().startswith("~"))  # the home of an unknown user has its own test


@hypothesis_settings(deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES) | st.text(), VALUES, max_size=4))
def test_only_settings_errors_escape_whatever_a_config_holds(values: dict[str, object]) -> None:
    values = {name: value for name, value in values.items() if not (isinstance(value, str) and value.startswith("~"))}
    try:
        settings = resolve([("host config", values)], "/base")
    except SettingsError:
        return
    assert set(values) <= set(NAMES) | {"vlm_film_decoder_stages"}
    assert all(settings.is_explicit(name) for name in values if name in NAMES)


@hypothesis_settings(deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES).map(str.upper) | st.text(), FREE_OF_TILDE, max_size=4))
def test_only_settings_errors_escape_whatever_the_environment_holds(values: dict[str, str]) -> None:
    values.pop("CONFIG", None)
    try:
        settings = from_env(Path("/base"), **values)
    except SettingsError:
        return
    assert settings.cond_dim >= 1


@hypothesis_settings(deadline=None)
@given(st.text())
def test_only_settings_errors_escape_whatever_the_mode_is(value: str) -> None:
    try:
        assert read_mode({"VLM_FILM_MODE": value}) in MODES
    except SettingsError:
        assert value not in MODES


def test_a_relative_model_folder_is_that_of_the_start_up_folder_and_a_hub_name_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "start" / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    for name, expected in (
        ("models/tiny", str(tmp_path / "start" / "models" / "tiny")),
        ("./models/tiny", str(tmp_path / "start" / "models" / "tiny")),
        (str(tmp_path / "start" / "models" / "tiny"), str(tmp_path / "start" / "models" / "tiny")),
        ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"),
        ("models/absent", "models/absent"),
    ):
        assert resolve([("argument", {"model_name": name})], tmp_path / "start").model_name == expected
    assert resolve([], tmp_path / "start").model_name == "Qwen/Qwen2.5-VL-3B-Instruct"


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (("argument", {"targets": "ups.*.1"}), "ups.*.1"),
        (("argument", {"targets": ["a.*", "re:b[.]\\d"]}), ("a.*", "re:b[.]\\d")),
        (("environment", {"VLM_FILM_TARGETS": EnvText('["a.*", "b.**"]')}), ("a.*", "b.**")),
        (("environment", {"VLM_FILM_TARGETS": EnvText("re:[ab].0")}), "re:[ab].0"),
        (("host config", {"targets": None}), None),
    ],
)
def test_targets_are_one_pattern_or_several_in_every_layer(layer: tuple[str, dict[str, object]], expected: object) -> None:
    assert resolve([layer]).targets == expected


@pytest.mark.parametrize("wrong", [[], "", ["a", 3], 3, {"a": "b"}, [""]])
def test_targets_that_are_no_patterns_are_refused(wrong: object) -> None:
    with pytest.raises(SettingsError, match="targets"):
        resolve([("host config", {"targets": wrong})])


def test_a_function_as_targets_is_written_by_name() -> None:
    def blocks_of(net: object) -> list[str]:
        return []

    settings = resolve([("argument", {"targets": blocks_of})])
    assert settings.targets is blocks_of and "blocks_of" in settings.as_dict()["targets"]


@pytest.mark.parametrize("wrong", ["first", "", 1, True])
def test_blocks_are_all_or_last(wrong: object) -> None:
    assert resolve([("argument", {"blocks": "last"})]).blocks == "last"
    with pytest.raises(SettingsError, match="blocks"):
        resolve([("argument", {"blocks": wrong})])
