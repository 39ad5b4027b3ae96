"""FiLM is attached, and the host frozen, when the outermost `__init__` has returned; what appears later is refused at the first step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from small_unet import Block, SmallUNet, inputs
from torch import nn

from vlmfilm_plugin import attach
from vlmfilm_plugin.errors import HostError, SettingsError
from vlmfilm_plugin.film.module import film_modules
from vlmfilm_plugin.host_spec import HostSpec, UNet
from vlmfilm_plugin.hosts.patches import patch_host
from vlmfilm_plugin.hosts.wrapping import when_built
from vlmfilm_plugin.run.runtime import Runtime


class Base:
    def __init__(self, value: int = 0) -> None:
        self.value = value


def test_built_is_called_once_when_the_outermost_init_returns() -> None:
    class Early(Base):
        def __init__(self) -> None:
            super().__init__(1)
            self.value += 1

    seen: list[int] = []
    undo = when_built(Base, lambda instance: seen.append(instance.value))

    class Late(Early):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Base(7)
            self.value *= 10

    class Heir(Late):
        pass

    class Twice(Base):
        def __init__(self) -> None:
            Base.__init__(self)
            Base.__init__(self, 5)

    class Fails(Base):
        def __init__(self) -> None:
            super().__init__()
            raise KeyError

    for cls in (Base, Early, Late, Heir, Twice):
        cls()
    with pytest.raises(KeyError):
        Fails()
    assert seen == [0, 2, 7, 20, 7, 20, 5]
    undo()
    Late()
    assert len(seen) == 7 and "__init_subclass__" not in vars(Base)


def test_a_hosts_own_init_subclass_still_runs_and_comes_back() -> None:
    class Registering:
        names: ClassVar[list[str]] = []

        def __init_subclass__(cls, label: str = "", **kwargs: Any) -> None:
            cls.names.append(label)

        def __init__(self) -> None: ...

    before = vars(Registering)["__init_subclass__"]
    seen: list[Any] = []
    undo = when_built(Registering, seen.append)

    class Child(Registering, label="child"):
        def __init__(self) -> None:
            super().__init__()

    Child()
    assert Registering.names == ["child"] and len(seen) == 1
    undo()
    assert vars(Registering)["__init_subclass__"] is before


@pytest.fixture
def patched(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[type[SmallUNet], Any]]:
    monkeypatch.delenv("VLM_FILM_MODE", raising=False)

    class Host(SmallUNet):
        def __init__(self) -> None:
            super().__init__()

    def patch(**settings: str) -> Runtime:
        run = Runtime("on", {"VLM_FILM_ENCODER": "descriptor", "VLM_FILM_CACHE_DIR": "c", "VLM_FILM_COND_DIM": "4", **settings}, str(tmp_path))
        spec = HostSpec(name="h", unets=[UNet(cls=Host, targets={"post_block2": "ups.*.1"})])
        undo.append(patch_host(__import__("types").ModuleType("h"), spec, run))
        return run

    undo: list[Any] = []
    yield Host, patch
    for each in undo:
        each()


def more(unet: Any) -> None:
    unet.ups.append(nn.ModuleList([Block(4, 4), Block(4, 4), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)]))


def test_a_subclass_that_appends_a_block_gets_film_on_every_block_and_is_frozen_whole(patched: Any) -> None:
    host, patch = patched
    patch(VLM_FILM_FREEZE_HOST="true")

    class Child(host):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            more(self)
            self.head = nn.Linear(3, 3)

    child = Child()
    assert [stage.path for stage in child.vlm_film.architecture.stages] == ["ups.0.1", "ups.1.1", "ups.2.1"]
    assert {name.split(".")[0] for name, parameter in child.named_parameters() if parameter.requires_grad} == {"vlm_film"}


def test_an_init_that_cannot_be_seen_is_found_at_the_first_forward(patched: Any) -> None:
    host, patch = patched
    patch()

    class Child(host):  # type: ignore[misc]
        pass

    def unseen(self: Any) -> None:
        host.__init__(self)
        more(self)

    Child.__init__ = unseen
    child = Child()
    assert len(film_modules(child)[0].heads) == 2
    with pytest.raises(HostError, match=r"decoder of Child has changed since FiLM was attached"):
        child(*inputs(1))


def test_blocks_appended_after_attach_are_refused_and_a_selection_they_are_no_part_of_is_not() -> None:
    for stages, is_refused in ((None, True), ([0, 1], False)):
        unet = SmallUNet()
        handle = attach(unet, feature_dim=3, cond_dim=4, decoder_stages=stages)
        more(unet)
        with handle.condition(torch.ones(1, 3)):
            if is_refused:
                with pytest.raises(HostError, match="has changed"):
                    unet(*inputs(1))
            else:
                unet(*inputs(1))


def test_a_parameter_that_would_train_beside_a_frozen_host_is_refused_at_the_first_forward() -> None:
    unet = SmallUNet()
    handle = attach(unet, feature_dim=3, cond_dim=4, freeze_host=True)
    unet.extra = nn.Linear(2, 2)
    with handle.condition(torch.ones(1, 3)), pytest.raises(SettingsError, match="would train although this SmallUNet is frozen") as caught:
        unet(*inputs(1))
    assert "extra.weight" in str(caught.value)


def test_a_layer_of_a_frozen_model_that_appears_before_its_optimizer_is_refused(tmp_path: Any) -> None:
    run = Runtime("on", {"VLM_FILM_ENCODER": "descriptor", "VLM_FILM_FREEZE_HOST": "true", "VLM_FILM_COND_DIM": "4"}, str(tmp_path))
    model = nn.Module()
    model.unet = SmallUNet()
    run.attach(model.unet, UNet(cls=SmallUNet, targets={"post_block2": "ups.*.1"}))
    run.require_film(model, "h")
    run.optimizers_configured(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model.late = nn.Linear(1, 1)
    with pytest.raises(SettingsError, match="late"):
        run.optimizers_configured(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_a_dataclass_of_a_host_is_not_broken() -> None:
    seen: list[Any] = []
    undo = when_built(Base, seen.append)

    @dataclasses.dataclass
    class Data(Base):
        value: int = 3

    assert Data(4).value == 4 and seen == []
    undo()
