"""Slices, concatenations, shifts and paddings over time, against the network as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from laws import law, offline
from torch import Tensor, nn

import dissect
from dissect.errors import NotStreamable

Function = Callable[[Tensor], Tensor]


def late(x: Tensor, frames: int = 1) -> Tensor:
    """The clip as it was some frames ago, with zeros before it."""
    return F.pad(x, (0, 0, 0, 0, frames, 0))[:, :, : x.shape[2]]


def shift_written(x: Tensor) -> Tensor:
    x = x.transpose(1, 2)
    out = torch.zeros_like(x)
    out[:, :-1, :1] = x[:, 1:, :1]
    out[:, 1:, 1:2] = x[:, :-1, 1:2]
    out[:, :, 2:] = x[:, :, 2:]
    return out.transpose(1, 2)


def shift_joined(x: Tensor) -> Tensor:
    x = x.transpose(1, 2)
    left, right, rest = x[:, :, :1], x[:, :, 1:2], x[:, :, 2:]
    left = torch.cat((left[:, 1:], torch.zeros_like(left)[:, :1]), 1)
    right = torch.cat((torch.zeros_like(right)[:, :1], right[:, :-1]), 1)
    return torch.cat((left, right, rest), 2).transpose(1, 2)


def shift_padded(x: Tensor) -> Tensor:
    ahead = F.pad(x[:, :1, 1:], (0, 0, 0, 0, 0, 1))
    behind = F.pad(x[:, 1:2, :-1], (0, 0, 0, 0, 1, 0))
    return torch.cat([ahead, behind, x[:, 2:]], 1)


def shift_with_frames(x: Tensor) -> Tensor:
    ahead = torch.cat([x[:, :1, 1:], x[:, :1, -1:]], 2)
    behind = torch.cat([x[:, 1:2, :1], x[:, 1:2, :-1]], 2)
    return torch.cat([ahead, behind, x[:, 2:]], 1)


def shifted_online(x: Tensor) -> Tensor:
    return torch.cat([x[:, :1], late(x[:, 1:2]), x[:, 2:]], 1)


def difference(x: Tensor) -> Tensor:
    return x[:, :, 1:] - x[:, :, :-1]


def written(x: Tensor, where: slice | int, value: float) -> Tensor:
    x = x.clone()
    x[:, :, where] = value
    return x


def scaled(x: Tensor, where: slice) -> Tensor:
    x = x.clone()
    x[:, :, where] = x[:, :, where] * 2
    return x


def same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Case:
    """A function of a clip, the frames that it waits for in ``exact``, and what is left of it without delay."""

    run: Function
    wait: int = 0
    online: Function | None = same


def chomp(x: Tensor) -> Tensor:
    kernel = torch.ones(x.shape[1], x.shape[1], 3, 1, 1, dtype=x.dtype) / 10
    return F.conv3d(x, kernel, padding=(2, 0, 0))[:, :, :-2]


CASES = {
    "shift, written into zeros": Case(shift_written, 1, shifted_online),
    "shift, joined with zeros": Case(shift_joined, 1, shifted_online),
    "shift, padded": Case(shift_padded, 1, shifted_online),
    "shift, joined with frames": Case(shift_with_frames, 1, shifted_online),
    "difference": Case(difference, 1, lambda x: x - late(x)),
    "difference, zeros before": Case(
        lambda x: torch.cat([torch.zeros_like(x[:, :, :1]), difference(x)], 2), 0, lambda x: x - late(x)
    ),
    "difference, zeros behind": Case(
        lambda x: torch.cat([difference(x), torch.zeros_like(x[:, :, :1])], 2), 1, lambda x: x - late(x)
    ),
    "difference, first frame before": Case(
        lambda x: torch.cat([x[:, :, :1], difference(x)], 2), 0, lambda x: x - late(x)
    ),
    "difference, last one again": Case(
        lambda x: torch.cat([difference(x), difference(x)[:, :, -1:]], 2), 1, lambda x: x - late(x)
    ),
    "torch.diff": Case(lambda x: torch.diff(x, dim=2), 1, lambda x: x - late(x)),
    "torch.diff of order 2": Case(lambda x: torch.diff(x, n=2, dim=2), 2, lambda x: x - 2 * late(x) + late(x, 2)),
    "torch.diff, prepended": Case(lambda x: torch.diff(x, dim=2, prepend=x[:, :, :1]), 0, lambda x: x - late(x)),
    "first and last frame repeated": Case(lambda x: torch.cat([x[:, :, :1], x, x[:, :, -1:]], 2)),
    "first frame repeated twice": Case(lambda x: torch.cat([x[:, :, :1].repeat(1, 1, 2, 1, 1), x], 2)),
    "edges expanded": Case(
        lambda x: torch.cat([x[:, :, :1].expand(-1, -1, 2, -1, -1), x, x[:, :, -1:].expand(-1, -1, 2, -1, -1)], 2)
    ),
    "edges selected": Case(lambda x: torch.cat([x[:, :, 0].unsqueeze(2), x, x[:, :, -1].unsqueeze(2)], 2)),
    "replicate": Case(lambda x: F.pad(x, (0, 0, 0, 0, 2, 1), mode="replicate")),
    "replicate, space too": Case(lambda x: F.pad(x, (1, 1, 0, 1, 1, 2), mode="replicate")),
    "reflect": Case(lambda x: F.pad(x, (0, 0, 0, 0, 2, 1), mode="reflect"), 2),
    "circular, behind": Case(lambda x: F.pad(x, (0, 0, 0, 0, 0, 2), mode="circular")),
    "zeros": Case(lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)), -1),
    "ones in front": Case(lambda x: torch.cat([torch.ones_like(x[:, :, :1]), x], 2), -1),
    "cropped by padding": Case(lambda x: F.pad(x, (0, 0, 0, 0, -1, -2)), 2, lambda x: late(x, 2)),
    "cropped": Case(lambda x: x[:, :, 2:-1], 2, late),
    "chomped": Case(chomp, 0, None),
    "halves": Case(lambda x: torch.cat([x[:, :, :4], x[:, :, 4:]], 2)),
    "three parts": Case(lambda x: torch.cat([x[:, :, :3], x[:, :, 3:5], x[:, :, 5:]], 2)),
    "chunks": Case(lambda x: torch.cat(x.chunk(2, 2), 2)),
    "halves of two kinds": Case(lambda x: torch.cat([x[:, :, :4] * 2, x[:, :, 4:] * 3], 2), 0, lambda x: x * 3),
    "first frame of another kind": Case(lambda x: torch.cat([x[:, :, :1].tanh(), x[:, :, 1:].relu()], 2), 0, F.relu),
    "rolled by slices": Case(lambda x: torch.cat([x[:, :, 1:], x[:, :, :1]], 2), 1),
    "rolled": Case(lambda x: x.roll(-1, 2), 1),
    "first frame zero": Case(lambda x: written(x, 0, 0.0)),
    "frame 2 one": Case(lambda x: written(x, 2, 1.0)),
    "last frame zero": Case(lambda x: written(x, -1, 0.0)),
    "first two frames zero": Case(lambda x: written(x, slice(None, 2), 0.0)),
    "last two frames one": Case(lambda x: written(x, slice(-2, None), 1.0), 1),
    "first two frames scaled": Case(lambda x: scaled(x, slice(None, 2))),
    "last two frames scaled": Case(lambda x: scaled(x, slice(-2, None)), 1),
    "all but the edges scaled": Case(lambda x: scaled(x, slice(1, -1)), 0, lambda x: late(x) * 2),
    "every second frame scaled": Case(lambda x: scaled(x, slice(None, None, 2)), 0, None),
    "without the first frame": Case(lambda x: x - x[:, :, :1], 0, None),
    "without the first frame, selected": Case(lambda x: x - x[:, :, 0].unsqueeze(2), 0, None),
    "edges replicated by index": Case(lambda x: x[:, :, [0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 7]]),
    "edges reflected by index": Case(lambda x: x[:, :, [2, 1, 0, 1, 2, 3, 4, 5, 6, 7, 6]], 2),
    "windows": Case(lambda x: x.unfold(2, 3, 1).mean(-1), 2, lambda x: (x + late(x) + late(x, 2)) / 3),
    "running sum": Case(lambda x: x.cumsum(2), 0, lambda x: x.cumsum(2)),
}
STRIDED = {
    "every second frame": lambda x: x[:, :, ::2],
    "every second frame, from the second": lambda x: x[:, :, 1::2],
    "both halves, as channels": lambda x: torch.cat([x[:, :, ::2], x[:, :, 1::2]], 1)[:, :4],
    "every second frame by index": lambda x: x[:, :, torch.arange(0, x.shape[2], 2)],
    "every third frame by index_select": lambda x: torch.index_select(x, 2, torch.arange(0, x.shape[2], 3)),
    "windows, every second": lambda x: x.unfold(2, 4, 2).amax(-1),
    "running sum of every second frame": lambda x: x[:, :, ::2].cumsum(2),
    "difference of every second frame": lambda x: difference(x[:, :, ::2]),
    "shift of every second frame": lambda x: shift_joined(x[:, :, ::2]),
    "edges of every second frame": lambda x: F.pad(x[:, :, ::2], (0, 0, 0, 0, 2, 1), mode="replicate"),
}
ENDED = {
    "two halves": lambda x: sum(part.mean(2, keepdim=True) for part in x.chunk(2, 2)),
    "first and last": lambda x: (x[:, :, 0] - x[:, :, -1]).unsqueeze(2),
    "unbound": lambda x: (x.unbind(2)[1] - x.unbind(2)[-2]).unsqueeze(2),
    "split": lambda x: x.split([3, 5], 2)[1].amax(2, keepdim=True),
    "every second and all": lambda x: x[:, :, ::2].mean(2, keepdim=True) + x.mean(2, keepdim=True),
    "first frame and mean": lambda x: x[:, :, :1] * x.mean(2, keepdim=True),
}


class Between(nn.Module):
    """A function between two layers that see frames on both sides; the first may be left out."""

    def __init__(self, run: Function, before: bool = True, time: int = 3) -> None:
        super().__init__()
        self.before = nn.Conv3d(4, 4, 3, padding=1) if before else nn.Identity()
        self.norm = nn.BatchNorm3d(4)
        self.last = nn.Conv3d(4, 4, (time, 3, 3), padding=(time // 2, 1, 1))
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.run(self.norm(self.before(x)) - 0.3))


def made(network: nn.Module, frames: int = 8) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.1, 0.6)
    return network.double().eval(), torch.randn(1, 4, frames, 4, 4, dtype=torch.float64)


@pytest.mark.parametrize("before", [True, False], ids=["behind a layer", "of the clip"])
@pytest.mark.parametrize("name", CASES)
def test_exact(name: str, before: bool) -> None:
    network, clip = made(Between(CASES[name].run, before))
    stream = dissect.convert(network, clip, preset="exact")
    assert stream.plan.exact, str(stream.plan)
    assert stream.timing.delay == max(1, 1 + before + CASES[name].wait) or not before
    law(stream, torch.randn(2, 4, 11, 4, 4, dtype=torch.float64))
    lengths = [8] if "by index" in name else [8, 7, 6, 5] if "halves of" not in name else [8, 6]
    assert offline(stream, network, clip, lengths) == len(lengths)


@pytest.mark.parametrize("name", STRIDED)
def test_exact_with_a_stride(name: str) -> None:
    network, clip = made(Between(STRIDED[name]), 12)
    stream = dissect.convert(network, clip, preset="exact")
    assert stream.plan.exact, str(stream.plan)
    law(stream, torch.randn(2, 4, 11, 4, 4, dtype=torch.float64))
    assert offline(stream, network, clip, [12] if "index" in name else [12, 11, 10, 8]) > 0


@pytest.mark.parametrize("name", ENDED)
def test_exact_at_the_end(name: str) -> None:
    network, clip = made(Between(ENDED[name], time=1))
    stream = dissect.convert(network, clip, preset="exact")
    assert stream.plan.exact, str(stream.plan)
    law(stream, torch.randn(2, 4, 11, 4, 4, dtype=torch.float64))
    assert offline(stream, network, clip, [8]) == 1


@pytest.mark.parametrize("preset", ["causal", "d3d"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.online is not None])
def test_without_delay(name: str, preset: str) -> None:
    network, clip = made(Between(CASES[name].run, before=False, time=1), 12 if "index" not in name else 8)
    stream = dissect.convert(network, clip[:, :, :8], preset=preset)
    assert stream.timing.delay == 0
    law(stream, torch.randn(2, 4, 11, 4, 4, dtype=torch.float64))
    network.run = CASES[name].online
    with torch.no_grad():
        got, wanted = stream.clip(clip), network(clip)
    steady = slice(3, None)  # away from the beginning, where the edges would be
    size = min(got.shape[-1], wanted.shape[-1]), min(got.shape[-2], wanted.shape[-2])
    inner = (slice(None), slice(None), steady, slice(1, size[1] - 1), slice(1, size[0] - 1))
    if "space" not in name:
        torch.testing.assert_close(got[inner], wanted[inner])


@pytest.mark.parametrize("preset", ["exact", "causal", "d3d"])
@pytest.mark.parametrize(
    "name", ["shift, written into zeros", "difference, last one again", "replicate", "reflect", "last frame zero"]
)
def test_goes_to_onnx(name: str, preset: str) -> None:
    network, clip = made(Between(CASES[name].run))
    dissect.verify(dissect.convert(network, clip, preset=preset), network).check()


def test_a_network_that_repeats_its_first_frame_has_no_delay() -> None:
    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Conv3d(4, 4, 3, (stride, 1, 1)) for stride in (1, 2, 1)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                front = x[:, :, :1].repeat(1, 1, 2, 1, 1)
                x = layer(F.pad(torch.cat([front, x], 2), (1, 1, 1, 1))).relu()
            return x

    network, clip = made(Causal(), 9)
    stream = dissect.convert(network, clip, preset="exact")
    assert stream.plan.exact
    assert stream.timing.delay == 0
    law(stream, torch.randn(2, 4, 11, 4, 4, dtype=torch.float64))
    assert offline(stream, network, clip, [9, 8, 7]) == 3


def test_frames_that_are_not_evenly_spaced_say_so() -> None:
    network, clip = made(Between(lambda x: x[:, :, torch.linspace(0, 31, 8).long()]), 32)
    stream = dissect.convert(network, clip, preset="exact")
    assert [row.reason for row in stream.plan.approximate] == ["frames 0, 4, 8, 13, ... are not evenly spaced"]
    assert stream.timing.stride == 4


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda x: x.flip(2), "backwards"),
        (lambda x: x.roll(1, 2), "last frame in front"),
        (lambda x: F.pad(x, (0, 0, 0, 0, 1, 0), mode="circular"), "end of the clip in front"),
        (lambda x: torch.cat([x[:, :, -1:], x], 2), "end of the clip in front"),
        (lambda x: torch.cat([x, x], 2), "end of the clip in front"),
        (lambda x: x.repeat(1, 1, 2, 1, 1), "once more"),
        (lambda x: x[:, :, [3, 1, 2, 0]], "order"),
    ],
)
def test_what_begins_with_its_end_is_refused(run: Function, reason: str) -> None:
    network, clip = made(Between(run))
    with pytest.raises(NotStreamable, match=reason):
        dissect.convert(network, clip, preset="exact")


class Chomped(nn.Module):
    """A causal convolution as it is often written: padded on both sides, cut at the end; in a residual block."""

    def __init__(self, left: int = 4) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv1d(4, 4, 3, padding=left, dilation=2) for _ in range(2)])
        self.norm = nn.BatchNorm1d(4)
        self.left = left

    def forward(self, x: Tensor) -> Tensor:
        y = x = x.mean((3, 4))
        for conv in self.convs:
            y = self.norm(conv(y)).relu()[:, :, : -self.left]
        return x + y


def test_a_causal_convolution_is_exact_in_the_preset_causal() -> None:
    network, clip = made(Chomped(), 12)
    stream = dissect.convert(network, clip, preset="causal")
    assert stream.plan.exact, str(stream.plan)
    with torch.no_grad():
        torch.testing.assert_close(stream.clip(clip), network(clip))
    law(stream, torch.randn(2, 4, 11, 4, 4, dtype=torch.float64))


def test_a_convolution_that_is_not_cropped_whole_is_approximate() -> None:
    network, clip = made(nn.Sequential(nn.Conv3d(4, 4, (3, 1, 1), padding=(2, 0, 0))), 12)
    assert not dissect.convert(network, clip, preset="causal").plan.exact
