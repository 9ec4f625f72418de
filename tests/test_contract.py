"""The metadata of a step model: written, read back, and refused where they are damaged."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dissect.contract import CacheSpec, Contract, InputSpec, OutputSpec, leaves_of, pack
from dissect.errors import StreamError

FULL = Contract(
    inputs=(InputSpec("frame_0", ("batch", 3, 112, 112)), InputSpec("frame_1", ("batch", 3, 56, 56), "uint8", 4)),
    outputs=(OutputSpec("logits", 8, 54, ((-1, 2), (0, 4))), OutputSpec("features", 1, 3, ((-1, 1),))),
    caches=(
        CacheSpec(
            "cache_000.layer1.0.conv1", "new_cache_000.layer1.0.conv1", ("batch", 64, 56, 56), path="layer1.0.conv1"
        ),
        CacheSpec("cache_001.age", "new_cache_001.age", ("batch",), "int64", "age", "age"),
        CacheSpec("cache_002.length", "new_cache_002.length", ("batch",), "int64", "length", "length"),
    ),
    structure={"logits": 0, "aux": [1]},
    preset="exact",
    delay=54,
    receptive_field=109,
    warmup=108,
    stride=8,
    preprocess={"size": [112, 112], "mean": [0.43, 0.39, 0.37], "color": "rgb"},
    labels=("Türe öffnen", "clap"),
    source={"model": "VideoResNet", "dissect": "0.1.0"},
)
CACHE = '"input":"c","output":"n","shape":["batch"]'
SMALL = Contract((InputSpec("frame", ("batch", 3)),), (OutputSpec("output"),))


@pytest.mark.parametrize("contract", [FULL, SMALL], ids=["full", "small"])
def test_metadata_are_strings_and_come_back_equal(contract: Contract) -> None:
    metadata = contract.to_metadata()
    assert all(isinstance(part, str) for entry in metadata.items() for part in entry)
    assert Contract.from_metadata(metadata) == contract


def test_metadata_have_the_shape_that_other_runners_rely_on() -> None:
    metadata = FULL.to_metadata()
    assert metadata["dissect.format_version"] == "1"
    assert (metadata["dissect.delay"], metadata["dissect.stride"]) == ("54", "8")
    assert json.loads(metadata["dissect.outputs"])[0] == {
        "name": "logits", "stride": 8, "delay": 54, "length": [[-1, 2], [0, 4]]
    }  # fmt: skip
    assert json.loads(metadata["dissect.caches"])[1] == {
        "input": "cache_001.age", "output": "new_cache_001.age", "shape": ["batch"],
        "dtype": "int64", "path": "age", "role": "age",
    }  # fmt: skip
    assert json.loads(metadata["dissect.structure"]) == {"logits": 0, "aux": [1]}


def test_what_is_absent_stays_absent() -> None:
    metadata = SMALL.to_metadata()
    assert "dissect.labels" not in metadata
    assert "dissect.preprocess" not in metadata
    read = Contract.from_metadata(metadata | {"someone.else": "x"})
    assert read.labels is None
    assert read.preprocess is None


def test_a_key_that_a_later_writer_added_is_passed_over() -> None:
    metadata = SMALL.to_metadata()
    metadata["dissect.inputs"] = '[{"name":"frame","shape":["batch",3],"dtype":"float32","rate":1,"hue":"red"}]'
    assert Contract.from_metadata(metadata) == SMALL


@given(
    frames=st.integers(0, 60),
    layers=st.lists(st.tuples(st.integers(1, 7), st.integers(0, 3), st.integers(1, 3)), max_size=4),
)
def test_positions_are_those_of_a_stack_of_convolutions(frames: int, layers: list[tuple[int, int, int]]) -> None:
    expected = frames
    for taps, padding, stride in layers:
        starts = [start for start in range(0, expected + 2 * padding, stride) if start + taps <= expected + 2 * padding]
        expected = len(starts) if expected else 0
    spec = OutputSpec("output", length=tuple((2 * padding - taps, stride) for taps, padding, stride in layers))
    assert spec.positions(frames) == expected


def test_last_output_by_delay_and_stride() -> None:
    spec = OutputSpec("output", stride=4, delay=5, length=((-1, 2), (-1, 2)))
    assert [spec.last(frames) for frames in (0, 1, 4, 5, 8, 9)] == [-1, 5, 5, 9, 9, 13]
    assert replace(FULL, outputs=(spec, OutputSpec("features"))).last(9) == 13


def test_cache_bytes_are_those_of_one_stream() -> None:
    assert [cache.bytes for cache in FULL.caches] == [64 * 56 * 56 * 4, 8, 8]
    assert FULL.cache_bytes == 64 * 56 * 56 * 4 + 16
    assert (FULL.role("age"), FULL.role("length"), SMALL.role("age")) == (1, 2, None)


@pytest.mark.parametrize(
    ("structure", "packed"),
    [
        (0, "a"),
        ([0, 1], ("a", "b")),
        ([1, [0]], ("b", ("a",))),
        ({"x": [0], "y": {"z": 1}}, {"x": ("a",), "y": {"z": "b"}}),
    ],
)
def test_pack(structure: object, packed: object) -> None:
    assert pack(structure, ["a", "b"]) == packed  # type: ignore[arg-type]
    assert all(leaf in (0, 1) for leaf in leaves_of(structure))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dissect.format_version": None}, "no step model.*dissect convert"),
        ({"dissect.format_version": "2"}, "step format '2'.*pip install -U dissect3d"),
        ({"dissect.format_version": "new"}, "step format 'new'"),
        ({"dissect.inputs": None}, "dissect.inputs is missing"),
        ({"dissect.inputs": "[]"}, "no frame input"),
        ({"dissect.inputs": '[{"name":"frame"}]'}, "dissect.inputs is damaged"),
        ({"dissect.inputs": '[{"name":"frame","shape":["batch","height"]}]'}, "frame: the shape"),
        ({"dissect.outputs": '[{"name":'}, "dissect.outputs is damaged"),
        ({"dissect.caches": '{"a": 1}'}, "dissect.caches is damaged"),
        ({"dissect.caches": f'[{{{CACHE},"dtype":"bfloat16"}}]'}, "no dtype 'bfloat16'"),
        ({"dissect.caches": f'[{{{CACHE},"role":"king"}}]'}, "unknown roles"),
        ({"dissect.caches": f'[{{{CACHE},"role":"length"}}]'}, "no length without an age"),
        ({"dissect.delay": "soon"}, "dissect.delay is damaged"),
        ({"dissect.structure": "[0,1]"}, "does not name each of the 1 outputs once"),
        ({"dissect.structure": '["0"]'}, "does not name each"),
    ],
)  # fmt: skip
def test_damaged_metadata_are_refused_by_name(change: dict[str, str | None], words: str) -> None:
    metadata = SMALL.to_metadata() | change
    with pytest.raises(StreamError, match=words) as caught:
        Contract.from_metadata({key: value for key, value in metadata.items() if value is not None}, "net.onnx")
    assert str(caught.value).startswith("net.onnx")


def test_the_contract_needs_no_library() -> None:
    code = "import sys, dissect.contract; sys.exit(bool({'torch', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
