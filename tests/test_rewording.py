"""What networks write along an axis where time meets others: frames on channels, in the batch, in pieces, in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from laws import close, law, offline, streamed
from torch import Tensor, nn
from torch.nn import functional as F

import dissect

PRESETS = ("exact", "causal", "d3d")


class Layers(nn.Module):
    """A forward of its own, and layers for it."""

    def __init__(self, run: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *args: Tensor) -> Tensor:
        return self.run(self, *args)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def flat(read: int, give: int = 3) -> nn.Conv2d:
    return nn.Conv2d(read, give, 3, padding=1)


def made(run: Callable[..., Tensor], **layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return Layers(run, **layers).double().eval()


def kept(network: nn.Module, *clip: Tensor, layout: str | Sequence[str | None] | None = None) -> dissect.Stream:
    """Every preset keeps its promise; the exact stream."""
    for preset in PRESETS:
        stream = dissect.convert(network, clip, preset=preset, layout=layout)
        dissect.verify(stream, network, runtime=False).check()
    stream = dissect.convert(network, clip, preset="exact", layout=layout)
    assert stream.plan.exact, str(stream.plan)
    return stream


# Frames on channels.

TRANSLATORS: dict[str, Callable[[], nn.Module]] = {
    "dense": lambda: nn.Conv2d(12, 12, 3, padding=1),
    "depthwise": lambda: nn.Conv2d(12, 12, 3, padding=1, groups=12),
    "grouped": lambda: nn.Conv2d(12, 12, 1, groups=4),
    "norm first": lambda: nn.Sequential(nn.BatchNorm2d(12), nn.Conv2d(12, 12, 1)),
    "group norm first": lambda: nn.Sequential(nn.GroupNorm(2, 12), nn.Conv2d(12, 12, 1)),
}


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", TRANSLATORS)
def test_a_translator_of_frames_stacked_on_channels(name: str, skip: bool) -> None:
    """SimVP's: 2D layers on all frames at once, in the middle of a network, and a skip connection around them."""

    def run(net: Layers, x: Tensor) -> Tensor:
        z = net.a(x).transpose(1, 2).flatten(1, 2)
        h = net.b(z) + z if skip else net.b(z)
        return net.c(h.unflatten(1, (4, 3)).flatten(0, 1)).unflatten(0, (-1, 4))

    kept(made(run, a=nn.Conv3d(3, 3, 3, padding=1), b=TRANSLATORS[name](), c=flat(3)), random(1, 3, 4, 4, 4))


def slices(x: Tensor) -> list[Tensor]:
    return [x[:, 3 * m : 3 * m + 3] for m in range(x.shape[1] // 3)]


def chunks(x: Tensor) -> list[Tensor]:
    return list(x.chunk(x.shape[1] // 3, 1))


def triples(net: Layers, frames: list[Tensor], *beside: Tensor) -> Tensor:
    """FastDVDnet: three neighbours at a time, then the three results."""
    middle = [net.a(torch.cat([*frames[at : at + 3], *beside], 1)).relu() for at in range(3)]
    return frames[2] - net.b(torch.cat([*middle, *beside], 1))


@pytest.mark.parametrize("parts", [slices, chunks])
def test_frames_on_channels(parts: Callable[[Tensor], list[Tensor]]) -> None:
    network = made(lambda net, x: triples(net, parts(2 * x - 1)), a=flat(9), b=flat(9))
    stream = kept(network, random(1, 15, 6, 6), layout="b (t=5 c) h w")
    assert stream.timing.receptive_field == 5


def test_frames_on_channels_beside_a_value_of_the_clip() -> None:
    network = made(lambda net, x, noise: triples(net, slices(x), noise), a=flat(10), b=flat(10))
    kept(network, random(1, 15, 6, 6), random(1, 1, 6, 6), layout=["b (t=5 c) h w", None])


def test_two_frames_on_channels() -> None:
    """SuperSloMo."""

    def run(net: Layers, x: Tensor) -> Tensor:
        first, second = x[:, :3], x[:, 3:]
        flow = net.a(torch.cat([first, second], 1))
        return first + net.b(torch.cat([first, second, flow], 1))

    stream = kept(made(run, a=flat(6, 4), b=flat(10)), random(1, 6, 6, 6), layout="b (t=2 c) h w")
    assert stream.timing.receptive_field == 2


def test_several_frames_at_a_time() -> None:
    network = made(lambda net, x: net.a(x[:, 3:9]) + net.b(x[:, 6:]), a=flat(6), b=flat(9))
    kept(network, random(1, 15, 6, 6), layout="b (t=5 c) h w")


def test_frames_put_on_channels_and_taken_apart() -> None:
    def run(net: Layers, x: Tensor) -> Tensor:
        frames = torch.split(net.before(x).transpose(1, 2).flatten(1, 2), 4, 1)
        return torch.stack([net.a(torch.cat(pair, 1)) for pair in pairwise(frames)], 2)

    network = made(run, before=nn.Conv3d(3, 4, 3, padding=1), a=flat(8))
    stream = kept(network, random(1, 3, 6, 6, 6))
    assert (stream.timing.delay, stream.timing.receptive_field) == (2, 4)
    assert offline(stream, network, random(1, 3, 12, 6, 6), range(3, 13)) == 10


@pytest.mark.parametrize("bounds", [(2, 6), (0, 4), (1, 3)])
def test_parts_that_are_no_frames_are_refused(bounds: tuple[int, int]) -> None:
    network = made(lambda net, x: net.a(x[:, slice(*bounds)]), a=flat(bounds[1] - bounds[0]))
    with pytest.raises(dissect.NotStreamable, match="dimension of TS"):
        dissect.convert(network, random(1, 15, 6, 6), layout="b (t=5 c) h w")


# Frames behind each other in the batch.


def test_frames_in_the_batch() -> None:
    """Wav2Lip."""

    def run(net: Layers, x: Tensor) -> Tensor:
        y = torch.cat([x[:, :, at] for at in range(x.shape[2])], 0)
        return torch.stack(torch.split(net.a(y).sigmoid(), len(x), 0), 2)

    network = made(run, a=flat(3))
    stream = kept(network, random(2, 3, 5, 6, 6))
    assert stream.timing.receptive_field == 1
    law(stream, random(2, 3, 9, 6, 6))
    assert offline(stream, network, random(2, 3, 9, 6, 6), range(2, 10)) == 8


def test_frames_of_two_inputs_in_the_batch() -> None:
    def run(net: Layers, sound: Tensor, x: Tensor) -> Tensor:
        sounds = torch.cat([sound[:, at] for at in range(sound.shape[1])], 0)
        faces = torch.cat([x[:, :, at] for at in range(x.shape[2])], 0)
        y = net.a(faces) + net.b(sounds).mean((2, 3), keepdim=True)
        return torch.stack(torch.split(y, len(x), 0), 2)

    network = made(run, a=flat(3), b=flat(1))
    clip = random(2, 5, 1, 4, 4), random(2, 3, 5, 6, 6)
    assert kept(network, *clip, layout=["b t c h w", "b c t h w"]).timing.receptive_field == 1


# A frame again and again in front of the clip.


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(
    "edges",
    [
        lambda x: torch.cat([x[:, :, :1]] * 2 + [x], 2),
        lambda x: torch.cat([x[:, :, :1], x[:, :, :1], x], 2),
        lambda x: torch.cat([x[:, :, 2:3], x[:, :, 1:2], x], 2),
    ],
    ids=["listed", "one by one", "mirrored"],
)
def test_frames_in_front(edges: Callable[[Tensor], Tensor], before: bool) -> None:
    """CogVideoX."""
    layer = nn.Conv3d(3, 3, 3, padding=1) if before else nn.Identity()
    network = made(lambda net, x: net.a(edges(net.before(x))), before=layer, a=nn.Conv3d(3, 4, 3, padding=(0, 1, 1)))
    stream = kept(network, random(1, 3, 9, 6, 6))
    assert offline(stream, network, random(1, 3, 13, 6, 6), range(4, 14)) == 10


# Pieces of time.


def cut(x: Tensor, size: int) -> Tensor:
    return x.unflatten(2, (x.shape[2] // size, size))


def in_depth(x: Tensor) -> Tensor:
    """Time and space to channels at once."""
    b, c, t, h, w = x.shape
    return x.view(b, c, t // 2, 2, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


PIECES: dict[str, tuple[Callable[[Tensor], Tensor], int, int]] = {
    "pairs to channels": (lambda x: cut(x, 2).transpose(2, 3).flatten(1, 2), 6, 2),
    "threes to channels": (lambda x: cut(x, 3).transpose(2, 3).flatten(1, 2), 9, 3),
    "with space": (in_depth, 24, 2),
    "mean and maximum": (lambda x: cut(x, 2).mean(3) + cut(x, 2).amax(3), 3, 2),
    "first of each": (lambda x: cut(x, 2)[:, :, :, 0], 3, 2),
    "difference": (lambda x: cut(x, 2)[:, :, :, 1] - cut(x, 2)[:, :, :, 0], 3, 2),
}


@pytest.mark.parametrize("name", PIECES)
def test_pieces_of_time(name: str) -> None:
    pieces, channels, size = PIECES[name]
    network = made(
        lambda net, x: net.a(pieces(net.before(x))),
        before=nn.Conv3d(3, 3, 3, padding=1),
        a=nn.Conv3d(channels, 3, 3, padding=1),
    )
    stream = kept(network, random(1, 3, 12, 4, 4))
    assert stream.timing.stride == size
    lengths = range(2 * size, 19)
    assert offline(stream, network, random(1, 3, 18, 4, 4), lengths) == len([t for t in lengths if t % size == 0])


def test_few_long_pieces_are_refused() -> None:
    """Segments: the clip's length decides how long they are."""
    network = made(lambda net, x: net.a(x.unflatten(2, (2, -1)).mean(3)), a=nn.Conv3d(3, 3, 1))
    with pytest.raises(dissect.NotStreamable, match="cuts through the time axis"):
        dissect.convert(network, random(1, 3, 8, 4, 4))


# Writes in turn.


def woven(like: Tensor, *parts: Tensor) -> Tensor:
    out = torch.zeros_like(like)
    for at, part in enumerate(parts):
        out[:, :, at :: len(parts)] = part
    return out


def in_turn(stream: dissect.Stream, network: nn.Module, size: int, lengths: Sequence[int]) -> None:
    """The frames that were written in turn come together, ``size`` of them at each of the stream's positions."""
    with torch.no_grad():
        for frames in lengths:
            clip = random(1, 3, frames, 4, 4)
            wanted = network(clip).unflatten(2, (-1, size)).movedim(2, 1)
            close(streamed(stream, clip, frames=frames), wanted, what=f"{frames} frames")


def test_writes_at_even_and_odd_frames() -> None:
    """An inverse wavelet."""

    def run(net: Layers, x: Tensor) -> Tensor:
        low, high = net.a((x[:, :, 0::2] + x[:, :, 1::2]) / 2).chunk(2, 1)
        return woven(x, low - high, low + high)

    network = made(run, a=nn.Conv3d(3, 6, 3, padding=1))
    in_turn(kept(network, random(1, 3, 8, 4, 4)), network, 2, range(4, 15, 2))


def test_writes_at_every_third_frame() -> None:
    def run(net: Layers, x: Tensor) -> Tensor:
        y = net.a(F.avg_pool3d(x, (3, 1, 1)))
        return woven(x, y, y.relu(), -y)

    network = made(run, a=nn.Conv3d(3, 3, 3, padding=1))
    in_turn(kept(network, random(1, 3, 9, 4, 4)), network, 3, range(6, 16, 3))


def test_writes_that_leave_gaps_are_refused() -> None:
    def run(net: Layers, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[:, :, 0::2] = net.a(x[:, :, 0::2])
        return out

    with pytest.raises(dissect.NotStreamable, match="with gaps, into a constant"):
        dissect.convert(made(run, a=nn.Conv3d(3, 3, 1)), random(1, 3, 8, 4, 4))


# Bins of uneven length.


@pytest.mark.parametrize(("kind", "bins"), [("avg", (3, 1, 1)), ("max", (5, 2, 2)), ("max", (3, None, None))])
def test_an_adaptive_pool_with_uneven_bins(kind: str, bins: tuple[int | None, ...]) -> None:
    pool = (nn.AdaptiveAvgPool3d if kind == "avg" else nn.AdaptiveMaxPool3d)(bins)  # type: ignore[arg-type]

    def run(net: Layers, x: Tensor) -> Tensor:
        return pool(net.a(x)).flatten(1) @ torch.linspace(-1, 1, 3 * (bins[0] or 1) * (bins[1] or 4) ** 2).double()

    kept(made(run, a=nn.Conv3d(3, 3, 3, padding=1)), random(1, 3, 8, 4, 4))


def test_a_spatial_pyramid_over_time_with_uneven_levels() -> None:
    def run(net: Layers, x: Tensor) -> Tensor:
        y = net.a(x).relu()
        return net.b(torch.cat([F.adaptive_max_pool3d(y, (level, 1, 1)).flatten(1) for level in (1, 2, 3)], 1))

    layers = {"a": nn.Conv3d(3, 4, 3, (2, 1, 1), 1), "b": nn.Linear(24, 5)}
    kept(made(run, **layers), random(1, 3, 16, 4, 4))


# One dimension of a write inside the frame.


def test_a_shift_of_the_class_token() -> None:
    """TokShift: channels of one token of every frame move along time, written into zeros."""

    def shifted(x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[:, :-1, 0, :2] = x[:, 1:, 0, :2]
        out[:, 1:, 0, 2:4] = x[:, :-1, 0, 2:4]
        out[:, :, 0, 4:] = x[:, :, 0, 4:]
        out[:, :, 1:] = x[:, :, 1:]
        return out

    def run(net: Layers, x: Tensor) -> Tensor:
        tokens = net.a(x).flatten(3).permute(0, 2, 3, 1)  # rows, frames, tokens, channels
        tokens = tokens + net.b(shifted(tokens))
        return net.b(shifted(tokens))[:, :, 0]

    layers = {"a": nn.Conv3d(3, 6, (1, 2, 2), (1, 2, 2)), "b": nn.Linear(6, 6)}
    kept(made(run, **layers), random(1, 3, 6, 4, 4))


# Axes joined, treated alike, and split where they were joined.


def joined(net: Layers, x: Tensor) -> Tensor:
    rows = x.mean((2, 4), keepdim=True).transpose(2, 3)
    time, rows = net.a(torch.cat([x.mean((3, 4), keepdim=True), rows], 2)).relu().split([6, 4], 2)
    return x * net.b(time).sigmoid() + net.b(rows.transpose(2, 3)).mean((2, 3, 4), keepdim=True)


def test_what_is_joined_and_split_is_done_part_by_part() -> None:
    network = made(joined, a=nn.Conv3d(3, 2, 1), b=nn.Conv3d(2, 3, 1))
    for preset in PRESETS:
        stream = dissect.convert(network, random(1, 3, 6, 4, 4), preset=preset)
        dissect.verify(stream, network, runtime=False).check()


def test_what_looks_across_the_seam_is_what_it_was() -> None:
    network = made(joined, a=nn.Conv3d(3, 2, (3, 1, 1), padding=(1, 0, 0)), b=nn.Conv3d(2, 3, 1))
    stream = dissect.convert(network, random(1, 3, 6, 4, 4), preset="exact")
    dissect.verify(stream, network, runtime=False).check()


# Nearest resampling by one frame.


@pytest.mark.parametrize("frames", [7, 9])
def test_the_nearest_of_one_frame_more_or_less(frames: int) -> None:
    """The skip of a U-Net behind a transposed convolution that gives 2n - 1 positions of 2n."""

    def run(net: nn.Module, x: Tensor) -> Tensor:
        return net.out(F.interpolate(net.layer(x), size=(x.shape[2] + frames - 8, 5, 6)))  # type: ignore[operator]

    network = made(run, layer=nn.Conv3d(2, 3, 3, padding=1), out=nn.Conv3d(3, 2, 3, padding=1))
    stream = kept(network, random(1, 2, 8, 4, 4))
    assert stream.timing.delay == 2
    for length in (5, 11):
        clip = random(2, 2, length, 4, 4)
        close(streamed(stream, clip, frames=length), network(clip).detach(), 1e-12)


def test_the_skip_behind_a_transposed_convolution() -> None:
    def run(net: nn.Module, x: Tensor) -> Tensor:
        return x + F.interpolate(net.up(net.down(x)), size=x.shape[2:])  # type: ignore[operator]

    down, up = nn.Conv3d(2, 3, 3, stride=2, padding=1), nn.ConvTranspose3d(3, 2, 3, stride=2, padding=1)
    kept(made(run, down=down, up=up), random(1, 2, 8, 8, 8))
