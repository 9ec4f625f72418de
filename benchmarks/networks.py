"""The networks that are measured, by name, at the clip that each was made for. Weights are random: time does not see them."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dissect import zoo

__all__ = ["NETWORKS", "Subject"]


@dataclass(frozen=True)
class Subject:
    """A network and its clip ``(channels, frames, height, width)``; ``slow``: a slow pathway takes every slow-th frame."""

    build: Callable[[], nn.Module]
    clip: tuple[int, int, int, int]
    slow: int | None = None

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.build().eval()

    def example(self, batch: int = 1, frames: int | None = None, size: int | None = None) -> tuple[Any, ...]:
        """The network's inputs."""
        channels, usual, height, width = self.clip
        generator = torch.Generator().manual_seed(0)
        clip = torch.randn(batch, channels, frames or usual, size or height, size or width, generator=generator)
        return (clip,) if self.slow is None else ([clip[:, :, :: self.slow].clone(), clip],)


def public(module: str, factory: str, **options: Any) -> Callable[[], nn.Module]:
    """A factory of a library, imported when it is called."""

    def build() -> nn.Module:
        _declare()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made: nn.Module = getattr(importlib.import_module(module), factory)(**options)
        return made

    return build


def _declare() -> None:
    """Lets torchvision be imported beside a torch build that its compiled operators do not load on."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")


_VISION, _HUB, _X3D = "torchvision.models.video", "pytorchvideo.models.hub", "pytorchvideo.models.x3d"

NETWORKS = {
    "3D-ResNet-18": Subject(lambda: zoo.resnet18(seed=0), (3, 16, 112, 112)),
    "3D-ResNet-50": Subject(lambda: zoo.resnet50(seed=0), (3, 16, 112, 112)),
    "3D-ResNet-101": Subject(lambda: zoo.resnet101(seed=0), (3, 16, 112, 112)),
    "r3d_18": Subject(public(_VISION, "r3d_18"), (3, 16, 112, 112)),
    "r2plus1d_18": Subject(public(_VISION, "r2plus1d_18"), (3, 16, 112, 112)),
    "s3d": Subject(public(_VISION, "s3d"), (3, 16, 224, 224)),
    "x3d_xs_112": Subject(
        public(_X3D, "create_x3d", input_clip_length=4, input_crop_size=112, depth_factor=2.2), (3, 4, 112, 112)
    ),
    "x3d_s": Subject(public(_HUB, "x3d_s"), (3, 13, 160, 160)),
    "slow_r50": Subject(public(_HUB, "slow_r50"), (3, 8, 224, 224)),
    "csn_r101": Subject(public(_HUB, "csn_r101"), (3, 32, 224, 224)),
    "slowfast_r50": Subject(public(_HUB, "slowfast_r50"), (3, 32, 224, 224), slow=4),
}
