"""A step as the ONNX exporter takes it: flat, its rows cleared on demand, in the precision that was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = ["Flat", "Resetting", "recast"]


class Flat(nn.Module):
    """A step whose outputs are flat, without those that never change.

    ``dtype``: what frames are brought to; outputs come in float32 whatever it is, caches as they are.
    """

    def __init__(self, step: nn.Module, frames: int, kept: Sequence[bool], dtype: torch.dtype) -> None:
        super().__init__()
        self.step = step
        self.frames = frames
        self.kept = tuple(kept)
        self.dtype = dtype

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        given = [self.brought(frame, self.dtype) for frame in args[: self.frames]]
        values = tuple(self.step(*given, *args[self.frames :]))
        outputs = [value for value, kept in zip(values, self.kept, strict=False) if kept]
        return (*(self.brought(value, torch.float32) for value in outputs), *values[len(self.kept) :])

    def brought(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        return value.to(dtype) if value.is_floating_point() and self.dtype != torch.float32 else value


class Resetting(nn.Module):
    """A step whose last input clears the caches of single rows first."""

    def __init__(self, step: nn.Module, frames: int) -> None:
        super().__init__()
        self.step = step
        self.frames = frames

    def forward(self, *args: Tensor) -> Any:
        *given, reset = args
        frames, caches = given[: self.frames], given[self.frames :]
        fresh = [
            torch.where(reset.reshape(-1, *[1] * (cache.dim() - 1)), torch.zeros_like(cache), cache) for cache in caches
        ]
        return self.step(*frames, *fresh)


def recast(module: fx.GraphModule, old: torch.dtype, new: torch.dtype) -> None:
    """Compute in ``new`` what was computed in ``old``, parameters, constants and casts, in place, in all graphs inside."""
    module.to(new)
    for inner in module.modules():
        if not isinstance(inner, fx.GraphModule):
            continue
        for node in inner.graph.nodes:
            if node.op == "call_function":
                node.args = fx.node.map_aggregate(node.args, lambda leaf: new if leaf is old else leaf)
                node.kwargs = fx.node.map_aggregate(node.kwargs, lambda leaf: new if leaf is old else leaf)
        inner.recompile()
