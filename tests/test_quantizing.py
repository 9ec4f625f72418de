"""Quantising: near the float model, caches a quarter, zero a zero; half precision beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from random_networks import scrambled
from torch import Tensor, nn

import dissect
from dissect.errors import ExportError, StreamError
from dissect.restacking import restack

CLIPS = np.random.default_rng(0).standard_normal((2, 3, 14, 12, 12)).astype(np.float32)


class Net(nn.Module):
    """A stem, a residual block with a depthwise convolution and a stride in time, scores."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 16, (3, 3, 3), padding=1)
        self.first = nn.Conv3d(16, 16, 3, padding=1)
        self.deep = nn.Conv3d(16, 16, 3, padding=1, groups=16)
        self.last = nn.Conv3d(16, 8, (3, 1, 1), (2, 1, 1), (1, 0, 0))
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.deep(torch.relu(self.first(x))))
        return self.fc(self.last(x).mean((2, 3, 4)))


class Remembering(nn.Module):
    """A mean over all frames so far after a convolution: a cache that is computed from itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv3d(3, 8, 3, padding=1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(x)).mean((2, 3, 4)))


def stream_of(network: nn.Module, **options: Any) -> dissect.Stream:
    return dissect.convert(scrambled(network, 0).float(), torch.from_numpy(CLIPS[:1]), **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("steps")


@pytest.fixture(scope="module")
def stream() -> dissect.Stream:
    return stream_of(Net(), preset="exact")


@pytest.fixture(scope="module", params=["every", "native"])
def step(request: pytest.FixtureRequest, stream: dissect.Stream, folder: Path) -> Path:
    return stream.export(folder / f"{request.param}.onnx", cadence=request.param)


@pytest.fixture(scope="module")
def quantized(step: Path) -> tuple[Path, Any]:
    target = step.with_suffix(".int8.onnx")
    return target, dissect.quantize(step, target, [CLIPS])


@pytest.fixture(scope="module")
def every(stream: dissect.Stream, folder: Path) -> Path:
    path = folder / "every.onnx"
    return path if path.exists() else stream.export(path)


def streamed(path: Path, clip: NDArray[np.float32]) -> list[NDArray[Any]]:
    """All outputs of a stream and its flush."""
    run = dissect.Runner(path, batch=len(clip), providers="cpu")
    given = [run.step(clip[:, :, time]) for time in range(clip.shape[2])]
    outputs = [np.array(out) for out in given if out is not None]
    return outputs + [np.array(out) for out in run.flush()]


def test_it_is_near_the_float_model_to_the_last_frame_of_the_flush(step: Path, quantized: tuple[Path, Any]) -> None:
    clip = np.random.default_rng(1).standard_normal((3, *CLIPS.shape[1:])).astype(np.float32)
    wanted, got = streamed(step, clip), streamed(quantized[0], clip)
    assert len(got) == len(wanted) > 3
    for ours, theirs in zip(got, wanted, strict=True):
        assert 0 < np.abs(ours - theirs).max() < 0.1 * np.abs(np.stack(wanted)).max()


def test_the_agreement_is_what_the_runner_sees(step: Path, quantized: tuple[Path, Any]) -> None:
    target, agreement = quantized
    pairs = [
        (ours, theirs)
        for row in range(2)
        for ours, theirs in zip(streamed(target, CLIPS[[row]]), streamed(step, CLIPS[[row]]), strict=True)
    ]
    missed = sum(float(((ours - theirs) ** 2).sum()) for ours, theirs in pairs)
    whole = sum(float((theirs**2).sum()) for _, theirs in pairs)
    assert agreement.error == pytest.approx((missed / whole) ** 0.5, rel=1e-3)
    assert agreement.steps == len(pairs)
    assert agreement.top1 == np.mean([ours.argmax() == theirs.argmax() for ours, theirs in pairs])


def test_caches_take_a_quarter_of_the_bytes(step: Path, quantized: tuple[Path, Any]) -> None:
    target, agreement = quantized
    before, after = dissect.Runner(step, providers="cpu"), dissect.Runner(target, providers="cpu")
    ages = sum(8 for cache in before.caches if cache.role != "cache")
    assert (before.cache_bytes - ages) == 4 * (after.cache_bytes - ages) > 0
    assert (agreement.before, agreement.after) == (before.cache_bytes, after.cache_bytes)
    assert {cache.dtype for cache in after.caches if cache.role == "cache"} <= {"uint8", "int8"}


def test_a_zero_is_a_zero_in_every_cache(quantized: tuple[Path, Any]) -> None:
    caches = [cache for cache in dissect.Runner(quantized[0], providers="cpu").caches if cache.role == "cache"]
    assert all(cache.zero_point == 0 and cache.scale is not None and cache.scale > 0 for cache in caches)
    scales: dict[str, set[Any]] = {}
    for cache in caches:
        scales.setdefault(cache.path, set()).add((cache.dtype, cache.scale))
    assert all(len(found) == 1 for found in scales.values()), "slots of one history share a scale"


def test_no_cache_is_turned_into_floats_on_its_way(quantized: tuple[Path, Any]) -> None:
    """A slot that moves on is copied as the bytes that it is."""
    graph = onnx.load(quantized[0]).graph
    makers = {output: node for node in graph.node for output in node.output}
    given = {value.name for value in graph.input}
    copies = [makers[value.name] for value in graph.output if makers[value.name].op_type == "Identity"]
    assert any(node.input[0] in given for node in copies)
    assert not any(
        node.op_type == "QuantizeLinear" and makers.get(node.input[0], node).op_type == "DequantizeLinear"
        and makers[node.input[0]].input[0] in given
        for node in graph.node
    )  # fmt: skip


def test_sums_that_float_kernels_fuse_become_one_convolution(every: Path) -> None:
    """The law of restacking, and that it did something."""
    before = ir.load(every)
    after = ir.load(every)
    restack(after)
    count = [sum(node.op_type == "Conv" for node in model.graph) for model in (before, after)]
    assert count[1] < count[0]
    feeds = {
        value.name: np.random.default_rng(2).standard_normal((2, *[int(size) for size in value.shape[1:]]))
        for value in before.graph.inputs
        if value.shape is not None
    }
    kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    results = []
    for model in (before, after):
        content = ir.serde.serialize_model(model).SerializeToString()
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        given = {entry.name: feeds[entry.name].astype(kinds[entry.type]) for entry in session.get_inputs()}
        results.append(session.run(None, given))
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * max(1.0, float(np.abs(theirs).max())))


def test_layers_that_are_asked_for_stay_float(every: Path, folder: Path) -> None:
    whole = dissect.quantize(every, folder / "whole.onnx", [CLIPS], frames=4)
    less = dissect.quantize(every, folder / "less.onnx", [CLIPS], frames=4, keep=["deep", "stem"])
    assert less.layers < whole.layers < whole.weighted


def test_what_is_computed_from_itself_stays_float(folder: Path) -> None:
    stream = stream_of(Remembering(), preset="causal", pool="cumulative")
    path = stream.export(folder / "remembering.onnx")
    dissect.quantize(path, folder / "remembering.int8.onnx", [CLIPS])
    caches = dissect.Runner(folder / "remembering.int8.onnx", providers="cpu").caches
    kinds = {cache.path: cache.dtype for cache in caches if cache.role == "cache"}
    assert "float32" in kinds.values()
    assert {"uint8", "int8"} & set(kinds.values())


def frames() -> Iterator[NDArray[np.float32]]:
    yield from np.moveaxis(CLIPS[0], 1, 0)


def test_streams_are_arrays_files_and_frames(every: Path, folder: Path) -> None:
    np.save(folder / "clips.npy", CLIPS[:1])
    found = [
        dissect.quantize(every, folder / "same.onnx", [source], frames=14)
        for source in (CLIPS[:1], CLIPS[0], folder / "clips.npy", str(folder / "clips.npy"), frames())
    ]
    assert len(set(found)) == 1


@pytest.mark.parametrize(
    ("streams", "keep", "message"),
    [
        ([], (), "nothing to calibrate with"),
        ([CLIPS[:, :, :, :6]], (), r"a clip for frame is \(N, 3, T, 12, 12\)"),
        ([iter(())], (), "no frames"),
        ([CLIPS], ("layer9.*",), "fits no layer"),
    ],
    ids=["no streams", "a wrong size", "an empty stream", "an unknown layer"],
)
def test_what_cannot_be_quantised_says_why(
    streams: list[Any], keep: tuple[str, ...], message: str, every: Path, tmp_path: Path
) -> None:
    with pytest.raises(StreamError, match=message):
        dissect.quantize(every, tmp_path / "none.onnx", streams, keep=keep)
    assert not list(tmp_path.iterdir())


def test_a_quantised_model_is_not_quantised_again(quantized: tuple[Path, Any], tmp_path: Path) -> None:
    with pytest.raises(StreamError, match="no float32"):
        dissect.quantize(quantized[0], tmp_path / "twice.onnx", [CLIPS])


def test_half_precision_keeps_frames_and_outputs_in_full(stream: dissect.Stream, every: Path, folder: Path) -> None:
    path = stream.export(folder / "half.onnx", dtype="float16")
    run = dissect.Runner(path, providers="cpu")
    assert {cache.dtype for cache in run.caches if cache.role == "cache"} == {"float16"}
    graph = onnx.load(path).graph
    weights = {weight.name: weight.data_type for weight in graph.initializer if weight.name.startswith("step.")}
    assert set(weights.values()) == {onnx.TensorProto.FLOAT16}
    wanted, got = streamed(every, CLIPS), streamed(path, CLIPS)
    assert all(out.dtype == np.float32 for out in got)
    assert len(got) == len(wanted)
    for ours, theirs in zip(got, wanted, strict=True):
        assert 0 < np.abs(ours - theirs).max() < 1e-2 * np.abs(np.stack(wanted)).max()


def test_types_that_there_are_not(stream: dissect.Stream, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="float32, float16 or int8"):
        stream.export(tmp_path / "net.onnx", dtype="bfloat16")
    with pytest.raises(ExportError, match="the phases need it"):
        stream.export(tmp_path / "net.onnx", cadence="native", live=True)
    assert not list(tmp_path.iterdir())
