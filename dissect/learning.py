"""The loop of every training here: batches, loss, step, and again, from wherever a checkpoint stands.

Law: on a CPU a run that was cut off and goes on from its checkpoint ends with the weights of one that was not, to the
last bit; and the same seed gives the same weights. So the order of the clips follows from the seed and the epoch, the rate
from the number of the step, and a checkpoint holds weights, optimizer, torch's random numbers and the place in the epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from dissect.checkpoints import Checkpoint, Saver
from dissect.clips import Batch, Clips
from dissect.errors import ClipError, PlanError
from dissect.rendering import Bar
from dissect.stream import Stream

__all__ = ["Course", "Plateau", "learn", "placed"]


class Course(Protocol):
    """What a run does with its rate of learning, and when it ends."""

    def rate(self, step: int) -> float:
        """The rate of step ``step``, counted from 0."""

    def over(self, step: int, epoch: int) -> bool:
        """Whether the run ends before step ``step``, after ``epoch`` epochs."""

    def epoch(self, loss: float) -> None:
        """An epoch ended with this loss."""

    def state_dict(self) -> dict[str, Any]:
        """What it remembers, as plain values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Remember it again."""


@dataclass
class Plateau:
    """The rate falls to a tenth whenever the loss no longer does; after ``drops`` times, the run ends at the next plateau.

    ``patience`` is the number of epochs without a loss smaller by a thousandth; ``most`` that of all epochs.
    """

    base: float
    patience: int
    drops: int
    most: int
    best: float = float("inf")
    waited: int = 0
    dropped: int = 0

    def rate(self, step: int) -> float:
        """The first one, or a tenth of it, or ..."""
        return self.base * 0.1 ** min(self.dropped, self.drops)

    def over(self, step: int, epoch: int) -> bool:
        """After the last plateau, or the last epoch."""
        return epoch >= self.most or self.dropped > self.drops

    def epoch(self, loss: float) -> None:
        """Wait, or drop the rate."""
        if loss < self.best * 0.999:
            self.best, self.waited = loss, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            self.dropped, self.waited = self.dropped + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """The counters."""
        return {"best": self.best, "waited": self.waited, "dropped": self.dropped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The counters."""
        self.best, self.waited, self.dropped = state["best"], state["waited"], state["dropped"]


@contextmanager
def placed(stream: Stream, device: str | torch.device | None) -> Iterator[torch.device | None]:
    """The stream on a device for the time of the block; afterwards all its modules are in eval mode, where they were."""
    parameter = next(stream.clip.parameters(), None)
    before = None if parameter is None else parameter.device
    target = before if device is None else _device(device)
    if target is not None and target != before:
        stream.clip.to(target)
    try:
        yield target
    finally:
        for form in (stream.clip, stream.step, stream.chunk):
            form.eval()
        if target is not None and before is not None and target != before:
            stream.clip.to(before)


def _device(name: str | torch.device) -> torch.device:
    """A device that is there; raises :class:`~dissect.PlanError` for any other."""
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise PlanError(f"device {name!r} is unknown; there are cpu, cuda, cuda:1, mps, ...") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise PlanError(f"device {str(found)!r}: torch sees no GPU here; leave the device out to train on the CPU")
    return torch.device("cuda", torch.cuda.current_device()) if found.type == "cuda" and found.index is None else found


@dataclass
class _Place:
    """Where a run stands: the epoch, the batch in it, the step, and the losses of the epoch so far."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    total: float = 0.0
    losses: list[float] = field(default_factory=list)


def learn(
    stream: Stream,
    clips: Clips,
    loss: Callable[[Batch], Tensor],
    optimizer: Optimizer,
    course: Course,
    *,
    checkpoint: Checkpoint,
    judge: Callable[[], float] | None = None,
    seed: int = 0,
    device: torch.device | None = None,
    every: float = 60.0,
    bar: Bar,
) -> list[float]:
    """Train the clip form until ``course`` is over; the mean loss of each epoch.

    ``loss`` runs the clip form on a batch; ``judge`` measures it at the end of an epoch, for the course (else the mean
    loss). A checkpoint is written at most every ``every`` seconds, and at the end.
    """
    saved = checkpoint.load()
    place = _Place()
    cuda = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        if saved is not None:
            place = _Place(**saved["place"])
            stream.clip.load_state_dict(saved["weights"])
            optimizer.load_state_dict(saved["optimizer"])
            course.load_state_dict(saved["course"])
        batches = clips.epoch(place.epoch, seed, place.batch)
        if saved is not None:  # after the clips' own draws, which brought them to their place
            torch.set_rng_state(saved["random"])
            for one, numbers in zip(cuda, saved["cuda"], strict=False):
                torch.cuda.set_rng_state(numbers, one)

        def state() -> dict[str, Any]:
            return {
                "place": vars(place),
                "weights": stream.clip.state_dict(),
                "optimizer": optimizer.state_dict(),
                "course": course.state_dict(),
                "random": torch.get_rng_state(),
                "cuda": [torch.cuda.get_rng_state(one) for one in cuda],
            }

        saver = Saver(checkpoint, every, state)
        bar.start(place.step)
        while not course.over(place.step, place.epoch):
            batch = next(batches, None)
            if batch is None:
                _turn(place, course, judge)
                batches = clips.epoch(place.epoch, seed)
                continue
            for group in optimizer.param_groups:
                group["lr"] = course.rate(place.step)
            stream.clip.train()
            value = loss(batch.to(device))
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            place.batch, place.step, place.total = place.batch + 1, place.step + 1, place.total + float(value.detach())
            bar.advance(f"loss {place.total / place.batch:.3g}")
            saver.tick()
        if place.batch:
            place.losses.append(place.total / place.batch)
            place.batch, place.total = 0, 0.0
        saver.save()
    return place.losses


def _turn(place: _Place, course: Course, judge: Callable[[], float] | None) -> None:
    """An epoch is over."""
    if not place.batch:
        raise ClipError(
            "an epoch without a single clip: a generator can be used up only once; give a list or a Dataset"
        )
    mean = place.total / place.batch
    place.losses.append(mean)
    course.epoch(mean if judge is None else judge())
    place.epoch, place.batch, place.total = place.epoch + 1, 0, 0.0
