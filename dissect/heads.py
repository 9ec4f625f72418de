"""Heads: what a network makes of its frame vectors in the end.

A head is an ordinary module. It takes the vectors of a clip, ``(N, T, F)``, and gives one result for its last frame,
``(N, classes)``; in a stream it gives one for every frame. Each of these is made of what the dissector knows (a window, a
recurrence, a running mean), so that it has a clip form and a step form and goes into the file like any other layer. It can
be trained on stored vectors by itself. :func:`dissect.with_head` puts one on a network; any other module that takes
``(N, T, F)`` will do as well.

    ==============  =====================================  =====================  ==================================
    head            what it sees                           cache                  source
    ==============  =====================================  =====================  ==================================
    ``FC``          the last ``frames`` vectors            ``frames - 1`` vectors  the paper's `fc`, 1 to 3 layers
    ``LSTM, GRU``   everything so far                      hidden values           the paper's `LSTM`, `GRU`
    ``Average``     the mean of all vectors so far         the mean, a count       -
    ``Plain``       the newest vector                      none                    -
    ``Embedding``   the mean of all vectors so far         the mean, a count       re-identification and faces
    ==============  =====================================  =====================  ==================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dissect.errors import PlanError
from dissect.matching import video_points
from dissect.vectors import running_mean

__all__ = ["FC", "GRU", "HEADS", "LSTM", "Average", "Embedding", "Plain", "head"]


class FC(nn.Module):
    """Linear layers over the last ``frames`` vectors, side by side; a shorter clip has zeros in front."""

    def __init__(self, features: int, classes: int, *, frames: int = 16, layers: int = 1, hidden: int = 1024) -> None:
        super().__init__()
        _positive(frames=frames, layers=layers, hidden=hidden)
        self.frames = frames
        sizes = [frames * features, *[hidden] * (layers - 1), classes]
        self.layers = nn.Sequential()
        for index in range(layers):
            if index:
                self.layers.append(nn.ReLU())
            self.layers.append(nn.Linear(sizes[index], sizes[index + 1]))

    def forward(self, x: Tensor) -> Tensor:
        missing = self.frames - x.shape[1]
        if missing > 0:
            x = F.pad(x, (0, 0, missing, 0))
        elif missing < 0:
            x = x[:, -missing:]
        scores: Tensor = self.layers(x.flatten(1))
        return scores


class _Recurrent(nn.Module):
    """A recurrence over all vectors, and a linear layer on its last output."""

    kind: Callable[..., nn.RNNBase]

    def __init__(
        self, features: int, classes: int, *, layers: int = 2, hidden: int = 1024, dropout: float = 0.3
    ) -> None:
        super().__init__()
        _positive(layers=layers, hidden=hidden)
        between = dropout if layers > 1 else 0.0  # there is nothing between the layers of one
        self.rnn = type(self).kind(features, hidden, layers, batch_first=True, dropout=between)
        self.fc = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.rnn(x)
        scores: Tensor = self.fc(outputs[:, -1])
        return scores


class LSTM(_Recurrent):
    """Layers of LSTM cells, dropout between them, and a linear layer on the newest output."""

    kind = nn.LSTM


class GRU(_Recurrent):
    """Layers of GRU cells, dropout between them, and a linear layer on the newest output."""

    kind = nn.GRU


class Average(nn.Module):
    """A linear layer on the mean of all vectors so far, without the first ``first`` ones."""

    def __init__(self, features: int, classes: int, *, first: int = 0) -> None:
        super().__init__()
        _count("first", first)
        self.first = first
        self.fc = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.fc(running_mean(x, self.first))
        return scores


class Plain(nn.Module):
    """A linear layer on the newest vector alone; without ``classes``, that vector."""

    def __init__(self, features: int, classes: int | None = None) -> None:
        super().__init__()
        self.fc = nn.Identity() if classes is None else nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.fc(x[:, -1])
        return scores


class Embedding(nn.Module):
    """The mean of all vectors so far as a point to compare by distance: for re-identification and faces.

    ``classes`` is its size where a linear layer without bias narrows every vector first. Of the first ``first`` frames, whose
    caches hold little yet, nothing is taken in: the paper's "5:end" is ``first=4``, and until then the point is zero.
    ``normalise`` scales it to length 1.
    """

    def __init__(self, features: int, classes: int | None = None, *, first: int = 0, normalise: bool = True) -> None:
        super().__init__()
        _count("first", first)
        self.first = first
        self.normalise = normalise
        self.neck = nn.Identity() if classes is None else nn.Linear(features, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return video_points(self.neck(x), self.first, self.normalise)


HEADS: dict[str, Callable[..., nn.Module]] = {
    "fc": FC,
    "lstm": LSTM,
    "gru": GRU,
    "average": Average,
    "plain": Plain,
    "embedding": Embedding,
}


def head(name: str, features: int, classes: int | None, *, seed: int | None = None, **settings: Any) -> nn.Module:
    """A head by its name, for vectors of ``features`` numbers.

    Weights are torch's own first ones, drawn from ``seed``, or from torch's generator where it is None. Raises
    :class:`~dissect.PlanError` for a name that there is not, and for settings that do not fit.
    """
    if name not in HEADS:
        raise PlanError(f"head {name!r} is unknown; there are {', '.join(HEADS)}")
    if classes is None and name not in ("plain", "embedding"):
        raise PlanError(f"head {name!r} needs a number of classes; plain and embedding can do without")
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            return HEADS[name](features, classes, **settings)
        except TypeError as error:
            raise PlanError(f"head {name!r}: {error}") from error


def _positive(**settings: Any) -> None:
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise PlanError(f"{name} must be a number of at least 1, not {value!r}")


def _count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise PlanError(f"{name} must be a number of frames, not {value!r}")
