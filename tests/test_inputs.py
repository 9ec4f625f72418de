"""Every way in which a network takes its frames: layouts, lists, rates, values without time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dissect
from dissect.errors import PlanError
from dissect.inputs import Inputs, parse

PRESETS = pytest.mark.parametrize("preset", ["exact", pytest.param("causal", marks=pytest.mark.slow), "d3d"])
T = 6


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Layers(nn.Module):
    """A layer for frames, one for clips, one for scores."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frame = nn.Conv2d(3, 4, 3, padding=1)
        self.early = nn.Conv2d(3 * T, 4, 3, padding=1)
        self.clip = nn.Conv3d(4, 4, 3, padding=1)
        self.score = nn.Linear(4, 5)
        self.double()


class Trunk(Layers):
    """(B*T, C, H, W): a 2D trunk, then clips."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.frame(x).relu()
        x = x.view(-1, T, *x.shape[1:]).transpose(1, 2)
        return self.score(self.clip(x).relu().mean((2, 3, 4)))


class Segments(Layers):
    """(B*T, C, H, W): a score for each frame, and their mean."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        scores = self.score(self.frame(x).relu().mean((2, 3)))
        return {"frames": scores, "clip": scores.view(-1, T, 5).mean(1)}


class Restored(Layers):
    """(B*T, C, H, W) to (B, T*C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.frame(x).relu()
        x = self.clip(x.view(-1, T, *x.shape[1:]).transpose(1, 2)).transpose(1, 2)
        return x.reshape(x.shape[0], -1, *x.shape[3:])


class Stacked(Layers):
    """(B, T*C, H, W): taken apart by a view."""

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        x = self.frame(x.view(batch * T, 3, height, width)).relu()
        return self.score(self.clip(x.view(batch, T, 4, height, width).transpose(1, 2)).mean((2, 3, 4)))


class Early(Layers):
    """(B, T*C, H, W): all frames in the first convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return self.score(self.early(x).relu().mean((2, 3)))


class Bytes(Layers):
    """(B, T, H, W, C), uint8."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 4, 1, 2, 3).to(self.clip.weight.dtype) / 255
        return self.score(self.clip(F.pad(x, (0, 0, 0, 0, 0, 0, 0, 1))).mean((3, 4)).transpose(1, 2))


class Listed(Layers):
    """A list of T frames."""

    def forward(self, frames: list[Tensor]) -> Tensor:
        x = torch.stack([self.frame(frame).relu() for frame in frames], 2)
        return self.score(self.clip(x).mean((2, 3, 4)))


class TimeFirst(Layers):
    """A network for (T, B, C, H, W), as spiking and recurrent code has it, in a wrapper: scores in its own order."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.GRU(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        features = self.frame(x.flatten(0, 1)).relu().mean((2, 3)).view(*x.shape[:2], -1)
        return self.score(self.memory(features)[0])


class BehindEachOther(Layers):
    """(T*B, C, H, W): the first frames of all clips, then the second."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.frame(x).relu()
        x = self.clip(x.view(T, -1, *x.shape[1:]).permute(1, 2, 0, 3, 4))
        return self.score(x.mean((3, 4)).transpose(1, 2))


LAYOUTS: dict[str, tuple[type[Layers], Any, Any]] = {
    "(b t=6) c h w": (Trunk, drawn(2 * T, 3, 6, 6), "(b t=6) c h w"),
    "(b=2 t) c h w": (Trunk, drawn(2 * T, 3, 6, 6), "(b=2 t) c h w"),
    "(b t=6) c h w, scores of frames": (Segments, drawn(2 * T, 3, 6, 6), "(b t=6) c h w"),
    "(b t=6) c h w to b (t c) h w": (Restored, drawn(2 * T, 3, 6, 6), "(b t=6) c h w"),
    "b (t c=3) h w": (Stacked, drawn(2, 3 * T, 6, 6), "b (t c=3) h w"),
    "b (t c=3) h w, early": (Early, drawn(2, 3 * T, 6, 6), "b (t c=3) h w"),
    "b (c t=6) h w, early": (Early, drawn(2, 3 * T, 6, 6), "b (c t=6) h w"),
    "b t h w c": (Bytes, (drawn(2, T, 6, 6, 3).abs() * 80).clamp(0, 255).to(torch.uint8), "b t h w c"),
    "b t c h w, time first inside": (TimeFirst, drawn(2, T, 3, 6, 6), "b t c h w"),
    "(t b=2) c h w": (BehindEachOther, drawn(2 * T, 3, 6, 6), "(t b=2) c h w"),
    "t b c h w": (Listed, ([drawn(2, 3, 6, 6) for _ in range(T)],), "t b c h w"),
}


@PRESETS
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str, preset: str) -> None:
    kind, example, layout = LAYOUTS[name]
    network = kind().eval()
    stream = dissect.convert(network, example, preset=preset, layout=layout)
    assert stream.plan.exact or preset != "exact"
    dissect.verify(stream, network, runtime=name[-1] != "y").check()


@pytest.mark.parametrize("name", LAYOUTS)
def test_dense_inputs_are_the_network_s_own_in_another_layout(name: str) -> None:
    kind, example, layout = LAYOUTS[name]
    network = kind().eval()
    stream = dissect.convert(network, example, preset="causal", layout=layout)
    own = example if isinstance(example, tuple) else (example,)
    dense = stream.dense(*own)
    for got, wanted in zip(
        torch.utils._pytree.tree_leaves(stream.original(*dense)), torch.utils._pytree.tree_leaves(own), strict=True
    ):
        assert torch.equal(got, wanted)
    with torch.no_grad():
        torch.testing.assert_close(stream.clip(*own), stream.clip(*dense))
    assert stream.frame(own, 2)[0].shape[0] == 2


class Pathways(Layers):
    """Two rates, a lateral connection, two heads."""

    def __init__(self, pooled: bool = False) -> None:
        super().__init__()
        self.lateral = nn.Conv3d(3, 3, (5, 1, 1), (2, 1, 1), (2, 0, 0)).double()
        self.slow = nn.Conv3d(6, 4, (3, 3, 3), padding=1).double()
        self.fast = nn.Conv3d(3, 4, (3, 3, 3), padding=1).double()
        self.pooled = pooled

    def forward(self, clips: list[Tensor]) -> Tensor:
        slow, fast = clips
        clips[0] = torch.cat([slow, self.lateral(fast)], 1)  # as public networks do it: into the list they are given
        slow, fast = self.slow(clips[0]).relu(), self.fast(fast).relu()
        if self.pooled:
            return torch.cat([slow.mean((2, 3, 4)), fast.amax((2, 3, 4))], 1)
        return slow + fast[:, :, ::2]


@PRESETS
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("given", [None, (2, 1)])
def test_pathways_share_one_frame(pooled: bool, given: tuple[int, int] | None, preset: str) -> None:
    network = Pathways(pooled).eval()
    fast = drawn(2, 3, 8, 5, 5)
    stream = dissect.convert(network, ([fast[:, :, ::2], fast],), preset=preset, rates=given)
    assert len(stream.frame(([fast[:, :, ::2], fast],), 0)) == 1
    assert stream.plan.exact or preset != "exact"
    dissect.verify(stream, network, runtime=pooled).check()


def test_pathways_at_every_clip_length() -> None:
    network = Pathways(pooled=True).eval()
    fast = drawn(1, 3, 8, 5, 5)
    stream = dissect.convert(network, ([fast[:, :, ::2], fast],), preset="exact")
    for frames in (8, 7, 6, 5, 3):
        clip = fast[:, :, :frames]
        with torch.no_grad():
            wanted = network([clip[:, :, ::2], clip])
            got = stream.offline([clip[:, :, ::2], clip])
        torch.testing.assert_close(got.select(2 if got.dim() > 2 else 1, got.shape[-1] - 1), wanted)


@PRESETS
def test_pathways_of_different_sizes_take_a_frame_each(preset: str) -> None:
    class Sizes(Layers):
        def forward(self, slow: Tensor, fast: Tensor) -> Tensor:
            fast = F.avg_pool3d(self.clip(F.pad(fast, (0, 0, 0, 0, 0, 0, 0, 1))), (1, 2, 2))
            return (self.clip(F.pad(slow, (0, 0, 0, 0, 0, 0, 0, 1))) + fast[:, :, ::2]).mean((2, 3, 4))

    network = Sizes().eval()
    example = (drawn(2, 3, 3, 5, 5), drawn(2, 3, 6, 10, 10))
    stream = dissect.convert(network, example, preset=preset)
    assert [frame.shape for frame in stream.frame(example, 0)] == [(2, 3, 5, 5), (2, 3, 10, 10)]
    dissect.verify(stream, network).check()


class Beside(Layers):
    """A clip and something without time."""

    def forward(self, x: Tensor, beside: Any) -> Any:
        x = self.clip(F.pad(x, (0, 0, 0, 0, 0, 0, 0, 1))).relu().mean((3, 4)).transpose(1, 2)
        if isinstance(beside, Tensor) and beside.dim() == 2:
            beside = beside[:, None]
        return {"scores": self.score(x + beside), "rest": [x.mean(1), x * beside]}


@PRESETS
@pytest.mark.parametrize(
    "beside", [drawn(2, 4), torch.tensor(1.7, dtype=torch.float64), 3], ids=["a vector", "a scalar", "a number"]
)
def test_values_beside_the_clip(beside: Any, preset: str) -> None:
    network = Beside().eval()
    stream = dissect.convert(network, (drawn(2, 3, T, 5, 5), beside), preset=preset)
    dissect.verify(stream, network).check()


@PRESETS
@pytest.mark.parametrize("option", [{"time_dim": (2, None)}, {"layout": ("b c t h w", None)}])
def test_an_input_that_only_looks_like_a_clip(option: dict[str, Any], preset: str) -> None:
    class Words(Layers):
        def forward(self, x: Tensor, words: Tensor) -> Tensor:
            x = self.clip(F.pad(x, (0, 0, 0, 0, 0, 0, 0, 1))).relu().mean((3, 4)).transpose(1, 2)
            return self.score(x + words.mean(1)[:, None])

    network = Words().eval()
    stream = dissect.convert(network, (drawn(2, 3, T, 5, 5), drawn(2, 7, 4)), preset=preset, **option)
    dissect.verify(stream, network, runtime=False).check()


def test_a_layout_names_factors_in_order() -> None:
    axes = parse("(b t=4) (c=2 g) h w", (12, 6, 5, 5))
    assert [axis.kinds for axis in axes.dims] == ["NT", "SS", "S", "S"]
    assert [[factor.size for factor in axis.factors] for axis in axes.dims[:2]] == [[3, 4], [2, 3]]


@pytest.mark.parametrize(
    ("layout", "shape", "message"),
    [
        ("b c t h", (2, 3, 8, 5, 5), "has 4 dimensions"),
        ("c t h w", (3, 8, 5, 5), "no batch"),
        ("(b t) c h w", (16, 3, 5, 5), "size of b or t"),
        ("(b t=5) c h w", (16, 3, 5, 5), "not a product with 5"),
        ("b (t c h w", (16, 3, 5, 5), "not closed"),
        ("b b t h w", (2, 3, 8, 5, 5), "twice"),
        ("b c ... h w", (2, 3, 8, 5, 5), "not understood"),
        (("b c t h w", None), (2, 3, 8, 5, 5), "2 layouts"),
        ("b n c h w", (2, 4, 3, 5, 5), "names no time: call its dimension t"),
    ],
)
def test_layouts_that_do_not_fit(layout: Any, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Inputs.of((torch.zeros(shape),), layout=layout)


@pytest.mark.parametrize(
    ("lengths", "rates", "message"),
    [
        ((9, 32), None, "no whole rate"),
        ((8, 32), (4,), "one for each"),
        ((8, 32), (2, 1), "no whole rate"),
        ((8, 32), (8, 2), "1 for the"),
    ],
)
def test_rates_that_do_not_fit(lengths: tuple[int, ...], rates: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Inputs.of(tuple(torch.zeros(2, 3, length, 5, 5) for length in lengths), rates=rates)


def test_batches_that_differ() -> None:
    with pytest.raises(PlanError, match="batches of 2 and 5"):
        Inputs.of((torch.zeros(2, 3, 8, 5, 5), torch.zeros(5, 4)))
