"""The promises of a stream, checked through its forms alone; the only oracle is the user's own network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from dissect.stream import Stream, output_time

__all__ = ["Ranks", "close", "law", "leaves", "offline", "steps", "streamed"]

leaves = pytree.tree_leaves


def close(got: Any, wanted: Any, tolerance: float = 1e-9, what: str = "") -> None:
    """Equal shapes, equal NaNs, and no number further away than ``tolerance`` of the largest."""
    pairs = list(zip(leaves(got), leaves(wanted), strict=True))
    for left, right in pairs:
        assert left.shape == right.shape, f"{what}: {tuple(left.shape)} is not {tuple(right.shape)}"
        if right.numel():
            left, right = left.detach().double(), right.detach().double()
            scale = max(float(right.nan_to_num(0.0, 0.0, 0.0).abs().max()), 1e-6)
            same = (left == right) | (left.isnan() & right.isnan())
            error = torch.where(same, 0.0, (left - right).abs()).amax() / scale
            assert error <= tolerance, f"{what}: {float(error):.1e}"


def steps(
    stream: Stream, inputs: Sequence[Any], caches: Sequence[Tensor] | None = None
) -> tuple[list[Any], tuple[Tensor, ...]]:
    """One step a frame: the outputs, and the caches at the end."""
    timed = [
        (leaf, dim)
        for leaf, dim in zip(leaves(tuple(inputs)), stream.dissected.time_dims, strict=True)
        if dim is not None
    ]
    held = tuple(stream.caches(timed[0][0].shape[0]) if caches is None else caches)
    outputs = []
    for time in range(timed[0][0].shape[timed[0][1]]):
        out, *new = stream.step(*stream.frame(tuple(inputs), time), *held)
        outputs.append(out)
        held = tuple(new)
    return outputs, held


def axes_of(stream: Stream) -> list[Any]:
    return [output.value.axes for output in stream.dissected.outputs if output.value is not None]


def columns(stream: Stream, out: Any) -> list[Any]:
    """The clip form's result, one entry a frame, as the step form gives them."""
    spec = pytree.tree_structure(out)
    parts = [leaf.unbind(output_time(axes)) for leaf, axes in zip(leaves(out), axes_of(stream), strict=True)]
    return [pytree.tree_unflatten(list(row), spec) for row in zip(*parts, strict=True)]


def law(stream: Stream, *inputs: Any, chunks: Sequence[int] = (1, 2, 5), tolerance: float = 1e-9) -> None:
    """Clip form, chunks and steps agree, outputs and caches."""
    with torch.no_grad():
        frames, batch = next(
            (leaf.shape[dim], leaf.shape[0])
            for leaf, dim in zip(leaves(inputs), stream.dissected.time_dims, strict=True)
            if dim is not None
        )
        whole = columns(stream, stream.clip(*inputs))
        single, held = steps(stream, inputs)
        close(single, whole, tolerance, "steps against the clip form")
        for size in (*chunks, frames):
            caches: Sequence[Tensor] = stream.caches(batch)
            got = []
            for start in range(0, frames, size):
                out, *caches = stream.chunk(*part(stream, inputs, start, min(start + size, frames)), *caches)
                got += columns(stream, out)
            close(got, whole, tolerance, f"chunks of {size} against the clip form")
            close(tuple(caches), held, tolerance, f"caches after chunks of {size} against those after steps")


def part(stream: Stream, inputs: Sequence[Any], start: int, stop: int) -> Any:
    """A piece of the clip."""
    spec = pytree.tree_structure(tuple(inputs))
    cut = [
        leaf if dim is None else leaf.narrow(dim, start, stop - start)
        for leaf, dim in zip(leaves(tuple(inputs)), stream.dissected.time_dims, strict=True)
    ]
    return pytree.tree_unflatten(cut, spec)


def streamed(stream: Stream, *inputs: Any, frames: int) -> Any:
    """The offline positions out of a stream and its flush: what the original network gives for the clip."""
    out = stream.offline(*inputs)
    spec = pytree.tree_structure(out)
    picked = []
    for leaf, axes, clock in zip(leaves(out), axes_of(stream), stream.leaf_timings, strict=True):
        dim = output_time(axes)
        start = clock.delay - stream.timing.delay
        count = clock.length(frames)
        assert leaf.shape[dim] > start + clock.stride * (count - 1), "the flush ended too early"
        index = [start + clock.stride * position for position in range(count)]
        leaf = leaf.index_select(dim, torch.tensor(index)) if axes.time is not None else leaf.select(dim, index[-1])
        if axes.window is not None and count < leaf.shape[axes.window]:  # weights of the positions that there are
            leaf = leaf.narrow(axes.window, leaf.shape[axes.window] - count, count)
        picked.append(leaf)
    return pytree.tree_unflatten(picked, spec)


def offline(stream: Stream, network: nn.Module, clip: Tensor, lengths: Sequence[int], tolerance: float = 1e-9) -> int:
    """Stream and flush give the network's own output at every length that it accepts; returns how many those were."""
    compared = 0
    with torch.no_grad():
        for frames in lengths:
            cut = clip[:, :, :frames]
            try:
                wanted = network(cut.clone())
            except (RuntimeError, ValueError, IndexError):
                continue  # a clip of this length is too short for it
            if not all(leaf.numel() and bool(leaf.isfinite().all()) for leaf in leaves(wanted)):
                continue
            if not all(clock.length(frames) > 0 for clock in stream.leaf_timings):
                continue  # nothing is left of a clip of this length, of which the network makes a sum of 0
            close(streamed(stream, cut, frames=frames), wanted, tolerance, f"a clip of {frames} frames")
            compared += 1
    return compared


class Ranks(fx.Interpreter):
    """The highest rank of all tensors of a run but parameters."""

    highest = 0

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and n.op != "get_attr":
            self.highest = max(self.highest, value.dim())
        return value
