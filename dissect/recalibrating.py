"""Recalibrate: the batch norms' statistics anew, from unlabelled clips.

A dissected layer gives other numbers than the original's, so the mean and the variance that its batch norm remembers are
those of another network. They are replaced by the cumulative average over all clips, each batch weighted by its clips;
every batch is normalised by its own statistics meanwhile. No other number of the network changes.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from dissect.checkpoints import Checkpoint, Saver
from dissect.clips import Clips
from dissect.errors import ClipError
from dissect.learning import placed
from dissect.rendering import Bar
from dissect.stream import Stream

__all__ = ["batch_norms", "recalibrate"]


def batch_norms(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The batch norms with statistics of their own, by path."""
    return [
        (path, child)
        for path, child in module.named_modules()
        if isinstance(getattr(child, "running_mean", None), Tensor)
        and isinstance(getattr(child, "momentum", 0.1), float)
    ]


def recalibrate(
    stream: Stream,
    clips: Any,
    *,
    batch: int = 16,
    device: str | torch.device | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    every: float = 60.0,
    progress: bool = True,
) -> Stream:
    """Put the statistics of ``clips`` into the batch norms of ``stream``, which is changed and returned.

    ``clips`` are clips as the network takes them, in batches or one by one (see :mod:`dissect.clips`); labels are left
    aside. Clips as long as the streams that the network will see are best: a fresh stream's first frames count like any
    other. ``checkpoint`` is a file from which a run that was cut off goes on; it is written every ``every`` seconds.

    Raises :class:`~dissect.ClipError` for clips that do not fit, and for a network without batch norms.
    """
    norms = batch_norms(stream.clip)
    if not norms:
        raise ClipError("this network has no batch norm with running statistics: there is nothing to recalibrate")
    source = Clips(stream, clips, batch=batch)
    checkpointed = Checkpoint.of(checkpoint, stream, "recalibrate", batch=batch)
    done, seen = 0, 0
    if (saved := checkpointed.load()) is not None:
        done, seen = saved["done"], saved["seen"]
        stream.clip.load_state_dict(saved["weights"])
    momenta = [module.momentum for _, module in norms]
    saver = Saver(checkpointed, every, lambda: {"done": done, "seen": seen, "weights": stream.clip.state_dict()})
    try:
        with placed(stream, device) as where, torch.no_grad(), Bar("recalibrating", len(source), progress) as bar:
            bar.start(done)
            for _, module in norms:
                module.training = True
            for taken in source.epoch(start=done):
                count = len(next(leaf for leaf in stream.leaves(taken.inputs)))
                seen, done = seen + count, done + 1
                for _, module in norms:
                    module.momentum = count / seen  # type: ignore[assignment]
                stream.clip(*taken.to(where).inputs)
                bar.advance()
                saver.tick()
            saver.save()
    finally:
        for (_, module), momentum in zip(norms, momenta, strict=True):
            module.momentum = momentum
    return stream
