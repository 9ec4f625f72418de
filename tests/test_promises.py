"""The promises, one by one: public networks against themselves, and the traps that others fell into."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from laws import close, law, offline, steps, streamed
from public_networks import NETWORKS, TORCHVISION, network, random_clip
from random_networks import scrambled
from torch import Tensor, nn

import dissect
from dissect import zoo
from dissect.errors import NotStreamable

PRESETS = ["d3d", "causal", "exact"]
presets = pytest.mark.parametrize("preset", PRESETS)

#: public networks small enough for every run: frames and size of the clip
SMALL = {"r3d_18": (16, 16), "mc3_18": (10, 16), "r2plus1d_18": (9, 16), "s3d": (16, 224)}
#: what s3d accepts: after four halvings of time, its last pool needs two positions
LENGTHS = {
    name: [16, 15, 14] if name == "s3d" else [frames, *range(frames - 1, 0, -3)][:4]
    for name, (frames, _) in SMALL.items()
}


@cache
def double(name: str) -> nn.Module:
    return network(name, num_classes=11).double()


@pytest.mark.parametrize(
    "name", [name if name != "s3d" else pytest.param(name, marks=pytest.mark.slow) for name in SMALL]
)
def test_exact_is_the_unmodified_network(name: str) -> None:
    frames, size = SMALL[name]
    clip = random_clip((1, 3, frames, size, size)).double()
    stream = dissect.convert(double(name), clip, preset="exact")
    assert stream.plan.exact
    assert offline(stream, double(name), clip, LENGTHS[name]) == len(LENGTHS[name])


@pytest.mark.parametrize(
    "name", [name if name in ("r3d_18", "mc3_18") else pytest.param(name, marks=pytest.mark.slow) for name in SMALL]
)
@presets
def test_public_networks_keep_the_law(name: str, preset: str) -> None:
    frames, size = SMALL[name]
    clip = random_clip((2, 3, frames, size, size)).double()
    stream = dissect.convert(double(name), clip, preset=preset)
    assert (stream.timing.delay == 0) == (preset != "exact")
    law(stream, clip[:, :, :7], chunks=(1, 2, 5) if name == "mc3_18" else (3,))
    assert set(stream.clip.state_dict()) == set(double(name).state_dict())
    if preset != "exact":
        dissect.verify(stream, double(name), runtime=False).check()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TORCHVISION, "c3d"])
@presets
def test_public_networks_at_their_own_size(name: str, preset: str, tmp_path: Path) -> None:
    """float32, by the exported file: streamed and flushed, the logits of the unmodified network."""
    model = zoo.c3d(num_classes=101, width=16, hidden=64, seed=0).eval() if name == "c3d" else network(name)
    _, frames, size, _ = (3, 16, 112, 112) if name == "c3d" else NETWORKS[name].clip
    clip = random_clip((1, 3, frames, size, size))
    started = time.perf_counter()
    stream = dissect.convert(model, clip, preset=preset)
    assert time.perf_counter() - started < 60
    path = dissect.export(stream, tmp_path / "net.onnx")
    dissect.verify(stream, model, onnx=path).check()
    model_proto = onnx.load(path)
    assert not {"BatchNormalization"} & {node.op_type for node in model_proto.graph.node}
    assert all(len(weight.dims) <= 4 for weight in model_proto.graph.initializer)
    if preset != "exact":
        return
    run, compared = dissect.Runner(path), 0
    for length in range(frames, 0, -1):
        with torch.no_grad():
            try:
                wanted = model(clip[:, :, :length])
            except RuntimeError:
                continue
        for frame in clip[:, :, :length].unbind(2):
            run.step(frame.numpy())
        close(torch.as_tensor(run.flush()[-1]), wanted, 1e-4, f"{length} frames")
        compared += 1
        if compared == 10:
            break
    assert compared >= (1 if name in ("c3d", "s3d") else 10)


# A home-made network with everything that the first networks need.


class Everything(nn.Module):
    """Concatenation, squeeze-excitation, dilation, temporal average pooling, F.pad, functional calls, 2D over merged time."""

    def __init__(self) -> None:
        super().__init__()
        self.plane = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.weight = nn.Parameter(torch.empty(6, 6, 3, 1, 1))
        self.dilated = nn.Conv3d(6, 6, 3, padding=(2, 1, 1), dilation=(2, 1, 1), groups=3)
        self.norm = nn.BatchNorm3d(12)
        self.down, self.up = nn.Linear(12, 4), nn.Linear(4, 12)
        self.mix = nn.Conv3d(12, 8, (2, 1, 1))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        n, _, t = x.shape[:3]
        x = self.plane(x.transpose(1, 2).reshape(n * t, *x.shape[1:2], *x.shape[3:]))
        x = x.view(n, t, *x.shape[1:]).permute(0, 2, 1, 3, 4)
        y = F.conv3d(F.pad(x, (0, 0, 0, 0, 2, 0)), self.weight, stride=1)
        x = F.silu(self.norm(torch.cat([y, F.softplus(self.dilated(x))], dim=1)))
        gate = self.up(F.relu(self.down(x.mean((3, 4)).transpose(1, 2)))).transpose(1, 2)
        x = x * torch.sigmoid(gate)[..., None, None]
        x = F.avg_pool3d(x, (3, 1, 1), stride=(2, 1, 1), padding=(1, 0, 0), count_include_pad=False)
        x = self.mix(F.pad(x, (0, 0, 0, 0, 1, 0), value=0.0))
        return self.fc(x.mean((2, 3, 4)))


@presets
def test_a_home_made_network(preset: str, tmp_path: Path) -> None:
    model = scrambled(Everything(), 0)
    clip = torch.randn(2, 3, 14, 8, 8, dtype=torch.float64)
    stream = dissect.convert(model, clip, preset=preset)
    law(stream, clip)
    dissect.verify(stream, model).check()
    if preset == "exact":
        assert stream.plan.exact
        assert offline(stream, model, clip, range(14, 0, -1)) >= 12


# The traps. The numbers are those of the list that the project keeps.


class Deep(nn.Module):
    """Biases, norms and paths of different delay: where a cold start shows."""

    def __init__(self, head: bool = True) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(2, 4, (3, 1, 1), padding=(1, 0, 0)), nn.BatchNorm3d(4), nn.Softplus())
        self.branch = nn.Sequential(
            nn.Conv3d(4, 4, (5, 1, 1), (2, 1, 1), (2, 0, 0)),
            nn.Sigmoid(),
            nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0)),
        )
        self.skip = nn.Conv3d(4, 4, 1, (2, 1, 1))
        self.fc = nn.Linear(4, 3) if head else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.branch(x) + self.skip(x)
        return x if self.fc is None else self.fc(x.mean((2, 3, 4)))


def deep(head: bool = True) -> nn.Module:
    return scrambled(Deep(head), 0)


CLIP = torch.randn(2, 2, 12, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def runner(model: nn.Module, preset: str, path: Path, batch: int = 1, **options: Any) -> dissect.Runner:
    stream = dissect.convert(model.float(), CLIP.float(), preset=preset, **options)
    return dissect.Runner(dissect.export(stream, path / "net.onnx"), batch=batch)


def test_1_every_step_has_its_output(tmp_path: Path) -> None:
    """Control flow over a step counter is frozen at export: an off step would give nothing for ever."""
    run = runner(deep(), "exact", tmp_path)
    given = [run.step(np.ones((1, 2, 3, 3), np.float32) * time) for time in range(30)]
    assert [out is None for out in given] == [time < run.delay for time in range(30)]
    assert len({float(out[0, 0]) for out in given if out is not None}) > 20


@presets
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_2_the_batch_comes_first(preset: str, batch: int, tmp_path: Path) -> None:
    stream = dissect.convert(deep(), CLIP, preset=preset)
    assert all(cache.shape[0] == batch for cache in stream.caches(batch))
    x = torch.randn(batch, 2, 9, 3, 3, dtype=torch.float64)
    law(stream, x, chunks=(2,))
    together, _ = steps(stream, (x,))
    for row in range(batch):
        alone, _ = steps(stream, (x[row : row + 1],))
        close([out[row : row + 1] for out in together], alone)


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 8, 12])
def test_3_a_cold_start_is_gated(frames: int) -> None:
    """Zero caches are no zero padding once a bias or a norm stands upstream: the first outputs are the clip's first."""
    model = deep(head=False)
    stream = dissect.convert(model, CLIP, preset="exact")
    assert offline(stream, model, CLIP, [frames]) == 1


NORMS = {
    "GroupNorm": nn.GroupNorm(2, 4),
    "InstanceNorm": nn.InstanceNorm3d(4, affine=True),
    "LayerNorm": nn.LayerNorm([12, 3, 3]),
}


@presets
@pytest.mark.parametrize("name", NORMS)
def test_4_a_norm_over_time_is_refused_or_says_so(name: str, preset: str) -> None:
    model = scrambled(nn.Sequential(nn.Conv3d(2, 4, (3, 1, 1), padding=(1, 0, 0)), NORMS[name]), 0)
    try:
        stream = dissect.convert(model, CLIP, preset=preset)
    except NotStreamable as error:
        refused = error.refusals
    else:
        refused = ()
    if refused:
        assert refused[0].path == "1"
        return
    law(stream, CLIP)
    assert not stream.plan.exact
    assert any(row.path == "1" and row.verdict == "approximate" and row.reason for row in stream.plan)


POOLS = {
    "padded maximum of negatives": nn.MaxPool3d((3, 1, 1), 1, (1, 0, 0)),
    "uncounted padding": nn.AvgPool3d((3, 1, 1), 1, (1, 0, 0), count_include_pad=False),
    "counted padding": nn.AvgPool3d((3, 1, 1), 2, (1, 0, 0)),
    "dilated maximum": nn.MaxPool3d((2, 1, 1), 1, 0, (3, 1, 1)),
    "a maximum that rounds up": nn.MaxPool3d((3, 1, 1), (2, 1, 1), ceil_mode=True),
    "a mean that rounds up": nn.AvgPool3d((3, 1, 1), (2, 1, 1), (1, 0, 0), ceil_mode=True),
    "a mean with a divisor": nn.AvgPool3d((3, 1, 1), (2, 1, 1), divisor_override=2),
    "a mean of frames with a divisor": nn.AvgPool3d(
        (1, 2, 2), 1, (0, 1, 0), count_include_pad=False, divisor_override=3
    ),
}


class Negative(nn.Module):
    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(-F.softplus(x) - 1)


@presets
@pytest.mark.parametrize("name", POOLS)
def test_4_pools_and_their_paddings(name: str, preset: str) -> None:
    model = Negative(POOLS[name]).eval()
    stream = dissect.convert(model, CLIP, preset=preset)
    law(stream, CLIP)
    if preset == "exact":
        assert offline(stream, model, CLIP, range(12, 3, -1)) == 9
    else:
        dissect.verify(stream, model, runtime=False).check()


@presets
def test_4_a_dilated_mean_over_strided_positions(preset: str) -> None:
    model = scrambled(
        nn.Sequential(
            nn.Conv3d(2, 3, (3, 1, 1), (2, 1, 1), (1, 0, 0)),
            nn.Sigmoid(),
            nn.AvgPool3d((3, 1, 1), 1, (1, 0, 0), False, False),
        ),
        0,
    )
    stream = dissect.convert(model, CLIP, preset=preset)
    law(stream, CLIP)
    if preset == "exact":
        assert offline(stream, model, CLIP, range(12, 0, -1)) >= 8


@pytest.mark.parametrize("positive", [True, False])
def test_4_a_dilated_maximum_of_padding_alone_is_torchs(positive: bool) -> None:
    """Of a clip of one frame its two taps see nothing but padding, and torch's maximum of that is -inf."""
    pool = nn.MaxPool3d((2, 1, 1), 1, (1, 0, 0), (2, 1, 1))
    model = nn.Sequential(nn.Sigmoid() if positive else nn.Identity(), pool, nn.Sigmoid()).eval()
    stream = dissect.convert(model, CLIP, preset="exact")
    law(stream, CLIP)
    assert offline(stream, model, CLIP, range(12, 0, -1)) == 12
    assert bool((model(CLIP[:, :, :1]) == 0).all())


class Bidirectional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 3, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x.mean((3, 4)).transpose(1, 2))[0]


@presets
def test_4_a_bidirectional_recurrence_is_never_made_unidirectional(preset: str) -> None:
    with pytest.raises(NotStreamable, match="bidirectional") as caught:
        dissect.convert(Bidirectional(), CLIP.float(), preset=preset)
    assert caught.value.refusals[0].path == "lstm"


@presets
def test_5_the_callers_caches_stay(preset: str) -> None:
    stream = dissect.convert(deep(), CLIP, preset=preset)
    _, caches = steps(stream, (CLIP,))
    before = [cache.clone() for cache in caches]
    with torch.no_grad():
        stream.step(CLIP[:, :, 0], *caches)
        stream.chunk(CLIP, *caches)
    assert all(torch.equal(cache, copy) for cache, copy in zip(caches, before, strict=True))


@presets
def test_6_the_plan_says_what_is_equal_to_what(preset: str) -> None:
    stream = dissect.convert(deep(), CLIP, preset=preset)
    assert stream.plan.exact == (preset == "exact")
    assert all(row.reason for row in stream.plan if row.verdict == "approximate")


@presets
def test_8_many_chunks_and_thousands_of_steps(preset: str) -> None:
    """Wrong from the third chunk on, wrong once a counter turns back, wrong after a reset: each would be seen."""
    model = scrambled(
        nn.Sequential(
            nn.Conv3d(1, 2, (3, 1, 1), (2, 1, 1), (1, 0, 0)),
            nn.Sigmoid(),
            nn.Conv3d(2, 1, (3, 1, 1), padding=(1, 0, 0)),
        ),
        0,
    )
    x = torch.randn(2, 1, 4000, 1, 1, dtype=torch.float64)
    stream = dissect.convert(model, x[:, :, :12], preset=preset)
    with torch.no_grad():
        whole = stream.clip(x)
        got, caches = steps(stream, (x,))
        close(torch.stack(got, 2), whole)
        held: Any = stream.caches(2)
        parts = []
        for start in range(0, 4000, 7):
            out, *held = stream.chunk(x[:, :, start : start + 7], *held)
            parts.append(out)
        close(torch.cat(parts, 2), whole)
    for held_one, spec in zip(caches, stream.cache_list, strict=True):
        if spec.spec.role == "age":
            assert int(held_one.max()) < 100, "the counter grows without bound"
    if preset == "exact":
        assert offline(stream, model, x, [4000, 3999, 3998]) == 3


@presets
def test_8_resets_in_between(preset: str, tmp_path: Path) -> None:
    model = deep()
    run = runner(model, preset, tmp_path, batch=2)
    stream = dissect.convert(model, CLIP.float(), preset=preset)
    x = torch.randn(2, 2, 25, 3, 3)
    resets = {6: 0, 7: 1, 15: 0, 16: 0}
    starts, got = [0, 0], []
    for moment, frame in enumerate(x.unbind(2)):
        if moment in resets:
            run.reset(resets[moment])
            starts[resets[moment]] = moment
        got.append((run.step(frame.numpy()), list(starts)))
    for moment, (out, began) in enumerate(got):
        for row in range(2):
            if moment - began[row] < stream.timing.delay:
                continue
            with torch.no_grad():
                wanted = stream.clip(x[row : row + 1, :, began[row] : moment + 1])[..., -1]
            np.testing.assert_allclose(out[row : row + 1], wanted, rtol=1e-3, atol=1e-4)


@presets
def test_9_and_5_nothing_is_kept_but_the_caches(preset: str) -> None:
    stream = dissect.convert(deep(), CLIP, preset=preset)
    names = {name for name, _ in stream.step.named_buffers()}
    assert names <= {name for name, _ in deep().named_buffers()}
    before = {name: value.clone() for name, value in stream.step.state_dict().items()}
    first, _ = steps(stream, (CLIP,))
    second, _ = steps(stream, (CLIP,))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in stream.step.state_dict().items())


@presets
def test_10_a_cumulative_pool_is_bounded(preset: str) -> None:
    model = scrambled(nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(1, 1)), 0)
    x = torch.rand(1, 1, 600, 1, 1, dtype=torch.float64)
    stream = dissect.convert(model, x[:, :, :12], preset=preset, pool="cumulative")
    close(stream.clip(x)[..., -1], model(x))
    from dissect.primitives import CumulativeMean

    for module in stream.step.modules():
        if isinstance(module, CumulativeMean):
            module.horizon = 50
    _, caches = steps(stream, (x,))
    counters = [cache for cache, spec in zip(caches, stream.cache_list, strict=True) if spec.spec.shape == (1,)]
    assert max(float(cache.max()) for cache in caches) <= 50
    assert counters


@presets
def test_12_a_nan_frame_leaves_after_the_receptive_field(preset: str) -> None:
    stream = dissect.convert(deep(), CLIP, preset=preset)
    x = torch.randn(1, 2, 60, 3, 3, dtype=torch.float64)
    spoilt = x.clone()
    spoilt[:, :, 5] = float("nan")
    with torch.no_grad():
        clean, _ = steps(stream, (x,))
        got, caches = steps(stream, (spoilt,))
    bad = [moment for moment, out in enumerate(got) if out.isnan().any()]
    assert bad, "the frame is seen"
    assert bad[0] >= 5
    assert bad[-1] <= 5 + stream.timing.receptive_field
    close(got[bad[-1] + 1 :], clean[bad[-1] + 1 :])
    assert not any(cache.isnan().any() for cache in caches if cache.is_floating_point())


@presets
def test_12_a_nan_in_one_row_stays_there(preset: str) -> None:
    stream = dissect.convert(deep(), CLIP, preset=preset)
    spoilt = CLIP.clone()
    spoilt[0, :, 3] = float("nan")
    with torch.no_grad():
        close(stream.clip(spoilt)[1], stream.clip(CLIP)[1])


def test_12_a_nan_before_the_stream_is_no_padding() -> None:
    """What layers make of fresh caches may be no number at all; a gate must not let it through."""

    class Divides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv3d(2, 2, (3, 1, 1), padding=(1, 0, 0), bias=False)
            self.second = nn.Conv3d(2, 2, (5, 1, 1), padding=(2, 0, 0))

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.second(torch.log(x.square().sum(1, keepdim=True)) + x / x.abs())

    model = scrambled(Divides(), 0)
    stream = dissect.convert(model, CLIP, preset="exact")
    assert offline(stream, model, CLIP, range(12, 0, -1)) == 12


def test_15_no_local_path_in_the_file(tmp_path: Path) -> None:
    stream = dissect.convert(deep().float(), CLIP.float(), preset="exact")
    data = dissect.export(stream, tmp_path / "net.onnx").read_bytes()
    assert not [word for word in (b"/home", b"/root", b"site-packages", b".py", str(tmp_path).encode()) if word in data]


# Refusals come by name.


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.mean() > 0 else x


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"odd": Odd()})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["odd"](x)


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft(x, dim=2).abs()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Branch(), ["Branch", "branches on the values"]),
        (Unknown(), ["inner.odd", "fft", "--rules"]),
        (Bidirectional(), ["lstm", "bidirectional"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_7_an_error_names_the_path_the_operator_and_what_to_do(model: nn.Module, words: list[str]) -> None:
    with pytest.raises(dissect.DissectError) as caught:
        dissect.convert(model, CLIP.float())
    assert all(word in str(caught.value) for word in words), caught.value


def test_flush_of_several_lengths_is_the_clip() -> None:
    model = deep(head=False)
    stream = dissect.convert(model, CLIP, preset="exact")
    for frames in (1, 4, 11):
        with torch.no_grad():
            close(streamed(stream, CLIP[:, :, :frames], frames=frames), model(CLIP[:, :, :frames]))
