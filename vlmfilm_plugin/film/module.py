"""The module that a UNet holds: projection, heads, and the architecture that travels with them in every state dict."""

from __future__ import annotations

import copy
import inspect
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn

from vlmfilm_plugin.errors import CheckpointError
from vlmfilm_plugin.film.architecture import Architecture, check_architecture, head_names, read_extra_state
from vlmfilm_plugin.film.feature_control import FeatureControl, build_control
from vlmfilm_plugin.film.feature_statistics import Statistics, check_facts, marks_of, read_facts
from vlmfilm_plugin.film.feature_transform import FeatureTransform
from vlmfilm_plugin.film.heads import Head, HeadShape, build_head
from vlmfilm_plugin.film.layers import ImageToConditionVector, TextToConditionVector
from vlmfilm_plugin.log import film_logger
from vlmfilm_plugin.settings.mode import STRICT_VARIABLE, is_strict

ATTRIBUTE = "vlm_film"
"""Name under which a UNet holds its FiLM."""
MARKER = f"{ATTRIBUTE}."
"""What stands in the state-dict key of every FiLM tensor."""

_said: set[tuple[str, str]] = set()


class CompiledInputs:
    """Gamma and beta (R, C, 1, 1) of one block for the forward that runs now: where compiled code finds them.

    A compiled block cannot look a context up in Python; a tensor attribute of a fixed object is an input of its graph.
    """

    def __init__(self) -> None:
        self.gamma: Tensor | None = None
        self.beta: Tensor | None = None
        self.has_run = False
        self.is_gated = False
        self.is_off = False
        # Compiled code has used these inputs: it will again where a block is run again in backward().
        self.is_used = False

    def close(self) -> bool:
        """Empty the inputs at the end of a forward; tell whether compiled code has used it."""
        has_run, self.gamma, self.beta, self.has_run = self.has_run, None, None, False
        self.is_used = self.is_used or has_run
        return has_run

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledInputs:
        # What a forward has left is no part of a copy; a tensor with a graph could not be copied either.
        memo[id(self)] = copied = CompiledInputs()
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {"gamma": None, "beta": None, "has_run": False, "is_gated": False, "is_off": False, "is_used": False}


class LastForward:
    """The condition of the UNet's last forward: features (S, F), and which of them each row had (R,), or None where row i had feature i."""

    def __init__(self) -> None:
        self.features: Tensor | None = None
        self.index: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> LastForward:
        memo[id(self)] = copied = LastForward()
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {"features": None, "index": None}


class FilmModule(nn.Module):
    """FiLM of one UNet, held by it under the attribute `vlm_film`: a transform of features, a projection and one head a block.

    State-dict keys: `image_to_cond.*` or `text_to_cond.*`, `heads.{i}.*` (`heads.{i}.{block}.*` where a stage has several), `feature_transform.*`
    where there is one and, as `_extra_state`, the architecture as JSON bytes.

    Args:
        is_transform_open: nobody chose the transform of features: a checkpoint that is loaded decides it.

    Raises:
        CheckpointError: on loading, the checkpoint's FiLM has another architecture or another encoder.
    """

    # In this process, one was built or unpickled.
    has_existed = False
    # Names the load of a checkpoint without FiLM that this module, and what was copied from it, is from.
    baseline_load: str | None = None
    # Of the encoder, in earlier versions: their checkpoints are of this encoder. No part of what is saved.
    former_fingerprints: tuple[str, ...] = ()
    is_transform_open = False
    # Weights of FiLM were loaded into this one.
    was_loaded = False
    # Set by `learning_rate`.
    lr_scale = 1.0

    def __init__(self, architecture: Architecture, mode: str, *, is_transform_open: bool = False) -> None:
        super().__init__()
        FilmModule.has_existed = True
        self.architecture, self.mode, self.is_transform_open = architecture, mode, is_transform_open
        self.film_id = uuid.uuid4().hex
        self.is_removed = False
        # A pickled model brings its mode along, into a process that may be asked for another one.
        self.is_unpickled = False
        a = architecture
        if a.is_text:
            self.text_to_cond = TextToConditionVector(a.feature_dim, a.cond_dim, a.hidden_dim)
        else:
            self.image_to_cond = ImageToConditionVector(a.feature_dim, a.cond_dim)
        self.heads = nn.ModuleList()
        for (place, block), stage in zip(head_names(a.stages), a.stages, strict=True):
            shape = HeadShape(a.cond_dim, stage.channels, a.hidden_dim, a.gamma_scale, a.beta_scale, a.use_layernorm)
            if block == 0:
                self.heads.append(nn.ModuleList())
            (self.heads if block is None else cast(nn.ModuleList, self.heads[place])).append(build_head(a.head, shape))
        self.head_places = head_names(a.stages)
        self.use_transform(a.feature_transform)
        self.control = build_control(a.feature_control, a.feature_dim)
        # An unused parameter stops DDP in the next step.
        self.requires_grad_(mode != "off")
        self.compiled_inputs = [CompiledInputs() for _ in architecture.stages]
        self.last_forward = LastForward()
        _living.add(self)

    feature_transform: FeatureTransform | None
    control: FeatureControl | None
    # Pickled before a stage could have several blocks: its place in `heads` is the head's.
    head_places: Sequence[tuple[int, int | None]] | None = None

    def use_transform(self, steps: Sequence[str]) -> None:
        """Have a transform of these steps, without statistics; none where there are no steps."""
        self.architecture = replace(self.architecture, feature_transform=tuple(steps))
        built = FeatureTransform(steps, self.architecture.feature_dim) if steps else None
        parameter = next(self.parameters())
        if built is not None:
            built.to(parameter.device, parameter.dtype)
        self.register_module("feature_transform", built)

    def transform(self, features: Tensor, keys: Sequence[str] | None = None) -> Tensor:
        """Return features (B, F) as the projection takes them.

        Args:
            keys: of the rows' images, by which a control draws; None: by the features' values.

        Raises:
            ConditionError: the transform has no statistics.
        """
        given, features = features, features if self.feature_transform is None else cast(Tensor, self.feature_transform(features))
        if self.control is None:
            return features
        if not self.control.is_known:
            self.control.take(features)
            for film in self.copies():
                if film.control is not None and film is not self and not film.control.is_known:
                    film.control.load_state_dict(self.control.state_dict())
        return cast(Tensor, self.control(features, marks_of(given) if keys is None else keys))

    @property
    def lacks_statistics(self) -> bool:
        """Tell whether the transform cannot be used yet."""
        return self.feature_transform is not None and not self.feature_transform.is_ready

    @property
    def waits(self) -> bool:
        """Tell whether FiLM is the identity for now: its transform cannot be used yet, or what a control holds of a training image is not known."""
        return self.lacks_statistics or (self.control is not None and not self.training and not self.control.is_known)

    def copies(self) -> list[FilmModule]:
        """Return this module and its copies in this process, such as an EMA's."""
        return [film for film in _living if film.film_id == self.film_id]

    def take_statistics(self, statistics: Statistics) -> None:
        """Give the transform its statistics, here and in every copy that has none of its own.

        Raises:
            ConditionError: it has some already.
        """
        assert self.feature_transform is not None
        self.feature_transform.take(statistics)
        for film in self.copies():
            if film is not self and film.feature_transform is not None and not film.feature_transform.is_frozen:
                film.feature_transform.take(statistics)

    def project(self, features: Tensor) -> Tensor:
        """Project features (B, F) to condition vectors (B, D)."""
        cond_vec: Tensor = self.projection(features)
        return cond_vec

    @property
    def projection(self) -> ImageToConditionVector | TextToConditionVector:
        """Return what makes condition vectors of features."""
        return self.text_to_cond if self.architecture.is_text else self.image_to_cond

    def head(self, position: int) -> Head:
        """Return the head of the `position`-th block that carries FiLM."""
        place, block = (position, None) if self.head_places is None else self.head_places[position]
        found = self.heads[place]
        return cast(Head, found if block is None else cast(nn.ModuleList, found)[block])

    def all_heads(self) -> list[Head]:
        """Return the head of each block that carries FiLM, in the order of the architecture's stages."""
        return [self.head(position) for position in range(len(self.architecture.stages))]

    def reset(self) -> None:
        """Set every tensor as in a fresh FiLM, which is the identity, without a draw from the host's random stream."""
        devices = {parameter.device for parameter in self.parameters() if parameter.device.type == "cuda"}
        with torch.random.fork_rng(devices=list(devices)):
            self.projection.reset()
            for head in self.all_heads():
                head.reset()
        # Statistics are of images, not of weights: those that are known stay.
        if self.feature_transform is not None and self.feature_transform.statistics is None:
            self.feature_transform.reset()

    def __setstate__(self, state: dict[str, Any]) -> None:
        inherited: Any = super().__setstate__
        inherited(state)
        self.is_unpickled = True
        FilmModule.has_existed = True
        for name in ("feature_transform", "control"):  # pickled before there were any
            self._modules.setdefault(name, None)
        self.__dict__.setdefault("last_forward", LastForward())
        _living.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> FilmModule:
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        _living.add(copied)
        return copied

    def change_probes(self) -> list[Tensor]:
        """Return small parameters, one of each layer group, that change whenever the weights are changed as a whole."""
        return [*self.projection.change_probes(), *(probe for head in self.all_heads() for probe in head.change_probes())]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move with the UNet, but keep full precision: `unet.half()` would round gamma = 1.0003 to 1."""
        inherited: Any = super()._apply
        return inherited(lambda tensor: _keep_precision(tensor, fn(tensor)), recurse)

    def get_extra_state(self) -> Tensor:
        # Bytes in a tensor: such a state dict loads with weights_only=True and fits safetensors.
        return torch.frombuffer(bytearray(json.dumps(self.architecture.as_dict(), sort_keys=True).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Accept the architecture of a checkpoint; `_load_from_state_dict` has checked it by then."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *args: Any) -> None:
        has_film = any(key.startswith(prefix) for key in state_dict)
        self.baseline_load = None if has_film else uuid.uuid4().hex
        self.was_loaded |= has_film
        if f"{prefix}_extra_state" in state_dict:
            self._check(state_dict, prefix)
        elif not _is_strict(strict):
            # As torch does: what is missing stays as it is, and is reported.
            if not has_film:
                self._say_once("the loaded state has no FiLM weights: FiLM is left as it is (strict=False)")
            elif self.architecture.fingerprint is not None:
                self._say_once("the loaded FiLM weights do not say which encoder they are of: not checked (strict=False)")
        elif has_film:
            self._refuse_undescribed(prefix)
            # Weights without a description: nothing says that features were transformed, unless the statistics are there.
            if not any(key.startswith(f"{prefix}feature_transform.") for key in state_dict):
                self.adopt_transform(())
            state_dict[f"{prefix}_extra_state"] = self.get_extra_state()
        else:
            self._start_at_identity(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *args)

    def _refuse_undescribed(self, prefix: str) -> None:
        """Check that weights on the features of an encoder say of which.

        Raises:
            CheckpointError: they do not: those of another encoder would be taken.
        """
        if self.architecture.fingerprint is None:
            return
        error = CheckpointError(
            "cannot load FiLM weights that do not say which encoder they are of",
            {"found": f"tensors under {prefix!r} without {prefix}_extra_state", "expected": f"an encoder {self.architecture.fingerprint}"},
            f"load the state dict as it was saved, every key of it; {STRICT_VARIABLE}=0 loads them unchecked",
        )
        if is_strict():
            raise error
        self._say_once(str(error))

    def _check(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Check the description in a state dict, and take its transform where nobody chose one here."""
        described = read_extra_state(state_dict[f"{prefix}_extra_state"])
        self.adopt_transform(described["feature_transform"])
        a = self.architecture
        check_architecture(described, a, self.former_fingerprints)
        extra = state_dict.get(f"{prefix}feature_transform._extra_state")
        if extra is not None and (facts := read_facts(extra)) is not None:
            check_facts(facts, a.fingerprint, a.feature_dim, self.former_fingerprints)

    def adopt_transform(self, steps: Sequence[str]) -> None:
        """Have the transform that weights were trained with, where nobody chose one here and nothing has been fitted."""
        held = None if self.feature_transform is None else self.feature_transform.statistics
        if self.is_transform_open and held is None and tuple(steps) != self.architecture.feature_transform:
            self.use_transform(steps)

    def _start_at_identity(self, state_dict: dict[str, Any], prefix: str) -> None:
        self._say_once(
            "the checkpoint has no FiLM weights (a plain baseline): FiLM starts as the identity, which equals the baseline until it is trained"
        )
        # This FiLM may have been trained before. A copy is reset: the load may still be refused.
        fresh = copy.deepcopy(self)
        fresh.reset()
        state_dict.update({prefix + name: value for name, value in fresh.state_dict().items()})

    def _say_once(self, text: str) -> None:
        if (self.film_id, text) not in _said:
            _said.add((self.film_id, text))
            film_logger().warning("[VLM] WARNING: %s", text)


# Every FiLM of this process; copies of one have its `film_id`.
_living: WeakSet[FilmModule] = WeakSet()


def _is_strict(passed: bool) -> bool:
    """Tell whether the load that is running is strict.

    torch passes True to every module, whatever `load_state_dict(strict=)` was asked; only that call's own variables know.
    """
    call = inspect.currentframe()
    while call is not None:
        if call.f_code.co_name == "load_state_dict" and {"strict", "missing_keys"} <= call.f_locals.keys():
            return bool(call.f_locals["strict"])
        call = call.f_back
    return passed


def is_any_attached(counts: Callable[[FilmModule], bool] = lambda film: True) -> bool:
    """Tell whether a module of this process holds FiLM now, of those that count."""
    return any(not film.is_removed and counts(film) for film in list(_living))


def film_modules(model: nn.Module) -> list[FilmModule]:
    """Return the FiLM modules inside a model, copies such as an EMA's included."""
    return [module for module in model.modules() if isinstance(module, FilmModule)]


def _keep_precision(before: Tensor, after: Tensor) -> Tensor:
    is_rounded = after.is_floating_point() and after.element_size() < before.element_size() and after.dtype in (torch.float16, torch.bfloat16)
    return before.to(after.device) if is_rounded else after
