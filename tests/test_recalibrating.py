"""Recalibrate: the statistics are those of the clips, counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import Breaking, clips, cut, same, tiny, weights
from torch import nn
from torch.nn import functional as F

import dissect
from dissect.errors import ClipError
from dissect.recalibrating import batch_norms

CLIPS = clips(5, 7)


def test_the_first_statistics_are_those_of_the_clips_counted_by_hand() -> None:
    model = tiny()
    stream = cut(model)
    dissect.recalibrate(stream, CLIPS, batch=2)
    # The stem keeps its three taps, moved into the past.
    values = F.conv3d(F.pad(CLIPS, (1, 1, 1, 1, 2, 0)), model.conv1.weight).detach()
    parts = [part.transpose(0, 1).flatten(1) for part in values.split(2)]
    mean = sum(part.mean(1) * share for part, share in zip(parts, (0.4, 0.4, 0.2), strict=True))
    variance = sum(part.var(1) * share for part, share in zip(parts, (0.4, 0.4, 0.2), strict=True))
    torch.testing.assert_close(stream.clip.bn1.running_mean, mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(stream.clip.bn1.running_var, variance, rtol=0, atol=1e-12)


def test_nothing_else_changes() -> None:
    stream = cut(tiny())
    before = weights(stream)
    momenta = [module.momentum for _, module in batch_norms(stream.clip)]
    assert dissect.recalibrate(stream, CLIPS) is stream
    after = weights(stream)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        f"{norm}.{part}" for norm in ("bn1", "bn3") for part in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert [module.momentum for _, module in batch_norms(stream.clip)] == momenta
    assert not any(module.training for form in (stream.clip, stream.step) for module in form.modules())


def test_the_step_form_has_them_too() -> None:
    stream = dissect.recalibrate(cut(tiny()), CLIPS)
    dissect.verify(stream, runtime=False).check()


def test_what_was_there_before_does_not_count() -> None:
    model, other = tiny(), tiny()
    with torch.no_grad():
        other.bn1.running_mean.add_(5.0)
        other.bn3.running_var.mul_(9.0)
    left, right = dissect.recalibrate(cut(model), CLIPS), dissect.recalibrate(cut(other), CLIPS)
    assert same(weights(left), weights(right))


def test_cut_off_and_gone_on(tmp_path: Path) -> None:
    whole = dissect.recalibrate(cut(tiny()), CLIPS, batch=1)
    stream = cut(tiny())
    with pytest.raises(KeyboardInterrupt):
        # The first clip is looked at once more than the others, to see whether it is a batch.
        dissect.recalibrate(stream, Breaking(CLIPS, 6), batch=1, checkpoint=tmp_path / "run", every=0)
    assert not same(weights(stream), weights(whole))
    late = Breaking(CLIPS, 99)
    again = dissect.recalibrate(cut(tiny()), late, batch=1, checkpoint=tmp_path / "run")
    assert late.asked < 5
    assert same(weights(again), weights(whole))
    assert same(weights(dissect.recalibrate(cut(tiny()), CLIPS, batch=1, checkpoint=tmp_path / "run")), weights(whole))


def test_a_network_without_batch_norms() -> None:
    stream = dissect.convert(nn.Conv3d(1, 2, 3, padding=1), CLIPS[:1].float())
    with pytest.raises(ClipError, match="no batch norm"):
        dissect.recalibrate(stream, CLIPS)
