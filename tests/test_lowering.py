"""Lowering: the same step, without a third dimension, without batch norms, with nothing in the way of fusion."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from laws import close
from onnx import ModelProto, NodeProto
from random_networks import scrambled
from torch import Tensor, nn

import dissect
from dissect import zoo
from dissect.exporting import to_model
from dissect.lowering import LoweredConv, lower

PRESETS = ["d3d", "causal", "exact"]


class Separable(nn.Module):
    """Depthwise over time and space, squeeze-excitation, a functional head: as X3D does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 8, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1), bias=False)
        self.time = nn.Conv3d(8, 8, (5, 1, 1), padding=(2, 0, 0), groups=8, bias=False)
        self.norm = nn.BatchNorm3d(8)
        self.deep = nn.Conv3d(8, 8, 3, padding=1, groups=8)
        self.after = nn.BatchNorm3d(8)
        self.down, self.up = nn.Conv3d(8, 4, 1), nn.Conv3d(4, 8, 1)
        self.middle = nn.BatchNorm3d(4)
        self.mixed = nn.Conv3d(8, 8, 3, padding=1, groups=2)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.time(self.stem(x))))
        y = self.after(self.deep(x))
        y = y * torch.sigmoid(self.up(F.relu(self.down(y.mean((3, 4), keepdim=True)))))
        gate = F.adaptive_avg_pool3d(y, 1)
        y = y * torch.cat([self.up(F.relu(self.middle(self.down(gate)))), gate], 1)[:, :8].sigmoid()
        x = F.relu(x + y)
        return self.fc(F.relu(self.mixed(x)).mean((2, 3, 4)))


class Loose(nn.Module):
    """Batch norms where there is no convolution to fold them into, or one that others read too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.conv, self.after = (
            nn.BatchNorm3d(3),
            nn.BatchNorm3d(4),
            nn.Conv3d(3, 4, 3, padding=1),
            nn.BatchNorm3d(4),
        )
        self.tokens, self.channels = nn.Linear(4, 4), nn.BatchNorm2d(4)
        self.fc, self.scores = nn.Linear(4, 3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.first(x))
        x = self.norm(x) + x + self.after(F.relu(x))
        x = F.adaptive_avg_pool3d(x, (x.shape[2], 2, 2)) + F.adaptive_max_pool3d(x[..., :5, :5], (x.shape[2], 2, 2))
        x = x.flatten(3)
        x = self.channels(self.tokens(x))
        return self.scores(self.fc(x.mean((2, 3))))


NETWORKS = {
    "resnet": lambda: zoo.resnet18(num_classes=4, width=4, seed=0),
    "c3d": lambda: zoo.c3d(num_classes=4, width=2, hidden=6, average=True, seed=0),
    "separable": Separable,
    "loose norms": Loose,
}


@cache
def stream_of(name: str, preset: str) -> dissect.Stream:
    torch.manual_seed(0)
    size = 32 if name == "c3d" else 16
    return dissect.convert(
        scrambled(NETWORKS[name](), 1), torch.randn(1, 3, 16, size, size, dtype=torch.float64), preset=preset
    )


@cache
def exported(name: str, preset: str) -> ModelProto:
    import onnx_ir as ir

    return onnx.shape_inference.infer_shapes(ir.serde.serialize_model(to_model(stream_of(name, preset))))


each = pytest.mark.parametrize("name", NETWORKS)
presets = pytest.mark.parametrize("preset", PRESETS)


@each
@presets
def test_a_lowered_step_is_the_step(name: str, preset: str) -> None:
    stream = stream_of(name, preset)
    lowered = lower(stream, torch.float64)
    torch.manual_seed(2)
    x = torch.randn(2, *stream.example[0].shape[1:], dtype=torch.float64)
    ours: Any = stream.caches(2)
    theirs: Any = ours
    with torch.no_grad():
        for time in range(8):
            out, *ours = stream.step(x[:, :, time], *ours)
            got, *theirs = lowered(x[:, :, time], *theirs)
            close(got, out)
            close(tuple(theirs), tuple(ours))
    assert not [module for module in lowered.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    assert [
        module for module in stream.step.modules() if isinstance(module, nn.modules.batchnorm._NormBase)
    ] or name == "c3d"


def ranks(model: ModelProto) -> Iterator[tuple[str, int]]:
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        yield value.name, len(value.type.tensor_type.shape.dim)
    for weight in graph.initializer:
        yield weight.name, len(weight.dims)


@each
@presets
def test_no_third_dimension_and_no_batch_norm(name: str, preset: str) -> None:
    model = exported(name, preset)
    assert {where: rank for where, rank in ranks(model) if rank > 4} == {}
    named = {value.name for value in (*model.graph.value_info, *model.graph.output)}
    assert all(out in named for node in model.graph.node for out in node.output if out), "a tensor of unknown rank"
    kinds = Counter(node.op_type for node in model.graph.node)
    assert not {"BatchNormalization", "Loop", "If", "Scan"} & set(kinds)
    weights = {weight.name: weight for weight in model.graph.initializer}
    assert all(len(weights[node.input[1]].dims) == 4 for node in model.graph.node if node.op_type == "Conv")
    assert not model.functions


FUSED = ("Relu", "Add", "Sum", "Sigmoid", "Clip", "Mul")
SHAPING = ("Reshape", "Squeeze", "Unsqueeze", "Transpose", "Flatten")


@each
@presets
def test_nothing_stands_between_a_convolution_and_what_follows(name: str, preset: str) -> None:
    graph = exported(name, preset).graph
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for value in node.input:
            readers.setdefault(value, []).append(node)
    for node in graph.node:
        if node.op_type == "Conv":
            assert not [reader.op_type for reader in readers.get(node.output[0], []) if reader.op_type in SHAPING], (
                node.name
            )


def test_a_depthwise_temporal_convolution_is_one_convolution_a_tap() -> None:
    graph = exported("separable", "exact").graph
    groups = [
        {entry.name: entry.i for entry in node.attribute}.get("group", 1)
        for node in graph.node
        if node.op_type == "Conv"
    ]
    assert groups.count(8) == 5 + 3
    assert groups.count(2) == 3
    graph = exported("separable", "d3d").graph
    groups = [
        {entry.name: entry.i for entry in node.attribute}.get("group", 1)
        for node in graph.node
        if node.op_type == "Conv"
    ]
    assert groups.count(8) < 8


def test_a_dense_temporal_convolution_is_one_convolution() -> None:
    """Over the stacked channels of its taps; :mod:`dissect.tuning` takes it apart again where a sum costs nothing."""
    layers = [layer for layer in lower(stream_of("resnet", "exact")).modules() if isinstance(layer, LoweredConv)]
    assert len(layers) == 17
    assert all(len(layer.kernels) == 1 for layer in layers)


def test_the_stream_is_not_changed_by_lowering_it() -> None:
    stream = stream_of("separable", "exact")
    before = {key: value.clone() for key, value in stream.step.state_dict().items()}
    code = stream.step.code
    lower(stream)
    assert stream.step.code == code
    assert stream.step.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in stream.step.state_dict().items())


class Housed(nn.Module):
    """Modules by the names that dissect uses itself; convolutions with a module inside, one of them called `conv`."""

    class Gated(nn.Conv3d):
        def __init__(self, inside: str) -> None:
            super().__init__(4, 4, 3, padding=1)
            self.inside = inside
            self.add_module(inside, nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0)))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.sigmoid(self.get_submodule(self.inside)(x))

    def __init__(self) -> None:
        super().__init__()
        self.temporal = nn.Conv3d(3, 4, (3, 1, 1), padding=(1, 0, 0))
        self.temporal_1 = nn.ModuleDict({"clock": nn.Conv3d(4, 4, 3, padding=1), "output_0": nn.BatchNorm3d(4)})
        self.a, self.b = self.Gated("gate"), self.Gated("conv")

    def forward(self, x: Tensor) -> Tensor:
        x = self.temporal_1["output_0"](self.temporal_1["clock"](self.temporal(x)))
        return self.b(F.relu(self.a(F.relu(x)))).mean((3, 4))


@pytest.mark.parametrize("preset", PRESETS)
def test_names_of_the_network_meet_none_of_ours(preset: str) -> None:
    model = scrambled(Housed(), 0)
    stream = dissect.convert(model, torch.rand(1, 3, 8, 4, 4, dtype=torch.float64), preset=preset)
    dissect.verify(stream, model).check()
    assert set(stream.clip.state_dict()) == set(model.state_dict())
