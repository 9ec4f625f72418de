"""Fine-tune: by labels and the paper's recipe; the same way each time, cut off or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Breaking, clips, cut, labelled, same, tiny, weights
from torch import nn
from torch.nn import functional as F

import dissect
from dissect.errors import ClipError
from dissect.learning import Plateau

PAIRS = labelled(6, 8)
SHORT: dict[str, Any] = {"epochs": 3, "batch": 2, "lr": 0.05, "progress": False}


def test_it_learns_the_labels() -> None:
    stream = cut(tiny())
    videos = torch.stack([clip for clip, _ in PAIRS])
    labels = torch.tensor([label for _, label in PAIRS])

    def loss() -> float:
        with torch.no_grad():
            return float(F.cross_entropy(stream.clip(videos)[:, :, 7], labels))

    before = loss()
    assert dissect.fine_tune(stream, PAIRS, epochs=25, batch=3, lr=0.05, progress=False) is stream
    assert loss() < 0.5 * before
    dissect.verify(stream, runtime=False).check()


@pytest.mark.parametrize(("skipped", "first"), [(None, 5), (2, 2), (0, 0)])
def test_the_first_outputs_do_not_count(skipped: int | None, first: int) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def loss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append((scores.detach().clone(), labels))
        return F.cross_entropy(scores, labels)

    stream = cut(tiny())
    with torch.no_grad():
        stream.clip.train()
        wanted = stream.clip(torch.stack([clip for clip, _ in PAIRS]))
        stream = cut(tiny())
    dissect.fine_tune(stream, PAIRS, epochs=1, batch=6, lr=0.0, skipped=skipped, loss=loss, progress=False)
    ((scores, labels),) = seen
    assert scores.shape == ((8 - first) * 6, 3)
    # The batch came in another order: compare by the labels and the sums.
    torch.testing.assert_close(scores.sum(), wanted[:, :, first:].sum())
    assert labels.tolist() == labels[:6].tolist() * (8 - first)


def test_without_a_window_three_outputs_are_left_out() -> None:
    stream = cut(tiny(), pool="none")
    seen: list[int] = []

    def loss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append(len(scores))
        return F.cross_entropy(scores, labels)

    dissect.fine_tune(stream, PAIRS, epochs=1, batch=6, loss=loss, progress=False)
    assert seen == [(8 - 3) * 6]


def test_the_same_seed_gives_the_same_weights_and_another_others() -> None:
    model = tiny(dropout=0.3)
    found = [weights(dissect.fine_tune(cut(model), PAIRS, seed=seed, **SHORT)) for seed in (0, 0, 1)]
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


@pytest.mark.parametrize("at", [3, 14])
def test_cut_off_and_gone_on_is_never_cut_off(tmp_path: Path, at: int) -> None:
    model = tiny(dropout=0.3)
    given = {**SHORT, "patience": 1, "drops": 1, "validation": labelled(3, 8, seed=4)}
    whole = weights(dissect.fine_tune(cut(model), PAIRS, **given))
    with pytest.raises(KeyboardInterrupt):
        dissect.fine_tune(cut(model), Breaking(PAIRS, at), checkpoint=tmp_path / "run", every=0, **given)
    again = dissect.fine_tune(cut(model), PAIRS, checkpoint=tmp_path / "run", **given)
    assert same(weights(again), whole)


def test_the_rate_falls_at_plateaus_and_the_run_ends_at_the_last() -> None:
    course = Plateau(1.0, patience=2, drops=3, most=100)
    rates, losses = [], [5.0, 4.0, 4.0, 4.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0]
    for epoch, loss in enumerate(losses):
        if course.over(0, epoch):
            break
        rates.append(course.rate(0))
        course.epoch(loss)
    assert rates == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    kept = Plateau(1.0, patience=2, drops=3, most=100)
    kept.load_state_dict(course.state_dict())
    assert kept == course
    assert Plateau(1.0, 2, 3, most=4).over(0, 4)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (clips(2, 8), r"clip . has no label; give pairs \(clip, label\)"),
        (
            labelled(2, 5),
            r"clip . has 5 frames, and 6 are needed \(the first 5 outputs do not count; skipped= says how many\)",
        ),
        ([(torch.zeros(3, 8, 8, 8), 0)], "clip 0 has 3 channels"),
        ([], "there are no clips"),
    ],
)
def test_what_does_not_fit_is_named_with_the_fix(given: Any, words: str) -> None:
    with pytest.raises(ClipError, match=words):
        dissect.fine_tune(cut(tiny()), given, **SHORT)


def test_a_generator_lasts_for_one_epoch_only() -> None:
    with pytest.raises(ClipError, match="used up only once"):
        dissect.fine_tune(cut(tiny()), iter(PAIRS), **SHORT)


def test_an_output_that_is_none() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
            return x.mean((2, 3, 4)), 3

    stream = dissect.convert(Two(), clips(1).float())
    with pytest.raises(ClipError, match="output 1 does not depend on the clip"):
        dissect.fine_tune(stream, PAIRS, output=1, **SHORT)
