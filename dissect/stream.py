"""The stream: a network dissected, in its clip form and its step form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree  # the specs that torch.export itself hands out

from dissect import forms
from dissect.capturing import capture, copied
from dissect.errors import NotStreamable, Refusal
from dissect.inputs import Input, Inputs
from dissect.plan import Options, Plan
from dissect.rewrite import rewrite
from dissect.timing import Timing
from dissect.values import Dissected

__all__ = ["Stream", "StreamTiming", "convert", "plan"]


@dataclass(frozen=True)
class StreamTiming:
    """Timing of the whole network, in frames.

    delay            frames between a frame's arrival and the output of its position
    receptive_field  frames that one output depends on
    warmup           first outputs' frames, until the receptive field lies inside the stream
    stride           frames between two positions of the offline output
    """

    delay: int
    receptive_field: int
    warmup: int
    stride: int


class Stream:
    """A dissected network.

    clip, step       its two forms, :class:`torch.nn.Module`; they share parameters
    plan             what became of each layer
    timing           delay, receptive field, warm-up and stride in frames
    example          the inputs it was converted with
    """

    def __init__(
        self, dissected: Dissected, options: Options, example: tuple[Any, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.dissected = dissected
        self.options = options
        self.example = example
        self.plan = Plan(options.preset, dissected.rows)
        self.cache_list = forms.caches_of(dissected)
        self.clip = forms.build(dissected, "clip")
        self.step = forms.build(dissected, "step")
        self.chunk = forms.build(dissected, "chunk")
        for form in (self.clip, self.step, self.chunk):
            form.eval()
        self._dtype, self._device = dtype, device
        self.leaf_timings: tuple[Timing, ...] = tuple(
            output.value.clock for output in dissected.outputs if output.value is not None and not output.value.constant
        )
        delay = max(timing.delay for timing in self.leaf_timings)
        old = max(timing.old for timing in self.leaf_timings)
        new = min(timing.new for timing in self.leaf_timings)
        self.timing = StreamTiming(delay, old - new + 1, old, max(timing.stride for timing in self.leaf_timings))
        self.preprocess: Any = None
        self.labels: Sequence[str] | None = None

    def caches(self, batch: int = 1) -> tuple[Tensor, ...]:
        """The caches of ``batch`` fresh streams: zeros, batch first."""
        parameter = next(self.clip.parameters(), None)
        dtype = parameter.dtype if parameter is not None and parameter.is_floating_point() else self._dtype
        return forms.fresh(self.cache_list, batch, dtype, parameter.device if parameter is not None else self._device)

    @property
    def cache_bytes(self) -> int:
        """Bytes of all caches of one stream."""
        return sum(cache.numel() * cache.element_size() for cache in self.caches())

    def frame(self, inputs: Sequence[Any], time: int) -> tuple[Any, ...]:
        """The clip's inputs at one time, as the step form takes them; ``inputs`` are the network's own, or dense ones."""
        taken = []
        for leaf, dim in zip(self.leaves(inputs), self.dissected.time_dims, strict=True):
            taken.append(leaf if dim is None else leaf.select(dim, time))
        return self.dissected.inputs.nested(taken)

    def dense(self, *inputs: Any, frames: int | None = None) -> tuple[Any, ...]:
        """The network's own inputs as the chunk form takes them: every frame of the stream, time on an axis of its own.

        Where batch and time are merged, ``frames`` is the clip's length (default: the example's).
        """
        return self.dissected.inputs.dense(inputs, frames)

    def original(self, *dense: Any) -> tuple[Any, ...]:
        """The network's own inputs for a dense stream: the inverse of :meth:`dense`."""
        return self.dissected.inputs.original(dense)

    def apart(self, out: Any, frames: int, original: bool = False) -> Any:
        """A result of the clip form, or of the original, for a clip of ``frames`` frames, as the chunk form gives it.

        The two differ where the network merges time with other axes: the chunk form has it on an axis of its own.
        """
        leaves, spec = pytree.tree_flatten(out)
        done = []
        for leaf, output in zip(leaves, self.dissected.outputs, strict=True):
            if output.own is not None and output.value is not None:
                count = output.value.clock.length(frames) if original else frames
                leaf = Input(output.own, leaf.dtype, leaf.device).dense(leaf, count)
            done.append(leaf)
        return pytree.tree_unflatten(done, spec)

    def leaves(self, inputs: Sequence[Any]) -> list[Tensor]:
        """The dense tensors of ``inputs``, one for each frame that a step takes."""
        return [leaf for leaf in pytree.tree_leaves(self.dissected.inputs.dense(inputs)) if isinstance(leaf, Tensor)]

    def flush_frames(self, frames: int) -> int:
        """How many steps a flush takes after ``frames`` frames (of zeros, with the ``length`` cache set)."""
        if not any(cache.spec.role == "length" for cache in self.cache_list):
            return 0
        ends = [timing.last(frames) for timing in self.leaf_timings if timing.length(frames) > 0]
        return max(0, max(ends, default=0) - (frames - 1))

    def offline(self, *inputs: Any) -> Any:
        """The outputs of one stream over a whole clip and its flush, without the first ``delay`` frames.

        For the ``exact`` preset every ``timing.stride``-th of them is the original network's own position, and the last one its last.
        """
        leaves = self.leaves(inputs)
        dims = self.dissected.time_dims
        frames, batch = next(
            (leaf.shape[dim], leaf.shape[0]) for leaf, dim in zip(leaves, dims, strict=True) if dim is not None
        )
        out, *caches = self.chunk(*self.dissected.inputs.nested(leaves), *self.caches(batch))
        extra = self.flush_frames(frames)
        if extra:
            # As a runner does it: nobody knows when a stream will end until it has.
            roles = [cache.spec.role for cache in self.cache_list]
            caches = [
                caches[roles.index("age")].clone() if role == "length" else cache
                for role, cache in zip(roles, caches, strict=True)
            ]
            silence = [
                leaf
                if dim is None
                else leaf.new_zeros([extra if at == dim else size for at, size in enumerate(leaf.shape)])
                for leaf, dim in zip(leaves, dims, strict=True)
            ]
            rest, *_ = self.chunk(*self.dissected.inputs.nested(silence), *caches)
            pairs = zip(pytree.tree_leaves(out), pytree.tree_leaves(rest), self.dissected.outputs, strict=True)
            joined = [
                leaf
                if output.value is None or output.value.constant
                else torch.cat([leaf, more], output_time(output.value.axes))
                for leaf, more, output in pairs
            ]
            out = pytree.tree_unflatten(joined, pytree.tree_structure(out))
        return self.trimmed(out, self.timing.delay)

    def trimmed(self, out: Any, start: int) -> Any:
        """An output of the clip form without its first ``start`` frames."""
        leaves = pytree.tree_leaves(out)
        outputs = list(self.dissected.outputs)
        cut = []
        for leaf, output in zip(leaves, outputs, strict=True):
            if output.value is None or output.value.constant:
                cut.append(leaf)
                continue
            dim = output_time(output.value.axes)
            first = min(start, leaf.shape[dim])
            cut.append(leaf.narrow(dim, first, leaf.shape[dim] - first))
        return pytree.tree_unflatten(cut, pytree.tree_structure(out))

    def export(self, path: str | Path, **options: Any) -> Path:
        """Write the step model to ``path``; see :func:`dissect.export`."""
        from dissect.exporting import export

        return export(self, path, **options)

    def __repr__(self) -> str:
        facts = f"preset={self.options.preset!r}, delay={self.timing.delay}, caches={self.cache_bytes:,} bytes"
        return f"Stream({self.dissected.captured.name}, {facts})"


def output_time(axes: Any) -> int:
    """The dimension that carries time in the clip form's output."""
    return axes.time if axes.time is not None else min(2, len(axes))


def _surgery(
    model: nn.Module | ExportedProgram | str | Path,
    example: Any,
    options: Options,
    time_dim: int | Sequence[int | None],
    layout: str | Sequence[str | None] | None,
    rates: Sequence[int] | None,
) -> tuple[Dissected, tuple[Any, ...]]:
    args = copied(example)
    if isinstance(model, (str, Path)):
        from dissect.loading import load

        model = load(model, example=args)
    inputs = Inputs.of(args, time_dim, layout, rates)
    captured = capture(model, args, inputs)
    dissected = rewrite(captured, options, inputs)
    if 1 == inputs.batch < captured.batch and dissected.refusals and all(map(_of_rows, dissected.refusals)):
        alone = rewrite(
            capture(model, args, inputs, (1,)), options, inputs
        )  # a network of one row, or a loop over rows
        dissected = dissected if alone.refusals else alone
    if not dissected.refusals:
        options.check_heard(dissected.heard, [row.path for row in dissected.rows])
    return dissected, args


def _of_rows(refusal: Refusal) -> bool:
    return "batch" in refusal.reason


def convert(
    model: nn.Module | ExportedProgram | str | Path,
    example: Any,
    preset: str = "d3d",
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    pool: str = "window",
    window: int | None = None,
    time_dim: int | Sequence[int | None] = 2,
    layout: str | Sequence[str | None] | None = None,
    rates: Sequence[int] | None = None,
    *,
    skip: str = "concat",
    fill: str = "zeros",
    stem: int | None = None,
) -> Stream:
    """Dissect a network: the same network, one frame at a time.

    ``model`` is a module, an exported program, or a file of either; it is not changed. ``example`` is the clip
    tensor, batch first, or a tuple of the model's inputs (which may hold lists); its values do not matter, its
    length sets the window of global pools. ``time_dim`` is the clip's time dimension (one for every input, or
    one each). ``overrides`` maps path patterns to settings, ``{"layer1.*.conv1": {"depth": 3}}``.

    For the preset ``d3d``, ``skip`` says how a convolution takes in the frame that it cached: put beside the present one
    (``concat``), added to it before one convolution without time (``sum``), or not at all (``none``); ``stem`` is the number of
    frames that the first temporal convolution sees (3), whatever the skip. ``fill`` says what stands before the first frame:
    ``zeros``, or that frame again (``replicate``; not for ``exact``, whose edges are the original's).

    Raises :class:`~dissect.CaptureError` where torch.export cannot take the network, :class:`~dissect.NotStreamable` with
    all operators that have no streaming form, :class:`~dissect.PlanError` for options that fit nothing.
    """
    options = Options.checked(preset, pool, window, overrides, skip, fill, stem)
    dissected, inputs = _surgery(model, example, options, time_dim, layout, rates)
    if dissected.refusals:
        raise NotStreamable(dissected.refusals)
    clip = next(unit for unit in dissected.inputs.tensors if unit.timed)
    dtype = clip.dtype if clip.dtype.is_floating_point else torch.get_default_dtype()
    return Stream(dissected, options, inputs, dtype, clip.device)


def plan(
    model: nn.Module | ExportedProgram | str | Path,
    example: Any,
    preset: str = "d3d",
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    pool: str = "window",
    window: int | None = None,
    time_dim: int | Sequence[int | None] = 2,
    layout: str | Sequence[str | None] | None = None,
    rates: Sequence[int] | None = None,
    *,
    skip: str = "concat",
    fill: str = "zeros",
    stem: int | None = None,
) -> tuple[Plan, tuple[Any, ...]]:
    """The plan alone, and the refusals, without building anything; arguments as for :func:`convert`."""
    options = Options.checked(preset, pool, window, overrides, skip, fill, stem)
    dissected, _ = _surgery(model, example, options, time_dim, layout, rates)
    return Plan(options.preset, dissected.rows), dissected.refusals
