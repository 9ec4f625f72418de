"""Verify: every promise of a stream, measured.

The law first: the clip form equals the step form, whatever the chunking, the batch, and with a reset in the middle.
Then the runtime: the exported file equals the step form. Then the original network, by what the preset promises:
``exact``, its own output for the whole clip by stream and flush, and that for the last frames of a longer stream;
``d3d``, a still scene in steady state; ``causal``, the original with its kernels shifted. Frames are random, never the
example.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import lcm
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree  # the specs that torch.export itself hands out

from dissect import oracle
from dissect.capturing import evaluating
from dissect.leaves import cloned, rows, select, stack, tensors, unstack
from dissect.ledger import rows_first
from dissect.parting import first_part
from dissect.primitives import History, unforgetting
from dissect.reports import Check, Report
from dissect.stream import Stream, output_time

__all__ = ["verify"]

Progress = Callable[[str], None]


def verify(
    stream: Stream,
    model: nn.Module | ExportedProgram | None = None,
    *,
    onnx: str | Path | None = None,
    frames: int | None = None,
    seed: int = 0,
    runtime: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Measure every promise of ``stream``; ``model`` is the original network, without it only the law is checked.

    ``onnx`` is an exported file to check (else one is made and thrown away); ``runtime=False`` leaves ONNX Runtime out.
    ``frames`` is the number of frames for the law (default: enough for every chunking).
    """
    with torch.no_grad():
        return Report(tuple(_Verifier(stream, seed, progress or (lambda _: None)).run(model, onnx, frames, runtime)))


def largest(x: Tensor) -> float:
    """The largest number in a tensor, whatever its sign; 0 for an empty one."""
    return float(x.detach().double().nan_to_num(0.0, 0.0, 0.0).abs().max()) if x.numel() else 0.0


class _Verifier:
    def __init__(self, stream: Stream, seed: int, say: Progress) -> None:
        self.stream = stream
        self.generator = torch.Generator().manual_seed(seed)
        self.say = say
        leaf = next((leaf for leaf in stream.caches(1) if leaf.is_floating_point()), None)
        own = leaf.dtype if leaf is not None else torch.float32
        graph = stream.dissected.captured.graph
        layers = sum(node.op == "call_function" and "conv" in str(node.target) for node in graph.nodes)
        # rounding adds up from layer to layer
        self.tolerance = 1e-9 if own == torch.float64 else max(_rounding(own), 1e-4 * max(1.0, layers / 20))
        self.exported = 1e-3 if own == torch.float64 else self.tolerance  # of a file, whose numbers are float32
        narrow = stream.dissected.captured.narrow
        self.coarse = (
            f"the original computes a part of itself in {str(narrow).removeprefix('torch.')}" if narrow else ""
        )
        self.rounding = max(self.tolerance, _rounding(narrow))  # of the original
        self.rows: list[Check] = []
        self.least: int | None = None  # rows that the original can be run on

    def clip(self, batch: int, frames: int, still: bool = False) -> tuple[Any, ...]:
        """Inputs like the example, of another scene: its frames in another order, moved in space, with a little noise.

        Their statistics are the example's, so that no layer is driven where it says the same of everything.
        """
        leaves = self.stream.leaves(self.stream.example)
        drawn = [
            self.drawn(leaf, dim, batch, frames, still)
            for leaf, dim in zip(leaves, self.stream.dissected.time_dims, strict=True)
        ]
        return self.stream.dissected.inputs.nested(drawn)

    def drawn(self, leaf: Tensor, dim: int | None, batch: int, frames: int, still: bool) -> Tensor:
        if leaf.dim() == 0:
            return leaf
        count = 1 if still or dim is None else frames
        known = leaf.detach().cpu().unsqueeze(1) if dim is None else leaf.detach().cpu().movedim(dim, 1)
        if known.numel() and float(known.max()) - float(known.min()) < 1e-6:  # an example of zeros shows nothing
            known = torch.rand(known.shape, generator=self.generator, dtype=torch.float64)
            known = known.to(leaf.dtype) if leaf.is_floating_point() else (known * 2).to(leaf.dtype)
        noise = 0.1 * float(known.double().std()) if known.numel() > 1 and leaf.is_floating_point() else 0.0
        made = []
        for _ in range(batch * count):
            frame = known[self.number(known.shape[0]), self.number(known.shape[1])]
            for at, size in enumerate(frame.shape):
                frame = frame.roll(self.number(size), at) if size > 4 else frame  # few are channels
            jitter = torch.randn(frame.shape, generator=self.generator, dtype=torch.float64)
            made.append((frame + noise * jitter).to(leaf.dtype) if noise else frame)
        drawn = torch.stack(made).unflatten(0, (batch, count))
        drawn = drawn[:, 0] if dim is None else drawn.movedim(1, dim)
        if still and dim is not None:
            drawn = drawn.expand(*[frames if at == dim else -1 for at in range(drawn.dim())])
        result: Tensor = drawn.contiguous().to(leaf.device)
        return result

    def number(self, below: int) -> int:
        """A random number from 0."""
        return int(torch.randint(below, (), generator=self.generator))

    def compare(
        self, pair: str, what: str, got: Any, wanted: Any, tolerance: float, note: str = "", usual: Any = None
    ) -> Check:
        """Adds a check; ``usual`` are outputs of a usual size, of which a thousandth counts where ``wanted`` is near zero."""
        worst = 0.0
        pairs = list(zip(pytree.tree_leaves(got), pytree.tree_leaves(wanted), strict=True))
        sizes = pytree.tree_leaves(usual) if usual is not None else [None] * len(pairs)
        for (left, right), size in zip(pairs, sizes, strict=True):
            if left is None and right is None:  # as some networks return beside their scores
                continue
            left, right = torch.as_tensor(left), torch.as_tensor(right)
            if left.shape != right.shape:
                self.rows.append(
                    Check(pair, what, None, None, False, f"shapes {tuple(left.shape)} and {tuple(right.shape)} differ")
                )
                return self.rows[-1]
            if right.numel():
                left, right = left.double(), right.double()
                scale = max(largest(right), 1e-12, 1e-3 * largest(size) if isinstance(size, Tensor) else 0.0)
                same = (left == right) | (left.isnan() & right.isnan())
                error = float(torch.where(same, 0.0, left - right).abs().max()) / scale
                worst = max(worst, error if error == error else float("inf"))
        self.rows.append(Check(pair, what, worst, tolerance, worst <= tolerance, note))
        return self.rows[-1]

    def run(
        self, model: nn.Module | ExportedProgram | None, onnx: str | Path | None, frames: int | None, runtime: bool
    ) -> list[Check]:
        self.law(frames or 9)
        if model is not None:
            self.say("original")
            getattr(self, self.stream.options.preset)(model)
        if runtime or onnx is not None:
            self.say("ONNX Runtime")
            self.runtime(onnx)
        return self.rows

    # -- the law

    def law(self, frames: int) -> None:
        stream = self.stream
        self.say("clip form")
        inputs = self.clip(3, frames)
        whole = stream.apart(stream.clip(*inputs), frames)
        out, *final = stream.chunk(*inputs, *stream.caches(3))
        self.compare("clip form = one chunk", f"batch 3, {frames} frames", out, whole, self.tolerance)
        for sizes in ((1, 2, 5), (2,)):
            self.say(f"chunks of {', '.join(map(str, sizes))}")
            got = self.chunked(inputs, frames, sizes)
            what = f"batch 3, chunks of {', '.join(map(str, sizes))}, outputs and caches"
            self.compare("clip form = chunks", what, got, (whole, final), self.tolerance)
        self.say("step form")
        reset = frames // 2
        steps, late = self.stepped(inputs, frames, reset)
        what = f"batch 3, {frames} frames, outputs and caches"
        check = self.compare("clip form = step form", what, steps, (whole, final), self.tolerance)
        if not check.ok:
            self.rows[-1] = replace(check, note=first_part(stream, inputs, frames))
        rest = self.cut(inputs, reset, frames, 1)
        again, *fresh = stream.chunk(*rest, *stream.caches(1))
        what = f"one row of three reset after {reset} frames, outputs and caches"
        self.compare("clip form = step form", what, late, (again, fresh), self.tolerance)
        one = self.cut(inputs, 0, frames, 0)
        single = stream.apart(stream.clip(*one), frames)
        self.compare("batch 1 = batch 3", "clip form", self.take(whole, 0), single, self.tolerance)

    def chunked(self, inputs: tuple[Any, ...], frames: int, sizes: Sequence[int]) -> tuple[Any, Sequence[Tensor]]:
        caches: Sequence[Tensor] = self.stream.caches(3)
        parts, at, turn = [], 0, 0
        while at < frames:
            size = min(sizes[turn % len(sizes)], frames - at)
            out, *caches = self.stream.chunk(*self.cut(inputs, at, at + size), *caches)
            parts.append(out)
            at, turn = at + size, turn + 1
        return self.joined(parts, torch.cat), caches

    def stepped(self, inputs: tuple[Any, ...], frames: int, reset: int) -> tuple[Any, Any]:
        """Steps over the whole stream, and again with row 1 reset in the middle (that row alone, from there on)."""
        caches: Sequence[Tensor] = self.stream.caches(3)
        parts, late = [], []
        second: Sequence[Tensor] | None = None
        for time in range(frames):
            frame = self.stream.frame(inputs, time)
            if time == reset:
                second = [cache.clone() for cache in caches]
                for cache in second:
                    cache[1] = 0
            if second is not None:
                out, *second = self.stream.step(*frame, *second)
                late.append(self.second(out))
            out, *caches = self.stream.step(*frame, *caches)
            parts.append(out)
        assert second is not None
        row = [cache[1:2] for cache in second]
        return (self.joined(parts, torch.stack), caches), (self.joined(late, torch.stack), row)

    def joined(self, parts: Sequence[Any], how: Callable[..., Tensor]) -> Any:
        """Outputs of several calls as the clip form gives them."""
        leaves = [pytree.tree_leaves(part) for part in parts]
        result = []
        for index, output in enumerate(self.stream.dissected.outputs):
            column = [row[index] for row in leaves]
            if output.value is None or output.value.constant:
                result.append(column[-1])
            else:
                result.append(
                    stack(column, output.value.axes)
                    if how is torch.stack
                    else torch.cat(column, output_time(output.value.axes))
                )
        return pytree.tree_unflatten(result, pytree.tree_structure(parts[0]))

    def cut(self, inputs: tuple[Any, ...], start: int, stop: int, row: int | None = None) -> tuple[Any, ...]:
        leaves, spec = pytree.tree_flatten(inputs)
        taken = []
        for leaf, dim in zip(leaves, self.stream.dissected.time_dims, strict=True):
            leaf = leaf if row is None or not isinstance(leaf, Tensor) else leaf[row : row + 1]
            taken.append(leaf if dim is None else leaf.narrow(dim, start, stop - start))
        return pytree.tree_unflatten(taken, spec)  # type: ignore[no-any-return]

    def second(self, out: Any) -> Any:
        """Of a step's outputs what is the second row's; a constant has no rows."""
        leaves, spec = pytree.tree_flatten(out)
        outputs = self.stream.dissected.outputs
        return pytree.tree_unflatten(
            [leaf[1:2] if output.moves else leaf for leaf, output in zip(leaves, outputs, strict=True)], spec
        )

    def take(self, out: Any, row: int) -> Any:
        leaves, spec = pytree.tree_flatten(out)
        kept = [
            leaf if output.value is None or output.value.constant else rows(leaf, output.value.axes, row)
            for leaf, output in zip(leaves, self.stream.dissected.outputs, strict=True)
        ]
        return pytree.tree_unflatten(kept, spec)

    # -- the original

    def lengths(self) -> list[int]:
        frames = max(leaf.shape[dim] for leaf, dim in self.timed(self.stream.dense(*self.stream.example)))
        grain = self.stream.dissected.grain
        shorter = [frames - 1, frames - 3, frames // 2 + 1, frames - grain, frames - 2 * grain]
        fit = [length for length in shorter if 0 < length < frames and (frames - length) % grain == 0]
        return [frames, *dict.fromkeys(fit)]

    def timed(self, inputs: tuple[Any, ...]) -> list[tuple[Tensor, int]]:
        leaves = pytree.tree_leaves(inputs)
        return [
            (leaf, dim) for leaf, dim in zip(leaves, self.stream.dissected.time_dims, strict=True) if dim is not None
        ]

    def batch(self, model: nn.Module | ExportedProgram) -> int:
        """Rows for the original: one, but as many as in the example where it takes no other batch."""
        dissected = self.stream.dissected
        given = dissected.inputs.batch
        if isinstance(model, ExportedProgram):
            return given if dissected.captured.batch == given else 1
        if given > 1 and self.least is None:
            try:
                with evaluating(model), torch.no_grad():
                    model(*cloned(self.stream.original(*self.clip(1, self.lengths()[0]))))
                self.least = 1
            except Exception:
                self.least = given
        return self.least or 1

    def exact(self, model: nn.Module | ExportedProgram) -> None:
        run = model.module(check_guards=False) if isinstance(model, ExportedProgram) else model
        promise = self.stream.plan.exact
        compared = 0
        for frames in self.lengths():
            inputs = self.clip(self.batch(model), frames)
            try:
                wanted = self.answer(run, inputs, frames)
            except Exception:
                if frames == self.lengths()[0]:
                    raise
                continue  # the original accepts no clip of this length
            if min(timing.length(frames) for timing in self.stream.leaf_timings) < 1:
                continue  # shorter than a window over the clip, which has no answer yet
            out = self.stream.offline(*inputs)
            what = f"stream and flush of {frames} frames"
            missing = self.missing(out, frames)
            if missing > 0:
                note = f"the flush ends {missing} frames before the last position"
                self.rows.append(Check("original = exact", what, None, None, False, note))
                return
            got = self.positions(out, frames)
            tolerance = self.rounding if promise else float("inf")
            note = (
                self.coarse
                if promise
                else "approximate by the plan: " + ", ".join(row.path for row in self.stream.plan.approximate[:3])
            )
            check = self.compare("original = exact", what, got, wanted, tolerance, note)
            if (
                not check.ok
                and frames != self.lengths()[0]
                and oracle.differs(model, self.stream.original(*inputs), self.stream.dissected.captured)
            ):
                note = "for clips of this length the original is another network (its settings follow the length)"
                self.rows[-1] = replace(check, ok=True, error=None, note=note)
            elif not check.ok and frames != self.lengths()[0] and self.resized(got, wanted):
                note = "for clips of this length the original's outputs have another size, and a step's have one"
                self.rows[-1] = replace(check, ok=True, note=note)
            elif not check.ok:
                self.rows[-1] = replace(check, note=first_part(self.stream, inputs, frames, model))
            compared += 1
            if compared == 2:
                break
        if promise and self.rows[-1].ok:
            self.beyond(run, self.batch(model))

    def answer(self, run: nn.Module, inputs: tuple[Any, ...], frames: int) -> Any:
        """The original's own result for a clip of so many frames."""
        with evaluating(run):
            return self.theirs(run(*cloned(self.stream.original(*inputs))), frames)

    def beyond(self, run: nn.Module, batch: int) -> None:
        """A stream longer than the clip: what the whole clip gives one answer for, against the original on the last frames.

        They are equal where nothing before those frames counts any more. Elsewhere the error is told: there, frames stand
        where the original has its padding.
        """
        ended = {
            at: value.clock
            for at, value in enumerate(output.value for output in self.stream.dissected.outputs)
            if value and not value.constant and value.axes.time is None and value.axes.window is None
        }
        if not ended:
            return
        frames = self.lengths()[0]
        traced = [value.clock.stride for value in self.stream.dissected.trace.values() if not value.constant]
        period = lcm(self.stream.dissected.grain, *traced)
        more = -(-3 // period) * period
        inputs = self.clip(batch, frames + more)
        wanted = pytree.tree_leaves(self.answer(run, self.cut(inputs, more, more + frames), frames))
        got = pytree.tree_leaves(self.positions(self.stream.offline(*inputs), frames + more))
        note = ""
        if any(clock.endless for clock in ended.values()) or unforgetting(self.stream.step):
            note = "every frame so far counts"
        elif any(row.decision.startswith("held") for row in self.stream.plan):
            note = "positions are held from where they were at the stream's beginning"
        elif any(clock.old > clock.last(frames) for clock in ended.values()) or any(
            max(row.padding or (0, 0)) > 0 for row in self.stream.plan
        ):
            note = f"{self.stream.timing.receptive_field} frames count, and the original has padding there"
        self.compare(
            "original on the last frames = exact",
            f"the last {frames} frames of {frames + more}",
            [got[at] for at in ended],
            [wanted[at] for at in ended],
            float("inf") if note else self.rounding,
            note or self.coarse,
        )

    def resized(self, got: Any, wanted: Any) -> bool:
        """Whether outputs differ in size in a dimension that is neither the batch nor time."""
        for output, left, right in zip(
            self.stream.dissected.outputs, pytree.tree_leaves(got), pytree.tree_leaves(wanted), strict=True
        ):
            dims = output.value.axes.dims if output.value is not None and output.moves else ()
            if dims and len(dims) == left.dim() == right.dim():
                sizes = zip(dims, left.shape, right.shape, strict=True)
                if any(axis.plain and one != other for axis, one, other in sizes):
                    return True
        return False

    def theirs(self, out: Any, frames: int) -> Any:
        """A result of the original for one row as the chunk form gives it; some networks squeeze a batch of one away."""
        leaves, spec = pytree.tree_flatten(out)
        for index, output in enumerate(self.stream.dissected.outputs):
            axes = None if output.value is None or output.value.constant else output.own or output.value.axes
            if axes is not None and axes.rows is not None and leaves[index].dim() == len(axes) - 1:
                leaves[index] = leaves[index].unsqueeze(axes.rows)
        return self.stream.apart(pytree.tree_unflatten(leaves, spec), frames, original=True)

    def missing(self, out: Any, frames: int) -> int:
        """How many outputs a stream and its flush lack for the offline network's last position."""
        ends = zip(pytree.tree_leaves(out), self.stream.dissected.outputs, strict=True)
        lacking: list[int] = [
            output.value.clock.last(frames) - self.stream.timing.delay + 1 - leaf.shape[output_time(output.value.axes)]
            for leaf, output in ends
            if output.value is not None and not output.value.constant
        ]
        return max(lacking)

    def positions(self, out: Any, frames: int) -> Any:
        """The offline network's own positions out of a stream and its flush."""
        leaves, spec = pytree.tree_flatten(out)
        kept = []
        delay = self.stream.timing.delay
        for leaf, output in zip(leaves, self.stream.dissected.outputs, strict=True):
            if output.value is None or output.value.constant:
                kept.append(leaf)
                continue
            clock, dim = output.value.clock, output_time(output.value.axes)
            last = clock.last(frames) - delay
            if output.value.axes.time is None:
                leaf = leaf.select(dim, last)
            else:
                index = torch.arange(clock.delay - delay, last + 1, clock.stride, device=leaf.device)
                leaf = leaf.index_select(dim, index)
            window = output.value.axes.window
            if (
                window is not None and output.value.axes[window].kinds == "K"
            ):  # of a shorter clip, the positions there are
                count = min(clock.length(frames), leaf.shape[window])
                leaf = leaf.narrow(window, leaf.shape[window] - count, count)
            kept.append(leaf)
        return pytree.tree_unflatten(kept, spec)

    def d3d(self, model: nn.Module | ExportedProgram) -> None:
        frames = self.lengths()[0]
        pair, what = "original = d3d", "a still scene in steady state, away from the clip's edges"
        batch, inputs, wanted = self.imagined(oracle.Still, model, frames, pair, what, still=True)
        if wanted is None:
            return
        caches: Sequence[Tensor] = self.stream.caches(batch)
        steady = self.stream.timing.warmup + 1
        frame = self.stream.frame(inputs, 0)
        out = None
        for _ in range(steady):
            out, *caches = self.stream.step(*frame, *caches)
        leaves = pytree.tree_leaves(self.theirs(wanted, frames))
        ends = []
        for leaf, output in zip(leaves, self.stream.dissected.outputs, strict=True):
            axes = None if output.value is None or output.value.constant else output.value.axes
            if axes is not None:
                leaf = rows_first(leaf, axes) if axes.time is None else select(leaf, axes)
            ends.append(leaf)
        endless = any(timing.endless for timing in self.stream.leaf_timings)
        asked = {key for changes in self.stream.options.overrides.values() for key in changes}
        placed = [row.path or row.op for row in self.stream.plan if row.placed and row.future]
        kept = self.stream.options.pool != "none" and asked <= {"depth", "skip", "fill"}
        promise = kept and not endless and not placed
        note = "no scene is steady to what remembers every frame so far" if endless else ""
        note = (
            f"no scene is still to what tells positions of the clip apart: {', '.join(placed[:3])}" if placed else note
        )
        tolerance = max(self.rounding, 1e-4) if promise else float("inf")
        usual = self.stream.clip(*self.clip(batch, frames))  # of a still scene differences are nothing
        outs = pytree.tree_leaves(out)
        if any(row.placed for row in self.stream.plan):  # of equal frames, any may be the first, or the largest
            for at, leaf in enumerate(outs):
                if isinstance(leaf, Tensor) and not leaf.is_floating_point():
                    outs[at] = ends[at] = None
        self.compare(pair, what, outs, ends, tolerance, note or self.coarse, usual)

    def causal(self, model: nn.Module | ExportedProgram) -> None:
        frames = self.lengths()[0]
        pair, what = "original, kernels shifted = causal", f"{frames} frames"
        shifted = partial(oracle.Shifted, repeated=self.stream.options.fill == "replicate")
        _, inputs, wanted = self.imagined(shifted, model, frames, pair, what)
        if wanted is None:
            return
        out = self.stream.apart(self.stream.clip(*inputs), frames)
        wanted = self.theirs(wanted, frames)
        got, kept = [], []
        for leaf, want, output in zip(
            pytree.tree_leaves(out), pytree.tree_leaves(wanted), self.stream.dissected.outputs, strict=True
        ):
            if output.value is None or output.value.constant:
                continue
            dim, stride = output_time(output.value.axes), output.value.clock.stride
            if output.value.axes.time is None:
                got.append(leaf.select(dim, (frames - 1) // stride * stride))
            else:
                first = -(-output.value.clock.new // stride)  # those before have seen no frame of the clip
                got.append(leaf.index_select(dim, torch.arange(0, frames, stride)[first:]))
                want = want.narrow(dim, first, want.shape[dim] - first)
            kept.append(want)
        options, future = self.stream.options, [row.path or row.op for row in self.stream.plan if row.future]
        phases = any(row.decision.startswith("held until") for row in self.stream.plan)  # two that meet
        given = options.pool == "window" and options.window is None and not options.overrides
        promise = given and not future and not phases
        note = f"offline, every frame sees the whole clip through {', '.join(future[:3])}" if future else ""
        tolerance = max(self.rounding, 1e-4) if promise else float("inf")
        self.compare(pair, what, got, kept, tolerance, note or self.coarse)

    def imagined(
        self, kind: Any, model: Any, frames: int, pair: str, what: str, still: bool = False
    ) -> tuple[int, tuple[Any, ...], Any]:
        """Rows, a clip of so many, and what the original gives for it in the manner of ``kind``; None where it cannot.

        The nodes of the original are found by name: where it is another network for one row, more are taken.
        """
        captured, inputs = self.stream.dissected.captured, ()
        batch = least = self.batch(model)
        try:
            for batch in dict.fromkeys((least, captured.batch)):
                inputs = self.clip(batch, frames, still)
                own = self.stream.original(*inputs)
                module = oracle.original(model, own)
                if oracle.calls(module.graph) == oracle.calls(captured.graph):
                    break
            return batch, inputs, kind(module, self.stream.dissected.trace).run(*pytree.tree_leaves(own))
        except Exception as error:
            said = (str(error).strip().splitlines() or [""])[0][:120]
            note = f"the original cannot be run that way: {type(error).__name__} {said}".strip()
            self.rows.append(Check(pair, what, None, None, True, note))
            return batch, inputs, None

    # -- the runtime

    def runtime(self, onnx: str | Path | None) -> None:
        from dissect.exporting import export

        if onnx is not None:
            self.drive(Path(onnx))
            return
        with tempfile.TemporaryDirectory() as folder:
            self.drive(export(self.stream, Path(folder) / "step.onnx"))

    def drive(self, path: Path) -> None:
        """Several streams at once, for so long that what every cache holds comes out again; then their flush, if any.

        A live step is compared once it is warm. Caches of 8 bits promise nothing: the error is told.
        """
        from dissect.runner import Runner

        pair, batch = "step form = ONNX Runtime", 2
        runner = Runner(path, batch=batch, providers=["CPUExecutionProvider"])
        other = self.another(runner)
        if other:
            self.rows.append(Check(pair, path.name, None, None, False, other))
            return
        if runner.period > 1:
            self.drive_native(path)
            return
        timing = self.stream.timing
        held = {cache.dtype for cache in runner.caches if cache.role == "cache"}
        tolerance, note = _narrow(held, self.exported)
        clocked = any(cache.spec.role == "age" for cache in self.stream.cache_list)
        live = clocked and not any(cache.role == "age" for cache in runner.caches)
        frames = timing.warmup + 3 if live else self.enough(min(max(7, self.deepest() + 3), 24))
        if frames > 128:
            self.rows.append(Check(pair, f"live, a warm-up of {timing.warmup} frames", None, None, True))
            return
        inputs = self.clip(batch, frames)
        skipped = timing.warmup if live else timing.delay
        outputs = []
        for time in range(frames):
            out = runner.step(*self.arrays(self.stream.frame(inputs, time)))
            outputs += [out] if time >= skipped else []
        what = f"batch {batch}, {frames} frames"
        if timing.delay and not live:
            what += f" and {self.stream.flush_frames(frames)} of flush"
            outputs += runner.flush()
            wanted = self.clip_of(self.stream.offline(*inputs))
        else:
            out, *_ = self.stream.chunk(*inputs, *self.stream.caches(batch))
            wanted = self.clip_of(self.stream.trimmed(out, skipped))
        if len(outputs) != len(wanted):
            self.rows.append(Check(pair, what, None, None, False, f"{len(outputs)} outputs, not {len(wanted)}"))
        else:
            given = [self.moving(out) for out in outputs]
            pairs = [pair for row in zip(given, wanted, strict=True) for pair in zip(*row, strict=True)]
            there = [(left, right) for left, right in pairs if left is not None]  # some outputs end before others
            self.compare(pair, what, [left for left, _ in there], [right for _, right in there], tolerance, note)

    def another(self, runner: Any) -> str:
        """What tells that a file was made from another network, or with other options; empty where nothing does."""
        ours = [tuple(array.shape[1:]) for array in self.arrays(self.stream.frame(self.stream.example, 0))]
        theirs = [tuple(spec.shape[1:]) for spec in runner.inputs]
        if ours != theirs:
            return f"the file is of another network: its frames are {theirs}, and this one's {ours}"
        if runner.period == 1 and runner.delay != self.stream.timing.delay:
            return (
                f"the file is of another network or other options: its delay is {runner.delay} frames, "
                f"and this one's {self.stream.timing.delay}"
            )
        return ""

    def enough(self, frames: int) -> int:
        """At least so many frames that some output comes, in the stream or in its flush."""
        delay = self.stream.timing.delay
        while frames <= delay and frames + self.stream.flush_frames(frames) <= delay:
            frames += 1
        return frames

    def deepest(self) -> int:
        """Frames in the longest history."""
        histories = [layer for layer in self.stream.step.modules() if isinstance(layer, History)]
        return max((layer.depth for layer in histories), default=0)

    def drive_native(self, path: Path) -> None:
        """A file in the native cadence: three streams and one, each with its flush, at the positions that there are."""
        from dissect.runner import Runner

        for batch in (3, 1):
            runner = Runner(path, batch=batch, providers=["CPUExecutionProvider"])
            frames = self.enough(2 * runner.period + 3)
            inputs = self.clip(batch, frames)
            given = [runner.step(*self.arrays(self.stream.frame(inputs, time))) for time in range(frames)]
            got = [tensors(out) for out in (*given, *runner.flush()) if out is not None]
            wanted = []
            for time, row in enumerate(self.clip_of(self.stream.offline(*inputs)), self.stream.timing.delay):
                there = [
                    leaf
                    for leaf, spec in zip(row, runner.outputs, strict=True)
                    if (time - spec.delay) % spec.stride == 0 and (time < frames or time <= spec.last(frames))
                ]
                wanted += [there] if there else []
            pair, what = "step form = ONNX Runtime", f"native cadence, batch {batch}, {frames} frames and the flush"
            if [len(row) for row in got] != [len(row) for row in wanted]:
                self.rows.append(Check(pair, what, None, None, False, f"{len(got)} outputs, not {len(wanted)}"))
            else:
                held = {cache.dtype for cache in runner.caches if cache.role == "cache"}
                tolerance, note = _narrow(held, self.exported)
                self.compare(pair, what, got, wanted, tolerance, note)

    def arrays(self, frame: Any) -> list[Any]:
        return [
            (leaf.float() if leaf.is_floating_point() else leaf).contiguous().numpy()
            for leaf in pytree.tree_leaves(frame)
        ]

    def moving(self, out: Any) -> list[Any]:
        """The leaves of a runner's result that depend on the clip; None for one that is at an end."""
        outputs = self.stream.dissected.outputs
        return [
            leaf
            for leaf, output in zip(pytree.tree_leaves(out), outputs, strict=True)
            if output.value is not None and not output.value.constant
        ]

    def clip_of(self, out: Any) -> list[list[Tensor]]:
        """The clip form's output as one entry a frame."""
        columns = []
        for leaf, output in zip(pytree.tree_leaves(out), self.stream.dissected.outputs, strict=True):
            if output.value is not None and not output.value.constant:
                columns.append(unstack(leaf, output.value.axes))
        return [list(row) for row in zip(*columns, strict=True)]


def _rounding(dtype: torch.dtype | None) -> float:
    """What a result may be off where it is computed in half precision; 0 for wider types, and for none."""
    return 8 * torch.finfo(dtype).eps if dtype is not None and dtype.itemsize < 4 else 0.0


def _narrow(held: set[str], tolerance: float) -> tuple[float, str]:
    """The tolerance for a file whose caches are of the types ``held``, and a note where these are narrow.

    Caches of 8 bits promise nothing: the error is told.
    """
    note = f"{', '.join(sorted(held))} caches" if held - {"float32"} else ""
    return float("inf") if held & {"uint8", "int8"} else 2e-2 if "float16" in held else tolerance, note
