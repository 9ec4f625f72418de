"""Matching: points and losses against their definitions, written as loops over plain numbers."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from laws import close
from torch import Tensor

import dissect
from dissect import matching, zoo
from dissect.errors import DissectError


def drawn(persons: int, clips: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(persons).repeat_interleave(clips)
    order = torch.randperm(len(labels), generator=generator)
    points = torch.randn(len(labels), size, dtype=torch.float64, generator=generator)
    return points, labels[order]


def length(left: Tensor, right: Tensor) -> float:
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(left.tolist(), right.tolist(), strict=True)))


def by_loops(points: Tensor, labels: Tensor, margin: float | None) -> float:
    losses = []
    for anchor in range(len(labels)):
        worst = -math.inf
        for same, other in product(range(len(labels)), repeat=2):
            if same == anchor or labels[same] != labels[anchor] or labels[other] == labels[anchor]:
                continue
            gap = length(points[anchor], points[same]) - length(points[anchor], points[other])
            worst = max(worst, math.log1p(math.exp(gap)) if margin is None else max(0.0, margin + gap))
        losses.append(worst)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("margin", [None, 0.0, 0.3, 5.0])
@pytest.mark.parametrize(("persons", "clips"), [(2, 2), (3, 4), (8, 4)])
def test_the_triplet_loss_is_that_of_the_worst_triplet_of_each_anchor(
    persons: int, clips: int, margin: float | None
) -> None:
    for seed in range(3):
        points, labels = drawn(persons, clips, 5, seed)
        assert float(matching.batch_hard_triplet(points, labels, margin)) == pytest.approx(
            by_loops(points, labels, margin), rel=1e-12, abs=1e-12
        )


def test_the_triplet_loss_has_the_gradient_of_its_definition() -> None:
    points, labels = drawn(3, 3, 4, 1)
    points.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: matching.batch_hard_triplet(x, labels), (points,))
    close(torch.autograd.grad(matching.batch_hard_triplet(points * 0, labels), points)[0], torch.zeros_like(points))


def test_the_loss_of_the_paper_is_the_sum_of_both() -> None:
    points, labels = drawn(3, 4, 5, 2)
    scores = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    entropy = -sum(
        row[label] - math.log(sum(map(math.exp, row)))
        for row, label in zip(scores.tolist(), labels.tolist(), strict=True)
    ) / len(labels)
    assert float(matching.identity_loss(scores, points, labels, 0.3)) == pytest.approx(
        entropy + by_loops(points, labels, 0.3)
    )


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [0, 0, 0, 0], [0, 0, 1, 1, 2]])
def test_a_batch_without_triplets_is_refused(labels: list[int]) -> None:
    with pytest.raises(DissectError, match="several clips of several people"):
        matching.batch_hard_triplet(torch.randn(len(labels), 3), torch.tensor(labels))


def test_distances_are_euclidean_also_where_they_are_small() -> None:
    points = torch.randn(40, 6, generator=torch.Generator().manual_seed(1)) + 100
    others = points[:30] + 1e-3
    found = matching.distances(points, others)
    for row, column in product(range(0, 40, 7), range(0, 30, 7)):
        assert float(found[row, column]) == pytest.approx(length(points[row], others[column]), rel=1e-3)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("frames", "first"), [(6, 0), (6, 4), (5, 4), (4, 4), (1, 4)])
def test_a_point_is_the_mean_without_the_first_frames(frames: int, first: int, normalise: bool) -> None:
    vectors = torch.randn(2, frames, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for row, point in zip(vectors, matching.video_points(vectors, first, normalise), strict=True):
        kept = [frame for at, frame in enumerate(row) if at >= first]
        mean = sum(kept, torch.zeros(3, dtype=torch.float64)) / max(1, len(kept))
        scale = math.sqrt(sum(float(value) ** 2 for value in mean)) if normalise and len(kept) else 1.0
        close(point, mean / scale)


def test_a_streamed_video_has_the_point_of_its_vectors() -> None:
    """A D-ResNet with an embedding gives at every frame the point of all vectors so far, and one learns from it."""
    made = {"width": 4, "size": 32, "seed": 0, "stem": 1}
    trunk = zoo.d_resnet(18, None, **made)  # type: ignore[arg-type]
    stream = zoo.d_resnet(18, "embedding", None, first=2, **made)  # type: ignore[arg-type]
    clip = torch.rand(4, 3, 7, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        vectors, points = trunk.clip(clip).movedim(1, 2), stream.clip(clip)
        for frame in range(7):
            close(points[:, :, frame], matching.video_points(vectors[:, : frame + 1], 2), 1e-5)
    stream.clip.train()
    loss = matching.batch_hard_triplet(stream.clip(clip)[:, :, -1], torch.tensor([0, 0, 1, 1]))
    loss.backward()
    gradient = stream.clip.get_parameter("conv1.weight").grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
    assert isinstance(stream, dissect.Stream)
