"""The registry: built-in encoders, and those that other packages add by a real entry point."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from vlmfilm_plugin.encoders.base import Encoder, encode_annotated
from vlmfilm_plugin.encoders.descriptor import DescriptorEncoder
from vlmfilm_plugin.encoders.registry import ENCODERS, build_encoder
from vlmfilm_plugin.errors import EncoderError, SettingsError, VlmFilmError
from vlmfilm_plugin.settings.layers import resolve
from vlmfilm_plugin.settings.record import Settings

MODULE = """
from vlmfilm_plugin.encoders.descriptor import DescriptorEncoder
from vlmfilm_plugin.errors import SettingsError
LOADED = True
class Brighter(DescriptorEncoder):
    pass
def build(settings):
    return Brighter()
def refuse(settings):
    raise SettingsError("cannot use setting `x`")
def fail(settings):
    raise KeyError("no such thing")
def nothing(settings):
    return object()
"""


def _settings(encoder: str) -> Settings:
    return resolve([("arguments", {"encoder": encoder})])


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Install a package with entry points onto the search path, as pip would leave it."""

    def add(package: str, source: str = MODULE, **encoders: str) -> None:
        root, module = tmp_path / package, package.replace("-", "_")
        info = root / f"{module}-1.0.dist-info"
        info.mkdir(parents=True)
        (root / f"{module}.py").write_text(source)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = [f"{name} = {module}:{attribute}" for name, attribute in encoders.items()]
        (info / "entry_points.txt").write_text("\n".join(["[vlmfilm.encoders]", *lines, ""]))
        monkeypatch.syspath_prepend(str(root))

    before = set(sys.modules)
    yield add
    for name in set(sys.modules) - before:
        if name.startswith("third_party"):
            del sys.modules[name]


def test_an_added_encoder_is_built_by_its_name(install: Callable[..., None]) -> None:
    install("third-party", brighter="build")
    encoder = build_encoder(_settings("brighter"))
    assert type(encoder).__name__ == "Brighter" and isinstance(encoder, Encoder)
    assert encoder.encode([Image.new("RGB", (8, 8))]).shape == (1, encoder.feature_dim)


def test_added_encoders_are_not_loaded_unless_asked_for(install: Callable[..., None]) -> None:
    install("third-party", "raise SystemError('imported')", brighter="build")
    assert isinstance(build_encoder(_settings("descriptor")), DescriptorEncoder)
    with pytest.raises(EncoderError, match="unknown name") as caught:
        build_encoder(_settings("brightr"))
    assert "'brighter'" in str(caught.value.fix) and set(ENCODERS) | {"brighter"} == set(caught.value.facts["known"])  # type: ignore[call-overload]
    assert "third_party" not in sys.modules


@pytest.mark.parametrize(
    ("source", "attribute", "said"),
    [
        ("raise SystemError('broken at import')", "build", "SystemError: broken at import"),
        ("import no_such_module_at_all", "build", "ModuleNotFoundError"),
        (MODULE, "no_such_factory", "AttributeError"),
        (MODULE, "fail", "KeyError: 'no such thing'"),
        (MODULE, "LOADED", "TypeError"),
    ],
)
def test_a_broken_one_is_reported_by_name_and_package(install: Callable[..., None], source: str, attribute: str, said: str) -> None:
    install("third-party", source, brighter=attribute)
    with pytest.raises(EncoderError, match="'brighter'") as caught:
        build_encoder(_settings("brighter"))
    assert said in str(caught.value.facts["error"]) and caught.value.facts["package"] == "third-party" and caught.value.__cause__ is not None


def test_what_is_no_encoder_is_reported(install: Callable[..., None]) -> None:
    install("third-party", brighter="nothing")
    with pytest.raises(EncoderError, match="'brighter'") as caught:
        build_encoder(_settings("brighter"))
    assert "encode" in str(caught.value.facts["found"])


def test_an_error_of_ours_goes_through_as_it_is(install: Callable[..., None]) -> None:
    install("third-party", brighter="refuse")
    with pytest.raises(SettingsError, match="`x`"):
        build_encoder(_settings("brighter"))


def test_the_name_of_a_built_in_is_refused_and_only_where_it_is_asked_for(install: Callable[..., None]) -> None:
    install("third-party", descriptor="build")
    with pytest.raises(EncoderError, match="claimed twice") as caught:
        build_encoder(_settings("descriptor"))
    assert "third-party" in str(caught.value.facts["found"]) and "vlmfilm-plugin" in str(caught.value.facts["found"])
    with pytest.raises(VlmFilmError, match="unknown name"):
        build_encoder(_settings("elsewhere"))


def test_two_packages_with_one_name_are_refused(install: Callable[..., None]) -> None:
    install("third-party", brighter="build")
    install("third-party-too", brighter="build")
    with pytest.raises(EncoderError, match="claimed twice"):
        build_encoder(_settings("brighter"))


def test_one_package_found_twice_is_one_claim(install: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install("third-party", brighter="build")
    copy = tmp_path / "again" / "third_party-1.0.dist-info"
    copy.mkdir(parents=True)
    for file in (tmp_path / "third-party" / "third_party-1.0.dist-info").iterdir():
        (copy / file.name).write_text(file.read_text())
    monkeypatch.syspath_prepend(str(copy.parent))
    assert type(build_encoder(_settings("brighter"))).__name__ == "Brighter"


def test_an_encoder_without_notes_gives_none() -> None:
    images = [Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8))]
    features, notes = encode_annotated(DescriptorEncoder(), images)
    assert notes is None and torch.equal(features, DescriptorEncoder().encode(images))


def test_notes_must_be_one_an_image() -> None:
    class Short(DescriptorEncoder):
        def encode_annotated(self, images: list[Image.Image]) -> tuple[torch.Tensor, list[str]]:
            return self.encode(images), ["one"]

    assert encode_annotated(Short(), [Image.new("RGB", (8, 8))])[1] == ["one"]
    with pytest.raises(EncoderError, match="notes of Short"):
        encode_annotated(Short(), [Image.new("RGB", (8, 8))] * 2)
