"""`freeze_host`: only FiLM trains, host parameters stay as they are to the bit, and optimizers hold FiLM alone."""

from __future__ import annotations

import pytest
import torch
from small_unet import SmallUNet, inputs
from torch import nn

from vlmfilm_plugin import SettingsError, attach
from vlmfilm_plugin.film.freezing import keep_trainable


def test_only_film_trains_and_the_host_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = SmallUNet()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    handle = attach(unet, feature_dim=3, cond_dim=4, freeze_host=True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-2, weight_decay=0.5)
    with handle.condition(torch.randn(2, 3)):
        for seed in range(3):
            optimizer.zero_grad()
            unet(*inputs(2, seed=seed)).square().mean().backward()
            optimizer.step()
    assert all(torch.equal(value, unet.state_dict()[name]) for name, value in before.items())
    assert all(head.mlp[2].weight.abs().sum() > 0 for head in handle.film.heads)


def test_remove_gives_the_host_its_gradients_back() -> None:
    unet = SmallUNet()
    unet.final.bias.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in unet.named_parameters()}
    attach(unet, feature_dim=3, freeze_host=True).remove()
    assert {name: parameter.requires_grad for name, parameter in unet.named_parameters()} == flags


def test_frozen_and_off_is_refused_and_leaves_the_module_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_FILM_MODE", "off")
    unet = SmallUNet()
    with pytest.raises(SettingsError, match="nothing would train"):
        attach(unet, feature_dim=3, freeze_host=True)
    assert not hasattr(unet, "vlm_film") and all(parameter.requires_grad for parameter in unet.parameters())


@pytest.mark.parametrize("form", ["bare", "list", "dict", "pair"])
def test_optimizers_hold_what_trains_in_every_form_that_lightning_takes(form: str) -> None:
    frozen, free = nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2)
    optimizer = torch.optim.AdamW([*frozen.parameters(), *free.parameters()])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    forms = {
        "bare": optimizer,
        "list": [optimizer],
        "dict": {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler}},
        "pair": ([optimizer], [scheduler]),
    }
    assert keep_trainable(forms[form]) is forms[form]
    assert optimizer.param_groups[0]["params"] == list(free.parameters())
