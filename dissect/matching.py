"""Matching: one point a video, distances between them, and the losses that teach them. For re-identification and faces.

The law: points of one video do not depend on how it was streamed; :class:`dissect.heads.Embedding` gives in a stream what
:func:`video_points` gives for all vectors at once. Sources: the D3D paper, sections 4.4 and 4.5; Hermans et al., *In Defense
of the Triplet Loss for Person Re-Identification* (2017), for the hardest of a batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dissect.errors import DissectError
from dissect.vectors import running_mean

__all__ = ["batch_hard_triplet", "distances", "identity_loss", "video_points"]


def video_points(vectors: Tensor, first: int = 0, normalise: bool = True) -> Tensor:
    """The mean of frame vectors ``(N, T, F)`` from frame ``first`` on, at length 1: ``(N, F)``.

    The caches hold little during the first frames: the paper's "5:end" is ``first=4``. With nothing left the point is zero.
    """
    points = running_mean(vectors, first)
    return F.normalize(points, dim=1) if normalise else points


def distances(points: Tensor, others: Tensor) -> Tensor:
    """Euclidean distances of ``(N, F)`` and ``(M, F)``, ``(N, M)``; not by products, which lose the small ones."""
    return torch.cdist(points, others, compute_mode="donot_use_mm_for_euclid_dist")


def batch_hard_triplet(points: Tensor, labels: Tensor, margin: float | None = None) -> Tensor:
    """The triplet loss of each point ``(N, F)`` with its furthest of the same label and its nearest of another, averaged.

    With a ``margin`` a triplet costs ``max(0, margin + same - other)``, without one ``log(1 + exp(same - other))``, which
    goes on pulling. Raises :class:`~dissect.DissectError` where a point has no other of its label, or all have one label: a
    batch needs several clips of each of several people (the paper: 4 clips).
    """
    apart = distances(points, points)
    alike = labels.unsqueeze(0) == labels.unsqueeze(1)
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    if not bool((alike & ~itself).any(1).all()) or bool(alike.all()):
        raise DissectError(
            f"batch of {len(labels)} points: each needs another of its label and one of a different label; draw several "
            "clips of several people"
        )
    furthest = apart.masked_fill(~alike | itself, float("-inf")).amax(1)
    nearest = apart.masked_fill(alike, float("inf")).amin(1)
    gap = furthest - nearest
    return (F.softplus(gap) if margin is None else F.relu(gap + margin)).mean()


def identity_loss(scores: Tensor, points: Tensor, labels: Tensor, margin: float | None = None) -> Tensor:
    """The paper's loss for re-identification: cross entropy of scores for identities, plus the batch-hard triplet loss."""
    return F.cross_entropy(scores, labels) + batch_hard_triplet(points, labels, margin)
