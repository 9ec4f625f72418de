"""What the original network says of a stream, and which of the step network's outputs it is to be compared with.

Offline, the original sees a window as long as its example's clip. Its answer for the window that ends at frame t is what
the step network should say at frame t, which is how a sliding window is used. Where an output keeps its time axis, there
is no window to slide: the original sees the whole clip, and each of its positions is compared at the frame it is centred
on.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree  # the specs that torch.export itself hands out

from dissect.capturing import evaluating
from dissect.centring import centres
from dissect.clips import Batch
from dissect.errors import ClipError
from dissect.ledger import rows_first, split_frames
from dissect.stream import Stream

__all__ = ["Lesson", "Teacher", "said"]


@dataclass(frozen=True)
class Lesson:
    """What the teacher says for one output: its number, the frames, and the answers ``(frames, N, ...)``.

    ``scores``: one number for each class, of which the differences count.
    """

    output: int
    frames: tuple[int, ...]
    answers: Tensor
    scores: bool


class Teacher:
    """The original network, asked for windows of a stream; it is not changed, and runs where ``device`` says."""

    def __init__(self, stream: Stream, model: nn.Module | ExportedProgram, device: torch.device | None) -> None:
        self.stream = stream
        self.window = int(stream.dissected.inputs.frames)
        # An exported program may have the batch of its example built in; so it is asked for that many windows at once.
        self.piece = int(stream.dissected.inputs.batch) if isinstance(model, ExportedProgram) else None
        run = model.module(check_guards=False) if isinstance(model, ExportedProgram) else model
        there = next(run.parameters(), None)
        if device is not None and there is not None and there.device != device:
            run = copy.deepcopy(run).to(device)
        self.run = run
        self.ended = [
            index
            for index, output in enumerate(stream.dissected.outputs)
            if output.value is not None and not output.value.constant and output.value.axes.time is None
        ]
        self.dense = [
            index
            for index, output in enumerate(stream.dissected.outputs)
            if output.value is not None and not output.value.constant and output.value.axes.time is not None
        ]
        self.centres = centres(stream.dissected) if self.dense else {}

    def ends(self, frames: int, most: int | None) -> list[int]:
        """The frames at which windows end; with ``most``, so many of them, drawn by torch's generator."""
        count = frames - self.window + 1
        if most is None or count <= most:
            return list(range(self.window - 1, frames))
        return sorted((torch.randperm(count)[:most] + self.window - 1).tolist())

    @torch.no_grad()
    def lessons(self, batch: Batch, most: int | None = None) -> list[Lesson]:
        """Its answers on a batch: to the windows that end in it (``most`` of them), and to the whole clip."""
        found: list[Lesson] = []
        dense = self.stream.dense(*batch.inputs)
        if self.ended:
            ends = self.ends(batch.frames, most)
            leaves, spec = pytree.tree_flatten(dense)
            cut = [
                leaf
                if dim is None
                else torch.cat([leaf.narrow(dim, end - self.window + 1, self.window) for end in ends])
                for leaf, dim in zip(leaves, self.stream.dissected.time_dims, strict=True)
            ]
            out = self._asked(pytree.tree_unflatten(cut, spec), self.window)
            for index in self.ended:
                value = self.stream.dissected.outputs[index].value
                assert value is not None
                rows = rows_first(out[index], value.axes)
                answers = rows.unflatten(0, (len(ends), -1))
                found.append(Lesson(index, tuple(ends), answers, answers.dim() == 3 and answers.shape[2] > 1))
        if self.dense:
            out = self._asked(dense, batch.frames)
            for index in self.dense:
                value = self.stream.dissected.outputs[index].value
                assert value is not None
                positions = split_frames(out[index], value.axes)
                frames = [self.centres[index] + at * value.clock.removed for at in range(len(positions))]
                kept = [at for at, frame in enumerate(frames) if 0 <= frame < batch.frames]
                if not kept:
                    raise ClipError("no position of the original's output lies in the clip: cut longer clips")
                answers = torch.stack([positions[at] for at in kept])
                found.append(Lesson(index, tuple(frames[at] for at in kept), answers, False))
        return found

    def _asked(self, dense: tuple[Any, ...], frames: int) -> list[Any]:
        """The leaves of the original's result on a dense stream, time on an axis of its own."""
        own = self.stream.original(*dense)
        with evaluating(self.run):
            if self.piece is None:
                return pytree.tree_leaves(self.stream.apart(self.run(*own), frames, original=True))
            leaves, spec = pytree.tree_flatten(own)
            rows = leaves[0].shape[0]
            parts = []
            for at in range(0, rows, self.piece):
                index = [min(row, rows - 1) for row in range(at, at + self.piece)]
                given = [leaf[index] if isinstance(leaf, Tensor) else leaf for leaf in leaves]
                out = self.run(*pytree.tree_unflatten(given, spec))
                parts.append(pytree.tree_leaves(self.stream.apart(out, frames, original=True)))
        return [torch.cat(column)[:rows] for column in zip(*parts, strict=True)]


def said(stream: Stream, out: Any, output: int, frames: Sequence[int]) -> Tensor:
    """What the clip form's result says for one output at some frames, ``(frames, N, ...)``."""
    leaf = pytree.tree_leaves(out)[output]
    value = stream.dissected.outputs[output].value
    assert value is not None
    rows = split_frames(leaf, value.axes)
    return torch.stack([rows[frame] for frame in frames])
