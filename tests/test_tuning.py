"""Tuning: the step of before, its caches in slots, its channels widened, its sums where a runtime fuses them."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import onnx
import onnx_ir
import pytest
import torch
import torch.nn.functional as F
from laws import close
from onnx import ModelProto
from random_networks import scrambled
from torch import Tensor, nn

import dissect
from dissect import zoo
from dissect.errors import ExportError
from dissect.exporting import to_model
from dissect.forms import fresh
from dissect.lowering import LoweredConv, lower
from dissect.primitives import History
from dissect.slots import Joined, JoinedHistory, SlotHistory, Slots
from dissect.squeezing import squeeze
from dissect.tuning import Tuned, tune

PRESETS = ["d3d", "causal", "exact"]


class Excited(nn.Module):
    """Squeeze-and-excitation over space and time, as X3D has it; one instance reads a vector and a volume."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.norm, self.up = nn.Conv3d(channels, 3, 1), nn.BatchNorm3d(3), nn.Conv3d(3, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.up(F.relu(self.norm(self.down(F.adaptive_avg_pool3d(x, 1)))))
        return x * torch.sigmoid(gate)


class Inverted(nn.Module):
    """A residual block around a depthwise convolution of 10 channels, which no blocked layout takes as they are."""

    def __init__(self, channels: int, middle: int) -> None:
        super().__init__()
        self.a, self.na = nn.Conv3d(channels, middle, 1, bias=False), nn.BatchNorm3d(middle)
        self.b = nn.Conv3d(middle, middle, 3, padding=1, groups=middle, bias=False)
        self.nb, self.se = nn.BatchNorm3d(middle), Excited(middle)
        self.c, self.nc = nn.Conv3d(middle, channels, 1, bias=False), nn.BatchNorm3d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.se(self.nb(self.b(F.relu(self.na(self.a(x)))))))
        return F.relu(x + self.nc(self.c(y)))


class Mobile(nn.Module):
    """Inverted blocks between a stem of seven taps over pictures and a linear layer."""

    def __init__(self, channels: int = 4, middle: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, channels, (7, 3, 3), (1, 2, 2), (3, 1, 1), bias=False)
        self.norm = nn.BatchNorm3d(channels)
        self.blocks = nn.Sequential(Inverted(channels, middle), Inverted(channels, middle))
        self.fc = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3, 4)))


class Strided(nn.Module):
    """Temporal strides, so that histories are long and their readers skip frames; grouped convolutions; a C3D-like end."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(3, 8, 3, (2, 1, 1), 1)
        self.second = nn.Conv3d(8, 8, 3, (2, 2, 2), 1, groups=2)
        self.third = nn.Conv3d(8, 16, 3, 1, 1)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool3d(F.relu(self.second(F.relu(self.first(x)))), 3, 1, 1)
        return self.fc(F.relu(self.third(x)).mean((2, 3, 4)))


def resnet(width: int, shortcut: Any = "A") -> nn.Module:
    """A 3D-ResNet of one block a stage."""
    return zoo.ResNet(zoo.BasicBlock, (1, 1, 1, 1), num_classes=4, width=width, shortcut=shortcut)


NETWORKS = {
    "resnet": lambda: resnet(16),
    "shortcut b": lambda: resnet(4, "B"),
    "mobile": Mobile,
    "strided": Strided,
}


@cache
def stream_of(name: str, preset: str) -> dissect.Stream:
    torch.manual_seed(0)
    clip = torch.randn(1, 3, 16, *[64 if name == "resnet" else 16] * 2, dtype=torch.float64)
    return dissect.convert(scrambled(NETWORKS[name](), 1), clip, preset=preset)


def tuned_of(stream: dissect.Stream, dtype: torch.dtype = torch.float64, **options: Any) -> Tuned:
    """The stream's step lowered, squeezed and tuned, for frames of ``dtype``."""
    step = lower(stream, dtype)
    frames = [leaf.to(dtype) for leaf in stream.frame(stream.example, 0)]
    squeeze(step, [*frames, *fresh(stream.cache_list, 1, dtype)])
    return tune(step, stream.cache_list, frames, **options)


@cache
def exported(name: str, preset: str, live: bool = False) -> ModelProto:
    model = onnx_ir.serde.serialize_model(to_model(stream_of(name, preset), live=live))
    return onnx.shape_inference.infer_shapes(model)


def kinds(model: ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots for frames as small as those of the tests."""
    monkeypatch.setattr("dissect.slots.WORTH", 32)


each = pytest.mark.parametrize("name", NETWORKS)
presets = pytest.mark.parametrize("preset", PRESETS)


@each
@presets
@pytest.mark.parametrize("worth", [0, 1 << 30], ids=["slots", "joined"])
def test_a_tuned_step_is_the_step(name: str, preset: str, worth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dissect.slots.WORTH", worth)
    stream = stream_of(name, preset)
    tuned = tuned_of(stream)
    torch.manual_seed(2)
    x = torch.randn(2, 3, 24, *stream.example[0].shape[3:], dtype=torch.float64)
    ours: Any = stream.caches(2)
    theirs: Any = fresh(tuned.caches, 2, torch.float64)
    with torch.no_grad():
        for time in range(24):
            if time == 20:  # the flush begins
                for held, roles in ((ours, stream.cache_list), (theirs, tuned.caches)):
                    ages = {cache.spec.role: at for at, cache in enumerate(roles)}
                    if "length" in ages:
                        held[ages["length"]] = held[ages["age"]]
            out, *ours = stream.step(x[:, :, time], *ours)
            got, *theirs = tuned.module(x[:, :, time], *theirs)
            close(got, out, 1e-9, f"frame {time}")
    assert [tuple(value.shape[1:]) for value in theirs] == [cache.spec.shape for cache in tuned.caches]


@presets
def test_a_row_is_reset_by_zeros(preset: str) -> None:
    """Zeros in every cache are a fresh stream, in whatever form the caches are."""
    tuned = tuned_of(stream_of("mobile", preset))
    torch.manual_seed(3)
    x = torch.randn(2, 3, 9, 16, 16, dtype=torch.float64)
    held: Any = fresh(tuned.caches, 2, torch.float64)
    alone: Any = fresh(tuned.caches, 1, torch.float64)
    with torch.no_grad():
        for time in range(9):
            if time == 4:
                held = [torch.stack([row[0], torch.zeros_like(row[1])]) for row in held]
            got, *held = tuned.module(x[:, :, time], *held)
            if time >= 4:
                wanted, *alone = tuned.module(x[1:, :, time], *alone)
                close(got[1:], wanted)


def test_caches_are_slots_of_one_frame_in_the_order_of_their_numbers() -> None:
    contract = {cache.name: cache.spec for cache in tuned_of(stream_of("strided", "exact"), torch.float32).caches}
    assert list(contract) == sorted(contract)
    tuned = [name.split(".", 1)[1] for name in contract]
    stacked = [cache.path for cache in stream_of("strided", "exact").cache_list]
    assert list(dict.fromkeys(tuned)) == list(dict.fromkeys(stacked))


def test_long_histories_of_short_frames_stay_in_one_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = stream_of("resnet", "exact")
    monkeypatch.setattr("dissect.slots.WORTH", 64 * 4 * 4)
    layers = list(tuned_of(stream).module.modules())
    assert any(isinstance(layer, SlotHistory) for layer in layers)
    assert any(isinstance(layer, JoinedHistory) for layer in layers)
    assert not any(type(layer) is History and layer.depth > 0 for layer in layers)


@pytest.mark.parametrize("ages", [(3, 2, 1, 0), (3,), (0,), (2, 0), (3, 1), (2, 1), (1, 0)], ids=str)
def test_slots_and_joined_histories_tell_what_a_history_tells(ages: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    values = [torch.randn(2, 3, 4) for _ in range(4)]
    wanted = torch.cat([values[3 - age] for age in ages], 1)
    for known in (Slots(values), Joined(torch.cat(values, 1), torch.cat(values[:-1], 1), values[-1])):
        assert torch.equal(known.stacked(ages), wanted)
        assert torch.equal(torch.cat([known.tap(age) for age in ages], 1), wanted)


def test_a_cache_of_one_frame_is_the_value_itself() -> None:
    """No operator copies what the next step reads: the new cache is what the layer before it made."""
    graph = exported("resnet", "d3d").graph
    makers = {output: node for node in graph.node for output in node.output}
    caches = [value.name for value in graph.output if "layer" in value.name]
    assert len(caches) == 4
    assert {makers[name].op_type for name in caches} <= {"Relu", "MaxPool"}
    assert not {"Slice", "Split", "Gather", "Where", "Expand"} & {
        node.op_type for node in graph.node if any("layer" in name for name in (*node.input, *node.output))
    }


def test_slots_are_passed_on_by_one_copy_each() -> None:
    graph = exported("strided", "exact").graph
    makers = {output: node for node in graph.node for output in node.output}
    given = {value.name for value in graph.input}
    copies = [name for name in (value.name for value in graph.output) if makers[name].op_type == "Identity"]
    slots = [name for name in copies if makers[name].input[0] in given and not name.endswith(("length", "first"))]
    assert len(slots) > 8
    for name in slots:
        number = int(name.removeprefix("new_cache_").split(".")[0])
        assert int(makers[name].input[0].removeprefix("cache_").split(".")[0]) == number + 1


def test_channels_are_widened_to_what_the_blocked_layout_takes() -> None:
    stream = stream_of("mobile", "exact")
    convolutions = [layer for layer in tuned_of(stream).module.modules() if isinstance(layer, LoweredConv)]
    assert not any(layer.conv.groups % 4 for layer in convolutions if layer.conv.groups > 1)
    widths = [cache.spec.shape[0] for cache in tuned_of(stream).caches if cache.path.endswith(".b")]
    assert set(widths) == {12}
    weights = {weight.name: weight for weight in exported("mobile", "exact").graph.initializer}
    for node in exported("mobile", "exact").graph.node:
        if node.op_type == "Conv" and weights[node.input[1]].dims[1] == 1:
            assert weights[node.input[1]].dims[0] % 4 == 0


def test_channels_that_meet_an_output_are_not_widened() -> None:
    net = nn.Sequential(nn.Conv3d(3, 10, 1), nn.Conv3d(10, 10, 3, padding=1, groups=10))
    stream = dissect.convert(scrambled(net, 1), torch.randn(1, 3, 8, 6, 6, dtype=torch.float64), preset="causal")
    tuned = tuned_of(stream)
    out, *_ = tuned.module(torch.randn(1, 3, 6, 6, dtype=torch.float64), *fresh(tuned.caches, 1, torch.float64))
    assert out.shape[1] == 10
    assert {cache.spec.shape[0] for cache in tuned.caches} == {10}


def test_one_split_tells_every_gate_what_the_clock_says() -> None:
    found = kinds(exported("mobile", "exact"))
    assert found["Gather"] + found["Split"] <= 6
    assert found["Unsqueeze"] <= 2
    assert found["Div"] == 0


def test_squeeze_and_excitation_is_two_matrix_products() -> None:
    graph = exported("mobile", "exact").graph
    found = kinds(exported("mobile", "exact"))
    assert found["Gemm"] == 2 * 2 + 1
    shapes = {
        value.name: value.type.tensor_type.shape.dim for value in (*graph.input, *graph.output, *graph.value_info)
    }
    for node in graph.node:
        if node.op_type == "Conv":
            assert shapes[node.output[0]][2].dim_value > 1


def test_a_stem_of_pictures_is_convolved_in_pieces_below_a_block() -> None:
    tuned = tuned_of(stream_of("mobile", "exact"))
    stem = tuned.module.get_submodule("stem")
    assert isinstance(stem, LoweredConv)
    assert stem.pieces == [(6, 5), (4, 3), (2, 1), (0,)]
    assert [kernel.shape[1] for kernel in stem.kernels] == [6, 6, 6, 3]


def test_sums_are_written_so_that_the_older_part_takes_them() -> None:
    """ONNX Runtime fuses a sum into the convolution in front; the newest frame's comes first of all."""
    graph = exported("resnet", "causal").graph
    makers = {output: node for node in graph.node for output in node.output}
    sums = [node for node in graph.node if node.op_type == "Add" and makers[node.input[0]].op_type == "Conv"]
    fresh_sums = [node for node in sums if makers[node.input[0]].input[0] in {value.name for value in graph.input}]
    assert len(fresh_sums) >= 2 * 8


def test_a_skip_connection_that_waits_in_a_cache_is_added_by_a_convolution() -> None:
    graph = exported("resnet", "exact").graph
    makers = {output: node for node in graph.node for output in node.output}
    given = {value.name for value in graph.input}
    relus = [makers[node.input[0]] for node in graph.node if node.op_type == "Relu" and node.input[0] in makers]
    skips = [node for node in relus if node.op_type == "Add"]
    first = [makers[node.input[0]] for node in skips if node.input[0] in makers]
    assert [node.op_type for node in first].count("Conv") == len(first)
    assert sum(node.input[0] in given for node in first) >= 1


def test_a_shortcut_without_weights_leaves_the_layout_alone() -> None:
    found = kinds(exported("resnet", "d3d"))
    assert found["Pad"] == 0
    assert found["Concat"] >= 3


@presets
def test_a_live_step_has_no_clock_and_is_the_step_once_it_is_warm(preset: str) -> None:
    stream = stream_of("resnet", preset)
    tuned = tuned_of(stream, live=True)
    assert {cache.spec.role for cache in tuned.caches} == {"cache"}
    frames = stream.timing.warmup + 4
    torch.manual_seed(4)
    x = torch.randn(1, 3, frames, 64, 64, dtype=torch.float64)
    ours: Any = stream.caches(1)
    theirs: Any = fresh(tuned.caches, 1, torch.float64)
    with torch.no_grad():
        for time in range(frames):
            out, *ours = stream.step(x[:, :, time], *ours)
            got, *theirs = tuned.module(x[:, :, time], *theirs)
            if time >= stream.timing.warmup:
                close(got, out, 1e-9, f"frame {time}")


def test_what_never_forgets_cannot_be_exported_live() -> None:
    net = nn.Sequential(nn.Conv3d(3, 2, 3, padding=1), nn.AdaptiveAvgPool3d(1))
    stream = dissect.convert(net.eval(), torch.randn(1, 3, 8, 6, 6), preset="exact", pool="cumulative")
    with pytest.raises(ExportError, match="never forgets"):
        to_model(stream, live=True)


def test_the_stream_is_not_changed_by_tuning_its_step() -> None:
    stream = stream_of("mobile", "exact")
    before = {key: value.clone() for key, value in stream.step.state_dict().items()}
    shapes = [cache.spec.shape for cache in stream.cache_list]
    tuned_of(stream)
    assert [cache.spec.shape for cache in stream.cache_list] == shapes
    assert stream.step.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in stream.step.state_dict().items())
