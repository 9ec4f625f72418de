"""Fine-tune: labelled clips teach the step network, by the recipe of the paper.

Nineteen frames go in and sixteen count: a fresh stream's first outputs come from caches that hold little yet, so they stay
out of the loss. SGD with momentum; the rate falls to a tenth three times, each time that the loss no longer falls.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree  # the specs that torch.export itself hands out

from dissect.checkpoints import Checkpoint
from dissect.clips import Batch, Clips
from dissect.errors import ClipError
from dissect.learning import Plateau, learn, placed
from dissect.rendering import Bar
from dissect.stream import Stream
from dissect.teaching import said

__all__ = ["fine_tune"]

Loss = Callable[[Tensor, Tensor], Tensor]


def fine_tune(
    stream: Stream,
    clips: Any,
    *,
    skipped: int | None = None,
    epochs: int = 100,
    batch: int = 16,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    patience: int = 3,
    drops: int = 3,
    validation: Any = None,
    output: int = 0,
    loss: Loss | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    every: float = 60.0,
    progress: bool = True,
) -> Stream:
    """Train ``stream`` on pairs (clip, label); it is changed and returned.

    Every output of a clip counts but the first ``skipped``: 3 of them, the paper's; or, where the output looks back over a
    window of frames (a global pool, an ``fc`` head), those before it is full once, so that of 19 frames and a window of 16
    the last 4 count. The loss is the cross entropy of output number ``output``, ``(N, classes)``; or give
    ``loss(scores, labels)`` of your own for ``(frames * N, ...)``.

    The rate begins at ``lr`` and falls to a tenth after ``patience`` epochs in which the loss (on ``validation``, if
    there are such clips) did not fall by a thousandth; after ``drops`` times the run ends at the next plateau, or after
    ``epochs``. ``checkpoint``, ``every``, ``seed``, ``device`` as in :func:`dissect.distil`.

    Raises :class:`~dissect.ClipError` for clips that do not fit, :class:`~dissect.LoadError` for a checkpoint of another run.
    """
    value = stream.dissected.outputs[output].value
    if value is None or value.constant:
        raise ClipError(f"output {output} does not depend on the clip: name another with output=")
    first = _skipped(stream, output) if skipped is None else skipped
    why = f"the first {first} outputs do not count; skipped= says how many"

    def source(given: Any) -> Clips:
        return Clips(stream, given, batch=batch, labelled=True, least=first + 1, why=why)

    train = source(clips)
    judges = None if validation is None else source(validation)
    settings = {"skipped": first, "epochs": epochs, "batch": batch, "lr": lr, "momentum": momentum}
    settings |= {"weight_decay": weight_decay, "patience": patience, "drops": drops, "output": output, "seed": seed}
    saver = Checkpoint.of(checkpoint, stream, "fine_tune", **settings)

    def error(taken: Batch) -> Tensor:
        assert taken.labels is not None
        frames = range(first, taken.frames)
        scores = said(stream, stream.clip(*taken.inputs), output, frames).flatten(0, 1)
        return (loss or F.cross_entropy)(scores, torch.cat([taken.labels] * len(frames)))

    with placed(stream, device) as where, Bar("fine-tuning", len(train) * epochs, progress) as bar:

        @torch.no_grad()
        def judged() -> float:
            assert judges is not None
            stream.clip.eval()
            parts = [(float(error(taken.to(where))), _rows(taken)) for taken in judges.epoch()]
            return sum(part * rows for part, rows in parts) / sum(rows for _, rows in parts)

        optimizer = torch.optim.SGD(stream.clip.parameters(), lr, momentum, weight_decay=weight_decay, nesterov=True)
        learn(
            stream,
            train,
            error,
            optimizer,
            Plateau(lr, patience, drops, epochs),
            checkpoint=saver,
            judge=None if judges is None else judged,
            seed=seed,
            device=where,
            every=every,
            bar=bar,
        )
    return stream


def _rows(taken: Batch) -> int:
    return int(next(leaf for leaf in pytree.tree_leaves(taken.inputs) if isinstance(leaf, Tensor)).shape[0])


def _skipped(stream: Stream, output: int) -> int:
    """The outputs before the window that an output looks back over is full; 3 where there is none."""
    value = stream.dissected.outputs[output].value
    assert value is not None
    return int(stream.dissected.inputs.frames) - 1 if value.axes.time is None and value.clock.pooled else 3
