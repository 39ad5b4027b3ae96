"""Encoders by name: ours, and third parties' by entry point."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING

from vlmfilm_plugin.entry_points import ENCODERS as GROUP
from vlmfilm_plugin.entry_points import installed, package_of
from vlmfilm_plugin.errors import EncoderError, VlmFilmError

if TYPE_CHECKING:
    from vlmfilm_plugin.settings.record import Settings
from vlmfilm_plugin.encoders.base import Encoder

EncoderFactory = Callable[["Settings"], Encoder]


def _descriptor(settings: Settings) -> Encoder:
    from vlmfilm_plugin.encoders.descriptor import DescriptorEncoder

    return DescriptorEncoder()


def _qwen2_5_vl(settings: Settings) -> Encoder:
    from vlmfilm_plugin.encoders import qwen2_5_vl

    return qwen2_5_vl.from_settings(settings)


def _hf(settings: Settings) -> Encoder:
    from vlmfilm_plugin.encoders import hf

    return hf.from_settings(settings)


def _questionnaire(settings: Settings) -> Encoder:
    from vlmfilm_plugin.encoders import questionnaire

    return questionnaire.from_settings(settings)


ENCODERS: dict[str, EncoderFactory] = {"descriptor": _descriptor, "hf": _hf, "qwen2_5_vl": _qwen2_5_vl, "questionnaire": _questionnaire}


def build_encoder(settings: Settings) -> Encoder:
    """Build the encoder named by `settings.encoder`, without reading weights.

    A name that two sides claim is refused rather than given to one of them: a feature must not depend on which package was found first.

    Raises:
        SettingsError: the settings of the encoder do not fit each other.
        EncoderError: the name is unknown or claimed twice, a third party's encoder cannot be built, or the model's configuration cannot be read.
    """
    name = settings.encoder
    added = installed(GROUP, name)
    claims = [f"{entry.value} of {package_of(entry)}" for entry in added] + (["vlmfilm-plugin"] if name in ENCODERS else [])
    if len(claims) > 1:
        facts = {"found": ", ".join(claims), "expected": "one encoder of this name"}
        raise EncoderError(f"cannot build the encoder {name!r}: the name is claimed twice", facts, f"uninstall or rename {claims[0]}")
    if added:
        return _build_added(added[0], settings)
    if name in ENCODERS:
        return ENCODERS[name](settings)
    known = sorted({*ENCODERS, *(entry.name for entry in installed(GROUP))})
    closest = get_close_matches(name, known, n=1)
    raise EncoderError(
        "cannot build the encoder: unknown name",
        {"encoder": f"{name!r}   (from {settings.origin('encoder')})", "known": known},
        f"set `encoder` to {closest[0] if closest else known[0]!r}",
    )


def _build_added(entry: EntryPoint, settings: Settings) -> Encoder:
    try:
        encoder: Encoder = entry.load()(settings)
    except VlmFilmError:
        raise
    except Exception as error:  # another's code: whatever it raises is named, and the cause stays attached
        facts = {"entry point": entry.value, "package": package_of(entry), "error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        raise EncoderError(f"cannot build the encoder {entry.name!r} of a third party", facts, "correct or uninstall that package") from error
    lacking = sorted({"identity", "feature_dim", "is_loaded", "encode", "release"} - set(dir(encoder)))
    if lacking:
        facts = {"entry point": entry.value, "found": f"{type(encoder).__name__} without {', '.join(lacking)}", "expected": "an Encoder"}
        raise EncoderError(f"cannot use the encoder {entry.name!r} of a third party", facts, "correct or uninstall that package")
    return encoder
