"""Options of the surgery: temporal skip connections, the frames of a stem, and what stands before the first frame."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from laws import close, law, steps
from torch import Tensor, nn

import dissect
from dissect import zoo
from dissect.cli import main
from dissect.convolution import FrameConv, TemporalConv
from dissect.errors import NotStreamable, PlanError

SKIPS = ["concat", "sum", "none"]


class Blocks(nn.Module):
    """A stem and a residual block, as small as they come."""

    def __init__(self, groups: int = 1, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv3d(2, 4, (7, 3, 3), padding=(3, 1, 1), bias=bias)
        self.a = nn.Conv3d(4, 4, 3, padding=1, groups=groups, bias=bias)
        self.b = nn.Conv3d(4, 4, 3, padding=1, groups=groups, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y: Tensor = self.b(self.a(x).relu()) + x
        return y


CLIP = torch.zeros(1, 2, 8, 5, 5, dtype=torch.float64)


def cut(model: nn.Module, **options: Any) -> dissect.Stream:
    return dissect.convert(model.double().eval(), CLIP, **options)


def taps(stream: dissect.Stream, path: str) -> int:
    layer = stream.clip.get_submodule(path)
    assert isinstance(layer, FrameConv)
    return len(layer.ages) if isinstance(layer, TemporalConv) else 1


def folded(weight: Tensor, kept: int) -> list[Tensor]:
    """By definition: the taps that meet the kept frames, oldest first, the others added to the nearest of those."""
    kernel = weight.shape[2]
    newest = max(kernel // 2, kept - 1)
    out = [torch.zeros_like(weight[:, :, 0]) for _ in range(kept)]
    for tap in range(kernel):
        out[min(max(tap - newest + kept - 1, 0), kept - 1)] += weight[:, :, tap]
    return out


def by_hand(model: Blocks, x: Tensor, skip: str, stem: int, fill: str, groups: int) -> Tensor:
    """The dissected network, frame by frame, with torch's own 2D convolutions."""

    def frames_of(values: list[Tensor], time: int, count: int) -> list[Tensor]:
        zeros = torch.zeros_like(values[0]) if fill == "zeros" else values[0]
        return [values[at] if at >= 0 else zeros for at in range(time - count + 1, time + 1)]

    def conv(layer: nn.Conv3d, past: list[Tensor], kept: int, groups: int) -> Tensor:
        parts = zip(past, folded(layer.weight.detach(), kept), strict=True)
        total = sum((F.conv2d(frame, weight, padding=1, groups=groups) for frame, weight in parts), torch.zeros(()))
        return total if layer.bias is None else total + layer.bias.detach()[:, None, None]

    stems: list[Tensor] = []
    outputs = []
    for time in range(x.shape[2]):
        stems.append(conv(model.stem, frames_of([*x.unbind(2)], time, stem), stem, 1))
        past = frames_of(stems, time, 2)
        if skip == "sum":
            a = conv(model.a, [(past[0] + past[1]) / 2], 1, groups)
        else:
            a = conv(model.a, past, 2, groups) if skip == "concat" else conv(model.a, past[1:], 1, groups)
        outputs.append(conv(model.b, [a.relu()], 1, groups) + stems[-1])
    return torch.stack(outputs, 2)


@pytest.mark.parametrize("fill", ["zeros", "replicate"])
@pytest.mark.parametrize("stem", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("skip", SKIPS)
def test_every_option_is_the_network_made_by_hand(skip: str, groups: int, stem: int, fill: str) -> None:
    model = Blocks(groups)
    stream = cut(model, skip=skip, stem=stem, fill=fill)
    assert (taps(stream, "stem"), taps(stream, "a"), taps(stream, "b")) == (stem, 2 if skip == "concat" else 1, 1)
    x = torch.randn(2, 2, 9, 5, 5, dtype=torch.float64)
    close(stream.clip(x), by_hand(model, x, skip, stem, fill, groups))
    law(stream, x)


@pytest.mark.parametrize("fill", ["zeros", "replicate"])
@pytest.mark.parametrize("skip", SKIPS)
def test_a_still_scene_keeps_its_answer(skip: str, fill: str) -> None:
    """In steady state; and where the first frame is repeated, from the first frame on."""
    model = Blocks()
    stream = cut(model, skip=skip, fill=fill)
    still = torch.randn(1, 2, 1, 5, 5, dtype=torch.float64).expand(-1, -1, 30, -1, -1)
    wanted = model(still)[:, :, 15]
    got, _ = steps(stream, (still,))
    early = stream.timing.warmup if fill == "zeros" and stream.timing.warmup else 0
    for output in got[early:]:
        close(output, wanted)
    report = dissect.verify(stream, model, runtime=False).check()
    row = next(row for row in report.rows if row.pair == "original = d3d")
    assert row.error is not None
    assert row.error < 1e-9
    assert row.tolerance == 1e-4


def test_a_cumulative_pool_promises_nothing_of_a_still_scene() -> None:
    """It holds the first frames for ever, whose caches were empty; with the first frame repeated they were not."""
    model = nn.Sequential(Blocks(), nn.AdaptiveAvgPool3d(1), nn.Flatten()).double().eval()
    for fill, error in (("zeros", 1.0), ("replicate", 1e-9)):
        stream = cut(model, pool="cumulative", fill=fill)
        row = next(row for row in dissect.verify(stream, model, runtime=False).check().rows if "d3d" in row.pair)
        assert row.error is not None
        assert row.error < error
        assert "remembers every frame" in row.note


@pytest.mark.parametrize("skip", SKIPS)
def test_an_override_is_the_option_for_one_layer(skip: str) -> None:
    model = Blocks()
    x = torch.randn(1, 2, 9, 5, 5, dtype=torch.float64)
    everywhere = cut(model, skip=skip).clip(x)
    close(cut(model, overrides={"[ab]": {"skip": skip}}).clip(x), everywhere)
    back = cut(model, skip=skip, overrides={"*": {"skip": "concat"}})
    close(back.clip(x), cut(model).clip(x))


def test_a_stem_is_spared_unless_it_is_named() -> None:
    model = Blocks()
    for skip, count in (("none", 1), ("sum", 1), ("concat", 3)):
        assert taps(cut(model, skip=skip), "stem") == 3
        assert taps(cut(model, overrides={"stem": {"skip": skip}}), "stem") == count
    row = next(row for row in cut(model, overrides={"stem": {"skip": "sum"}}).plan if row.path == "stem")
    assert row.decision == "the sum of 3 frames, 1 of 7 taps"


@pytest.mark.parametrize(("skip", "depth", "kept"), [("sum", 3, 1), ("concat", 3, 3), ("none", 3, 1)])
def test_depth_says_how_many_frames_are_added(skip: str, depth: int, kept: int) -> None:
    model = Blocks()
    stream = cut(model, overrides={"a": {"depth": depth, "skip": skip}})
    assert taps(stream, "a") == kept
    cached = [cache.spec.shape[0] for cache in stream.cache_list if cache.path == "a"]
    assert cached == ([] if skip == "none" else [4 * (depth - 1)])
    still = torch.randn(1, 2, 1, 5, 5, dtype=torch.float64).expand(-1, -1, 30, -1, -1)
    close(stream.clip(still)[:, :, 20], model(still)[:, :, 15])
    law(stream, torch.randn(2, 2, 9, 5, 5, dtype=torch.float64))


@pytest.mark.parametrize("skip", SKIPS)
def test_shared_weights_are_folded_as_well(skip: str) -> None:
    """A layer that is used twice takes its weights as arguments."""

    class Twice(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            y = self.a(x).relu() + x
            z: Tensor = self.a(y) + y
            return z

    model = Twice()
    stream = cut(model, skip=skip)
    still = torch.randn(1, 2, 1, 5, 5, dtype=torch.float64).expand(-1, -1, 30, -1, -1)
    close(stream.clip(still)[:, :, 20], model(still)[:, :, 15])
    law(stream, torch.randn(2, 2, 9, 5, 5, dtype=torch.float64))


@pytest.mark.parametrize("preset", ["d3d", "causal"])
def test_pools_and_stacked_frames_are_filled_too(preset: str) -> None:
    """With the first frame repeated, a still scene is steady at once, whatever looks back."""

    class Pools(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv3d(2, 4, 3, padding=1)
            self.mean = nn.AvgPool3d((3, 1, 1), 1, (1, 0, 0))
            self.max = nn.MaxPool3d((3, 1, 1), 1, (1, 0, 0))
            self.fc = nn.Linear(8 * 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.max(self.mean(self.conv(x)).relu())
            y: Tensor = self.fc(x.mean((3, 4)).transpose(1, 2).flatten(1))
            return y

    torch.manual_seed(0)
    stream = cut(Pools(), preset=preset, fill="replicate", overrides={"mean": {"depth": 3}, "max": {"depth": 3}})
    frame = torch.randn(2, 2, 1, 5, 5, dtype=torch.float64)
    got, _ = steps(stream, (frame.expand(-1, -1, 20, -1, -1),))
    for output in got:
        close(output, got[-1])
    law(stream, torch.randn(2, 2, 13, 5, 5, dtype=torch.float64))


def test_causal_with_the_first_frame_repeated_is_the_original_with_its_kernels_shifted() -> None:
    model = Blocks()
    stream = cut(model, preset="causal", fill="replicate")
    report = dissect.verify(stream, model, runtime=False).check()
    row = next(row for row in report.rows if "causal" in row.pair)
    assert row.error is not None
    assert row.tolerance == 1e-4


@pytest.mark.parametrize("fill", ["zeros", "replicate"])
@pytest.mark.parametrize("skip", SKIPS)
def test_the_file_gives_the_same_and_starts_from_zeros(skip: str, fill: str, tmp_path: Path) -> None:
    model = Blocks().float().eval()
    stream = dissect.convert(model, CLIP.float(), skip=skip, fill=fill)
    run = dissect.Runner(dissect.export(stream, tmp_path / "net.onnx"), batch=2)
    x = torch.randn(2, 2, 12, 5, 5)
    wanted = stream.clip(x)
    for time in range(6):
        close(torch.from_numpy(run.step(x[:, :, time].numpy())), wanted[:, :, time], 1e-4)
    run.reset(rows=[1])
    again = stream.clip(x[1:, :, 6:])
    for time in range(6, 12):
        got = torch.from_numpy(run.step(x[:, :, time].numpy()))
        close(got[:1], wanted[:1, :, time], 1e-4)
        close(got[1:], again[:, :, time - 6], 1e-4)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"skip": "add"}, ["add", "concat, sum, none"]),
        ({"fill": "same"}, ["same", "zeros, replicate"]),
        ({"stem": 0}, ["stem", "0"]),
        ({"stem": True}, ["stem", "True"]),
        ({"preset": "causal", "stem": 1}, ["stem=1", "d3d", "causal keeps every tap"]),
        ({"preset": "causal", "skip": "sum"}, ["skip=sum", "d3d", "causal keeps every tap"]),
        ({"preset": "exact", "skip": "none"}, ["skip=none", "d3d"]),
        ({"preset": "exact", "fill": "replicate"}, ["fill=replicate", "exact"]),
        ({"preset": "exact", "overrides": {"a": {"fill": "replicate"}}}, ["'a'", "fill=replicate", "exact"]),
        ({"preset": "causal", "overrides": {"a": {"skip": "sum"}}}, ["'a'", "skip=sum", "d3d"]),
        ({"overrides": {"a": {"skip": "add"}}}, ["'a'", "skip='add'", "concat, sum, none"]),
        ({"overrides": {"a": {"fill": 1}}}, ["'a'", "fill=1"]),
    ],
    ids=str,
)
def test_an_option_that_makes_no_sense_is_refused_with_what_there_is(given: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(PlanError) as caught:
        cut(Blocks(), **given)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_transposed_convolution_has_no_sum() -> None:
    model = nn.Sequential(nn.Conv3d(2, 3, 3, padding=1), nn.ConvTranspose3d(3, 2, 3, padding=1))
    with pytest.raises(NotStreamable, match=r"1: .*no sum of frames.*--set '1: skip=concat'"):
        cut(model, skip="sum", overrides={"1": {"depth": 2}})
    law(cut(model, skip="sum", overrides={"1": {"skip": "concat", "depth": 2}}), CLIP + 1)


@pytest.mark.parametrize("skip", SKIPS)
def test_a_resnet_keeps_its_stem_and_its_keys(skip: str) -> None:
    network = zoo.resnet18(num_classes=3, width=4, seed=0).eval()
    stream = dissect.convert(network, torch.zeros(1, 3, 16, 32, 32), skip=skip)
    state = stream.clip.state_dict()
    assert set(state) == set(network.state_dict())
    assert state["conv1.weight"].shape[2] == 3
    assert {state[f"layer{at}.{block}.conv1.weight"].shape[2] for at in range(1, 5) for block in (0, 1)} == (
        {2} if skip == "concat" else {1}
    )


def test_the_command_line_has_them_too() -> None:
    arguments = {"depth": 18, "head": "gru", "width": 4, "hidden": 8, "seed": 0}
    command = ["inspect", "--arch", "dissect.zoo:headed_resnet", "--arch-args", json.dumps(arguments)]
    command += ["--input", "1x3x16x32x32", "--skip", "sum", "--stem", "1", "--fill", "replicate", "--json"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    rows = {row["path"]: row["decision"] for row in json.loads(result.stdout)["rows"]}
    assert rows["conv1"] == "1 of 7 taps"
    assert rows["layer1.0.conv1"] == "the sum of 2 frames, 1 of 3 taps"
    assert rows["layer1.0.conv2"] == "1 of 3 taps"
    assert rows["head.rnn"].startswith("recurrence")
    result = CliRunner().invoke(main, [*command, "--preset", "causal"])
    assert result.exit_code == 2
    assert "stem=1 is for the preset d3d" in result.output
