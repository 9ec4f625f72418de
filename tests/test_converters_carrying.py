"""Python loops over time that carry values: ConvGRU, ConvLSTM, cells, running averages; against the network itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from laws import law, offline
from torch import Tensor, nn

import dissect


class Cell(nn.Module):
    """A convolutional GRU cell."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.gates = nn.Conv2d(channels + hidden, 2 * hidden, 3, padding=1)
        self.new = nn.Conv2d(channels + hidden, hidden, 3, padding=1)
        self.hidden = hidden

    def forward(self, x: Tensor, h: Tensor | None) -> Tensor:
        if h is None:
            h = x.new_zeros(x.shape[0], self.hidden, *x.shape[2:])
        reset, update = torch.sigmoid(self.gates(torch.cat([x, h], 1))).chunk(2, 1)
        new = torch.tanh(self.new(torch.cat([x, reset * h], 1)))
        return (1 - update) * h + update * new


class ConvGRU(nn.Module):
    """A trunk in 3D, a head in 2D inside the loop, one or more levels, and several ways to end."""

    def __init__(self, end: str, stride: int = 1, levels: int = 1, learned: bool = False) -> None:
        super().__init__()
        self.trunk = nn.Conv3d(2, 3, 3, (stride, 2, 2), 1)
        self.head = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
        self.cells = nn.ModuleList(Cell(3, 3) for _ in range(levels))
        self.out = nn.Conv2d(3, 2, 1)
        self.end = end
        self.first = nn.Parameter(torch.randn(1, 3, 1, 1)) if learned else None

    def forward(self, x: Tensor) -> Any:
        x = self.trunk(x)
        for cell in self.cells:
            h = None if self.first is None else self.first.expand(x.shape[0], 3, *x.shape[3:])
            states = []
            for t in range(x.shape[2]):
                h = cell(self.head(x[:, :, t]), h)
                states.append(h)
            x = torch.stack(states, 2)
        if self.end == "last":
            return self.out(h).mean((2, 3))
        if self.end == "mean":
            return self.out(x.mean(2))
        return torch.stack([self.out(state) for state in states], 1)


class ConvLSTM(nn.Module):
    def __init__(self, frames: str) -> None:
        super().__init__()
        self.gates = nn.Conv2d(2 + 3, 12, 3, padding=1)
        self.frames = frames

    def forward(self, x: Tensor) -> Any:
        h = torch.zeros(x.shape[0], 3, *x.shape[3:], dtype=x.dtype)
        c = torch.zeros_like(h)
        if self.frames == "unbind":
            frames = x.unbind(2)
        elif self.frames == "split":
            frames = tuple(frame.squeeze(2) for frame in x.split(1, 2))
        else:
            frames = tuple(x[:, :, t : t + 1].squeeze(2) for t in range(x.shape[2]))
        states = []
        for frame in frames:
            enter, forget, cell, leave = self.gates(torch.cat([frame, h], 1)).chunk(4, 1)
            c = torch.sigmoid(forget) * c + torch.sigmoid(enter) * torch.tanh(cell)
            h = torch.sigmoid(leave) * torch.tanh(c)
            states.append(h.unsqueeze(2))
        return torch.cat(states, 2), h, c


class Cells(nn.Module):
    """A CNN for each frame and one of torch's cells, in a loop."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.cnn = nn.Sequential(
            nn.Conv2d(2, 3, 3, 2, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.cell = {"gru": nn.GRUCell, "lstm": nn.LSTMCell, "lstm from nothing": nn.LSTMCell, "rnn": nn.RNNCell}[kind](
            3, 4
        )
        self.fc = nn.Linear(4, 2)
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        state: Any = None
        if self.kind != "lstm from nothing":
            h = x.new_zeros(x.shape[0], 4)
            state = (h, h) if self.kind == "lstm" else h
        scores = []
        for t in range(x.size(2)):
            state = self.cell(self.cnn(x[:, :, t]), state)
            h = state[0] if isinstance(state, tuple) else state
            scores.append(self.fc(h))
        return torch.stack(scores, 1), self.fc(h)


class Layers(nn.Module):
    """One of torch's layers, called for one frame at a time, its hidden values passed on; the last output counts."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.cnn = nn.Sequential(nn.Conv2d(2, 3, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.layer = kind(3, 4, num_layers=2)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = None
        for t in range(x.size(2)):
            out, hidden = self.layer(self.cnn(x[:, :, t]).unsqueeze(0), hidden)
        return self.fc(out[-1])


class Average(nn.Module):
    """A running average of differences of frames: it carries a frame, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        average = torch.zeros_like(x[:, :, 0])
        before = torch.zeros_like(average)
        results = []
        for t in range(x.shape[2]):
            frame = x[:, :, t]
            average = 0.9 * average + 0.1 * (frame - before)
            before = frame
            results.append(self.conv(average * frame))
        return torch.stack(results, 2)


NETWORKS: dict[str, Any] = {
    "convgru, last": lambda: ConvGRU("last"),
    "convgru, every frame, stride 2": lambda: ConvGRU("list", stride=2),
    "convgru, two levels, mean": lambda: ConvGRU("mean", levels=2),
    "convgru, learned start": lambda: ConvGRU("list", learned=True),
    "convlstm, unbind": lambda: ConvLSTM("unbind"),
    "convlstm, split": lambda: ConvLSTM("split"),
    "convlstm, slices": lambda: ConvLSTM("slice"),
    "lstm in steps": lambda: Layers(nn.LSTM),
    "gru in steps": lambda: Layers(nn.GRU),
    "gru cell": lambda: Cells("gru"),
    "lstm cell": lambda: Cells("lstm"),
    "lstm cell from nothing": lambda: Cells("lstm from nothing"),
    "rnn cell": lambda: Cells("rnn"),
    "running average": Average,
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = NETWORKS[name]()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean)
    return network.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_loop_is_a_recurrence(name: str) -> None:
    network = made(name).double()
    clip = torch.randn(2, 2, 6, 4, 3, dtype=torch.float64)
    for preset in ("exact", "causal", "d3d"):
        stream = dissect.convert(network, clip, preset=preset)
        law(stream, clip, chunks=(2, 4))
        dissect.verify(stream, network, runtime=False).check()
        assert [row.decision for row in stream.plan if "loop over time" in row.decision]
        if preset == "exact":
            assert stream.plan.exact
            assert offline(stream, network, clip, (6, 5, 3)) == 3


@pytest.mark.parametrize("name", ["convgru, two levels, mean", "lstm cell", "running average"])
def test_a_step_is_an_onnx_model(name: str) -> None:
    network = made(name)
    stream = dissect.convert(network, torch.randn(1, 2, 6, 4, 3), preset="exact")
    dissect.verify(stream, network).check()


@pytest.mark.parametrize("name", ["convgru, learned start", "lstm cell"])
def test_parameters_stay_where_they_are_and_learn(name: str) -> None:
    network = made(name).double()
    clip = torch.randn(2, 2, 6, 4, 3, dtype=torch.float64)
    form = dissect.convert(network, clip, preset="d3d").clip
    names = {name for name, _ in form.named_parameters()}
    assert names == {name for name, _ in network.named_parameters()}
    out = form(clip)
    (out[0] if isinstance(out, tuple) else out).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in form.parameters())


def test_what_is_inside_one_frame_leaves_the_loop() -> None:
    """The CNN is no part of the recurrence: it is lowered and folded as everywhere else."""
    stream = dissect.convert(made("gru cell"), torch.randn(1, 2, 6, 4, 3))
    kinds = [type(stream.clip.get_submodule(path)).__name__ for path in ("cnn.0", "cnn.1")]
    assert kinds == ["FrameConv", "BatchNorm"]


class Backwards(nn.Module):
    """The loop begins at the end of the clip."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 3)
        for t in reversed(range(x.shape[2])):
            h = self.cell(x[:, :, t].mean((2, 3)), h)
        return h


def test_what_cannot_be_rolled_is_still_right_for_the_clip() -> None:
    """Written out, a loop is a window of positions: as dear as the clip, and no less exact."""
    network = Backwards().double().eval()
    clip = torch.randn(2, 2, 5, 4, 3, dtype=torch.float64)
    stream = dissect.convert(network, clip, preset="exact")
    law(stream, clip, chunks=(2,))
    assert offline(stream, network, clip, (5,)) == 1
