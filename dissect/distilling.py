"""Distil: the original network teaches the step network what it says of a sliding window. No labels.

The clip form runs over a clip from a fresh stream; at every frame where a window of the original ends, its output is
drawn towards the original's answer. Clips longer than the window teach the stream beyond its first frames: the step
network then sees what it sees on a live camera, caches full of real frames.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional as F

from dissect.checkpoints import Checkpoint
from dissect.clips import Batch, Clips
from dissect.errors import ClipError
from dissect.learning import learn, placed
from dissect.rendering import Bar
from dissect.stream import Stream
from dissect.teaching import Teacher, said

__all__ = ["agreement", "distil", "divergence"]

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Falling:
    """A rate that rises over the first twentieth of the steps and then falls to zero along a cosine."""

    base: float
    steps: int

    def rate(self, step: int) -> float:
        """The rate of a step."""
        rise = max(1, self.steps // 20)
        return self.base * min((step + 1) / rise, (1 + math.cos(math.pi * step / self.steps)) / 2)

    def over(self, step: int, epoch: int) -> bool:
        """After its steps."""
        return step >= self.steps

    def epoch(self, loss: float) -> None:
        """Nothing changes."""

    def state_dict(self) -> dict[str, Any]:
        """The number of the step says all."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to remember."""


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of scores ``(..., classes)`` at a temperature, times its square (Hinton et al., 2015)."""
    wanted, got = (F.log_softmax(scores / temperature, -1) for scores in (teacher, student))
    total = F.kl_div(got.flatten(0, -2), wanted.flatten(0, -2), reduction="batchmean", log_target=True)
    return total * temperature**2


def distil(
    stream: Stream,
    model: nn.Module | ExportedProgram,
    clips: Any,
    *,
    steps: int = 1000,
    batch: int = 8,
    lr: float = 1e-3,
    temperature: float = 2.0,
    windows: int | None = 4,
    loss: Loss | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    every: float = 60.0,
    progress: bool = True,
) -> Stream:
    """Train ``stream`` on unlabelled clips to say what ``model``, its original, says; it is changed and returned.

    ``clips`` (see :mod:`dissect.clips`) must be as long as the original's window at least; longer is better. For each
    clip of a step the original is asked for ``windows`` windows, drawn anew each time (None: all of them), which is
    most of the cost. Scores are compared by :func:`divergence`, everything else by its mean squared error in units of the
    answers' variance; or give a ``loss(student, teacher)`` of your own, for tensors ``(frames, N, ...)``.

    AdamW for ``steps`` steps of ``batch`` clips, the rate rising to ``lr`` and falling along a cosine. ``checkpoint`` is a
    file, written every ``every`` seconds, from which a run that was cut off goes on. On a CPU, the same seed gives the same
    weights, cut off or not.

    Raises :class:`~dissect.ClipError` for clips that do not fit, :class:`~dissect.LoadError` for a checkpoint of another run.
    """
    source = _source(stream, clips, batch)
    given = {"steps": steps, "batch": batch, "lr": lr, "temperature": temperature, "windows": windows, "seed": seed}
    saver = Checkpoint.of(checkpoint, stream, "distil", **given)

    with placed(stream, device) as where, Bar("distilling", steps, progress) as bar:
        teacher = Teacher(stream, model, where)

        def apart(taken: Batch) -> Tensor:
            lessons = teacher.lessons(taken, windows)
            out = stream.clip(*taken.inputs)
            total = None
            for lesson in lessons:
                student = said(stream, out, lesson.output, lesson.frames)
                if loss is not None:
                    part = loss(student, lesson.answers)
                elif lesson.scores:
                    part = divergence(student, lesson.answers, temperature)
                else:
                    part = F.mse_loss(student, lesson.answers) / lesson.answers.var().clamp(min=1e-12)
                total = part if total is None else total + part
            assert total is not None
            return total

        optimizer = torch.optim.AdamW(stream.clip.parameters(), lr)
        learn(
            stream,
            source,
            apart,
            optimizer,
            Falling(lr, steps),
            checkpoint=saver,
            seed=seed,
            device=where,
            every=every,
            bar=bar,
        )
    return stream


@torch.no_grad()
def agreement(
    stream: Stream,
    model: nn.Module | ExportedProgram,
    clips: Any,
    *,
    batch: int = 8,
    windows: int | None = None,
    device: str | torch.device | None = None,
) -> float:
    """The part of the windows in ``clips`` for which the step network's best class is the original's, from 0 to 1.

    Raises :class:`~dissect.ClipError` for a network whose outputs are no scores.
    """
    source = _source(stream, clips, batch)
    same = count = 0
    with placed(stream, device) as where, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stream.clip.eval()
        teacher = Teacher(stream, model, where)
        for taken in source.epoch():
            ready = taken.to(where)
            out = stream.clip(*ready.inputs)
            for lesson in teacher.lessons(ready, windows):
                if not lesson.scores:
                    raise ClipError("the network's outputs are no scores of classes: there is no best one to compare")
                student = said(stream, out, lesson.output, lesson.frames)
                same += int((student.argmax(-1) == lesson.answers.argmax(-1)).sum())
                count += lesson.answers.shape[0] * lesson.answers.shape[1]
    return same / count


def _source(stream: Stream, clips: Any, batch: int) -> Clips:
    frames = int(stream.dissected.inputs.frames)
    return Clips(stream, clips, batch=batch, least=frames, why="the window of the original network")
