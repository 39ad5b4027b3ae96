"""The module that a UNet holds: projection, heads, and the architecture that travels with them in every state dict."""

from __future__ import annotations

import copy
import inspect
import json
import uuid
from typing import Any, cast

import torch
from torch import Tensor, nn

from vlmfilm_plugin.film.architecture import Architecture, check_architecture, read_extra_state
from vlmfilm_plugin.film.heads import Head, HeadShape, build_head
from vlmfilm_plugin.film.layers import ImageToConditionVector, TextToConditionVector
from vlmfilm_plugin.log import film_logger

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
        return {"gamma": None, "beta": None, "has_run": False, "is_gated": False, "is_used": False}


class FilmModule(nn.Module):
    """FiLM of one UNet, held by it under the attribute `vlm_film`: a projection and one head a stage.

    State-dict keys: `image_to_cond.*` or `text_to_cond.*`, `heads.{i}.*` and, as `_extra_state`, the architecture as JSON bytes.

    Raises:
        CheckpointError: on loading, the checkpoint's FiLM has another architecture or another encoder.
    """

    # In this process, one was built or unpickled.
    has_existed = False
    # Names the load of a checkpoint without FiLM that this module, and what was copied from it, is from.
    baseline_load: str | None = None
    # Of the encoder, in earlier versions: their checkpoints are of this encoder. No part of what is saved.
    former_fingerprints: tuple[str, ...] = ()

    def __init__(self, architecture: Architecture, mode: str) -> None:
        super().__init__()
        FilmModule.has_existed = True
        self.architecture, self.mode = architecture, mode
        self.film_id = uuid.uuid4().hex
        self.is_removed = False
        # A pickled model brings its mode along, into a process that may be asked for another one.
        self.is_unpickled = False
        a = architecture
        if a.is_text:
            self.text_to_cond = TextToConditionVector(a.feature_dim, a.cond_dim, a.hidden_dim)
        else:
            self.image_to_cond = ImageToConditionVector(a.feature_dim, a.cond_dim)
        self.heads = nn.ModuleList(
            build_head(a.head, HeadShape(a.cond_dim, stage.channels, a.hidden_dim, a.gamma_scale, a.beta_scale, a.use_layernorm))
            for stage in a.stages
        )
        # An unused parameter stops DDP in the next step.
        self.requires_grad_(mode != "off")
        self.compiled_inputs = [CompiledInputs() for _ in architecture.stages]

    def project(self, features: Tensor) -> Tensor:
        """Project features (B, F) to condition vectors (B, D)."""
        cond_vec: Tensor = self.projection(features)
        return cond_vec

    @property
    def projection(self) -> ImageToConditionVector | TextToConditionVector:
        """Return what makes condition vectors of features."""
        return self.text_to_cond if self.architecture.is_text else self.image_to_cond

    def head(self, position: int) -> Head:
        """Return the head of the `position`-th selected stage."""
        return cast(Head, self.heads[position])

    def reset(self) -> None:
        """Set every tensor as in a fresh FiLM, which is the identity, without a draw from the host's random stream."""
        devices = {parameter.device for parameter in self.parameters() if parameter.device.type == "cuda"}
        with torch.random.fork_rng(devices=list(devices)):
            self.projection.reset()
            for position in range(len(self.heads)):
                self.head(position).reset()

    def __setstate__(self, state: dict[str, Any]) -> None:
        inherited: Any = super().__setstate__
        inherited(state)
        self.is_unpickled = True
        FilmModule.has_existed = True

    def __deepcopy__(self, memo: dict[int, Any]) -> FilmModule:
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def change_probes(self) -> list[Tensor]:
        """Return small parameters, one of each layer group, that change whenever the weights are changed as a whole."""
        return [*self.projection.change_probes(), *(probe for position in range(len(self.heads)) for probe in self.head(position).change_probes())]

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
        if f"{prefix}_extra_state" in state_dict:
            check_architecture(read_extra_state(state_dict[f"{prefix}_extra_state"]), self.architecture, self.former_fingerprints)
        elif not _is_strict(strict):
            # As torch does: what is missing stays as it is, and is reported.
            if not has_film:
                self._say_once("the loaded state has no FiLM weights: FiLM is left as it is (strict=False)")
        elif has_film:
            state_dict[f"{prefix}_extra_state"] = self.get_extra_state()
        else:
            self._start_at_identity(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *args)

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


def film_modules(model: nn.Module) -> list[FilmModule]:
    """Return the FiLM modules inside a model, copies such as an EMA's included."""
    return [module for module in model.modules() if isinstance(module, FilmModule)]


def _keep_precision(before: Tensor, after: Tensor) -> Tensor:
    is_rounded = after.is_floating_point() and after.element_size() < before.element_size() and after.dtype in (torch.float16, torch.bfloat16)
    return before.to(after.device) if is_rounded else after
