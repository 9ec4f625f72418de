"""Recurrent layers over time and inside a frame, against torch's own on the whole clip."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from laws import law, offline
from torch import Tensor, nn

import dissect

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")

KINDS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "gru": (nn.GRU, {}),
    "two levels": (nn.GRU, {"num_layers": 2, "dropout": 0.5}),
    "no bias": (nn.GRU, {"num_layers": 2, "bias": False}),
    "lstm": (nn.LSTM, {"num_layers": 2}),
    "projection": (nn.LSTM, {"proj_size": 2}),
    "projection without bias": (nn.LSTM, {"proj_size": 2, "bias": False, "num_layers": 2}),
    "tanh": (nn.RNN, {}),
    "relu": (nn.RNN, {"nonlinearity": "relu", "num_layers": 2}),
}


class Recurrent(nn.Module):
    """Frame features, a recurrence, and all that it gives: the sequence, and the last hidden values."""

    def __init__(self, kind: str = "gru", stride: int = 1, batch_first: bool = True, **changes: Any) -> None:
        super().__init__()
        layer, settings = KINDS[kind]
        self.conv = nn.Conv3d(2, 3, 3, (stride, 2, 2), 1)
        self.rnn = layer(3, 4, batch_first=batch_first, **{**settings, **changes})
        self.batch_first = batch_first

    def features(self, x: Tensor) -> Tensor:
        y = self.conv(x).relu().mean((3, 4))
        return y.transpose(1, 2) if self.batch_first else y.permute(2, 0, 1)

    def forward(self, x: Tensor) -> Any:
        y, last = self.rnn(self.features(x))
        last = last if isinstance(last, tuple) else (last,)
        return y if self.batch_first else y.transpose(0, 1), *[h.transpose(0, 1) for h in last]


class Started(Recurrent):
    """First hidden values of its own."""

    def __init__(self, kind: str, value: float) -> None:
        super().__init__(kind)
        self.first = nn.Parameter(torch.full((2, 1, 4), value) if value == 0 else torch.randn(2, 1, 4))

    def forward(self, x: Tensor) -> Any:
        h = self.first.expand(2, x.shape[0], 4).contiguous()
        return self.rnn(self.features(x), (h, h) if isinstance(self.rnn, nn.LSTM) else h)[0][:, -1]


class EveryPixel(nn.Module):
    """The rows of the recurrence are the pixels of all clips."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 4, batch_first=True)
        self.conv = nn.Conv3d(2, 3, (2, 1, 1))
        self.first = nn.Parameter(torch.randn(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        n, c, t, h, w = x.shape
        y = x.permute(0, 3, 4, 2, 1).reshape(n * h * w, t, c)
        y, _ = self.rnn(y, self.first.expand(1, n * h * w, 4))
        return y.reshape(n, h, w, t, 4).permute(0, 4, 3, 1, 2)


class OverTokens(nn.Module):
    """A recurrence over the rows of each frame, in both directions."""

    def __init__(self, batch_first: bool, merged: bool) -> None:
        super().__init__()
        self.rnn = nn.LSTM(2, 3, 2, batch_first=batch_first, bidirectional=True)
        self.batch_first, self.merged = batch_first, merged

    def forward(self, x: Tensor) -> Any:
        n, c, t, h, w = x.shape
        y = (
            x.permute(0, 2, 4, 3, 1).reshape(n * t * w, h, c)
            if self.merged
            else x[..., 0].permute(0, 2, 3, 1).reshape(n * t, h, c)
        )
        y, (last, _) = self.rnn(y if self.batch_first else y.transpose(0, 1))
        y = y if self.batch_first else y.transpose(0, 1)
        return y.reshape(n, t, -1), last.transpose(0, 1).reshape(n, t, -1)


def check(network: nn.Module, frames: int = 7, presets: tuple[str, ...] = ("exact", "causal", "d3d")) -> None:
    network = network.double().eval()
    clip = torch.randn(2, 2, frames, 4, 3, dtype=torch.float64)
    for preset in presets:
        stream = dissect.convert(network, clip, preset=preset)
        law(stream, clip, chunks=(2, 3))
        dissect.verify(stream, network, runtime=False).check()
        if preset == "exact":
            assert stream.plan.exact
            assert offline(stream, network, clip, (frames, frames - 1, frames - 3)) == 3


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_over_time(kind: str, stride: int) -> None:
    torch.manual_seed(0)
    check(Recurrent(kind, stride, batch_first=stride == 1))


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["two levels", "lstm"])
def test_a_learned_start(kind: str, value: float) -> None:
    torch.manual_seed(0)
    network = Started(kind, value)
    check(network, presets=("exact",))
    stream = dissect.convert(network, torch.randn(1, 2, 7, 4, 3, dtype=torch.float64), preset="exact")
    assert "first" in stream.clip.state_dict()


def test_every_pixel_is_a_row() -> None:
    torch.manual_seed(0)
    check(EveryPixel())


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_over_tokens_of_a_frame(batch_first: bool, merged: bool) -> None:
    torch.manual_seed(0)
    check(OverTokens(batch_first, merged), presets=("exact",))


@pytest.mark.parametrize("kind", ["two levels", "projection", "relu"])
def test_a_step_is_an_onnx_model(kind: str) -> None:
    torch.manual_seed(0)
    network = Recurrent(kind, 2).eval()
    stream = dissect.convert(network, torch.randn(1, 2, 7, 4, 3), preset="exact")
    dissect.verify(stream, network).check()


def test_over_tokens_goes_to_onnx() -> None:
    torch.manual_seed(0)
    network = OverTokens(True, True).eval()
    stream = dissect.convert(network, torch.randn(1, 2, 7, 4, 3))
    dissect.verify(stream, network).check()


@pytest.mark.parametrize("kind", ["two levels", "projection without bias"])
def test_the_clip_form_trains_like_the_original(kind: str) -> None:
    torch.manual_seed(0)
    network = Recurrent(kind).double().eval()
    clip = torch.randn(2, 2, 7, 4, 3, dtype=torch.float64)
    stream = dissect.convert(network, clip, preset="causal")
    assert set(stream.clip.state_dict()) == set(network.state_dict())
    network.conv.padding = (0, 1, 1)

    def loss(y: Tensor) -> Tensor:
        return y.square().sum()

    loss(stream.clip(clip)[0]).backward()
    loss(network(nn.functional.pad(clip, (0, 0, 0, 0, 2, 0)))[0]).backward()
    wanted = {name: parameter.grad for name, parameter in network.named_parameters()}
    for name, parameter in stream.clip.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], msg=name)


def test_levels_drop_out_in_training() -> None:
    torch.manual_seed(0)
    network = Recurrent("two levels").eval()
    clip = torch.randn(2, 2, 7, 4, 3)
    form = dissect.convert(network, clip).clip
    assert torch.equal(form(clip)[0], form(clip)[0])
    form.train()
    assert not torch.equal(form(clip)[0], form(clip)[0])


class Both(Recurrent):
    def __init__(self) -> None:
        super().__init__("gru", bidirectional=True)


class FromTheClip(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        return self.rnn(y, nn.functional.pad(y.mean(1), (0, 1)).unsqueeze(0))[0]


class OverTheBatch(Recurrent):
    """The classic mistake: features with the batch first, a layer without ``batch_first``."""

    def __init__(self) -> None:
        super().__init__("gru", batch_first=True)
        self.rnn.batch_first = False

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(self.features(x))[0]


@pytest.mark.parametrize(
    ("network", "reason", "fix"),
    [
        (Both(), "both directions", "bidirectional=False"),
        (FromTheClip(), "first hidden value is computed from the clip", "zeros"),
        (OverTheBatch(), "over the batch", "batch_first=True"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_refusals(network: nn.Module, reason: str, fix: str) -> None:
    with pytest.raises(dissect.NotStreamable) as refused:
        dissect.convert(network.eval(), torch.randn(1, 2, 7, 4, 3))
    (refusal,) = refused.value.refusals
    assert refusal.path == "rnn"
    assert refusal.op == "aten.gru"
    assert reason in refusal.reason
    assert fix in refusal.fix
