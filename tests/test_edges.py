"""Time padded with the clip's own frames, and who reads it: exact at every length, with the least delay that there can be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from laws import law, offline
from torch import Tensor, nn

import dissect

Function = Callable[[Tensor], Tensor]
LENGTH = 8


def padded(left: int, right: int, mode: str) -> Function:
    return lambda x: F.pad(x, (0, 0, 0, 0, left, right), mode=mode)


def reflected(left: int, right: int) -> Function:
    return lambda x: F.pad(x.flatten(3), (0, 0, left, right), mode="reflect").unflatten(3, x.shape[3:])


def edges(left: int, right: int) -> Function:
    return lambda x: torch.cat([*[x[:, :, :1]] * left, x, *[x[:, :, -1:]] * right], 2)


PADDINGS = {
    **{
        f"replicate {left}, {right}": padded(left, right, "replicate")
        for left, right in ((1, 1), (2, 2), (3, 3), (1, 0), (3, 0), (0, 1), (0, 3), (3, 1))
    },
    **{f"reflect {left}, {right}": reflected(left, right) for left, right in ((1, 1), (2, 2), (3, 3), (2, 0), (0, 2))},
    **{f"edges {left}, {right}": edges(left, right) for left, right in ((1, 1), (2, 1), (0, 2))},
    "of the crop": lambda x: padded(2, 1, "replicate")(x[:, :, 1:-2]),
    "of the front, cropped": lambda x: padded(3, 1, "replicate")(x)[:, :, 1:],
    "of the mirrored front, cropped": lambda x: reflected(3, 3)(x)[:, :, 2:-1],
    "behind a zero": lambda x: padded(1, 1, "replicate")(F.pad(x, (0, 0, 0, 0, 1, 1))),
    "twice": lambda x: padded(1, 1, "replicate")(padded(1, 1, "replicate")(x)),
    "the first frames once more": lambda x: torch.cat([x[:, :, :5], x], 2),
    "the second frame": lambda x: torch.cat([x[:, :, 1:2], x], 2),
    "replicate 1, 1, of one frame in two": lambda x: padded(1, 1, "replicate")(x[:, :, ::2]),
    "reflect 2, 1, of one frame in two": lambda x: reflected(2, 1)(x[:, :, ::2]),
}


class Reader(nn.Module):
    """A layer that sees the frames of a padding, behind nothing or behind a layer with a delay."""

    def __init__(self, pad: Function, layer: nn.Module, before: bool = False) -> None:
        super().__init__()
        self.pad, self.layer = pad, layer
        self.before = nn.Conv3d(2, 2, 3, padding=1) if before else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(self.pad(self.before(x)))
        return out


class Run(nn.Module):
    def __init__(self, run: Function) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


READERS: dict[str, Callable[[], nn.Module]] = {
    "two taps": lambda: nn.Conv3d(2, 2, (2, 1, 1)),
    "five taps": lambda: nn.Conv3d(2, 2, (5, 1, 1)),
    "dilated": lambda: nn.Conv3d(2, 2, (3, 1, 1), dilation=(2, 1, 1)),
    "a padded layer": lambda: nn.Conv3d(2, 2, 3, padding=1),
    "of one frame": lambda: nn.Conv3d(2, 2, (1, 3, 3)),
    "behind an activation": lambda: nn.Sequential(nn.Sigmoid(), nn.Conv3d(2, 2, (3, 1, 1))),
    "maximum": lambda: nn.MaxPool3d((3, 1, 1), stride=1),
    "mean": lambda: nn.AvgPool3d(3, stride=1),
    "padded mean": lambda: nn.AvgPool3d((3, 1, 1), stride=1, padding=(1, 0, 0)),
    "windows": lambda: Run(lambda x: x.unfold(2, 3, 1).amax(-1)),
    "difference": lambda: Run(lambda x: x[:, :, 2:] - x[:, :, :-2]),
    "neighbours": lambda: Run(
        lambda x: torch.stack([x[:, :, 1:-1] * x[:, :, at : x.shape[2] - 2 + at] for at in range(3)], 1).sum(2)
    ),
    "channels": lambda: Run(lambda x: torch.cat([x[:, :, :-1], x[:, :, 1:]], 1)),
    "frame by frame": lambda: nn.BatchNorm3d(2),
    "running sum": lambda: Run(lambda x: x.cumsum(2)),
    "joined": lambda: Run(lambda x: torch.cat([x[:, :, :2] * 2, x], 2)),
}


def clip_of(frames: int) -> Tensor:
    return torch.randn(1, 2, frames, 3, 3, dtype=torch.float64)


def made(network: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.1, 0.6)
    return network.double().eval()


def least(network: nn.Module, stride: int = 1) -> int:
    """The least delay: when position ``i`` is given, ``delay + stride * i`` frames after the first, no frame that may follow changes it."""
    torch.manual_seed(1)
    frames = 14
    clip, others = clip_of(frames), [clip_of(frames) for _ in range(2)]

    def outputs(seen: int) -> list[Tensor]:
        found = []
        for other in others:
            for length in range(seen, frames + 1):
                try:
                    found.append(network(torch.cat([clip[:, :, :seen], other[:, :, seen:length]], 2)))
                except (RuntimeError, ValueError):
                    continue  # too short for it
        return found

    with torch.no_grad():
        ends = {seen: outputs(seen) for seen in range(1, 11)}

    def settled(seen: int, at: int) -> bool:
        return (
            bool(ends[seen])
            and all(out.shape[2] > at for out in ends[seen])
            and all(torch.allclose(out[:, :, at], ends[seen][0][:, :, at]) for out in ends[seen])
        )

    for delay in range(10):
        if all(settled(seen, (seen - 1 - delay) // stride) for seen in range(1 + delay, 11, stride)):
            return delay
    raise AssertionError("none")


def check(network: nn.Module, stride: int = 1, shortest: int = 1, twice: bool = False) -> None:
    network = made(network)
    clip = clip_of(12)
    stream = dissect.convert(network, clip[:, :, :LENGTH], preset="exact")
    assert stream.plan.exact, str(stream.plan)
    assert offline(stream, network, clip, range(shortest, 13)) >= 6
    law(stream, torch.randn(2, 2, 11, 3, 3, dtype=torch.float64))
    assert stream.timing.stride == stride
    found = least(network, stride)
    assert stream.timing.delay <= found + 1 if twice else stream.timing.delay == found


@pytest.mark.parametrize("before", [False, True], ids=["of the clip", "behind a layer"])
@pytest.mark.parametrize("name", PADDINGS)
def test_a_convolution_over_edges(name: str, before: bool) -> None:
    network = Reader(PADDINGS[name], nn.Conv3d(2, 2, (3, 1, 1)), before)
    check(
        network,
        2 if "in two" in name else 1,
        {"the first frames once more": 5, "the second frame": 2}.get(name, 1),
        name in ("twice", "behind a zero"),
    )


@pytest.mark.parametrize(
    "pad", ["replicate 1, 1", pytest.param("replicate 3, 1", marks=pytest.mark.slow), "reflect 2, 2"]
)
@pytest.mark.parametrize("name", READERS)
def test_who_reads_edges(name: str, pad: str) -> None:
    check(Reader(PADDINGS[pad], READERS[name](), before=pad == "reflect 2, 2"), twice="padded" in name)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv3d(2, 3, 3, padding=1, padding_mode="replicate"),
        nn.Sequential(nn.ReplicationPad3d((1, 1, 1, 1, 2, 0)), nn.Conv3d(2, 3, 3)),
        nn.Sequential(
            nn.Flatten(3), nn.Conv2d(2, 3, (3, 1), padding=(1, 0), padding_mode="reflect"), nn.Unflatten(3, (3, 3))
        ),
        nn.Sequential(
            nn.Conv3d(2, 2, 3, padding=1, padding_mode="replicate"),
            nn.ReLU(),
            nn.Conv3d(2, 3, 3, padding=1, padding_mode="replicate"),
        ),
        nn.Sequential(
            nn.Conv3d(2, 2, 3, stride=(2, 1, 1), padding=1, padding_mode="replicate"),
            nn.Conv3d(2, 3, 3, padding=1, padding_mode="replicate"),
        ),
    ],
    ids=["convolution", "causal", "mirrored", "two of them", "behind a stride"],
)
def test_layers_that_pad_so(layer: nn.Module) -> None:
    check(Run(layer), 1 + any(getattr(part, "stride", ())[:1] == (2,) for part in layer.modules()))


def test_scores_over_time() -> None:
    """Time is the only dimension beside the channels."""
    check(nn.Sequential(Run(lambda x: x.mean((3, 4))), nn.Conv1d(2, 2, 3, padding=1, padding_mode="replicate")))


@pytest.mark.parametrize("name", ["replicate 1, 1", "reflect 2, 2"])
def test_edges_go_to_onnx(name: str) -> None:
    network = made(Reader(PADDINGS[name], nn.Conv3d(2, 2, (3, 1, 1)), before=True))
    for preset in ("exact", "causal", "d3d"):
        dissect.verify(dissect.convert(network, clip_of(LENGTH), preset=preset), network).check()


def test_a_clip_in_front_of_itself_is_refused() -> None:
    network = made(Run(lambda x: torch.cat([x[:, :, -1:], x[:, :, -1:]], 2).mean(2, keepdim=True)))
    with pytest.raises(dissect.NotStreamable, match="end of the clip in front"):
        dissect.convert(network, clip_of(LENGTH), preset="exact")
