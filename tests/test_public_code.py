"""Lines of public packages that broke once: each as its package writes it, in a network around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws import offline
from test_rewording import Layers
from torch import Tensor, nn
from torch.nn import functional as F

import dissect


def upsampled_by_one(net: Any, x: Tensor) -> Tensor:
    """TPN's neck: an upsampling that does nothing, behind a pool over the whole clip."""
    return (net.pool(net.a(x)) + net.up(net.pool(net.b(x)))).mean((2, 3, 4))  # type: ignore[no-any-return]


def pooled_pictures(net: Any, x: Tensor) -> Tensor:
    """TPN's head: a 3D pool of pictures, for which the batch is channels."""
    return net.fc(F.avg_pool3d(net.a(x).mean(2), (1, 6, 6), 1).flatten(1))  # type: ignore[no-any-return]


def shifted(net: Any, x: Tensor) -> Tensor:
    """TSM's shift of an eighth of three channels, which is none."""
    x = x.transpose(1, 2)
    fold = x.shape[2] // 8
    left, rest = x[:, :, :fold], x[:, :, fold:]
    left = torch.cat((left[:, 1:], torch.zeros_like(left)[:, :1]), 1)
    return net.a(torch.cat((left, rest), 2).transpose(1, 2))  # type: ignore[no-any-return]


def shifted_in_place(net: Any, x: Tensor) -> Tensor:
    """The same, written into zeros."""
    x = x.transpose(1, 2)
    fold = x.shape[2] // 8
    out = torch.zeros_like(x)
    out[:, :-1, :fold] = x[:, 1:, :fold]
    out[:, :, fold:] = x[:, :, fold:]
    return net.a(out.transpose(1, 2))  # type: ignore[no-any-return]


def on_the_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Set Transformer's heads."""
    rows = len(k)
    q, k, v = (torch.cat(part.split(2, 2), 0) for part in (q, k, v))
    return torch.cat((q + torch.softmax(q.bmm(k.transpose(1, 2)) / 2, 2).bmm(v)).split(rows, 0), 2)


def set_transformer(net: Any, x: Tensor) -> Tensor:
    """Frames ask frames, and a learned seed asks them."""
    x = x.mean((3, 4)).transpose(1, 2)
    x = on_the_batch(net.q(x), net.k(x), net.v(x))
    return net.fc(on_the_batch(net.seed.weight.unsqueeze(0).repeat(len(x), 1, 1), x, x)).squeeze(1)  # type: ignore[no-any-return]


def extracted(net: Any, x: Tensor) -> Tensor:
    """UniFormerV2's extractor: a token, through a slice of a parameter, asks all tokens of the clip, batch second."""
    x = net.a(x)
    n, c, t, h, w = x.shape
    x = x.permute(0, 2, 3, 4, 1).reshape(n * t, h * w, c).permute(1, 0, 2)
    y = x.view(h * w, n, t, c).permute(2, 0, 1, 3).flatten(0, 1)
    token = net.token.weight.unsqueeze(0).repeat(1, n, 1)
    q, k = (a.view(a.size(0), n, 2, c // 2).permute(1, 2, 0, 3) for a in (token @ net.qkv.weight[:c].T, y))
    z = ((q @ k.transpose(-2, -1)).softmax(-1) @ k).permute(2, 0, 1, 3).flatten(2)
    out: Tensor = (token + z)[0] + x.view(h * w, n, t, c)[0].mean(1)
    return out


def conv() -> nn.Module:
    return nn.Conv3d(3, 4, 3, padding=1)


CODE: dict[str, Callable[[], nn.Module]] = {
    "TPN's neck": lambda: Layers(
        upsampled_by_one, a=conv(), b=conv(), pool=nn.MaxPool3d((8, 1, 1)), up=nn.Upsample(scale_factor=(1, 1, 1))
    ),
    "TPN's head": lambda: Layers(pooled_pictures, a=conv(), fc=nn.Linear(4, 5)),
    "TSM's shift": lambda: Layers(shifted, a=conv()),
    "TSM's shift, in place": lambda: Layers(shifted_in_place, a=conv()),
    "UniFormerV2": lambda: Layers(
        extracted, a=nn.Conv3d(3, 16, (1, 3, 3), (1, 3, 3)), token=nn.Linear(16, 1), qkv=nn.Linear(16, 48)
    ),
    "Set Transformer": lambda: Layers(
        set_transformer,
        q=nn.Linear(3, 4),
        k=nn.Linear(3, 4),
        v=nn.Linear(3, 4),
        seed=nn.Linear(4, 1),
        fc=nn.Linear(4, 2),
    ),
}


@pytest.mark.parametrize("name", CODE)
@pytest.mark.parametrize("preset", ["exact", "causal", "d3d"])
def test_keeps_its_promises(name: str, preset: str) -> None:
    torch.manual_seed(0)
    network = CODE[name]().double().eval()
    stream = dissect.convert(network, torch.rand(1, 3, 8, 6, 6, dtype=torch.float64), preset=preset)
    dissect.verify(stream, network, runtime=preset == "exact").check()
    if preset == "exact":
        assert stream.plan.exact, str(stream.plan)
        assert stream.timing.delay == (0 if name in ("Set Transformer", "UniFormerV2") else 1)


def test_a_cumulative_pool_where_the_example_has_one_position() -> None:
    """ir-CSN with strides of 8 in all, and an example of 8 frames."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(3, 4, 3, (4, 1, 1), 1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten()).double()
    stream = dissect.convert(network.eval(), torch.rand(1, 3, 4, 6, 6, dtype=torch.float64), "exact", pool="cumulative")
    assert offline(stream, network, torch.rand(1, 3, 24, 6, 6, dtype=torch.float64), (4, 8, 16, 24)) == 4


def test_channels_and_time_flattened_behind_moved_edges() -> None:
    """SCCNet: the oracle of ``causal`` keeps the newest positions of each channel."""
    torch.manual_seed(0)
    layers = {"a": nn.Conv2d(1, 3, (4, 3)), "pool": nn.AvgPool2d((1, 6), (1, 3)), "fc": nn.Linear(15, 2)}
    network = (
        Layers(lambda net, x: net.fc(net.pool(net.a(x.unsqueeze(1))).view(x.size(0), -1)), **layers).double().eval()
    )
    stream = dissect.convert(network, torch.randn(1, 4, 20, dtype=torch.float64), "causal", time_dim=2)
    report = dissect.verify(stream, network, runtime=False).check()
    assert any(row.pair.startswith("original") and row.error is not None for row in report.rows)
