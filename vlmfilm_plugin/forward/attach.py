"""Attach FiLM to a UNet: plan, validate, then change the module; all or nothing. `remove()` undoes it exactly.

Everything a hook reaches is deepcopied and pickled with the UNet, so that copies use their own heads; an encoder is never among it.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from vlmfilm_plugin.encoders.registry import build_encoder
from vlmfilm_plugin.errors import HostError, SettingsError
from vlmfilm_plugin.film.architecture import Architecture, Stage, decided_by
from vlmfilm_plugin.film.freezing import freeze_host
from vlmfilm_plugin.film.heads import check_head
from vlmfilm_plugin.film.learning_rate import scale_learning_rate
from vlmfilm_plugin.film.module import ATTRIBUTE, FilmModule
from vlmfilm_plugin.film.targets import Target, match_targets, select_stages
from vlmfilm_plugin.forward.first_pass import only_channel
from vlmfilm_plugin.forward.handle import FilmHandle
from vlmfilm_plugin.forward.module_hooks import CloseContext, Expected, ModulateBlock, OpenContext
from vlmfilm_plugin.host_spec import Masks
from vlmfilm_plugin.log import film_logger
from vlmfilm_plugin.settings.arguments import signature_with_settings
from vlmfilm_plugin.settings.layers import layers_of, resolve
from vlmfilm_plugin.settings.mode import MODE_VARIABLE, read_mode
from vlmfilm_plugin.settings.port_names import without_effect
from vlmfilm_plugin.settings.record import Settings

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from vlmfilm_plugin.settings.arguments import SettingsArguments

BY_HAND = Masks(prediction=only_channel)
DEFAULT_TARGETS: Mapping[str, str] = {"post_block2": "ups.*.1", "post_block1": "ups.*.0"}


def attach(unet: nn.Module, *, feature_dim: int | None = None, mode: str | None = None, **settings: Unpack[SettingsArguments]) -> FilmHandle:
    """Attach FiLM to a UNet by hand: for notebooks, and for hosts without a host adapter.

    Args:
        unet: a module whose decoder blocks match `targets` (default `ups.*.1`, `ups.*.0` with `apply_point="post_block1"`).
        feature_dim: width F of the features that will be given; None asks the encoder of the settings, without reading its weights.
        mode: `on`, `off` or `shuffle`; None takes `VLM_FILM_MODE`, and `on` where that is unset.
        settings: any setting by name; they win over `VLM_FILM_<NAME>` and the file of `VLM_FILM_CONFIG`. `feature_transform` acts once it is
            fitted, `handle.fit(...)`: until then features are used as they are given, and one that was set is an error.

    Returns:
        A handle; `with handle.condition(features=...)` around forwards, `handle.remove()` to undo.

    Raises:
        SettingsError: a wrong setting, a wrong mode, or `VLM_FILM_MODE` is set to no mode.
        TargetMatchError: no module matched, or a stage does not exist.
        HostError: the module carries FiLM already, or a block's channels cannot be told.
    """
    resolved = resolve(layers_of(os.environ, arguments=settings))
    if (line := without_effect(resolved)) is not None:
        film_logger().info("[VLM] settings without effect here: %s", line)
    mode = read_mode() or "on" if mode is None else read_mode({MODE_VARIABLE: mode})
    return install(unet, resolved, str(mode), feature_dim=feature_dim, is_by_hand=True)


# For editors that ask the running function rather than its types, such as a notebook's.
attach.__signature__ = signature_with_settings(attach)  # type: ignore[attr-defined]


def install(
    unet: nn.Module,
    settings: Settings,
    mode: str,
    *,
    feature_dim: int | None = None,
    targets: Mapping[str, str] = DEFAULT_TARGETS,
    channels: Callable[[nn.Module], int] | None = None,
    condition: str | None = None,
    own_film: str | None = None,
    masks: Masks = BY_HAND,
    is_by_hand: bool = False,
) -> FilmHandle:
    """Attach FiLM with resolved settings; `attach` and the runtime both come here.

    Args:
        is_by_hand: nobody looks for statistics of features: a `feature_transform` that nobody chose begins with `handle.fit`.
        condition: name of the argument of `forward` that holds the condition image.
        own_film: name of the one through which the UNet's own FiLM would be conditioned: a call with it is refused.
        masks: where the mask is that spatial gates look at.
    """
    owner = type(unet).__name__
    if feature_dim is not None and (not isinstance(feature_dim, int) or isinstance(feature_dim, bool) or feature_dim < 1):
        raise SettingsError(
            f"cannot attach FiLM to {owner}: bad feature_dim", {"found": repr(feature_dim), "expected": "a whole number >= 1, or None"}, "correct it"
        )
    if hasattr(unet, ATTRIBUTE):
        raise HostError(f"cannot attach FiLM to {owner}: it has an attribute {ATTRIBUTE!r} already", {}, "call `handle.remove()` first")
    if not settings.use_vlm_film:
        facts = {"found": f"use_vlm_film false   (from {settings.origin('use_vlm_film')})", "expected": "true"}
        raise SettingsError(f"cannot attach FiLM to {owner}: the settings say not to", facts, "take `use_vlm_film` out")
    check_head(settings.head, settings.origin("head"))
    pattern = _pattern(settings, targets, owner)
    stages = _plan(unet, settings, pattern, channels, owner)
    identity = None if feature_dim is not None else build_encoder(settings)
    is_open = not settings.is_explicit("feature_transform")
    architecture = Architecture(
        stages=tuple(stages),
        feature_dim=feature_dim if identity is None else identity.feature_dim,  # type: ignore[arg-type]
        **(decided_by(settings) | ({"feature_transform": ()} if is_by_hand and is_open else {})),
        fingerprint=None if identity is None else identity.identity.fingerprint,
        encoder=None if identity is None else dict(identity.identity.facts),
    )
    film = _build(architecture, mode, unet, is_open)
    if identity is not None:
        film.former_fingerprints = identity.identity.formerly
    frozen_by = settings.origin("freeze_host") if settings.freeze_host else None
    undo = _mutate(unet, film, condition, masks, Expected(pattern, settings.decoder_stages, own_film, frozen_by))
    undo.append(scale_learning_rate(film, settings.film_lr_scale))
    if settings.freeze_host:
        try:
            undo.append(freeze_host(unet, mode, settings))
        except SettingsError:
            FilmHandle(unet, film, settings, undo).remove()
            raise
    return FilmHandle(unet, film, settings, undo)


def _pattern(settings: Settings, targets: Mapping[str, str], owner: str) -> str:
    pattern = settings.targets or targets.get(settings.apply_point)
    if pattern is None:
        raise HostError(
            f"cannot apply FiLM {settings.apply_point} in {owner}",
            {"found": f"apply_point {settings.apply_point!r}   (from {settings.origin('apply_point')})", "expected": f"one of {sorted(targets)}"},
            "correct `apply_point`",
        )
    return pattern


def _plan(unet: nn.Module, settings: Settings, pattern: str, channels: Callable[[nn.Module], int] | None, owner: str) -> list[Stage]:
    modules = dict(unet.named_modules())
    origin = settings.origin("targets") if settings.targets else "host adapter"
    matched: list[Target] = match_targets(modules, pattern, owner=owner, origin=origin)
    matched = select_stages(matched, settings.decoder_stages, owner=owner, origin=settings.origin("decoder_stages"))
    return [Stage(t.index, t.path, (channels or output_channels)(modules[t.path])) for t in matched]


def output_channels(block: nn.Module) -> int:
    """Return C of a block's output: of `block2.proj` in a ResnetBlock of the MedSegDiff kind, else of its last convolution."""
    proj = getattr(getattr(block, "block2", None), "proj", None)
    convolutions = [proj] if isinstance(proj, nn.Conv2d) else [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    if not convolutions:
        raise HostError(
            f"cannot tell the channels of a {type(block).__name__}",
            {"found": "no Conv2d in it", "expected": "a block of convolutions"},
            "correct `targets`, or let the host adapter state `channels`",
        )
    return convolutions[-1].out_channels


def _build(architecture: Architecture, mode: str, unet: nn.Module, is_transform_open: bool) -> FilmModule:
    """Build the module on the UNet's device, in its training state, without a draw from the host's random stream."""
    parameter = next((p for p in unet.parameters() if p.is_floating_point()), None)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        film = FilmModule(architecture, mode, is_transform_open=is_transform_open)
    if parameter is not None:
        film.to(device=parameter.device, dtype=torch.float64 if parameter.dtype == torch.float64 else torch.float32)
    return film.train(unet.training)


def _mutate(unet: nn.Module, film: FilmModule, condition: str | None, masks: Masks, expected: Expected) -> list[Callable[[], None]]:
    undo: list[Callable[[], None]] = []
    unet.add_module(ATTRIBUTE, film)

    def take_out() -> None:
        film.is_removed = True
        # Someone may have taken the module out by hand already.
        unet._modules.pop(ATTRIBUTE, None)

    undo.append(take_out)
    modules = dict(unet.named_modules())
    arguments = list(inspect.signature(type(unet).forward).parameters)[1:]
    handles = [
        unet.register_forward_pre_hook(OpenContext(arguments, condition, masks, expected), with_kwargs=True),
        unet.register_forward_hook(CloseContext(), always_call=True),
        *(modules[stage.path].register_forward_hook(ModulateBlock(film, head)) for head, stage in enumerate(film.architecture.stages)),
    ]
    undo.extend(handle.remove for handle in handles)
    return undo
