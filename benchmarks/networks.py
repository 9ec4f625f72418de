"""The networks that are measured, by name, at the clip that each was made for. Weights are random: time does not see them."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dissect
from dissect import zoo
from dissect.counting import multiply_adds
from dissect.sessions import open_session

__all__ = ["NETWORKS", "Subject", "clip_call", "converted", "count_of", "step_file"]


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


def converted(name: str, preset: str) -> dissect.Stream:
    """The network dissected, at its own clip."""
    subject = NETWORKS[name]
    return dissect.convert(subject.network(), subject.example(), preset)


def step_file(name: str, preset: str, cadence: str, folder: Path, stream: dissect.Stream | None = None) -> Path:
    """The step model of a network, made where ``folder`` has it not; :func:`count_of` then knows its multiply-adds."""
    path = folder / f"{name}.{preset}.{cadence}.onnx"
    if not path.exists():
        stream = stream or converted(name, preset)
        arguments = (*stream.frame(stream.example, 0), *stream.caches(1))
        path.with_suffix(".count").write_text(str(multiply_adds(stream.step, arguments)))
        stream.export(path, cadence=cadence)
    return path


def count_of(path: Path) -> int:
    """The multiply-adds of a dense step of that file."""
    return int(path.with_suffix(".count").read_text())


def clip_call(name: str, threads: int, folder: Path) -> Callable[[], Any]:
    """A call that runs the whole network in ONNX Runtime, as a sliding window does; its file is kept in ``folder``."""
    path, example = folder / f"{name}.clip.onnx", NETWORKS[name].example()
    if not path.exists():
        logging.disable(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(NETWORKS[name].network(), NETWORKS[name].example(), str(path), dynamo=True, verbose=False)
        logging.disable(logging.NOTSET)
    session = open_session(path, "cpu", threads)
    leaves = example[0] if isinstance(example[0], list) else example
    feed = {entry.name: leaf.numpy() for entry, leaf in zip(session.get_inputs(), leaves, strict=True)}
    return lambda: session.run(None, feed)


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
