"""Distil: it comes nearer to its teacher, the same way each time, cut off or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CLIP, Breaking, clips, cut, same, tiny, weights
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import dissect
from dissect.distilling import Falling, divergence
from dissect.errors import ClipError, LoadError

CLIPS = clips(7, 8)
SHORT: dict[str, Any] = {"steps": 9, "batch": 2, "lr": 3e-3, "progress": False}


class Noisy(Dataset[torch.Tensor]):
    """Clips that are drawn anew each time, from torch's own random numbers."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        return CLIPS[index] + 0.1 * torch.randn(1, 8, 1, 1, dtype=torch.float64)


def gap(stream: dissect.Stream, model: nn.Module, videos: torch.Tensor) -> float:
    """How far the stream is from the sliding window, by hand."""
    with torch.no_grad():
        out = stream.clip(videos)
        parts = [
            F.kl_div(
                out[:, :, frame].log_softmax(1),
                model(videos[:, :, frame - 5 : frame + 1]).softmax(1),
                reduction="batchmean",
            )
            for frame in range(5, videos.shape[2])
        ]
    return float(sum(parts)) / len(parts)


def test_it_comes_nearer_to_its_teacher_on_clips_that_it_has_not_seen() -> None:
    model, fresh = tiny(), clips(16, 8, seed=9)
    stream = cut(model)
    before = gap(stream, model, fresh)
    assert dissect.distil(stream, model, clips(32, 8), steps=60, batch=8, lr=1e-2, progress=False) is stream
    assert gap(stream, model, fresh) < 0.5 * before
    assert not any(module.training for form in (stream.clip, stream.step) for module in form.modules())
    dissect.verify(stream, runtime=False).check()


def test_the_teacher_is_not_changed() -> None:
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dissect.distil(cut(model), model, CLIPS, **SHORT)
    assert same(before, dict(model.state_dict()))
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("given", [CLIPS, Noisy()], ids=["clips", "clips drawn anew"])
def test_the_same_seed_gives_the_same_weights_and_another_others(given: Any) -> None:
    model = tiny(dropout=0.3)
    found = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        found.append(weights(dissect.distil(cut(model), model, given, seed=seed, **SHORT)))
        assert torch.equal(torch.get_rng_state(), before), "torch's own random numbers were touched"
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


@pytest.mark.parametrize(("at", "every"), [(4, 0.0), (15, 0.0), (8, 1e9)])
def test_cut_off_and_gone_on_is_never_cut_off(tmp_path: Path, at: int, every: float) -> None:
    model = tiny(dropout=0.3)
    whole = weights(dissect.distil(cut(model), model, CLIPS, **SHORT))
    with pytest.raises(KeyboardInterrupt):
        dissect.distil(cut(model), model, Breaking(CLIPS, at), checkpoint=tmp_path / "run", every=every, **SHORT)
    assert (tmp_path / "run").exists() == (every == 0.0)
    again = dissect.distil(cut(model), model, CLIPS, checkpoint=tmp_path / "run", every=every, **SHORT)
    assert same(weights(again), whole)
    done = dissect.distil(cut(model), model, CLIPS, checkpoint=tmp_path / "run", **SHORT)
    assert same(weights(done), whole), "a run that is over is not gone on with"


def test_cut_off_twice_with_clips_drawn_anew(tmp_path: Path) -> None:
    model = tiny(dropout=0.3)
    whole = weights(dissect.distil(cut(model), model, Noisy(), **SHORT))
    for at in (6, 7):
        broken = Breaking([], at)
        broken.items = Noisy()  # type: ignore[assignment]
        with pytest.raises(KeyboardInterrupt):
            dissect.distil(cut(model), model, broken, checkpoint=tmp_path / "run", every=0, **SHORT)
    assert same(weights(dissect.distil(cut(model), model, Noisy(), checkpoint=tmp_path / "run", **SHORT)), whole)


@pytest.mark.slow
def test_a_loader_is_entered_where_it_was_left(tmp_path: Path) -> None:
    model = tiny()

    def loader() -> Any:
        return DataLoader(CLIPS, batch_size=2, shuffle=True)  # type: ignore[arg-type]

    whole = weights(dissect.distil(cut(model), model, loader(), **SHORT))

    class Cut:
        def __iter__(self) -> Any:
            for index, item in enumerate(loader()):
                if index == 2:
                    raise KeyboardInterrupt
                yield item

    with pytest.raises(KeyboardInterrupt):
        dissect.distil(cut(model), model, Cut(), checkpoint=tmp_path / "run", every=0, **SHORT)
    assert same(weights(dissect.distil(cut(model), model, loader(), checkpoint=tmp_path / "run", **SHORT)), whole)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    model = tiny()
    dissect.distil(cut(model), model, CLIPS, checkpoint=tmp_path / "run", **SHORT)
    with pytest.raises(LoadError, match=r"of a run with lr=0.003, not 0.1"):
        dissect.distil(cut(model), model, CLIPS, checkpoint=tmp_path / "run", **{**SHORT, "lr": 0.1})


def test_divergence_by_hand() -> None:
    student, teacher = torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p, q = (teacher / 3).softmax(-1), (student / 3).softmax(-1)
    by_hand = 9 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(divergence(student, teacher, 3.0), by_hand)
    assert float(divergence(teacher, teacher, 3.0)) == pytest.approx(0, abs=1e-12)


def test_the_rate_rises_and_falls() -> None:
    rates = [Falling(2.0, 100).rate(step) for step in range(100)]
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert 1.9 < max(rates) <= 2.0
    assert rates[-1] < 0.01


def test_what_is_no_score_is_compared_by_its_error() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(1, 2, 3, stride=(2, 1, 1), padding=1), nn.Tanh()).double().eval()
    stream = dissect.convert(model, CLIP.double())

    def error() -> float:
        with torch.no_grad():
            wanted = model(CLIPS)
            return float((stream.clip(CLIPS)[:, :, ::2] - wanted).square().mean())

    before = error()
    dissect.distil(stream, model, CLIPS, steps=80, batch=4, lr=1e-2, progress=False)
    assert error() < 0.7 * before
    with pytest.raises(ClipError, match="no scores of classes"):
        dissect.agreement(stream, model, CLIPS)


def test_a_loss_of_ones_own() -> None:
    model, seen = tiny(), []

    def loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        seen.append((student.shape, teacher.shape, teacher.requires_grad))
        return (student - teacher).abs().mean()

    dissect.distil(cut(model), model, CLIPS, loss=loss, windows=2, **{**SHORT, "steps": 1})
    assert seen == [((2, 2, 3), (2, 2, 3), False)]


def test_agreement_by_hand() -> None:
    model = tiny()
    stream = cut(model)
    with torch.no_grad():
        out = stream.clip(CLIPS)
        same_class = [
            out[:, :, frame].argmax(1) == model(CLIPS[:, :, frame - 5 : frame + 1]).argmax(1) for frame in (5, 6, 7)
        ]
    assert dissect.agreement(stream, model, CLIPS) == pytest.approx(float(torch.stack(same_class).double().mean()))


def test_clips_shorter_than_the_window_are_refused() -> None:
    model = tiny()
    with pytest.raises(
        ClipError, match=r"clip . has 4 frames, and 6 are needed \(the window of the original network\)"
    ):
        dissect.distil(cut(model), model, clips(3, 4), **{**SHORT, "batch": 1})
