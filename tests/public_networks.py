"""Public 3D-CNNs for the tests, unmodified, with weights and statistics in which no error can hide.

Freshly made networks are poor oracles: batch norms are the identity, biases are zero, deep activations fade away.
`network` disturbs every parameter that was left constant, and gives batch norms the statistics of a clip, disturbed.

The networks are torchvision's and pytorchvideo's; a test that asks for one is skipped where its library is missing.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm


@dataclass(frozen=True)
class PublicNetwork:
    """A factory of a public library, and the clip that it was made for: ``(channels, frames, height, width)``.

    One with two pathways takes a list of two clips, the slow one with every `slow`-th frame.
    """

    module: str
    factory: str
    clip: tuple[int, int, int, int]
    slow: int | None = None


_TORCHVISION = "torchvision.models.video"
_PYTORCHVIDEO = "pytorchvideo.models.hub"

NETWORKS = {
    network.factory: network
    for network in (
        PublicNetwork(_TORCHVISION, "r3d_18", (3, 16, 112, 112)),
        PublicNetwork(_TORCHVISION, "mc3_18", (3, 16, 112, 112)),
        PublicNetwork(_TORCHVISION, "r2plus1d_18", (3, 16, 112, 112)),
        PublicNetwork(_TORCHVISION, "s3d", (3, 16, 224, 224)),
        PublicNetwork(_PYTORCHVIDEO, "slow_r50", (3, 8, 224, 224)),
        PublicNetwork(_PYTORCHVIDEO, "c2d_r50", (3, 8, 224, 224)),
        PublicNetwork(_PYTORCHVIDEO, "i3d_r50", (3, 8, 224, 224)),
        PublicNetwork(_PYTORCHVIDEO, "r2plus1d_r50", (3, 16, 224, 224)),
        PublicNetwork(_PYTORCHVIDEO, "csn_r101", (3, 32, 224, 224)),
        PublicNetwork(_PYTORCHVIDEO, "x3d_xs", (3, 4, 160, 160)),
        PublicNetwork(_PYTORCHVIDEO, "x3d_s", (3, 13, 160, 160)),
        PublicNetwork(_PYTORCHVIDEO, "x3d_m", (3, 16, 224, 224)),
        PublicNetwork(_PYTORCHVIDEO, "slowfast_r50", (3, 32, 224, 224), slow=4),
    )
}
"""Every public network by the name of its factory."""

TORCHVISION = [name for name, public in NETWORKS.items() if public.module == _TORCHVISION]
PYTORCHVIDEO = [name for name, public in NETWORKS.items() if public.module == _PYTORCHVIDEO]


def network(name: str, seed: int = 0, **arguments: Any) -> nn.Module:
    """Build a public network in eval mode; the same seed gives the same weights. `arguments` go to its factory."""
    public = NETWORKS[name]
    factory: Callable[..., nn.Module] = getattr(_library(public.module), public.factory)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return disturb(factory(**arguments), example(name, seed=seed))


def example(name: str, batch: int = 1, frames: int | None = None, size: int | None = None, seed: int = 0) -> Any:
    """Return a random clip as that network takes it: a tensor ``(batch, C, T, H, W)``, or a list of two such tensors.

    Frames and size are those that the network was made for, unless they are given. Some networks write into the list
    that they are given: make a new example for every call.
    """
    public = NETWORKS[name]
    channels, usual_frames, height, width = public.clip
    clip = random_clip((batch, channels, frames or usual_frames, size or height, size or width), seed)
    return clip if public.slow is None else [clip[:, :, :: public.slow].clone(), clip]


def random_clip(shape: tuple[int, int, int, int, int], seed: int = 0) -> Tensor:
    """Return a clip ``(N, C, T, H, W)`` of mean 0 and variance 1 whose frames differ in fine and in large structure.

    White noise would not do: pooling averages it away, and every frame looks alike to the deeper layers.
    """
    generator = torch.Generator().manual_seed(seed)
    *leading, height, width = shape
    clip = torch.zeros(shape)
    for cell in (1, 8, 32, max(height, width)):
        coarse = torch.randn(*leading, -(-height // cell), -(-width // cell), generator=generator)
        clip += F.interpolate(coarse.flatten(0, 1), size=(height, width)).unflatten(0, leading[:2])
    return clip / 2


def disturb(module: nn.Module, inputs: Any) -> nn.Module:
    """Disturb constant parameters, give batch norms the statistics of `inputs`, disturbed, and return it in eval mode.

    Changes `module` itself, which is one that a test has just made. Draws from torch's own generator.
    """
    norms = [layer for layer in module.modules() if isinstance(layer, BatchNorm)]
    scales = {id(norm.weight) for norm in norms}
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.numel() > 1 and parameter.min() == parameter.max():
                if id(parameter) in scales:  # 1, or 0 where a residual branch starts as the identity
                    parameter.uniform_(0.5, 1.5)
                else:
                    parameter.normal_(std=0.2)
        module.eval()
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.train().momentum = 1.0
        module(inputs)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval().momentum = momentum
            mean, variance = norm.running_mean, norm.running_var
            assert mean is not None
            assert variance is not None
            mean += 0.2 * variance.sqrt() * torch.randn_like(mean)
            variance *= torch.empty_like(variance).uniform_(0.7, 1.4)
    return module


@cache
def _library(module: str) -> ModuleType:
    declare_torchvision_operators()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the libraries do while they are imported is not ours to mend
        return pytest.importorskip(module, exc_type=ImportError)


@cache
def declare_torchvision_operators() -> torch.library.Library | None:
    """Let torchvision be imported on a torch build that its compiled operators do not load on, such as a CPU build.

    It registers fake kernels of two operators without looking whether they exist. We declare them (no video network
    calls them), and keep the library object, since the declarations live no longer than it does.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    try:
        for library in Path(spec.origin).parent.glob("_C.*"):
            torch.ops.load_library(library)
    except OSError:
        declarations = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            declarations.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return declarations
    return None
