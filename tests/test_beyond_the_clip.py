"""A stream that is longer than the clip: with windows of the clip's positions, every step answers for the window that ends there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws import close, steps, streamed
from torch import Tensor, nn

import dissect

FRAMES, WIDTH, CLASSES = 6, 4, 5
CLIP = torch.rand(1, 3, FRAMES, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Tokens(nn.Module):
    """Features of the frames, put together by ``join``, attended to over and over, and read by ``head``."""

    def __init__(self, join: Callable[[Any, Tensor], Tensor], head: Callable[[Tensor], Tensor], depth: int = 2) -> None:
        super().__init__()
        self.join, self.head, self.depth = join, head, depth
        self.patch, self.qkv = nn.Conv3d(3, WIDTH, (1, 2, 2), (1, 2, 2)), nn.Linear(WIDTH, 3 * WIDTH)
        self.fc = nn.Linear(WIDTH, CLASSES)
        for name, count in (("cls", 1), ("time", FRAMES), ("place", 1 + FRAMES), ("all", 1 + 4 * FRAMES)):
            self.register_parameter(name, nn.Parameter(torch.randn(1, count, WIDTH)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.join(self, self.patch(x))
        for _ in range(self.depth):
            q, k, v = self.qkv(x).chunk(3, -1)
            x = x + (q @ k.transpose(1, 2)).softmax(-1) @ v
        return self.fc(self.head(x))  # type: ignore[no-any-return]


def frames(x: Tensor) -> Tensor:
    return x.mean((3, 4)).transpose(1, 2)


def with_class(net: Any, x: Tensor) -> Tensor:
    return torch.cat((net.cls.expand(x.shape[0], -1, -1), x), 1)


def first(x: Tensor) -> Tensor:
    return x[:, 0]


#: how ViViT, STAM, TimeSformer, X-CLIP and VideoMAE write it
JOINED: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "a class token": (lambda net, x: with_class(net, frames(x)), first),
    "a class token behind": (
        lambda net, x: torch.cat((frames(x), net.cls.expand(len(x), -1, -1)), 1),
        lambda x: x[:, -1],
    ),
    "a class token, then positions": (lambda net, x: with_class(net, frames(x)) + net.place, first),
    "positions, then a class token": (lambda net, x: with_class(net, frames(x) + net.time), first),
    "a class token, read as a mean": (lambda net, x: with_class(net, frames(x)), lambda x: x.mean(1)),
    "tokens of space and time": (lambda net, x: with_class(net, x.flatten(2).transpose(1, 2)) + net.all, first),
    "time for each place": (
        lambda net, x: with_class(
            net, (x.flatten(3).permute(0, 3, 2, 1).flatten(0, 1) + net.time).reshape(x.shape[0], -1, WIDTH)
        ),
        first,
    ),
    "the first of all tokens": (lambda net, x: x.flatten(2).transpose(1, 2), first),
    "a token of the clip itself": (lambda net, x: torch.cat((frames(x).mean(1, keepdim=True), frames(x)), 1), first),
}


def slides(stream: dissect.Stream, network: nn.Module, clip: Tensor) -> None:
    """Each step gives what the network says of the last frames, as many as in its own clip."""
    with torch.no_grad():
        outputs, _ = steps(stream, (clip,))
        for time in range(FRAMES - 1, clip.shape[2]):
            close(outputs[time], network(clip[:, :, time + 1 - FRAMES : time + 1]), what=f"frame {time}")


def converted(network: nn.Module, preset: str = "exact") -> dissect.Stream:
    stream = dissect.convert(network, CLIP, preset=preset)
    dissect.verify(stream, network, runtime=False).check()
    return stream


@pytest.mark.parametrize("preset", ["exact", "causal", "d3d"])
@pytest.mark.parametrize("name", JOINED)
def test_tokens_stand_beside_every_window(name: str, preset: str) -> None:
    torch.manual_seed(0)
    network = Tokens(*JOINED[name]).double().eval()
    stream = converted(network, preset)
    assert stream.timing.delay == 0
    if preset == "exact":
        assert stream.plan.exact, str(stream.plan)
    elif name == "the first of all tokens":
        return  # made of windows of windows, and the plan says so
    slides(stream, network, torch.rand(1, 3, 3 * FRAMES, 4, 4, dtype=torch.float64))


@pytest.mark.parametrize("classes", [FRAMES, 1 + FRAMES])
def test_as_many_classes_as_frames(classes: int) -> None:
    torch.manual_seed(0)
    network = Tokens(*JOINED["a class token, then positions"])
    network.fc = nn.Linear(WIDTH, classes)
    stream = converted(network.double().eval())
    assert stream.plan.exact, str(stream.plan)
    slides(stream, network, torch.rand(1, 3, 3 * FRAMES, 4, 4, dtype=torch.float64))


def test_a_class_token_repeated_for_every_frame() -> None:
    """TimeSformer, divided: its class token is a key in the attention of every frame, and of every place."""

    class Divided(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            x = with_class(self, self.patch(x).flatten(2).transpose(1, 2)) + self.all
            for pattern in ((1, 2), (2, 1)):
                q, k, v = self.qkv(x).chunk(3, -1)
                cls = (q[:, :1] @ k.transpose(1, 2)).softmax(-1) @ v
                parts = []
                for part in (q, k, v):
                    rest = part[:, 1:].unflatten(1, (FRAMES, 4)).movedim(pattern[0], 1).flatten(0, 1)
                    parts.append((part[:, :1].repeat_interleave(len(rest) // len(x), 0), rest))
                kept = [torch.cat(pair, 1) for pair in parts[1:]]
                y = (parts[0][1] @ kept[0].transpose(1, 2)).softmax(-1) @ kept[1]
                sizes = (FRAMES, 4) if pattern[0] == 1 else (4, FRAMES)
                y = y.unflatten(0, (len(x), sizes[0])).movedim(1, pattern[0]).flatten(1, 2)
                x = x + torch.cat((cls, y), 1)
            return self.fc(x[:, 0])  # type: ignore[no-any-return]

    torch.manual_seed(0)
    network = Divided(*JOINED["a class token"]).double().eval()
    stream = converted(network)
    assert stream.plan.exact, str(stream.plan)
    slides(stream, network, torch.rand(1, 3, 3 * FRAMES, 4, 4, dtype=torch.float64))


@pytest.mark.parametrize("dropped", [False, True])
def test_a_class_token_read_off_the_first_rows(dropped: bool) -> None:
    """TimeSformer, as its authors wrote it: ``x[:B, 0]`` of a batch of frames, then blocks over time and over space."""

    class Divided(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            rows = len(x)
            y = self.patch(x).flatten(3).permute(0, 2, 3, 1).flatten(0, 1)
            y = with_class(self, y) + self.all[:, :5]
            y = nn.functional.dropout(y, 0.5, self.training) if dropped else y
            cls, y = y[:rows, 0].unsqueeze(1), y[:, 1:]
            y = y.unflatten(0, (rows, FRAMES)).transpose(1, 2).flatten(0, 1) + self.time
            x = torch.cat((cls, y.reshape(rows, -1, WIDTH)), 1)
            for _ in range(self.depth):
                y = x[:, 1:] + self.attended(x[:, 1:].reshape(-1, FRAMES, WIDTH)).reshape(rows, -1, WIDTH)
                first = x[:, :1].repeat(1, FRAMES, 1).flatten(0, 1).unsqueeze(1)
                each = y.unflatten(1, (4, FRAMES)).transpose(1, 2).flatten(0, 1)
                z = self.attended(torch.cat((first, each), 1))
                mean = z[:, 0].reshape(rows, FRAMES, WIDTH).mean(1, True)
                rest = z[:, 1:].unflatten(0, (rows, FRAMES)).transpose(1, 2).flatten(1, 2)
                x = torch.cat((x[:, :1], y), 1) + torch.cat((mean, rest), 1)
            return self.fc(x[:, 0])  # type: ignore[no-any-return]

        def attended(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return (q @ k.transpose(1, 2)).softmax(-1) @ v

    torch.manual_seed(0)
    network = Divided(*JOINED["a class token"]).double().eval()
    stream = converted(network)
    assert stream.plan.exact, str(stream.plan)
    assert len(stream.plan) == 1, str(stream.plan)
    slides(stream, network, torch.rand(1, 3, 3 * FRAMES, 4, 4, dtype=torch.float64))
    clip = torch.rand(3, 3, FRAMES, 4, 4, dtype=torch.float64)
    close(streamed(stream, clip, frames=FRAMES), network(clip))


class Relations(nn.Module):
    """TRN: frames picked by their numbers, joined, and put through a layer for each choice."""

    def __init__(self, *chosen: list[int]) -> None:
        super().__init__()
        self.chosen = chosen
        self.layers = nn.ModuleList(nn.Linear(3 * len(each), CLASSES) for each in chosen)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((3, 4)).transpose(1, 2)
        scores = [layer(x[:, each].flatten(1)) for each, layer in zip(self.chosen, self.layers, strict=True)]
        return torch.stack(scores).sum(0)


@pytest.mark.parametrize(
    "chosen",
    [[[1, 2, 5]], [[0, 1, 4]], [[0, 1, 3, 5]], [[1, 4], [0, 5]], [[*range(FRAMES)], [2, 5], [0, 2, 3]]],
    ids=str,
)
def test_chosen_frames_are_those_of_every_window(chosen: list[list[int]]) -> None:
    torch.manual_seed(0)
    network = Relations(*chosen).double().eval()
    stream = converted(network)
    assert stream.plan.exact, str(stream.plan)
    slides(stream, network, torch.rand(1, 3, 3 * FRAMES, 4, 4, dtype=torch.float64))


def test_zeros_in_front_of_the_clip_are_its_edge() -> None:
    """What is joined to be convolved with the frames stays at the beginning of the stream."""

    class Edge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.conv = nn.Parameter(torch.randn(1, 3, 2)), nn.Conv1d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x.mean((3, 4))
            return self.conv(torch.cat((self.start.expand(len(x), -1, -1), x), 2))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    network = Edge().double().eval()
    stream = converted(network)
    clip = torch.rand(1, 3, 2 * FRAMES, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        outputs = torch.stack(steps(stream, (clip,))[0], 2)[:, :, stream.timing.delay :]
        close(outputs, network(clip)[:, :, : outputs.shape[2]])
