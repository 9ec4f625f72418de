"""Verify finds what is broken: each form, the original, the file; it says where, and a sound stream passes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_networks import scrambled
from torch import Tensor, nn

import dissect
from dissect.errors import VerificationError
from dissect.reports import Report

PRESETS = ["d3d", "causal", "exact"]
CLIP = torch.randn(1, 2, 8, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(2, 4, 3, padding=1)
        self.second = nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0))
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        return self.fc((x + torch.sigmoid(self.second(x))).mean((2, 3, 4)))


def made(preset: str) -> tuple[nn.Module, dissect.Stream]:
    model = scrambled(Net(), 0)
    return model, dissect.convert(model, CLIP, preset=preset)


def broken(report: Report) -> list[str]:
    """The pairs that are not equal; the report must say so in every way that it has."""
    assert not report.ok
    with pytest.raises(VerificationError) as caught:
        report.check()
    pairs = [row.pair for row in report.rows if not row.ok]
    assert all(pair in str(caught.value) for pair in pairs)
    assert str(report).count("FAIL") == len(pairs)
    return pairs


@pytest.mark.parametrize("preset", PRESETS)
def test_a_sound_stream_passes(preset: str) -> None:
    model, stream = made(preset)
    report = dissect.verify(stream, model)
    assert report.check() is report
    pairs = [row.pair for row in report.rows]
    assert any("original" in pair for pair in pairs)
    assert any("ONNX Runtime" in pair for pair in pairs)
    assert any("batch" in pair for pair in pairs)
    assert all(
        row.error is not None and row.tolerance is not None and row.error <= row.tolerance for row in report.rows
    )
    assert "FAIL" not in str(report)


def test_a_network_may_return_none_and_constants_beside_its_scores() -> None:
    class Discriminator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main = nn.Conv3d(3, 2, 3, padding=1)
            self.register_buffer("priors", torch.arange(6.0))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Any, None]:
            return self.main(x).mean((2, 3, 4)), self.priors, None

    network = Discriminator().eval()
    dissect.verify(dissect.convert(network, torch.randn(1, 3, 4, 6, 6), preset="exact"), network).check()


@pytest.mark.parametrize("preset", PRESETS)
def test_captures_of_two_batches_call_their_nodes_alike(preset: str) -> None:
    """Behind a layer in place a capture makes its views anew, and with a batch of one more of them."""

    class Trunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early, self.late = (nn.Conv3d(c, 4, (3, 1, 1), padding=(1, 0, 0)) for c in (2, 4))
            self.act = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.early(x))
            b, c, t, h, w = x.shape
            flat = x.transpose(1, 2).reshape(b * t, c, h, w)
            return self.late(flat.view(b, t, c, h, w).transpose(1, 2)).mean((2, 3, 4))

    network = scrambled(Trunk(), 0)
    report = dissect.verify(dissect.convert(network, CLIP, preset=preset), network, runtime=False).check()
    assert any("original" in row.pair and row.error is not None for row in report.rows)


def test_without_the_original_only_the_law_is_checked() -> None:
    _, stream = made("exact")
    report = dissect.verify(stream, runtime=False).check()
    assert not [row for row in report.rows if "original" in row.pair or "ONNX" in row.pair]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_wrong_weight_in_the_step_is_found_and_named(preset: str) -> None:
    model, stream = made(preset)
    stream.step = copy.deepcopy(stream.step)
    with torch.no_grad():
        stream.step.get_parameter("second.bias").add_(1e-6)
    report = dissect.verify(stream, model, runtime=False)
    assert set(broken(report)) == {"clip form = step form"}
    assert any("second" in row.note for row in report.rows if not row.ok), "the first node that parts"


@pytest.mark.parametrize("preset", PRESETS)
def test_a_wrong_weight_in_the_original_is_found(preset: str) -> None:
    model, stream = made(preset)
    with torch.no_grad():
        model.get_parameter("second.weight").add_(1e-3)
    report = dissect.verify(stream, model, runtime=False)
    assert [pair for pair in broken(report) if "original" not in pair] == []
    if preset == "exact":
        assert any("conv3d_1" in row.note or "second" in row.note for row in report.rows if not row.ok), (
            "the first node that parts"
        )


@pytest.mark.parametrize("preset", PRESETS)
def test_another_file_is_found(preset: str, tmp_path: Path) -> None:
    model, stream = made(preset)
    dissect.verify(stream, model, onnx=dissect.export(stream, tmp_path / "right.onnx")).check()
    other = scrambled(Net(), 5)
    path = dissect.export(dissect.convert(other, CLIP, preset=preset), tmp_path / "wrong.onnx")
    assert set(broken(dissect.verify(stream, model, onnx=path))) == {"step form = ONNX Runtime"}


def test_a_file_of_other_options_is_told(tmp_path: Path) -> None:
    model, stream = made("exact")
    path = dissect.export(dissect.convert(model, CLIP, preset="causal"), tmp_path / "causal.onnx")
    (row,) = [row for row in dissect.verify(stream, model, onnx=path).rows if not row.ok]
    assert f"its delay is 0 frames, and this one's {stream.timing.delay}" in row.note


def test_outputs_are_compared_however_late_they_come() -> None:
    """A stack whose first output comes after the frames of an ordinary comparison."""
    model = scrambled(nn.Sequential(*(nn.Conv3d(1, 1, (9, 1, 1)) for _ in range(5))), 0)
    stream = dissect.convert(model, torch.randn(1, 1, 48, 2, 2, dtype=torch.float64), preset="exact")
    assert stream.timing.delay == 40
    (row,) = [row for row in dissect.verify(stream, model).check().rows if row.pair == "step form = ONNX Runtime"]
    assert row.error is not None
    assert "41 frames" in row.what


class Leaky(nn.Module):
    """Breaks the law: what a row gives depends on the batch."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.__dict__["run"] = inner.__dict__["run"]

    def forward(self, *args: Any) -> Any:
        out, *caches = self.inner(*args)
        return (out + out.mean(0, keepdim=True) * 1e-3, *caches)


def test_a_step_that_mixes_rows_is_found() -> None:
    model, stream = made("exact")
    stream.step = Leaky(stream.step)  # type: ignore[assignment]
    assert "clip form = step form" in broken(dissect.verify(stream, model, runtime=False))


def test_a_cache_that_is_wrong_is_found_though_no_output_shows_it() -> None:
    model, stream = made("exact")
    inner = stream.step

    class Late(nn.Module):
        """Spoils the caches of the last step, which no output has read yet."""

        def __init__(self) -> None:
            super().__init__()
            self.__dict__["run"] = inner.__dict__["run"]
            self.steps = 0

        def forward(self, *args: Any) -> Any:
            self.steps += 1
            out, *caches = inner(*args)
            return (out, *[cache + 1 if self.steps > 8 and cache.is_floating_point() else cache for cache in caches])

    stream.step = Late()  # type: ignore[assignment]
    assert set(broken(dissect.verify(stream, model, frames=9, runtime=False))) == {"clip form = step form"}


def test_nan_is_no_agreement() -> None:
    model, stream = made("exact")
    with torch.no_grad():
        model.get_parameter("fc.bias")[0] = float("nan")
    assert broken(dissect.verify(stream, model, runtime=False))


def test_what_is_approximate_by_the_plan_is_measured_but_no_promise() -> None:
    model = scrambled(Net(), 0)
    stream = dissect.convert(model, CLIP, preset="exact", overrides={"first": {"depth": 1}})
    report = dissect.verify(stream, model, runtime=False).check()
    (row,) = [row for row in report.rows if row.note and "first" in row.note][:1]
    assert row.error is not None
    assert row.error > 1e-6


def test_progress_is_told() -> None:
    model, stream = made("causal")
    told: list[str] = []
    dissect.verify(stream, model, runtime=False, progress=told.append)
    assert "step form" in told
    assert "original" in told


@pytest.mark.parametrize("preset", PRESETS)
def test_the_original_may_be_an_exported_program_or_in_training_mode(preset: str) -> None:
    model, stream = made(preset)
    program = torch.export.export(model, (CLIP,), strict=False)
    dissect.verify(stream, program, runtime=False).check()
    model.train()
    dissect.verify(stream, model, runtime=False).check()
    assert model.training


class TwoRates(nn.Module):
    """Two outputs, one for every frame and one for every other: in a flush one of them ends before the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(2, 4, 3, padding=1)
        self.second = nn.Conv3d(4, 2, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(x)
        return x, self.second(x)


def test_outputs_that_end_apart() -> None:
    model = scrambled(TwoRates(), 0)
    dissect.verify(dissect.convert(model, CLIP, preset="exact"), model).check()


def test_a_flush_that_is_too_short_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    model, stream = made("exact")
    monkeypatch.setattr(stream, "flush_frames", lambda frames: 0)
    report = dissect.verify(stream, model, runtime=False)
    assert broken(report) == ["original = exact"]
    assert f"the flush ends {stream.timing.delay} frames before the last position" in str(report)


class Sliced(nn.Module):
    """Averages of slices of the clip that end at fixed frames, as segments of a proposal do."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[:, 0:3].mean(1), x[:, 3:9].mean(1), x[:, 9:12].mean(1)], 1)


class Chunks(nn.Module):
    """A recurrence over the last values of chunks of four frames."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.LSTM(4, 6, batch_first=True), nn.LSTM(6, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.inner(x[:, at : at + 4])[0][:, -1] for at in range(0, x.shape[1], 4)]
        return self.outer(torch.stack(parts, 1))[0][:, -1]


@pytest.mark.parametrize(("network", "frames"), [(Sliced(), 12), (Chunks(), 16)])
def test_a_slice_that_a_shorter_clip_cuts_off_is_no_broken_promise(network: nn.Module, frames: int) -> None:
    network = network.double().eval()
    clip = torch.randn(1, frames, 4, dtype=torch.float64)
    report = dissect.verify(dissect.convert(network, clip, "exact", time_dim=1), network, runtime=False).check()
    assert any("another network" in (row.note or "") for row in report.rows)


class Cropped(nn.Module):
    """A crop of the clip's end, and what turns a zero into something else before the next kernel."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Conv3d(3, 4, 1), last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x)[:, :, :-2].sigmoid())


@pytest.mark.parametrize("last", [nn.Conv3d(4, 2, (6, 1, 1), 2), nn.AvgPool3d((6, 1, 1), 2)])
def test_before_a_crop_there_is_nothing_whatever_is_made_of_it(last: nn.Module) -> None:
    network = Cropped(last).double().eval()
    clip = torch.randn(2, 3, 12, 4, 4, dtype=torch.float64)
    report = dissect.verify(dissect.convert(network, clip, "causal"), network, runtime=False).check()
    assert any("kernels shifted" in row.pair and row.tolerance is not None and row.tolerance < 1 for row in report.rows)


class Read(nn.Module):
    """A mean of the whole clip, behind a kernel of three frames that the clip is padded for, or not."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv3d(3, 4, 3, padding=(padding, 1, 1)), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().mean((2, 3, 4)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("padding", [0, 1])
def test_a_longer_stream_is_the_original_on_the_last_frames_but_for_its_padding(padding: int) -> None:
    network = Read(padding).double().eval()
    clip = torch.randn(1, 3, 6, 5, 5, dtype=torch.float64)
    report = dissect.verify(dissect.convert(network, clip, "exact"), network, runtime=False).check()
    (row,) = [row for row in report.rows if row.pair == "original on the last frames = exact"]
    assert row.error is not None
    assert row.tolerance is not None
    if padding:
        assert row.error > 1e-3
        assert "8 frames count" in row.note
    else:
        assert row.error < 1e-12
        assert row.tolerance == 1e-9


def test_a_longer_stream_that_answers_for_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that lets the newest frame stand for all would be right for a still clip alone."""
    network = Read(0).double().eval()
    stream = dissect.convert(network, torch.randn(1, 3, 6, 5, 5, dtype=torch.float64), "exact")
    offline = stream.offline
    monkeypatch.setattr(stream, "offline", lambda x: offline(x if x.shape[2] <= 6 else x.roll(1, 2)))
    assert broken(dissect.verify(stream, network, runtime=False)) == ["original on the last frames = exact"]
