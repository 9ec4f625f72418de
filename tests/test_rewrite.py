"""The rewrite: time followed through every merge, refusals all at once with what to do, converters of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from laws import law, offline
from torch import Tensor, nn

import dissect
from dissect.errors import DissectError, NotStreamable

PRESETS = pytest.mark.parametrize("preset", ["d3d", "causal", "exact"])
CLIP = torch.randn(2, 2, 8, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Lambda(nn.Module):
    """A forward as a function, with a temporal convolution before it, so that a wrong frame is seen."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv3d(2, 4, (3, 1, 1), padding=(1, 0, 0)), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.conv(x))


#: forwards that move, merge and split dimensions; the time axis of the result, if any, stays findable
SHAPES: dict[str, Callable[[Tensor], Any]] = {
    "merged with the batch": lambda x: (
        F.relu(x.transpose(1, 2).reshape(-1, 4, 4, 6)).reshape(-1, 8, 4, 4, 6).transpose(1, 2)
    ),
    "batch and time apart again by -1": lambda x: x.permute(0, 2, 1, 3, 4).flatten(0, 1).view(x.shape[0], -1, 4, 4, 6),
    "merged with space": lambda x: x.flatten(2).softmax(1).reshape(-1, 4, 8, 4, 6),
    "tokens": lambda x: F.layer_norm(x.flatten(2).transpose(1, 2), (4,)).transpose(1, 2).reshape(-1, 4, 8, 24),
    "tokens with a place": lambda x: (
        (x.flatten(2) + torch.arange(24.0).repeat(8).to(x)).softmax(1).reshape(-1, 4, 8, 24)
    ),
    "a token more": lambda x: torch.cat([torch.ones(x.shape[0], 8, 1, 6).to(x), x.mean(1)], 2),
    "space into the batch": lambda x: (
        x.permute(0, 3, 4, 1, 2).reshape(-1, 4, 8).unflatten(0, (-1, 4, 6)).movedim(-1, 1)
    ),
    "channels first split, then shuffled": lambda x: x.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2),
    "plain neighbours dealt out anew": lambda x: x.permute(0, 2, 1, 3, 4).reshape(-1, 8, 16, 6).reshape(-1, 8, 3, 32),
    "time last": lambda x: x.permute(0, 1, 3, 4, 2).mean((2, 3)),
    "time first but for the batch": lambda x: x.movedim(2, 1).contiguous().amax((3, 4)),
    "squeezed and back": lambda x: x.mean((3, 4), keepdim=True).squeeze(-1).squeeze(-1).unsqueeze(2),
    "broadcast over time": lambda x: x * x[:, :1].sigmoid() + torch.arange(4.0).reshape(4, 1, 1, 1).to(x),
    "chunks of channels": lambda x: torch.cat([part * (i + 1) for i, part in enumerate(x.chunk(2, 1))][::-1], 1),
    "unbound channels": lambda x: torch.stack(list(x.unbind(1))[::-1], 2),
    "rows and columns": lambda x: x[:, :, :, 1:, ::2] + x[:, 1, None, :, :3, :3],
    "several": lambda x: {"a": x.mean((3, 4)), "b": (x.amax((1, 3, 4)), [x])},
}


@PRESETS
@pytest.mark.parametrize("name", SHAPES)
def test_time_is_followed(name: str, preset: str) -> None:
    torch.manual_seed(0)
    model = Lambda(SHAPES[name]).double().eval()
    stream = dissect.convert(model, CLIP, preset=preset)
    law(stream, CLIP, chunks=(3,))
    if preset == "exact":
        assert stream.plan.exact
        assert offline(
            stream,
            model,
            CLIP,
            [8] if "merged" in name or "token" in name or name == "space into the batch" else [8, 5, 2],
        )


#: what has no streaming form: the words that its refusal must have
HOPELESS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "the order of the rows": (lambda x: x.sort(0).indices, "sort"),
    "a Fourier transform over time": (lambda x: torch.fft.fft(x, dim=2).abs(), "fft"),
    "frames that fit the clip alone": (lambda x: x.transpose(1, 2).reshape(-1, 2, 16, 4, 6), "time axis"),
    "a mean over the batch": (lambda x: x - x.mean(0, keepdim=True), "batch"),
    "mirrored frames": (lambda x: x + x.flip(2), "flip"),
}


@PRESETS
@pytest.mark.parametrize("name", HOPELESS)
def test_what_cannot_be_streamed_is_named(name: str, preset: str) -> None:
    function, word = HOPELESS[name]
    with pytest.raises(NotStreamable) as caught:
        dissect.convert(Lambda(function), CLIP.float(), preset=preset)
    (first, *_) = caught.value.refusals
    assert word in str(caught.value), caught.value
    assert first.op.startswith(("aten", "dissect"))
    assert "test_rewrite.py" in str(caught.value), "the user's own line"


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(2, 3, batch_first=True, bidirectional=True)
        self.inner = nn.Sequential(Lambda(lambda x: x.flip(2)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(x), self.gru(x.mean((3, 4)).transpose(1, 2))[0]


def test_all_refusals_come_at_once_with_their_paths() -> None:
    with pytest.raises(NotStreamable) as caught:
        dissect.convert(Two(), CLIP.float())
    paths = {refusal.path: refusal for refusal in caught.value.refusals}
    assert set(paths) == {"inner.0", "gru"}
    assert "bidirectional" in str(paths["gru"])
    assert "2 operators cannot be streamed" in str(caught.value)
    assert all(refusal.fix for refusal in caught.value.refusals)


def test_an_output_without_a_clip() -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ones(1)

    with pytest.raises(DissectError, match="does not depend on the clip"):
        dissect.convert(Constant(), CLIP)


@PRESETS
def test_shared_layers_and_shared_weights(preset: str) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv3d(2, 2, (3, 1, 1), padding=(1, 0, 0))
            self.tied = nn.Conv3d(2, 2, (3, 1, 1), padding=(1, 0, 0))
            self.tied.weight = self.conv.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.tied(self.conv(F.relu(self.conv(x))))

    torch.manual_seed(0)
    model = Shared().double().eval()
    stream = dissect.convert(model, CLIP, preset=preset)
    law(stream, CLIP)
    assert set(stream.clip.state_dict()) <= set(model.state_dict())
    if preset == "exact":
        assert offline(stream, model, CLIP, [8, 3])


@PRESETS
def test_computed_weights(preset: str) -> None:
    """Weight standardisation: a kernel computed from parameters in the forward stays trainable."""

    class Standardised(nn.Conv3d):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight - self.weight.mean((1, 2, 3, 4), keepdim=True)
            return F.conv3d(x, weight / weight.std((1, 2, 3, 4), keepdim=True), self.bias, padding=(2, 0, 0))

    torch.manual_seed(0)
    model = nn.Sequential(Standardised(2, 3, (5, 1, 1))).double().eval()
    stream = dissect.convert(model, CLIP, preset=preset)
    law(stream, CLIP)
    if preset == "exact":
        assert offline(stream, model, CLIP, [8, 3])
    stream.clip.train()(CLIP).sum().backward()
    assert dict(stream.clip.named_parameters())["0.weight"].grad is not None


@PRESETS
def test_one_cache_serves_all_who_read_a_value(preset: str) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv3d(2, 2, (5, 1, 1), padding=(2, 0, 0))
            self.second = nn.Conv3d(2, 2, (3, 1, 1), padding=(1, 0, 0))
            self.pool = nn.AvgPool3d((3, 1, 1), 1, (1, 0, 0))

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + self.second(x) + self.pool(x) + x

    model = Shared().double().eval()
    stream = dissect.convert(model, CLIP, preset=preset)
    deep = [cache for cache in stream.cache_list if cache.spec.role == "cache"]
    assert len(deep) == (1 if preset != "exact" else len(deep))
    law(stream, CLIP)
    if preset == "exact":
        assert offline(stream, model, CLIP, [8, 3, 1])


def test_timing_of_a_known_network() -> None:
    net = nn.Sequential(
        nn.Conv3d(2, 2, (5, 1, 1), stride=(2, 1, 1), padding=(2, 0, 0)),
        nn.MaxPool3d((3, 1, 1), (2, 1, 1), (1, 0, 0)),
        nn.Conv3d(2, 2, (3, 1, 1), padding=(2, 0, 0), dilation=(2, 1, 1)),
    )
    timing = dissect.convert(net, torch.randn(1, 2, 32, 2, 2), preset="exact").timing
    assert (timing.stride, timing.delay) == (4, 2 + 1 * 2 + 2 * 4)
    assert timing.receptive_field == 1 + 4 + 2 * 2 + 4 * 4
    assert timing.warmup == timing.receptive_field - 1
    causal = dissect.convert(net, torch.randn(1, 2, 32, 2, 2), preset="causal").timing
    assert (causal.stride, causal.delay, causal.receptive_field) == (4, 0, timing.receptive_field)
    d3d = dissect.convert(net, torch.randn(1, 2, 32, 2, 2)).timing
    assert (d3d.stride, d3d.delay) == (1, 0)


@pytest.mark.parametrize("preset", ["d3d", "causal", "exact"])
def test_the_receptive_field_is_that_of_the_gradient(preset: str) -> None:
    """An output depends on exactly the frames that the timing declares: no later one, none before the warm-up."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv3d(2, 3, (3, 1, 1), padding=(1, 0, 0)),
        nn.Softplus(),
        nn.AvgPool3d((2, 1, 1), (2, 1, 1)),
        nn.Conv3d(3, 2, (3, 1, 1), padding=(0, 0, 0)),
    ).double()
    stream = dissect.convert(net, torch.randn(1, 2, 16, 2, 2, dtype=torch.float64), preset=preset)
    x = torch.randn(1, 2, 30, 2, 2, dtype=torch.float64, requires_grad=True)
    at = 25
    stream.clip(x)[:, :, at].sum().backward()
    seen = x.grad.abs().amax((0, 1, 3, 4)).nonzero().flatten()  # type: ignore[union-attr]
    assert (int(seen.min()), int(seen.max())) == (at - stream.timing.receptive_field + 1, at)
