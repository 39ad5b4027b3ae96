"""The UNets of libraries under test: each in several configurations, tiny, with an input and what is known of its decoder.

`stages` is written by hand from each library's code: paths that a stage begins with, and the channels of its blocks, bottleneck first.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torchvision_stand_in import provide_torchvision


@dataclass(frozen=True)
class Net:
    """One configuration of a UNet class.

    Attributes:
        package: what must be installed.
        module: the module that defines the class, which triggers the adapter.
        adapter: the adapter's module.
        build: the class -> a net.
        inputs: arguments of a forward.
        stages: channels of each block, by stage.
    """

    package: str
    module: str
    name: str
    adapter: str
    build: Callable[[Any], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    stages: list[list[int]]

    def cls(self) -> Any:
        provide_torchvision()
        return getattr(importlib.import_module(self.module), self.name)

    def record(self) -> Any:
        """Return what the adapter states of the class."""
        provide_torchvision()
        spec = importlib.import_module(f"vlmfilm_plugin.hooks.{self.adapter}").vlmfilm_host(importlib.import_module(self.module))
        (found,) = [unet for unet in spec.unets if unet.cls is self.cls()]
        return found

    @property
    def is_installed(self) -> bool:
        return find_spec(self.package) is not None


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def _monai(module: str, name: str, build: Any, inputs: Any, stages: list[list[int]]) -> Net:
    return Net("monai", f"monai.networks.nets.{module}", name, "monai", build, inputs, stages)


def _diffusion(dims: int, channels: tuple[int, ...], blocks: Any, stages: list[list[int]], **more: Any) -> Net:
    def build(cls: Any) -> Any:
        attention = more.pop("attention_levels", tuple(level == len(channels) - 1 for level in range(len(channels))))
        return cls(dims, 2, 1, blocks, channels, attention, norm_num_groups=4, num_head_channels=4, **more)

    def inputs() -> dict[str, Any]:
        context = {"context": x(2, 1, 6)} if more.get("with_conditioning") else {}
        return {"x": x(2, 2, *[16] * dims), "timesteps": torch.tensor([3, 7]), **context}

    return _monai("diffusion_model_unet", "DiffusionModelUNet", build, inputs, stages)


def _dynunet(dims: int, strides: list[Any], filters: list[int], stages: list[list[int]], **more: Any) -> Net:
    def build(cls: Any) -> Any:
        return cls(dims, 1, 2, [3] * len(strides), strides, strides[1:], filters=filters, **more)

    return _monai("dynunet", "DynUNet", build, lambda: {"x": x(2, 1, *[32] * dims)}, stages)


def _basic(dims: int, features: tuple[int, ...], stages: list[list[int]], **more: Any) -> Net:
    return _monai("basic_unet", "BasicUNet", lambda cls: cls(dims, 1, 2, features, **more), lambda: {"x": x(2, 1, *[32] * dims)}, stages)


def _swin(dims: int, size: int, stages: list[list[int]], **more: Any) -> Net:
    def build(cls: Any) -> Any:
        return cls(in_channels=1, out_channels=2, feature_size=size, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), spatial_dims=dims, **more)

    # Instance norm wants more than one value at the bottleneck.
    return _monai("swin_unetr", "SwinUNETR", build, lambda: {"x_in": x(1 if dims == 3 else 2, 1, *[64] * dims)}, stages)


def _unetr(dims: int, size: int, stages: list[list[int]]) -> Net:
    def build(cls: Any) -> Any:
        return cls(1, 2, (32,) * dims, feature_size=size, hidden_size=24, mlp_dim=32, num_heads=2, spatial_dims=dims)

    return _monai("unetr", "UNETR", build, lambda: {"x_in": x(2, 1, *[32] * dims)}, stages)


def _segresnet(dims: int, init: int, stages: list[list[int]], **more: Any) -> Net:
    def build(cls: Any) -> Any:
        return cls(dims, init, 1, 2, norm=("GROUP", {"num_groups": 4}), **more)

    return _monai("segresnet", "SegResNet", build, lambda: {"x": x(2, 1, *[32] * dims)}, stages)


def _nested(dims: int, channels: tuple[int, ...], strides: Any, stages: list[list[int]], **more: Any) -> Net:
    return _monai("unet", "UNet", lambda cls: cls(dims, 1, 2, channels, strides, **more), lambda: {"x": x(2, 1, *[32] * dims)}, stages)


def _nnunet(name: str, dims: int, features: list[int], strides: list[Any], stages: list[list[int]], **more: Any) -> Net:
    conv, norm = ((nn.Conv1d, nn.InstanceNorm1d), (nn.Conv2d, nn.InstanceNorm2d), (nn.Conv3d, nn.InstanceNorm3d))[dims - 1]
    count = len(features)

    def build(cls: Any) -> Any:
        per_stage = {"n_conv_per_stage": 2} if name == "PlainConvUNet" else {"n_blocks_per_stage": 1}
        known = dict(conv_bias=True, norm_op=norm, norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU)
        return cls(1, count, features, conv, [3] * count, strides, num_classes=2, n_conv_per_stage_decoder=1, **per_stage, **known, **more)

    module = "dynamic_network_architectures.architectures.unet"
    package = "dynamic_network_architectures"
    return Net(package, module, name, package, build, lambda: {"x": x(2, 1, *[32] * dims)}, stages)


def _smp(encoder: str, channels: tuple[int, ...], **more: Any) -> Net:
    def build(cls: Any) -> Any:
        return cls(encoder, encoder_weights=None, encoder_depth=len(channels), decoder_channels=channels, **more)

    package = "segmentation_models_pytorch"
    module = f"{package}.decoders.unet.model"
    return Net(package, module, "Unet", package, build, lambda: {"x": x(2, 3, 64, 64)}, [[each] for each in channels])


def _ddpm(module: str, name: str, dim: int, mults: tuple[int, ...], stages: list[list[int]], shape: tuple[int, ...], **more: Any) -> Net:
    package = "denoising_diffusion_pytorch"

    def build(cls: Any) -> Any:
        return cls(dim, dim_mults=mults, channels=shape[0], attn_dim_head=8, attn_heads=2, **more)

    return Net(package, f"{package}.{module}", name, package, build, lambda: {"x": x(2, *shape), "time": torch.tensor([3, 7])}, stages)


def _unet2d(channels: tuple[int, ...], up: tuple[str, ...], stages: list[list[int]], layers: int = 1, **more: Any) -> Net:
    def build(cls: Any) -> Any:
        down = tuple(kind.replace("Up", "Down") for kind in reversed(up))
        known = {"out_channels": 1, "norm_num_groups": 4, "attention_head_dim": 4, "layers_per_block": layers, **more}
        return cls(None, 3, block_out_channels=channels, down_block_types=down, up_block_types=up, **known)

    def inputs() -> dict[str, Any]:
        return {"sample": x(2, 3, 32, 32), "timestep": torch.tensor([3, 7])}

    return Net("diffusers", "diffusers.models.unets.unet_2d", "UNet2DModel", "diffusers", build, inputs, stages)


def _conditioned(channels: tuple[int, ...], up: tuple[str, ...], stages: list[list[int]], layers: int = 1) -> Net:
    def build(cls: Any) -> Any:
        down = tuple(kind.replace("Up", "Down") for kind in reversed(up))
        return cls(
            None, 3, 1, block_out_channels=channels, down_block_types=down, up_block_types=up, layers_per_block=layers, norm_num_groups=4,
            cross_attention_dim=6, attention_head_dim=4,
        )  # fmt: skip

    def inputs() -> dict[str, Any]:
        return {"sample": x(2, 3, 32, 32), "timestep": torch.tensor([3, 7]), "encoder_hidden_states": x(2, 5, 6)}

    return Net("diffusers", "diffusers.models.unets.unet_2d_condition", "UNet2DConditionModel", "diffusers", build, inputs, stages)


CROSS = ("CrossAttnUpBlock2D", "UpBlock2D")
NETS: dict[str, Net] = {
    "ddpm two levels": _ddpm("denoising_diffusion_pytorch", "Unet", 8, (1, 2), [[16], [8]], (3, 16, 16)),
    "ddpm three levels, self-conditioned": _ddpm(
        "denoising_diffusion_pytorch", "Unet", 8, (1, 2, 4), [[32], [16], [8]], (1, 16, 16), self_condition=True
    ),
    "ddpm 1d": _ddpm("denoising_diffusion_pytorch_1d", "Unet1D", 8, (1, 2, 4), [[32], [16], [8]], (3, 32)),
    "UNet2DModel": _unet2d((8, 16), ("AttnUpBlock2D", "UpBlock2D"), [[16, 16], [8, 8]]),
    "UNet2DModel, two layers, resnet upsampling": _unet2d(
        (8, 16, 16),
        ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        [[16] * 3, [16] * 3, [8] * 3],
        layers=2,
        upsample_type="resnet",
        downsample_type="resnet",
    ),
    "UNet2DModel, skip blocks": _unet2d((32, 64), ("AttnSkipUpBlock2D", "SkipUpBlock2D"), [[64, 64], [32, 32]], out_channels=3),
    "UNet2DConditionModel": _conditioned((8, 16), ("UpBlock2D", "CrossAttnUpBlock2D"), [[16, 16], [8, 8]]),
    "UNet2DConditionModel, three levels": _conditioned((8, 8, 16), (CROSS[1], *CROSS), [[16] * 3, [8] * 3, [8] * 3], layers=2),
    "DiffusionModelUNet 2d": _diffusion(2, (8, 16), 1, [[16, 16], [8, 8]]),
    "DiffusionModelUNet 2d, uneven, resblocks between": _diffusion(2, (8, 8, 16), (1, 2, 1), [[16] * 2, [8] * 3, [8] * 2], resblock_updown=True),
    "DiffusionModelUNet 2d with context": _diffusion(2, (8, 16), 1, [[16, 16], [8, 8]], with_conditioning=True, cross_attention_dim=6),
    "DiffusionModelUNet 3d": _diffusion(3, (4, 8), 1, [[8, 8], [4, 4]]),
    "DynUNet 2d": _dynunet(2, [1, 2, 2], [4, 8, 16], [[8], [4]]),
    "DynUNet 2d, a level without a stride, residual": _dynunet(2, [1, 2, 1, 2], [4, 8, 8, 16], [[8, 8], [4]], res_block=True),
    "DynUNet 2d, deep supervision": _dynunet(2, [1, 2, 2, 2], [4, 8, 8, 16], [[8], [8], [4]], deep_supervision=True, deep_supr_num=2),
    "DynUNet 3d, anisotropic": _dynunet(3, [1, (1, 2, 2), 2], [4, 4, 8], [[4], [4]]),
    "BasicUNet 1d": _basic(1, (4, 4, 8, 8, 16, 6), [[8], [8], [4], [6]]),
    "BasicUNet 2d": _basic(2, (4, 4, 8, 8, 16, 4), [[8], [8], [4], [4]]),
    "BasicUNet 2d, nontrainable upsampling": _basic(2, (4, 4, 4, 4, 4, 4), [[4]] * 4, upsample="nontrainable"),
    "BasicUNet 3d": _basic(3, (2, 2, 4, 4, 4, 4), [[4], [4], [2], [4]]),
    "SwinUNETR 2d": _swin(2, 12, [[96], [48], [24], [12], [12]]),
    "SwinUNETR 2d, v2": _swin(2, 24, [[192], [96], [48], [24], [24]], use_v2=True),
    "SwinUNETR 3d": _swin(3, 12, [[96], [48], [24], [12], [12]]),
    "UNETR 2d": _unetr(2, 4, [[32], [16], [8], [4]]),
    "UNETR 3d": _unetr(3, 4, [[32], [16], [8], [4]]),
    "SegResNet 2d": _segresnet(2, 4, [[16], [8], [4]], blocks_down=(1, 1, 1, 1)),
    "SegResNet 2d, two blocks, two levels": _segresnet(2, 8, [[16, 16], [8]], blocks_down=(1, 1, 1), blocks_up=(2, 1), upsample_mode="deconv"),
    "SegResNet 3d": _segresnet(3, 4, [[8], [4]], blocks_down=(1, 1, 1), blocks_up=(1, 1)),
    "UNet 2d": _nested(2, (4, 8, 16), (2, 2), [[4]]),
    "UNet 2d, residual, a level without a stride": _nested(2, (4, 8, 8, 16), (2, 1, 2), [[8, 4]], num_res_units=2),
    "UNet 3d, residual": _nested(3, (4, 4, 8, 16), (2, 2, 2), [[4], [4]], num_res_units=1),
    "smp mit_b0": _smp("mit_b0", (16, 8, 8, 4, 4)),
    "smp scse": _smp("efficientnet-b0", (32, 16, 16), decoder_attention_type="scse"),
    "smp scse without normalisation": _smp("efficientnet-b0", (32, 16, 32, 16), decoder_attention_type="scse", decoder_use_norm=False),
    "nnU-Net plain 2d": _nnunet("PlainConvUNet", 2, [4, 8, 16], [1, 2, 2], [[8], [4]]),
    "nnU-Net plain 2d, a level without a stride": _nnunet("PlainConvUNet", 2, [4, 8, 8, 16], [1, 2, 1, 2], [[8, 8], [4]], deep_supervision=True),
    "nnU-Net plain 3d, anisotropic": _nnunet("PlainConvUNet", 3, [4, 8, 8], [1, (1, 2, 2), 2], [[8], [4]]),
    "nnU-Net plain 1d": _nnunet("PlainConvUNet", 1, [4, 8], [1, 2], [[4]]),
    "nnU-Net residual encoder 2d": _nnunet("ResidualEncoderUNet", 2, [4, 8, 16], [1, 2, 2], [[8], [4]]),
    "nnU-Net residual encoder 3d": _nnunet("ResidualEncoderUNet", 3, [4, 8, 8], [1, 2, 2], [[8], [4]]),
    "nnU-Net residual 2d": _nnunet("ResidualUNet", 2, [4, 8, 16], [1, 2, 2], [[8], [4]]),
}
