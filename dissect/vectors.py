"""Frame vectors: what a head reads, one vector a frame, and what it may make of all of them so far.

Two operations on ``(N, T, F)`` that a capture keeps as one operator each, so that the dissector knows where a head begins
and what it means. Anywhere else they are plain torch: differentiable, and open to every exporter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dissect.capturing import capturing

__all__ = ["OPS", "frame_vectors", "running_mean"]


def frame_vectors(x: Tensor, frames: int) -> Tensor:
    """One vector for every frame of the clip: ``(N, positions, F)`` becomes ``(N, frames, F)``, each position held until the next.

    Here a head begins: what comes after keeps all of its taps, whatever the preset. In the ``d3d`` and ``causal`` presets
    every frame has a vector of its own; in ``exact`` they are held, as here.
    """
    return OPS.frame_vectors(x, frames) if capturing() else _held(x, frames)


def running_mean(x: Tensor, first: int = 0) -> Tensor:
    """The mean of ``(N, T, F)`` over time, without the first ``first`` frames; zeros where there are no others.

    In a stream it is the mean of all frames so far: a cumulative cache, whatever becomes of other pools over time.
    """
    return OPS.running_mean(x, first) if capturing() else _mean(x, first)


def _held(x: Tensor, frames: int) -> Tensor:
    index = torch.arange(frames, device=x.device) * x.shape[1] // frames
    return x.index_select(1, index)


def _mean(x: Tensor, first: int) -> Tensor:
    return x[:, first:].sum(1) / max(1, x.shape[1] - first)


@torch.library.custom_op("dissect::frame_vectors", mutates_args=())
def _frame_vectors(x: Tensor, frames: int) -> Tensor:
    return _held(x, frames)


@_frame_vectors.register_fake
def _(x: Tensor, frames: int) -> Tensor:
    return x.new_empty((x.shape[0], frames, x.shape[2]))


@torch.library.custom_op("dissect::running_mean", mutates_args=())
def _running_mean(x: Tensor, first: int) -> Tensor:
    return _mean(x, first)


@_running_mean.register_fake
def _(x: Tensor, first: int) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[2]))


#: the operators, for those who convert them
OPS = torch.ops.dissect
