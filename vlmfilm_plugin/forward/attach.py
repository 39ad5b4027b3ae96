"""Attach FiLM to a UNet: plan, validate, then change the module; all or nothing. `remove()` undoes it exactly.

Everything a hook reaches is deepcopied and pickled with the UNet, so that copies use their own heads; an encoder is never among it.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlmfilm_plugin.encoders.registry import build_encoder
from vlmfilm_plugin.errors import HostError, SettingsError
from vlmfilm_plugin.film.architecture import Architecture, decided_by, is_count
from vlmfilm_plugin.film.feature_control import set_seed
from vlmfilm_plugin.film.freezing import freeze_host
from vlmfilm_plugin.film.heads import check_head
from vlmfilm_plugin.film.learning_rate import scale_learning_rate
from vlmfilm_plugin.film.module import ATTRIBUTE, FilmModule
from vlmfilm_plugin.film.stage_order import stated_groups
from vlmfilm_plugin.forward.example import Example
from vlmfilm_plugin.forward.first_pass import only_channel
from vlmfilm_plugin.forward.handle import FilmHandle
from vlmfilm_plugin.forward.module_hooks import CallValues, CloseContext, Expected, ModulateBlock, OpenContext
from vlmfilm_plugin.forward.plan import modules_in, plan_of
from vlmfilm_plugin.host_spec import Channels, Masks, OfCall, Paths, Stages, UNet
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
DEFAULT_TARGETS: Mapping[str, Paths] = {"post_block2": "ups.*.1", "post_block1": "ups.*.0"}


def attach(
    unet: nn.Module,
    *,
    feature_dim: int | None = None,
    mode: str | None = None,
    example: Example | None = None,
    stages: Stages | None = None,
    channels: Channels | None = None,
    rank: int | None = None,
    channel_axis: int | None = None,
    output: int | str | None = None,
    x: OfCall | None = None,
    condition: OfCall | None = None,
    own_condition: str | None = None,
    own_film: Callable[[Any], str | None] | None = None,
    masks: Masks = BY_HAND,
    **settings: Unpack[SettingsArguments],
) -> FilmHandle:
    """Attach FiLM to a UNet by hand: for notebooks, and for hosts without a host adapter.

    Args:
        unet: a module whose decoder blocks match `targets` (default: the blocks of `stages` where these are given, else `ups.*.1`, and `ups.*.0`
            with `apply_point="post_block1"`). `targets` may be a function of the UNet that returns module paths, or a mapping by apply point.
        feature_dim: width F of the features that will be given; None asks the encoder of the settings, without reading its weights.
        mode: `on`, `off` or `shuffle`; None takes `VLM_FILM_MODE`, and `on` where that is unset.
        example: arguments of one call of the UNet, a tuple or a mapping by name: its forward runs once, without gradients, and stages, channels,
            rank and axis are read off it where they are not stated. Random streams, buffers and training flags are then as they were.
        stages, channels, rank, channel_axis, output, x, condition, own_condition, own_film, masks: as in the record `UNet`.
        settings: any setting by name; they win over `VLM_FILM_<NAME>` and the file of `VLM_FILM_CONFIG`. `feature_transform` acts once it is
            fitted, `handle.fit(...)`: until then features are used as they are given, and one that was set is an error.

    Returns:
        A handle; `with handle.condition(features=...)` around forwards, `handle.remove()` to undo.

    Raises:
        SettingsError: a wrong setting, a wrong mode, or `VLM_FILM_MODE` is set to no mode.
        TargetMatchError: no module matched, the order of the blocks cannot be told, or a stage does not exist.
        HostError: the module carries FiLM already, or a block's channels or layout cannot be told.
    """
    targets = DEFAULT_TARGETS
    if isinstance(given := settings.get("targets"), Mapping):
        targets = settings.pop("targets")
    elif given is None and stages is not None:
        targets = dict.fromkeys(
            DEFAULT_TARGETS, tuple(p for group in stated_groups(stages, unet, owner=type(unet).__name__, origin="argument") for p in group)
        )
    resolved = resolve(layers_of(os.environ, arguments=settings))
    if (line := without_effect(resolved)) is not None:
        film_logger().info("[VLM] settings without effect here: %s", line)
    mode = read_mode() or "on" if mode is None else read_mode({MODE_VARIABLE: mode})
    spec = UNet(
        cls=type(unet),
        targets=targets,
        stages=stages,
        channels=channels,
        rank=rank,
        channel_axis=channel_axis,
        output=output,
        x=x,
        condition=condition,
        own_condition=own_condition,
        own_film=own_film,
        masks=masks,
    )
    if own_film is not None and (instead := own_film(unet)) is not None:
        raise HostError(f"cannot attach FiLM to {type(unet).__name__}: it applies FiLM of its own", {}, instead)
    return install(unet, resolved, str(mode), spec, feature_dim=feature_dim, example=example, is_by_hand=True)


# For editors that ask the running function rather than its types, such as a notebook's.
attach.__signature__ = signature_with_settings(attach)  # type: ignore[attr-defined]


def install(
    unet: nn.Module,
    settings: Settings,
    mode: str,
    spec: UNet | None = None,
    *,
    feature_dim: int | None = None,
    example: Example | None = None,
    is_by_hand: bool = False,
) -> FilmHandle:
    """Attach FiLM with resolved settings; `attach` and the runtime both come here.

    Args:
        spec: what is stated of the UNet; None: that of the MedSegDiff kind.
        example: arguments of a forward that tells the rest.
        is_by_hand: nobody looks for statistics of features: a `feature_transform` that nobody chose begins with `handle.fit`.
    """
    spec = UNet(cls=type(unet), targets=DEFAULT_TARGETS, condition=None, masks=BY_HAND) if spec is None else spec
    owner = type(unet).__name__
    if feature_dim is not None and not is_count(feature_dim):
        raise SettingsError(
            f"cannot attach FiLM to {owner}: bad feature_dim", {"found": repr(feature_dim), "expected": "a whole number >= 1, or None"}, "correct it"
        )
    if hasattr(unet, ATTRIBUTE):
        raise HostError(f"cannot attach FiLM to {owner}: it has an attribute {ATTRIBUTE!r} already", {}, "call `handle.remove()` first")
    if not settings.use_vlm_film:
        facts = {"found": f"use_vlm_film false   (from {settings.origin('use_vlm_film')})", "expected": "true"}
        raise SettingsError(f"cannot attach FiLM to {owner}: the settings say not to", facts, "take `use_vlm_film` out")
    check_head(settings.head, settings.origin("head"))
    plan = plan_of(unet, settings, spec, example)
    identity = None if feature_dim is not None else build_encoder(settings)
    is_open = not settings.is_explicit("feature_transform")
    architecture = Architecture(
        stages=plan.stages,
        feature_dim=feature_dim if identity is None else identity.feature_dim,  # type: ignore[arg-type]
        **(decided_by(settings) | ({"feature_transform": ()} if is_by_hand and is_open else {}) | {"blocks": plan.selection.blocks}),
        fingerprint=None if identity is None else identity.identity.fingerprint,
        encoder=None if identity is None else dict(identity.identity.facts),
    )
    film = _build(architecture, mode, unet, is_open)
    set_seed(film.control, settings.feature_control_seed)
    if identity is not None:
        film.former_fingerprints = identity.identity.formerly
    frozen_by = settings.origin("freeze_host") if settings.freeze_host else None
    undo = _mutate(unet, film, spec, Expected(plan.selection, plan.layouts, spec.own_condition, frozen_by))
    undo.append(scale_learning_rate(film, settings.film_lr_scale))
    if settings.freeze_host:
        try:
            undo.append(freeze_host(unet, mode, settings))
        except SettingsError:
            FilmHandle(unet, film, settings, undo).remove()
            raise
    return FilmHandle(unet, film, settings, undo)


def _build(architecture: Architecture, mode: str, unet: nn.Module, is_transform_open: bool) -> FilmModule:
    """Build the module on the UNet's device, in its training state, without a draw from the host's random stream."""
    parameter = next((p for p in unet.parameters() if p.is_floating_point()), None)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        film = FilmModule(architecture, mode, is_transform_open=is_transform_open)
    if parameter is not None:
        film.to(device=parameter.device, dtype=torch.float64 if parameter.dtype == torch.float64 else torch.float32)
    return film.train(unet.training)


def _mutate(unet: nn.Module, film: FilmModule, spec: UNet, expected: Expected) -> list[Callable[[], None]]:
    undo: list[Callable[[], None]] = []
    unet.add_module(ATTRIBUTE, film)

    def take_out() -> None:
        film.is_removed = True
        # Someone may have taken the module out by hand already.
        unet._modules.pop(ATTRIBUTE, None)

    undo.append(take_out)
    modules = modules_in(unet)
    values = CallValues(tuple(inspect.signature(type(unet).forward).parameters)[1:], spec.x, spec.condition)
    opened = OpenContext(values, spec.masks, expected)
    blocks = enumerate(zip(film.architecture.stages, expected.layouts, strict=True))
    handles = [
        unet.register_forward_pre_hook(opened, with_kwargs=True),
        unet.register_forward_hook(CloseContext(opened), with_kwargs=True, always_call=True),
        *(modules[stage.path].register_forward_hook(ModulateBlock(film, head, layout)) for head, (stage, layout) in blocks),
    ]
    undo.extend(handle.remove for handle in handles)
    return undo
