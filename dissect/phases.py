"""Phases: what a value that has a position every few frames becomes where more positions are wanted than it has.

The phase of a frame is the number of frames since the newest position, which the clock knows. The law of
:mod:`dissect.primitives` holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dissect.primitives import CacheSpec, Primitive, lifted

__all__ = ["PhaseMix", "phases"]


class PhaseMix(Primitive):
    """The last positions of a value, mixed by weights that follow the frames since the newest.

    ``weights`` is ``(stride, positions)``, oldest first; without it the newest position is held. ``edges`` are the
    clock's masks of the two positions: one outside the clip leaves its weight to the other, as a clamped index does.
    """

    weights: Tensor | None

    def __init__(self, frame: Sequence[int], weights: Tensor | None = None) -> None:
        super().__init__()
        self.frame = tuple(frame)
        self.depth = 1 if weights is None else weights.shape[1]
        self.register_buffer("weights", weights, persistent=False)

    @property
    def specs(self) -> tuple[CacheSpec, ...]:  # type: ignore[override]
        channels, *rest = self.frame or (1,)
        return (CacheSpec((self.depth * channels, *rest)),)

    def forward(
        self,
        x: Tensor,
        since: Tensor,
        edges: Sequence[Tensor] = (),
        caches: tuple[Tensor] | None = None,
        frames: int | None = None,
    ) -> Any:
        shape = x.shape
        x = x.reshape(shape[0], -1) if x.dim() == 1 else x
        channels = x.shape[1]
        if frames is None:
            assert caches is not None
            (cache,) = caches
            newer = x if self.depth == 1 else torch.cat([cache[:, channels:], x], 1)
            held = torch.where(lifted(since, x) < 0.5, newer, cache)
            positions = list(held.split(channels, 1))
            new = held
        else:
            batch = x.shape[0] // frames
            past = (
                x.new_zeros(batch, self.depth, *x.shape[1:])
                if caches is None
                else caches[0].reshape(batch, self.depth, *x.shape[1:])
            )
            known = torch.cat([past, x.reshape(batch, frames, *x.shape[1:])], 1)
            due = since.reshape(batch, frames) < 0.5
            # Where in `known` the positions are: those of the cache, then the frames that are due, in order.
            kept = torch.arange(self.depth, device=x.device).expand(batch, -1)
            places = torch.cat([kept, self.depth + torch.argsort(~due, dim=1, stable=True)], 1)
            rows = torch.arange(batch, device=x.device)[:, None]
            at = due.long().cumsum(1)
            picked = [known[rows, places.gather(1, at + slot)] for slot in range(self.depth)]
            positions = [pick.flatten(0, 1) for pick in picked]
            new = torch.cat([pick[:, -1] for pick in picked], 1)
        return self.mixed(positions, since, edges).reshape(shape), (new,)

    def mixed(self, positions: list[Tensor], since: Tensor, edges: Sequence[Tensor]) -> Tensor:
        if self.weights is None:
            return positions[0]
        older, newer = self.weights.to(since.dtype)[since.long()].unbind(1)
        if edges:
            lost, late = older * (1 - edges[0]), newer * (1 - edges[1])
            older, newer = older - lost + late, newer - late + lost
        return positions[0] * lifted(older, positions[0]) + positions[1] * lifted(newer, positions[1])

    def extra_repr(self) -> str:
        return f"frame={self.frame}, positions={self.depth}"


def phases(stride: int, factor: int, corners: bool) -> tuple[Tensor, int]:
    """Weights of the older and the newer position by the frames since the newer one, and the frames to wait for it.

    Output ``i * factor + r`` lies at position ``i + offset(r)``; a positive offset waits for position ``i + 1``.
    """
    offsets = [r / factor if corners else (2 * r + 1 - factor) / (2 * factor) for r in range(factor)]
    first = next(r for r, offset in enumerate(offsets) if offset > 0)
    step = stride // factor
    wait = stride - first * step
    table = torch.zeros(stride, 2, dtype=torch.float64)
    for since in range(stride):
        offset = offsets[(since - wait) % stride // step]
        newer = offset if offset > 0 else 1 + offset
        table[since, 0], table[since, 1] = 1 - newer, newer
    return table, wait
