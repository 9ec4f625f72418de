"""Networks of packages on PyPI, unmodified, made small by their own arguments; each is left out where its package is missing."""

from __future__ import annotations

import contextlib
import importlib
import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from survey import disturbed

__all__ = ["PACKAGES", "Package"]


@dataclass(frozen=True)
class Package:
    """A factory of a package, what it is called with, and the shape of a clip for it.

    ``arguments`` are its keywords, or, as a tuple, its positional arguments; with ``config``, those of its configuration.
    """

    distribution: str
    factory: str
    arguments: Any = field(default_factory=dict)
    clip: tuple[int, ...] = (1, 1, 16, 32, 32)
    options: Mapping[str, Any] = field(default_factory=dict)
    config: str | None = None

    def build(self) -> tuple[nn.Module, tuple[Any, ...]]:
        """The network in float64 and eval mode, and an example; ImportError where the package is not there."""
        from public_networks import declare_torchvision_operators

        declare_torchvision_operators()  # some of them import torchvision
        model = self.made(self.arguments)
        return disturbed(model).double(), (torch.rand(self.clip, dtype=torch.float64),)

    def made(self, arguments: Any) -> nn.Module:
        torch.manual_seed(0)
        factory = found(self.factory)
        if self.config is not None:
            factory, arguments = partial(factory, found(self.config)(**arguments)), {}
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter(
                "ignore"
            )  # what the packages do while they are imported and built is not ours to mend
            model = factory(*arguments) if isinstance(arguments, tuple) else factory(**arguments)
        assert isinstance(model, nn.Module)
        return model


def found(name: str) -> Callable[..., Any]:
    """What stands in a module: ``package.module:name``."""
    module, _, attribute = name.partition(":")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return result


MONAI = "monai.networks.nets:"
VOLUME = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}
SMALL = {"in_chns": 1, "class_num": 2, "feature_chns": [4, 8, 8, 8, 8]}
VIDEO = {"num_labels": 5, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VIT = {
    "image_size": 16,
    "image_patch_size": 8,
    "frames": 8,
    "frame_patch_size": 2,
    "num_classes": 5,
    "heads": 2,
    "mlp_dim": 32,
}


def monai(name: str, clip: tuple[int, ...] = (1, 1, 16, 32, 32), **arguments: Any) -> Package:
    return Package("monai", MONAI + name, arguments, clip)


def transformers(name: str, config: str, **arguments: Any) -> Package:
    settings = {**VIDEO, "image_size": 16, "patch_size": 8, "num_frames": 4, **arguments}
    clip, options = (1, 4, 3, 16, 16), {"time_dim": 1}
    return Package("transformers", f"transformers:{name}", settings, clip, options, config=f"transformers:{config}")


def timm(name: str) -> Package:
    return Package("timm-3d", "timm_3d:create_model", {"model_name": name, "num_classes": 5}, (1, 3, 32, 32, 32))


def segmentation(name: str) -> Package:
    arguments = {"encoder_name": "resnet18", "encoder_weights": None, "in_channels": 3, "classes": 2}
    return Package(
        "segmentation-models-pytorch-3d", f"segmentation_models_pytorch_3d:{name}", arguments, (1, 3, 32, 32, 32)
    )


def sequence(**arguments: Any) -> Package:
    settings = {"num_inputs": 4, "num_channels": [4, 4], **arguments}
    return Package("pytorch-tcn", "pytorch_tcn:TCN", settings, (1, 4, 20), {"time_dim": 2})


def mvit(**arguments: Any) -> nn.Module:
    """torchvision's MViT with two blocks, the second of which halves the frame."""
    block = found("torchvision.models.video.mvit:MSBlockConfig")
    kernels = {"kernel_q": [3, 3, 3], "kernel_kv": [3, 3, 3], "stride_kv": [1, 2, 2]}
    blocks = [
        block(num_heads=1, input_channels=8, output_channels=16, stride_q=[1, 1, 1], **kernels),
        block(num_heads=2, input_channels=16, output_channels=16, stride_q=[1, 2, 2], **kernels),
    ]
    model: nn.Module = found("torchvision.models.video.mvit:MViT")(
        spatial_size=(32, 32), temporal_size=8, block_setting=blocks, num_classes=5, dropout=0.0, **arguments
    )
    return model


PACKAGES = {
    "torchvision Swin3D": Package(
        "torchvision",
        "torchvision.models.video.swin_transformer:SwinTransformer3d",
        {
            "patch_size": [2, 4, 4],
            "embed_dim": 8,
            "depths": [2, 2],
            "num_heads": [2, 2],
            "window_size": [8, 7, 7],
            "num_classes": 5,
        },
        (1, 3, 8, 32, 32),
    ),
    "torchvision MViT": Package(
        "torchvision",
        "survey.packages:mvit",
        {"residual_pool": False, "residual_with_cls_embed": True, "rel_pos_embed": False, "proj_after_attn": False},
        (1, 3, 8, 32, 32),
    ),
    "torchvision MViT v2": Package(
        "torchvision",
        "survey.packages:mvit",
        {"residual_pool": True, "residual_with_cls_embed": False, "rel_pos_embed": True, "proj_after_attn": True},
        (1, 3, 8, 32, 32),
    ),
    "pytorchvideo MViT": Package(
        "pytorchvideo",
        "pytorchvideo.models.vision_transformers:create_multiscale_vision_transformers",
        {
            "spatial_size": 32,
            "temporal_size": 8,
            "depth": 2,
            "patch_embed_dim": 8,
            "embed_dim_mul": [[1, 2.0]],
            "atten_head_mul": [[1, 2.0]],
            "pool_q_stride_size": [[1, 1, 2, 2]],
            "pool_kv_stride_size": [[0, 1, 2, 2]],
            "pool_kvq_kernel": [3, 3, 3],
            "head_num_classes": 5,
        },
        (1, 3, 8, 32, 32),
    ),
    "MONAI UNet": monai("UNet", **VOLUME, channels=(4, 8, 16), strides=(2, 2), num_res_units=2, norm="batch"),
    "MONAI UNet, instance norms": monai("UNet", **VOLUME, channels=(4, 8, 16), strides=(2, 2)),
    "MONAI BasicUNet": monai("BasicUNet", **VOLUME, features=(4, 4, 8, 8, 16, 4)),
    "MONAI BasicUNet++": monai("BasicUNetPlusPlus", **VOLUME, features=(4, 4, 8, 8, 16, 4)),
    "MONAI DynUNet": monai(
        "DynUNet",
        **VOLUME,
        kernel_size=(3, 3, 3),
        strides=(1, 2, 2),
        upsample_kernel_size=(2, 2),
        filters=(4, 8, 16),
        norm_name="batch",
    ),
    "MONAI SegResNet": monai("SegResNet", **VOLUME, init_filters=8, blocks_down=(1, 1), blocks_up=(1,)),
    "MONAI SegResNetDS": monai("SegResNetDS", **VOLUME, init_filters=8, blocks_down=(1, 1, 1)),
    "MONAI AttentionUnet": monai("AttentionUnet", **VOLUME, channels=(4, 8, 16), strides=(2, 2)),
    "MONAI DenseNet": monai("DenseNet", **VOLUME, init_features=8, growth_rate=4, block_config=(2, 2)),
    "MONAI SEResNet50": monai("SEResNet50", spatial_dims=3, in_channels=1, num_classes=3, layers=(1, 1, 1, 1)),
    "MONAI ResNet": monai(
        "ResNet",
        block="basic",
        layers=[1, 1, 1, 1],
        block_inplanes=[4, 8, 8, 8],
        n_input_channels=1,
        num_classes=3,
    ),
    "MONAI ViT": monai(
        "ViT",
        in_channels=1,
        img_size=(16, 32, 32),
        patch_size=(4, 8, 8),
        hidden_size=24,
        mlp_dim=32,
        num_layers=2,
        num_heads=2,
        classification=True,
    ),
    "MONAI AutoEncoder": monai("AutoEncoder", **VOLUME, channels=(4, 8), strides=(2, 2), norm="batch"),
    "MONAI Classifier": monai("Classifier", in_shape=(1, 16, 32, 32), classes=2, channels=(4, 8), strides=(2, 2)),
    "timm resnet18": timm("resnet18"),
    "timm seresnet18": timm("seresnet18"),
    "timm efficientnet_b0": timm("efficientnet_b0"),
    "timm convnext_atto": timm("convnext_atto"),
    "timm densenet121": timm("densenet121"),
    "smp Unet": segmentation("Unet"),
    "smp FPN": segmentation("FPN"),
    "smp Linknet": segmentation("Linknet"),
    "smp PSPNet": segmentation("PSPNet"),
    "smp DeepLabV3+": segmentation("DeepLabV3Plus"),
    "smp MAnet": segmentation("MAnet"),
    "unet3d UNet3d": Package("unet3d", "unet3d.unet3d:UNet3d", {"c_start": 4, "layers": 2}),
    "unet3d LinkNet3d": Package("unet3d", "unet3d.linknet3d:LinkNet3d", {"c_start": 4, "layers": 2}),
    "unet UNet3D": Package(
        "unet", "unet:UNet3D", {"out_channels_first_layer": 4, "num_encoding_blocks": 3, "padding": 1}
    ),
    "unet UNet3D, no padding": Package(
        "unet",
        "unet:UNet3D",
        {"out_channels_first_layer": 4, "num_encoding_blocks": 2, "padding": 0},
        (1, 1, 24, 24, 24),
    ),
    "highresnet": Package(
        "highresnet",
        "highresnet:HighRes3DNet",
        {"in_channels": 1, "out_channels": 2, "initial_out_channels_power": 2},
        (1, 1, 12, 16, 16),
    ),
    "elektronn3 UNet": Package("elektronn3", "elektronn3.models.unet:UNet", {"n_blocks": 3, "start_filts": 4}),
    "elektronn3 UNet, attention": Package(
        "elektronn3", "elektronn3.models.unet:UNet", {"n_blocks": 3, "start_filts": 4, "attention": True}
    ),
    "elektronn3 MSDNet": Package(
        "elektronn3", "elektronn3.models.msdnet:MSDNet", {"num_layers": 6}, (1, 1, 16, 16, 16)
    ),
    "PyMIC UNet3D": Package("PYMIC", "pymic.net.net3d.unet3d:UNet3D", (SMALL,)),
    "PyMIC UNet2.5D": Package("PYMIC", "pymic.net.net3d.unet2d5:UNet2D5", (SMALL,)),
    "x-unet": Package(
        "x-unet",
        "x_unet:XUnet",
        {
            "dim": 8,
            "frame_kernel_size": 3,
            "dim_mults": (1, 2),
            "num_blocks_per_stage": (1, 1),
            "num_self_attn_per_stage": (0, 1),
            "nested_unet_depths": (2, 1),
            "nested_unet_dim": 4,
        },
        (1, 3, 8, 16, 16),
    ),
    "image-classifier-3d DenseNet": Package(
        "image-classifier-3d",
        "image_classifier_3d.models.densenet:generate_model",
        {"model_depth": 121, "num_classes": 3},
        (1, 3, 16, 32, 32),
    ),
    "pytorch-tcn, causal": sequence(causal=True),
    "pytorch-tcn": sequence(causal=False),
    "pytorch-tcn, skips and gates": sequence(
        causal=True, use_skip_connections=True, use_norm="layer_norm", use_gate=True
    ),
    "timesformer-pytorch": Package(
        "timesformer-pytorch",
        "timesformer_pytorch:TimeSformer",
        {"dim": 16, "image_size": 16, "patch_size": 8, "num_frames": 4, "num_classes": 5, "depth": 2, "heads": 2},
        (1, 4, 3, 16, 16),
        {"time_dim": 1},
    ),
    "vit-pytorch ViViT": Package(
        "vit-pytorch",
        "vit_pytorch.vivit:ViViT",
        {**VIT, "dim": 16, "spatial_depth": 1, "temporal_depth": 1, "use_flash_attn": False},
        (1, 3, 8, 16, 16),
    ),
    "vit-pytorch simple ViT 3D": Package(
        "vit-pytorch", "vit_pytorch.simple_vit_3d:SimpleViT", {**VIT, "dim": 24, "depth": 1}, (1, 3, 8, 16, 16)
    ),
    "vit-pytorch CCT 3D": Package(
        "vit-pytorch",
        "vit_pytorch.cct_3d:CCT",
        {
            "img_size": 32,
            "num_frames": 8,
            "embedding_dim": 16,
            "frame_kernel_size": 3,
            "kernel_size": 7,
            "stride": 2,
            "padding": 3,
            "num_layers": 2,
            "num_heads": 2,
            "mlp_ratio": 2.0,
            "num_classes": 5,
            "positional_embedding": "learnable",
        },
        (1, 3, 8, 32, 32),
    ),
    "VideoMAE": transformers("VideoMAEForVideoClassification", "VideoMAEConfig", tubelet_size=2),
    "ViViT": transformers("VivitForVideoClassification", "VivitConfig", tubelet_size=[2, 8, 8]),
    "TimeSformer": transformers("TimesformerForVideoClassification", "TimesformerConfig"),
    "PlainConvUNet": Package(
        "dynamic_network_architectures",
        "dynamic_network_architectures.architectures.unet:PlainConvUNet",
        (1, 3, (4, 8, 8), nn.Conv3d, 3, (1, 2, 2), (1, 1, 1), 2, (1, 1), True, nn.BatchNorm3d),
    ),
}
