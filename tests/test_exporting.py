"""Export: the contract that any runner relies on, and no half-written file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from laws import steps
from random_networks import scrambled
from torch import Tensor, nn

import dissect
from dissect.contract import Contract
from dissect.errors import ExportError
from dissect.exporting import contract_of

PRESETS = ["d3d", "causal", "exact"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv3d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 4, (3, 1, 1), (2, 1, 1), (1, 0, 0))
        )
        self.blocks = nn.ModuleList(nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0)) for _ in range(11))
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x).sigmoid()
        return self.fc(x.mean((2, 3, 4)))


class Several(nn.Module):
    """A dictionary with a list and a constant in it, of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.rgb, self.flow = nn.Conv3d(3, 2, (3, 1, 1), padding=(1, 0, 0)), nn.Conv3d(2, 2, 1)

    def forward(self, rgb: Tensor, flow: Tensor) -> dict[str, Any]:
        y = self.rgb(rgb) + self.flow(flow)
        return {"scores": y.mean((2, 3, 4)), "maps": [y, rgb], "version": 3}


@pytest.fixture(scope="module", params=PRESETS)
def stream(request: pytest.FixtureRequest) -> dissect.Stream:
    return dissect.convert(scrambled(Net(), 0).float(), torch.randn(1, 3, 8, 6, 6), preset=request.param)


@pytest.fixture(scope="module")
def small() -> dissect.Stream:
    """Two temporal convolutions, so that there is a delay, a gate, and something to clear."""
    net = nn.Sequential(
        nn.Conv3d(3, 2, (3, 1, 1), padding=(1, 0, 0)), nn.Sigmoid(), nn.Conv3d(2, 2, (3, 1, 1), padding=(1, 0, 0))
    )
    return dissect.convert(scrambled(net, 0).float(), torch.randn(1, 3, 8, 4, 4), preset="exact")


@pytest.fixture(scope="module")
def file(stream: dissect.Stream, tmp_path_factory: pytest.TempPathFactory) -> Path:
    preprocess = dissect.Preprocess(size=(6, 6), mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.2))
    path = tmp_path_factory.mktemp("secret_folder") / "net.onnx"
    assert dissect.export(stream, path, preprocess=preprocess, labels=["a", "b", "Türe öffnen"]) == path
    return path


def test_names_and_order(stream: dissect.Stream, file: Path) -> None:
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    inputs, outputs = [value.name for value in model.graph.input], [value.name for value in model.graph.output]
    caches = inputs[1:]
    assert (inputs[0], outputs[0]) == ("frame", "output")
    assert outputs[1:] == [f"new_{name}" for name in caches]
    assert caches == sorted(caches)
    assert sorted(outputs[1:]) == outputs[1:]
    assert all(name.startswith(f"cache_{index:03d}.") for index, name in enumerate(caches))
    paths = {name.split(".", 1)[1] for name in caches}
    assert {"stem.0", "blocks.0"} <= paths
    assert len(caches) > 10, "numbers are padded, so that ten comes after nine"


def test_the_batch_is_dynamic_and_nothing_else_is(file: Path) -> None:
    model = onnx.load(file)
    for value in (*model.graph.input, *model.graph.output):
        first, *rest = value.type.tensor_type.shape.dim
        assert first.dim_param == "batch"
        assert all(dim.dim_value > 0 and not dim.dim_param for dim in rest), value.name
        assert len(rest) < 4
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        given = {
            entry.name: np.zeros([batch, *entry.shape[1:]], np.int64 if "int64" in entry.type else np.float32)
            for entry in session.get_inputs()
        }
        assert all(out.shape[0] == batch for out in session.run(None, given))


def test_no_input_is_an_output(file: Path) -> None:
    graph = onnx.load(file).graph
    made = {name for node in graph.node for name in node.output}
    assert all(value.name in made for value in graph.output)
    assert len({value.name for value in graph.output}) == len(graph.output)


def test_nothing_of_the_building_machine_is_inside(file: Path) -> None:
    data = file.read_bytes()
    for secret in (
        b"secret_folder",
        str(Path.home()).encode(),
        os.getcwd().encode(),
        b"test_exporting",
        b".py",
        b"site-packages",
    ):
        assert secret not in data, secret
    assert [path.name for path in file.parent.iterdir()] == ["net.onnx"]


def test_metadata_are_the_contract(stream: dissect.Stream, file: Path) -> None:
    metadata = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    contract = Contract.from_metadata(metadata)
    assert contract.labels == ("a", "b", "Türe öffnen")
    assert dissect.Preprocess.from_json(contract.preprocess).size == (6, 6)  # type: ignore[arg-type]
    assert (contract.preset, contract.delay) == (stream.options.preset, stream.timing.delay)
    assert (contract.receptive_field, contract.warmup) == (stream.timing.receptive_field, stream.timing.warmup)
    assert contract.source["model"] == "Net"
    assert [cache.input for cache in contract.caches] == [cache.name for cache in stream.cache_list]
    assert all(cache.shape[0] == "batch" for cache in contract.caches)
    (output,) = contract.outputs
    clock = stream.leaf_timings[0]
    assert (output.delay, output.stride) == (clock.delay, clock.stride)
    assert [max(output.positions(frames), 0) for frames in range(1, 20)] == [
        max(clock.length(frames), 0) for frames in range(1, 20)
    ]
    run = dissect.Runner(file)
    assert tuple(run.labels) == contract.labels


@pytest.mark.parametrize("batch", [1, 3])
def test_the_runner_gives_what_the_step_form_gives(stream: dissect.Stream, file: Path, batch: int) -> None:
    torch.manual_seed(3)
    x = torch.randn(batch, 3, 11, 6, 6)
    with torch.no_grad():
        wanted, _ = steps(stream, (x,))
    run = dissect.Runner(file, batch=batch)
    got = [run.step(frame.numpy()) for frame in x.unbind(2)]
    delay = stream.timing.delay
    assert [value is None for value in got] == [time < delay for time in range(11)]
    for mine, other in zip(got[delay:], wanted[delay:], strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5)


def test_a_flush_gives_the_original_network(stream: dissect.Stream, file: Path) -> None:
    if stream.options.preset != "exact":
        pytest.skip("only exact streams promise it")
    model = scrambled(Net(), 0).float()
    clip = torch.randn(2, 3, 8, 6, 6)
    run = dissect.Runner(file, batch=2)
    for frames in (8, 5, 1):
        for frame in clip[:, :, :frames].unbind(2):
            run.step(frame.numpy())
        with torch.no_grad():
            np.testing.assert_allclose(run.flush()[-1], model(clip[:, :, :frames]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_several_inputs_and_outputs_keep_their_structure(preset: str, tmp_path: Path) -> None:
    model = scrambled(Several(), 0).float()
    clips = torch.randn(1, 3, 6, 4, 4), torch.randn(1, 2, 6, 4, 4)
    stream = dissect.convert(model, clips, preset=preset)
    dissect.verify(stream, model).check()
    path = dissect.export(stream, tmp_path / "net.onnx")
    graph = onnx.load(path).graph
    assert [value.name for value in graph.input][:2] == ["frame_0", "frame_1"]
    assert [value.name for value in graph.output][:3] == ["scores", "maps_0", "maps_1"]
    run = dissect.Runner(path)
    out = None
    for time in range(6):
        out = run.step(*[clip[:, :, time].numpy() for clip in clips])
    assert set(out) == {"scores", "maps", "version"}
    assert [part.shape for part in out["maps"]] == [(1, 2, 4, 4), (1, 3, 4, 4)]


@pytest.mark.parametrize("live", [False, True])
def test_a_fault_in_tuning_costs_speed_and_no_model(
    small: dissect.Stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, live: bool
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("dissect.exporting.tune", broken)
    with pytest.warns(UserWarning, match=r"right but not tuned for speed \(ZeroDivisionError: by zero\)"):
        path = dissect.export(small, tmp_path / "net.onnx", live=live)
    if not live:
        assert dissect.verify(small, onnx=path).check()
    run = dissect.Runner(path)
    outputs = [run.step(np.ones((1, 3, 4, 4), np.float32)) for _ in range(6)]
    assert outputs[-1] is not None


def test_a_reset_input_clears_single_rows(small: dissect.Stream, tmp_path: Path) -> None:
    path = dissect.export(small, tmp_path / "net.onnx", reset=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    assert names[-1] == "reset"
    x = torch.randn(3, 3, 12, 4, 4)
    caches = [cache.numpy() for cache in small.caches(3)]
    outputs = []
    for time, frame in enumerate(x.unbind(2)):
        reset = np.array([False, time == 5, False])
        out, *caches = session.run(None, dict(zip(names, [frame.numpy(), *caches, reset], strict=True)))
        outputs.append(out)
    with torch.no_grad():
        whole, _ = steps(small, (x,))
        late, _ = steps(small, (x[:, :, 5:],))
    for time in range(12):
        for row in range(3):
            wanted = late[time - 5] if row == 1 and time >= 5 else whole[time]
            np.testing.assert_allclose(outputs[time][row], wanted[row], rtol=1e-4, atol=1e-5)


def test_bytes_as_frames(tmp_path: Path) -> None:
    class Bytes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv3d(3, 2, (3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.float() / 255 - 0.5)

    clip = torch.randint(0, 256, (1, 3, 6, 4, 4), dtype=torch.uint8)
    model = Bytes().eval()
    stream = dissect.convert(model, clip, preset="exact")
    run = dissect.Runner(dissect.export(stream, tmp_path / "net.onnx"))
    got = [run.step(frame.numpy()) for frame in clip.unbind(2)]
    got = [out for out in got if out is not None] + run.flush()
    with torch.no_grad():
        np.testing.assert_allclose(np.stack(got, 2), model(clip), rtol=1e-4, atol=1e-5)


# No half-written file.


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_export_that_fails_leaves_the_old_file(
    error: type[BaseException], small: dissect.Stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def halfway(model: Any, path: Any, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise error

    target = tmp_path / "net.onnx"
    target.write_bytes(b"old")
    monkeypatch.setattr(onnx_ir, "save", halfway)
    with pytest.raises(error):
        dissect.export(small, target)
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


KILLED = """
import os, signal, sys
import torch, onnx_ir, dissect
def halfway(model, path, **_):
    open(path, "wb").write(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
onnx_ir.save = halfway
dissect.export(dissect.convert(torch.nn.Conv3d(3, 2, 3), torch.randn(1, 3, 8, 6, 6)), sys.argv[1])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_an_export_that_is_killed_leaves_no_file(tmp_path: Path) -> None:
    target = tmp_path / "net.onnx"
    done = subprocess.run([sys.executable, "-c", KILLED, str(target)], capture_output=True, timeout=120, check=False)
    assert done.returncode == -9, done.stderr
    assert not target.exists()
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".onnx"]


@pytest.mark.parametrize("where", ["", "missing/net.onnx"])
def test_a_place_that_is_none(where: str, small: dissect.Stream, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="folder"):
        dissect.export(small, tmp_path / where)


def test_one_file_unless_it_is_too_large(
    small: dissect.Stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dissect.exporting.LIMIT", 100)
    path = dissect.export(small, tmp_path / "net.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data"]
    run = dissect.Runner(path)
    assert [run.step(np.zeros((1, 3, 4, 4), np.float32)) is None for _ in range(3)] == [True, True, False]


def test_the_contract_of_a_stream_says_what_it_takes() -> None:
    stream = dissect.convert(nn.Conv3d(3, 2, (3, 1, 1)), torch.randn(1, 3, 8, 6, 5), preset="exact")
    contract = contract_of(stream)
    assert contract.inputs[0].shape == ("batch", 3, 6, 5)
    assert contract.preprocess is None
    assert contract.labels is None


class Named(nn.Module):
    """Outputs under names that operators and inputs have, too."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = x.mean((3, 4)).relu()
        return {"mean": y, "frame": y + 1, "relu": y.square(), "cache_000": y - 1}


def test_outputs_may_have_the_names_of_operators_and_inputs(tmp_path: Path) -> None:
    stream = dissect.convert(Named(), torch.rand(1, 2, 4, 3, 3), "exact")
    run = dissect.Runner(dissect.export(stream, tmp_path / "net.onnx"))
    assert [spec.name for spec in run.outputs] == ["mean", "output_frame", "relu", "output_cache_000"]
    x = torch.rand(1, 2, 3, 3)
    wanted = Named()(x[:, :, None])
    got = run.step(x.numpy())
    assert list(got) == list(wanted)
    for key, value in got.items():
        np.testing.assert_allclose(value, wanted[key][:, :, 0], rtol=1e-5)


def test_what_parameters_alone_give_is_computed_once(tmp_path: Path) -> None:
    """ONNX has no form for the exponential of a matrix, which makes an orthogonal weight."""

    class Orthogonal(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = torch.nn.Conv3d(3, 4, 3, padding=1)
            self.score = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scores: torch.Tensor = self.score(self.stem(x).mean((2, 3, 4)))
            return scores

    torch.manual_seed(0)
    network = Orthogonal().eval()
    stream = dissect.convert(network, torch.randn(1, 3, 4, 6, 6), preset="exact")
    dissect.verify(stream, network, onnx=stream.export(tmp_path / "step.onnx")).check()


class Tiny(nn.Module):
    """Numbers next to 0 and 1, which count where the picture is black."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 2, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x / (x.square().mean(1, keepdim=True) + 1e-9).sqrt() + (x + 1e-10).abs().log() * 1.000004


def test_small_numbers_stay(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Tiny().eval()
    stream = dissect.convert(network, torch.randn(1, 2, 8), preset="exact", time_dim=2)
    runner = dissect.Runner(dissect.export(stream, tmp_path / "tiny.onnx"), providers=["CPUExecutionProvider"])
    black = torch.zeros(1, 2, 4)
    with torch.no_grad():
        wanted = network(black)[..., 0].numpy()
    outputs = [runner.step(np.zeros((1, 2), np.float32)) for _ in range(3)]
    assert np.allclose(outputs[-1], wanted, rtol=1e-6, atol=0)
    clip = torch.randn(1, 2, 12)
    runner.reset()
    got = [runner.step(clip[..., at].numpy()) for at in range(12)]
    wanted = torch.log((network.conv(clip) + 1e-10).abs())[..., 5].detach().numpy()
    scaled = network(clip)[..., 5].detach().numpy()
    assert np.allclose(got[6], scaled, rtol=2e-6, atol=1e-6)
    assert not np.allclose(scaled, scaled - 4e-6 * wanted, rtol=1e-7, atol=0)
