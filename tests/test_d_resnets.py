"""The paper's D-ResNets: their shape comes out of dissecting a conventional network, and all their forms are one network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from laws import close
from public_networks import random_clip
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

import dissect
from dissect import heads, zoo
from dissect.convolution import FrameConv, TemporalConv
from dissect.errors import PlanError

FRAMES = 100
EVERY = {
    "fc": {},
    "fc, 3 layers": {"layers": 3},
    "lstm": {},
    "lstm, 1 layer": {"layers": 1},
    "gru": {},
    "gru, 3 layers": {"layers": 3},
    "average": {"first": 4},
    "plain": {},
    "embedding": {"first": 4},
}


def calibrated(stream: dissect.Stream, clip: torch.Tensor) -> None:
    """Give the network the shape of a trained one: branches that add a little, and batch norms with a clip's statistics.

    A hundred fresh layers are no oracle: activations grow to 1e5, where the gates of an LSTM are steps, and each branch
    that is as large as its shortcut makes an error of rounding larger, here from 1e-7 to more than 1e-4.
    """
    norms = {name: layer for name, layer in stream.clip.named_modules() if isinstance(layer, _NormBase)}
    assert norms
    for name, norm in norms.items():
        norm.train().momentum = 1.0
        block, _, own = name.rpartition(".")
        if block.startswith("layer") and own == ("bn3" if f"{block}.bn3" in norms else "bn2"):
            nn.init.constant_(norm.weight, 0.25)
    with torch.no_grad():
        stream.clip(clip)
    stream.clip.eval()


def three_forms_agree(stream: dissect.Stream, size: int, folder: Path, batch: int = 1) -> None:
    """Clip form, step form and ONNX Runtime over 100 frames."""
    clip = random_clip((batch, 3, FRAMES, size, size))
    calibrated(stream, clip[:, :, :8])
    run = dissect.Runner(dissect.export(stream, folder / "net.onnx"), batch=batch)
    caches = stream.caches(batch)
    with torch.no_grad():
        whole = stream.clip(clip)
        assert whole.std(2).min() > 1e-4 * whole.abs().max(), "an output that does not move proves nothing"
        for time, frame in enumerate(clip.unbind(2)):
            out, *caches = stream.step(frame, *caches)
            close(out, whole[:, :, time], 1e-4, f"step form, frame {time}")
            close(torch.from_numpy(run.step(frame.numpy())), whole[:, :, time], 1e-4, f"ONNX Runtime, frame {time}")


def narrow(depth: int, head: str, **settings: Any) -> dissect.Stream:
    kind = head.partition(",")[0]
    hidden = {"hidden": 24} if kind in ("fc", "lstm", "gru") else {}
    return zoo.d_resnet(depth, kind, 7, width=4, size=32, seed=0, **hidden, **EVERY[head], **settings)


QUICK = [
    *((18, head) for head in ("fc, 3 layers", "lstm", "gru, 3 layers", "average", "plain", "embedding")),
    (50, "lstm"),
]
REST = [(depth, head) for depth in (18, 34, 50, 101) for head in EVERY if (depth, head) not in QUICK]


@pytest.mark.parametrize(("depth", "head"), [*QUICK, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in REST)])
def test_narrow_networks_are_one_in_all_forms(depth: int, head: str, tmp_path: Path) -> None:
    three_forms_agree(narrow(depth, head), 32, tmp_path, batch=2)


@pytest.mark.parametrize("options", [{"skip": "sum"}, {"skip": "none", "stem": 1}, {"fill": "replicate"}], ids=str)
def test_so_are_those_with_other_options(options: dict[str, Any], tmp_path: Path) -> None:
    three_forms_agree(narrow(18, "gru", **options), 32, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("head", EVERY)
@pytest.mark.parametrize("depth", [18, 50, 101])
def test_full_networks_are_one_in_all_forms(depth: int, head: str, tmp_path: Path) -> None:
    three_forms_agree(zoo.d_resnet(depth, head.partition(",")[0], seed=0, **EVERY[head]), 112, tmp_path)


@pytest.mark.parametrize("depth", [18, 50])
def test_the_shape_is_that_of_table_1(depth: int) -> None:
    """Stem of 3 frames, one depth-2 convolution a block (the first, or the middle one), no temporal stride, one neck."""
    stream = zoo.d_resnet(depth, seed=0)
    layers = {name: layer for name, layer in stream.clip.named_modules() if isinstance(layer, FrameConv)}
    taps = {name: len(layer.ages) if isinstance(layer, TemporalConv) else 1 for name, layer in layers.items()}
    middle = "conv1" if depth == 18 else "conv2"
    assert taps["conv1"] == 3
    blocks = {name: count for name, count in taps.items() if name.startswith("layer")}
    assert {count for name, count in blocks.items() if name.endswith(middle)} == {2}
    assert {count for name, count in blocks.items() if not name.endswith(middle)} == {1}
    assert sum(count == 2 for count in blocks.values()) == (8 if depth == 18 else 16)
    assert ("neck" in taps) == ("layer2.0.downsample.0" in taps) == (depth == 50)
    assert stream.timing.stride == 1
    assert stream.timing.delay == 0
    assert stream.clip.get_submodule("head.layers.0").weight.shape == (600, 16 * 512)  # type: ignore[union-attr]


def test_an_untrained_still_scene_keeps_the_conventional_answer() -> None:
    network = zoo.headed_resnet(18, head="fc", num_classes=5, width=4, seed=0).double().eval()
    still = torch.randn(1, 3, 1, 32, 32, dtype=torch.float64).expand(-1, -1, 64, -1, -1)
    stream = dissect.convert(network, still[:, :, :16])
    report = dissect.verify(stream, network, runtime=False).check()
    row = next(row for row in report.rows if row.pair == "original = d3d")
    assert row.error is not None
    assert row.error < 1e-9
    again = zoo.d_resnet(18, "fc", 5, width=4, size=32, seed=0)
    close(again.clip.double()(still), stream.clip(still), 1e-6)


def test_heads_come_by_name_as_modules_or_not_at_all() -> None:
    class Newest(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, -1, :2]

    clip = torch.rand(1, 3, 20, 32, 32)
    vectors = zoo.d_resnet(18, None, width=4, size=32, seed=0).clip(clip)
    assert vectors.shape == (1, 32, 20)
    close(zoo.d_resnet(18, Newest(), width=4, size=32, seed=0).clip(clip), vectors[:, :2])
    assert isinstance(zoo.headed_resnet(18, head="gru", width=4).head, heads.GRU)
    with pytest.raises(PlanError, match=r"3D-ResNet-20.*18, 34, 50, 101"):
        zoo.d_resnet(20)
    with pytest.raises(PlanError, match="'rnn' is unknown"):
        zoo.d_resnet(18, "rnn", width=4)
    with pytest.raises(PlanError, match="layers: settings of a head by name"):
        zoo.d_resnet(18, Newest(), width=4, layers=2)
