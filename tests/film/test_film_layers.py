"""FiLM itself: identity, bounds, gradients, precision, widths, names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmfilm_plugin.errors import FeatureError
from vlmfilm_plugin.film.layers import AdaptiveFiLMHead, ImageToConditionVector, TextToConditionVector, modulate


def moved(module: nn.Module, scale: float = 1.0, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype))
    return module


SCALES = [(0.1, 0.1), (None, None), (0.5, None), (None, 0.2)]


@pytest.mark.parametrize(("gamma_scale", "beta_scale"), SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_fresh_head_is_exactly_the_identity(gamma_scale: float | None, beta_scale: float | None, dtype: torch.dtype) -> None:
    head = AdaptiveFiLMHead(16, 5, 8, gamma_scale, beta_scale)
    gamma, beta = head(1e3 * torch.randn(3, 16))
    assert gamma.shape == beta.shape == (3, 5, 1, 1)
    assert torch.equal(gamma, torch.ones(3, 5, 1, 1))
    assert torch.equal(beta, torch.zeros(3, 5, 1, 1))
    x = (1e2 * torch.randn(3, 5, 4, 6)).to(dtype)
    y = modulate(x, gamma, beta)
    assert y.dtype == dtype
    assert torch.equal(y, x)


def test_the_identity_keeps_subnormal_and_huge_values() -> None:
    x = torch.tensor([1e-42, -1e-42, 3e38, -3e38, 0.0]).view(1, 1, 1, 5)
    assert torch.equal(modulate(x, torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)), x)


def test_bounds_hold_for_any_weights_and_inputs() -> None:
    head = moved(AdaptiveFiLMHead(4, 50, 8, 0.1, 0.3), 100.0)
    with torch.no_grad():
        gamma, beta = head(1e4 * torch.randn(64, 4))
    assert float((gamma - 1).abs().max()) <= 0.1 + 1e-6
    assert float(beta.abs().max()) <= 0.3 + 1e-6
    assert float((gamma - 1).abs().max()) > 0.099


def test_unbounded_form_is_one_plus_g_and_b() -> None:
    head = moved(AdaptiveFiLMHead(4, 6, 8, None, None), 3.0).double()
    cond = torch.randn(5, 4, dtype=torch.float64)
    g, b = head.mlp(head.ln(cond)).chunk(2, dim=1)
    gamma, beta = head(cond)
    assert torch.equal(gamma, (1 + g)[:, :, None, None])
    assert torch.equal(beta, b[:, :, None, None])
    assert float((gamma - 1).detach().abs().max()) > 1


@pytest.mark.parametrize(("gamma_scale", "beta_scale"), SCALES)
@pytest.mark.parametrize("use_layernorm", [True, False])
def test_gradients_equal_a_hand_written_film_in_double_precision(gamma_scale: float | None, beta_scale: float | None, use_layernorm: bool) -> None:
    torch.manual_seed(0)
    projection = moved(ImageToConditionVector(7, 4), 0.5).double()
    head = moved(AdaptiveFiLMHead(4, 3, 6, gamma_scale, beta_scale, use_layernorm), 0.5).double()
    feature, x = torch.randn(2, 7, dtype=torch.float64), torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    gamma, beta = head(projection(feature))
    loss = (modulate(x, gamma, beta) * weight).sum()
    named = {**{f"p.{n}": p for n, p in projection.named_parameters()}, **{f"h.{n}": p for n, p in head.named_parameters()}, "x": x}
    found = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))

    w = {name: parameter.detach().clone().requires_grad_() for name, parameter in named.items()}

    def normalise(v: Tensor, name: str) -> Tensor:
        centred = v - v.mean(1, keepdim=True)
        return centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    c = normalise(feature @ w["p.proj.weight"].T + w["p.proj.bias"], "p.ln")
    hidden = ((normalise(c, "h.ln") if use_layernorm else c) @ w["h.mlp.0.weight"].T + w["h.mlp.0.bias"]).clamp(min=0)
    out = hidden @ w["h.mlp.2.weight"].T + w["h.mlp.2.bias"]
    g, b = out[:, :3, None, None], out[:, 3:, None, None]
    by_hand = (1 + (g if gamma_scale is None else gamma_scale * torch.tanh(g))) * w["x"] + (b if beta_scale is None else beta_scale * torch.tanh(b))
    expected = torch.autograd.grad((by_hand * weight).sum(), list(w.values()))
    for name, gradient in zip(w, expected, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12, msg=name)


def test_a_fresh_head_learns_from_the_first_step() -> None:
    head = AdaptiveFiLMHead(4, 3)
    gamma, beta = head(torch.randn(2, 4))
    modulate(torch.randn(2, 3, 2, 2), gamma, beta).square().sum().backward()
    assert float(head.mlp[2].weight.grad.abs().sum()) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_keep_their_dtype_and_gamma_is_not_rounded_away(dtype: torch.dtype) -> None:
    gamma, beta = torch.full((1, 2, 1, 1), 1.003), torch.zeros(1, 2, 1, 1)
    assert float(torch.tensor(1.003, dtype=torch.bfloat16)) == 1.0
    x = torch.linspace(1, 2, 4096).view(1, 2, 32, 64).to(dtype)
    y = modulate(x, gamma, beta)
    assert y.dtype == dtype
    assert torch.equal(y, (x.float() * 1.003).to(dtype))
    assert float((y != x).float().mean()) > 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_pass_gradients_to_full_precision_heads(dtype: torch.dtype) -> None:
    head = moved(AdaptiveFiLMHead(4, 3, 6), 0.3)
    x = torch.randn(2, 3, 4, 4).to(dtype).requires_grad_()
    modulate(x, *head(torch.randn(2, 4))).float().square().sum().backward()
    assert x.grad.dtype == dtype
    assert all(parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all() for parameter in head.parameters())


def test_autocast_leaves_heads_and_projections_in_full_precision() -> None:
    image, text = moved(ImageToConditionVector(7, 4)), moved(TextToConditionVector(7, 4))
    head, feature = moved(AdaptiveFiLMHead(4, 3, 6), 0.3), torch.randn(2, 7)
    expected = [image(feature), text(feature), *head(image(feature))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert nn.Linear(7, 4)(feature).dtype == torch.bfloat16
        found = [image(feature), text(feature), *head(image(feature))]
        assert modulate(torch.randn(2, 3, 2, 2, dtype=torch.bfloat16), *found[2:]).dtype == torch.bfloat16
    assert all(tensor.dtype == torch.float32 for tensor in found)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("shape", [(2, 5), (2, 3), (4,), (2, 4, 1), (), (1, 1, 4)])
@pytest.mark.parametrize("build", [lambda: AdaptiveFiLMHead(4, 3), lambda: ImageToConditionVector(4, 3), lambda: TextToConditionVector(4, 3)])
def test_a_wrong_width_names_got_expected_and_shape(build: object, shape: tuple[int, ...]) -> None:
    module: nn.Module = build()  # type: ignore[operator]
    with pytest.raises(RuntimeError) as caught:
        module(torch.zeros(shape))
    assert isinstance(caught.value, FeatureError)
    assert caught.value.facts["got"] == (shape[-1] if shape else 0)
    assert caught.value.facts["expected"] == 4
    assert str(shape) in str(caught.value)
    assert type(module).__name__ in str(caught.value)


def test_a_lazy_projection_takes_its_width_from_the_first_call_and_then_refuses_others() -> None:
    projection = ImageToConditionVector(None, 3)
    assert projection(torch.randn(2, 9)).shape == (2, 3)
    with pytest.raises(FeatureError, match=r"expected:\s+9"):
        projection(torch.randn(2, 8))


def test_a_lazy_projection_refuses_a_feature_without_rows_before_it_takes_a_width() -> None:
    projection = ImageToConditionVector(None, 3)
    with pytest.raises(FeatureError):
        projection(torch.randn(2, 9, 4))
    assert projection(torch.randn(2, 9)).shape == (2, 3)


def test_a_feature_of_another_dtype_is_projected_in_the_dtype_of_the_weights() -> None:
    feature = torch.randn(2, 7).half()
    assert ImageToConditionVector(7, 4).double()(feature).dtype == torch.float64
    assert TextToConditionVector(7, 4)(feature).dtype == torch.float32
    assert ImageToConditionVector(None, 4)(torch.randn(2, 7, dtype=torch.float64)).dtype == torch.float32


def test_state_dict_names_are_exactly_the_ports() -> None:
    head = ["ln.weight", "ln.bias", "mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"]
    assert list(AdaptiveFiLMHead(4, 3).state_dict()) == head
    assert list(AdaptiveFiLMHead(4, 3, use_layernorm=False).state_dict()) == head[2:]
    assert list(ImageToConditionVector(4, 3).state_dict()) == ["proj.weight", "proj.bias", "ln.weight", "ln.bias"]
    assert list(TextToConditionVector(4, 3).state_dict()) == ["mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"]
    shapes = {name: tuple(value.shape) for name, value in AdaptiveFiLMHead(4, 3, 5).state_dict().items()}
    assert shapes["mlp.0.weight"] == (5, 4)
    assert shapes["mlp.2.weight"] == (6, 5)


def test_a_row_is_modulated_by_its_own_gamma_and_beta() -> None:
    x = torch.randn(2, 3, 4, 4)
    gamma, beta = torch.randn(2, 3, 1, 1), torch.randn(2, 3, 1, 1)
    torch.testing.assert_close(modulate(x, gamma, beta)[1], gamma[1] * x[1] + beta[1])


def test_without_normalisation_the_condition_vector_is_the_projection() -> None:
    projection = moved(ImageToConditionVector(7, 4, use_layernorm=False))
    feature = torch.randn(2, 7)
    assert torch.equal(projection(feature), F.linear(feature, projection.proj.weight, projection.proj.bias))
