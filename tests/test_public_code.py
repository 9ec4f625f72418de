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


def of_one_row(net: Any, x: Tensor) -> Tensor:
    """A masked mean, over how many rows there are, in several spellings."""
    y = net.a(x)
    mask = torch.ones(x.shape[0], 1, x.shape[2], 1, 1, dtype=x.dtype)
    y = (y * mask).sum(2) / mask.sum() + y.mean(2) / x.size(0) * torch.tensor(x.size(0))
    y = y / (x.numel() / x[0].numel()) + torch.ones_like(x[:, 0, 0, 0, 0]).sum()
    return y.mean((2, 3)) / torch.count_nonzero(torch.ones(x.shape[0], x.shape[2]))


def first_frames(net: Any, x: Tensor) -> Tensor:
    """The frames of a clip up to a number."""
    return net.a(x)[:, :, :6].mean((2, 3, 4))  # type: ignore[no-any-return]


def counted_frames(net: Any, x: Tensor) -> Tensor:
    """As many frames as a mask has, of a clip like the example."""
    return ((net.a(x) * torch.ones_like(x)).sum(2) / torch.ones_like(x).sum(2)).mean((2, 3))  # type: ignore[no-any-return]


def stripes(net: Any, x: Tensor) -> Tensor:
    """GaitPart's stripes of every picture beside one another on the batch, which frames are on, too."""
    rows = net.a(x).transpose(1, 2).flatten(0, 1)
    rows = net.picture(torch.cat(torch.chunk(rows, 2, 2), 0))
    return torch.cat(torch.chunk(rows, 2, 0), 2).unflatten(0, (x.shape[0], -1)).mean((3, 4))


def pieces_of_the_batch(net: Any, x: Tensor) -> Tensor:
    """ViViT in pieces: a row for each of the batch, of rows that are frames."""
    rows = net.a(x).transpose(1, 2).flatten(0, 1).mean((2, 3))
    return net.fc(torch.cat([row[None] for row in rows.chunk(x.shape[0], 0)], 0).mean(1))  # type: ignore[no-any-return]


def class_maps(net: Any, x: Tensor) -> Tensor:
    """Ego-RNN: the weights of each frame's best class."""
    maps = net.a(x).transpose(1, 2).flatten(0, 1)
    best = net.fc(maps.mean((2, 3))).sort(1, True)[1][:, 0]
    both = net.fc.weight[best] + net.fc.weight.index_select(0, best)
    return (both[:, :, None, None] * maps).sum((1, 2, 3)).view(x.shape[0], -1)  # type: ignore[no-any-return]


def first_frame_for_all(net: Any, x: Tensor) -> Tensor:
    """BigSmall's branch of one frame, stacked as often as there are frames."""
    y = net.a(x).transpose(1, 2).flatten(0, 1)
    once = net.picture(x[:, :, 0])
    return (y + torch.stack([once] * x.shape[2], 1).flatten(0, 1)).view(x.shape[0], -1, *y.shape[1:])  # type: ignore[no-any-return]


def windows_of_frames(net: Any, x: Tensor) -> Tensor:
    """MS-G3D: frames side by side by ``F.unfold``, of joints."""
    x = net.a(x).flatten(3)[..., :5]
    sides = F.unfold(x, (3, 1), padding=(1, 0), stride=(2, 1)).view(len(x), x.shape[1], 3, -1, x.shape[3])
    return sides.transpose(2, 3).flatten(3).mean(3)  # type: ignore[no-any-return]


def laid_over(net: Any, x: Tensor) -> Tensor:
    """ActionFormer's chunks of a mask that lie over each other in memory."""
    mask = x.new_ones(x.size(0), x.size(2) * 2, 1)
    chunks = mask.as_strided((x.size(0), x.size(2) - 1, 4, 1), (x.size(2) * 2, 2, 1, 1))
    return net.a(x).mean((3, 4)) * chunks.mean((1, 2, 3)).view(-1, 1, 1)  # type: ignore[no-any-return]


SPELT: dict[str, tuple[Callable[[Any, Tensor], Tensor], bool]] = {
    "counts of rows": (of_one_row, True),
    "the first frames": (first_frames, True),
    "counts of frames": (counted_frames, True),
    "stripes on the batch": (stripes, True),
    "pieces of the batch": (pieces_of_the_batch, True),
    "weights of a class": (class_maps, True),
    "one frame stacked": (first_frame_for_all, False),
    "windows of frames": (windows_of_frames, True),
    "chunks over each other": (laid_over, True),
}


@pytest.mark.parametrize("name", SPELT)
@pytest.mark.parametrize("preset", ["exact", "causal", "d3d"])
def test_spellings_keep_their_promises(name: str, preset: str) -> None:
    torch.manual_seed(0)
    forward, exact = SPELT[name]
    layers = {"a": nn.Conv3d(3, 3, 3, padding=1), "picture": nn.Conv2d(3, 3, 3, padding=1), "fc": nn.Linear(3, 4)}
    network = Layers(forward, **layers).double().eval()
    stream = dissect.convert(network, torch.rand(1, 3, 8, 6, 6, dtype=torch.float64), preset=preset)
    dissect.verify(stream, network, runtime=preset == "exact").check()
    if preset == "exact" and exact:
        assert stream.plan.exact, str(stream.plan)
        assert offline(stream, network, torch.rand(1, 3, 8, 6, 6, dtype=torch.float64), (8,)) == 1


@pytest.mark.parametrize("preset", ["exact", "causal", "d3d"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_forward_that_branches_on_one_row(batch: int, preset: str) -> None:
    """TGM: a squeeze, which takes a batch of one away, is taken back; verify finds the original's layers all the same."""

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.rand(2, 3))

        def forward(self, x: Tensor) -> Tensor:
            y = x.squeeze()
            if x.shape[0] == 1:
                y = y.unsqueeze(0)
            return F.conv2d(F.pad(y, (1, 1)).unsqueeze(1), self.kernel.unsqueeze(1).unsqueeze(1)).flatten(1, 2)

    torch.manual_seed(0)
    network = Branching().double()
    stream = dissect.convert(network, torch.rand(batch, 4, 8, 1, 1, dtype=torch.float64), preset=preset)
    report = dissect.verify(stream, network, runtime=False).check()
    assert any(row.pair.startswith("original") and row.error is not None for row in report.rows)


def test_a_network_that_takes_no_batch_of_one() -> None:
    """MoCoGAN: what a squeeze leaves of one row has no second dimension."""

    def forward(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = net.a(x).squeeze()
        return y[:, :1], y[:, 1:]

    torch.manual_seed(0)
    network = Layers(forward, a=nn.Conv3d(3, 5, (8, 4, 4))).double()
    stream = dissect.convert(network, torch.rand(2, 3, 8, 4, 4, dtype=torch.float64), "exact")
    report = dissect.verify(stream, network, runtime=False).check()
    assert any(row.pair == "original = exact" and row.error is not None for row in report.rows)


def cropped(net: Any, x: Tensor) -> Tensor:
    """The skip connections of fepegar's U-Net: sizes as tensors, their difference halved, a padding of negative widths."""
    y = net.a(x)
    crop = torch.tensor(x.shape)[2:] - torch.tensor(y.shape)[2:]
    half = (crop / 2).int()
    pad = -torch.stack((half, half)).t().flatten()
    return torch.cat((F.pad(x, pad.flip(0).tolist()), y), dim=1)


def picked_size(net: Any, x: Tensor) -> Tensor:
    sizes = torch.tensor(x.shape[-3:]).tolist()
    return net.a(x)[:, :, 1 : sizes[0] - 1, : torch.as_tensor(x.shape).prod().item()]  # type: ignore[no-any-return]


@pytest.mark.parametrize("preset", ["exact", "causal", "d3d"])
@pytest.mark.parametrize("forward", [cropped, picked_size])
def test_sizes_in_a_tensor_are_sizes(forward: Any, preset: str) -> None:
    torch.manual_seed(0)
    network = Layers(forward, a=nn.Conv3d(3, 4, 3)).double()
    stream = dissect.convert(network, torch.rand(1, 3, 8, 7, 7, dtype=torch.float64), preset)
    dissect.verify(stream, network, runtime=False).check()
    assert stream.plan.exact is (preset == "exact")


def test_a_size_that_follows_from_the_clip_is_named() -> None:
    """With its line: a size of its own for each clip, no step can have."""

    def forward(net: Any, x: Tensor) -> Tensor:
        sizes = x[0, 0, :3, 0, 0].long().tolist()
        return net.a(x)[:, :, 1 : sizes[0] - 1]  # type: ignore[no-any-return]

    with pytest.raises(
        dissect.CaptureError, match=r"a size follows from what is read out of a tensor.*test_public_code"
    ):
        dissect.convert(Layers(forward, a=nn.Conv3d(3, 4, 1)), torch.rand(1, 3, 8, 4, 4))


def test_counts_of_rows_that_no_row_can_have() -> None:
    """A network that counts its rows, and cannot be run on one."""

    def forward(net: Any, x: Tensor) -> Tensor:
        return net.a(x) / x.size(0) + 0 * x[1:2].mean()  # type: ignore[no-any-return]

    class Two(Layers):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] == 1:
                raise ValueError("two rows at least")
            return super().forward(x)  # type: ignore[no-any-return]

    with pytest.raises(dissect.CaptureError, match="how many rows its batch has"):
        dissect.convert(Two(forward, a=nn.Conv3d(3, 4, 1)), torch.rand(2, 3, 8, 4, 4))


def test_new_tensors_keep_the_type_that_they_were_captured_with() -> None:
    """A network built and captured under another default type, and exported under this one."""

    class State(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv3d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + torch.zeros(4, 1, 1, 1) + torch.eye(6)  # type: ignore[no-any-return]

    torch.set_default_dtype(torch.float64)
    try:
        network = State()
        stream = dissect.convert(network, torch.rand(1, 3, 8, 6, 6), "exact")
    finally:
        torch.set_default_dtype(torch.float32)
    dissect.verify(stream, network.eval()).check()


@pytest.mark.parametrize("spelling", [torch.max, torch.min, torch.mean, torch.sum])
def test_a_reduction_of_everything_says_what_to_name(spelling: Callable[[Tensor], Tensor]) -> None:
    network = Layers(lambda net, x: net.a(x) / spelling(net.a(x)), a=nn.Conv3d(3, 4, 3, padding=1))
    with pytest.raises(dissect.NotStreamable, match="the whole tensor") as refused:
        dissect.convert(network, torch.rand(1, 3, 8, 4, 4), "exact")
    assert all("name the dimensions" in refusal.fix for refusal in refused.value.refusals)


def test_the_last_frame_before_layers_of_points() -> None:
    """MoViNet's head: the newest running mean, kept as a volume of one frame for convolutions of points; no frame is awaited."""

    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.a(F.pad(x, (1, 1, 1, 1, 2, 0))).mean((3, 4), keepdim=True)
        x = torch.cumsum(x, 2) / torch.arange(1, x.shape[2] + 1, dtype=x.dtype)[:, None, None]
        return net.point(x[:, :, -1:]).flatten(1)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    network = Layers(forward, a=nn.Conv3d(3, 4, 3), point=nn.Conv3d(4, 5, 1)).double().eval()
    stream = dissect.convert(network, torch.rand(1, 3, 8, 6, 6, dtype=torch.float64), "exact")
    assert stream.plan.exact
    assert stream.timing.delay == 0
    dissect.verify(stream, network, runtime=False).check()
    assert offline(stream, network, torch.rand(1, 3, 12, 6, 6, dtype=torch.float64), (5, 8, 12)) == 3


def test_channels_joined_along_the_batch_are_refused() -> None:
    """VNet's first layer: the input sixteen times along the batch, added to sixteen channels, and no batch is left."""
    network = Layers(
        lambda net, x: net.b(net.a(x) + torch.cat([x] * 4, 0)), a=nn.Conv3d(1, 4, 3, padding=1), b=nn.ReLU()
    )
    with pytest.raises(dissect.NotStreamable) as refused:
        dissect.convert(network, torch.rand(1, 1, 8, 6, 6), "exact")
    assert all("batch" in refusal.reason and "batch" in refusal.fix for refusal in refused.value.refusals)
