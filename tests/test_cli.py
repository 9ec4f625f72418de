"""The command line: what it prints, its exit codes, and that an error is one paragraph."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

import dissect
from dissect.cli import main
from dissect.errors import DissectError

SMALL = ["--input", "1x3x6x16x16"]
FAST = ["--no-bench", "--no-verify"]


class Tiny(nn.Module):
    """A small clip network: two convolutions over time, a global pool, 4 classes."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv3d(3, 4, 3, stride=(1, 2, 2), padding=1)
        self.second = nn.Conv3d(4, 6, 3, padding=1)
        self.head = nn.Linear(6, classes)

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        """Clip (N, 3, T, H, W) to scores (N, classes)."""
        return self.head(torch.relu(self.second(torch.relu(self.first(clip)))).mean(dim=(2, 3, 4)))


class Strange(nn.Module):
    """A network with an operator that has no converter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, 3, padding=1)

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        """Clip (N, 3, T, H, W) to (N, 4, T, H, W)."""
        return torch.special.i1e(self.conv(clip))


TINY = f"{__name__}:Tiny"
STRANGE = f"{__name__}:Strange"


def call(*args: object, code: int = 0) -> Result:
    """Run a command; it ends with ``code`` and without a traceback."""
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def outside(*args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    command = [sys.executable, "-m", "dissect", *(str(arg) for arg in args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    torch.save(Tiny().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def steps(weights: Path) -> dict[str, Path]:
    """Tiny as a step model, by preset."""
    labels = weights.parent / "labels.txt"
    labels.write_text("cake\nrun\njump\nswim\n")
    made = {}
    for preset in ("d3d", "exact"):
        made[preset] = weights.parent / f"{preset}.onnx"
        options = ["--arch", TINY, *SMALL, *FAST, "--preset", preset, "--labels", labels, "-o", made[preset]]
        call("convert", weights, *options)
    return made


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    av = pytest.importorskip("av")
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    random = np.random.default_rng(0)
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(20):
            image = random.integers(0, 256, (48, 64, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path


class Strided(Tiny):
    """The same with a temporal stride of 2."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Conv3d(4, 6, 3, stride=(2, 1, 1), padding=1)


# Help and imports.


@pytest.mark.parametrize("args", [["--help"], ["run", "--help"], ["convert", "--help"], ["--version"]])
def test_help_imports_no_torch(args: list[str]) -> None:
    code = (
        "import sys\nfrom dissect.cli import main\n"
        f"try: main({args})\nexcept SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'onnxruntime', 'onnx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_run_imports_no_torch(steps: dict[str, Path], film: Path) -> None:
    code = (
        "import sys\nfrom dissect.cli import main\n"
        f"try: main(['run', {str(steps['d3d'])!r}, {str(film)!r}])\nexcept SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules and 'onnx' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_every_command_is_there() -> None:
    out = call("--help").stdout
    for name in ("inspect", "convert", "verify", "bench", "run"):
        assert f"  {name} " in out


# inspect


def test_inspect_prints_the_plan_and_the_totals() -> None:
    out = call("inspect", TINY, *SMALL).stdout
    for word in (
        "first",
        "second",
        "conv3d",
        "approximate",
        "delay",
        "receptive field",
        "caches",
        "multiply-adds",
    ):
        assert word in out


def test_inspect_as_json_and_nothing_else() -> None:
    found = json.loads(call("inspect", TINY, *SMALL, "--preset", "exact", "--json").stdout)
    assert found["ok"]
    assert found["exact"]
    assert [row["path"] for row in found["rows"]][:2] == ["first", "second"]
    totals = found["totals"]
    assert totals["delay"] == 2
    assert totals["cache_bytes"] > 0
    # 3x3x3 kernels over 8x8 positions a frame, and the head
    convolutions = 27 * 64 * (3 * 4 + 4 * 6)
    assert totals["multiply_adds_per_clip"] == 6 * convolutions + 6 * 4
    assert totals["multiply_adds_per_frame"] >= convolutions


def test_inspect_as_markdown() -> None:
    out = call("inspect", TINY, *SMALL, "--markdown").stdout
    assert out.startswith("| layer |")
    assert "\n- delay: 0 frames" in out


def test_inspect_without_a_model_takes_our_own() -> None:
    out = call("inspect", "--input", "1x3x8x32x32").stdout
    assert "layer4.1.conv2" in out


def test_the_plan_is_edited_by_path() -> None:
    def rows(*more: str) -> dict[str, Any]:
        found = json.loads(call("inspect", TINY, *SMALL, "--json", *more).stdout)
        return {row["path"]: row for row in found["rows"]}

    assert rows()["second"] != rows("--set", "sec*: depth=3")["second"]
    assert rows("--set", "*: depth=1", "--set", "*:depth=3") == rows("--set", "*: depth=3")
    assert "window" not in rows("--pool", "cumulative")[""]["decision"]


def test_a_network_of_weights_and_arguments(weights: Path) -> None:
    call("inspect", weights, "--arch", TINY, *SMALL)
    message = call("inspect", weights, "--arch", TINY, "--arch-args", '{"classes": 7}', *SMALL, code=2).stderr
    assert "head.weight [4, 6] for [7, 6]" in message
    assert "--arch" in call("inspect", weights, *SMALL, code=2).stderr


def test_a_pickled_module_needs_trust(tmp_path: Path) -> None:
    torch.save(Tiny(), tmp_path / "tiny.pt")
    assert "--trust" in call("inspect", tmp_path / "tiny.pt", *SMALL, code=2).stderr
    call("inspect", tmp_path / "tiny.pt", "--trust", *SMALL)


# What is refused.


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_an_operator_without_a_converter_is_named(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = call(command, STRANGE, *SMALL, code=2).stderr
    assert "special_i1e" in message
    assert not list(tmp_path.iterdir())


def test_refusals_as_json() -> None:
    found = json.loads(call("inspect", STRANGE, *SMALL, "--json", code=2).stdout)
    assert found["ok"] is False
    assert found["error"]["type"] == "NotStreamable"
    assert "special_i1e" in found["error"]["message"]


@pytest.mark.parametrize("batch", [1, 3])
def test_an_archive_knows_its_example_and_may_take_no_other_batch(tmp_path: Path, batch: int) -> None:
    program = torch.export.export(Tiny().eval(), (torch.randn(batch, 3, 8, 20, 20),))
    torch.export.save(program, tmp_path / "tiny.pt2")
    out = call("convert", tmp_path / "tiny.pt2", "--preset", "exact", "--no-bench", "-o", tmp_path / "tiny.onnx").output
    assert "original = exact" in out
    assert "BROKEN" not in out
    assert dissect.Runner(tmp_path / "tiny.onnx").inputs[0].shape[1:] == (3, 20, 20)


class Choosing(nn.Module):
    """A network that branches on what it sees."""

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        """Clip to clip."""
        return clip * 2 if clip.mean() > 0 else clip


def test_a_forward_that_branches_on_values_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    out = call("inspect", f"{__name__}:Choosing", *SMALL, code=2).output
    assert "branches on the values of a tensor at test_cli.py:" in out
    assert not capfd.readouterr().err, "torch's own account of it"


def test_a_forgotten_input_is_named(tmp_path: Path) -> None:
    out = call("inspect", f"{__name__}:Flat", code=2).output
    assert "The example was 1x3x16x112x112, the default: give the network's own as --input." in out


class Flat(nn.Module):
    """Scores of a clip of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 8 * 8 * 8, 4)

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        """Clip (N, 3, 8, 8, 8) to scores."""
        return self.fc(clip.flatten(1))


def test_labels_are_as_many_as_classes(tmp_path: Path) -> None:
    (tmp_path / "two.txt").write_text("cake\nrun\n")
    options = ["--labels", tmp_path / "two.txt", "-o", tmp_path / "tiny.onnx", *SMALL, *FAST]
    out = call("convert", TINY, *options, code=2).output
    assert "two.txt has 2 names, and the network scores 4 classes." in out


def test_rules_of_ones_own(tmp_path: Path) -> None:
    rules = tmp_path / "my_rules.py"
    rules.write_text(
        "import torch\nfrom dissect import converter\nfrom dissect.converters.pointwise import pointwise\n"
        "OP = torch.ops.aten.special_i1e.default\n"
        "@converter(OP)\ndef i1e(ctx, *args, **kwargs):\n    return pointwise(ctx, OP, args, kwargs)\n"
    )
    folder = Path(__file__).parent
    done = outside("inspect", STRANGE, *SMALL, "--rules", rules, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "none.py" in call("inspect", TINY, *SMALL, "--rules", tmp_path / "none.py", code=2).stderr


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["--input", "3x"], "1x3x16x112x112"),
        (["--set", "depth"], "layer1.*.conv1: depth=3"),
        (["--set", "*: depth"], "layer1.*.conv1: depth=3"),
        (["--arch-args", "{"], "num_classes"),
        (["--arch-args", "3"], "num_classes"),
        (["--preset", "best"], "d3d"),
        (["--pool", "most"], "cumulative"),
        (["--window", "0"], "window"),
        (["--set", "nosuchlayer: depth=2"], "nosuchlayer"),
        (["--set", "*: depht=2"], "depth"),
        (["--time-dim", "0"], "time_dim"),
        (["--rates", "4;1"], "4,1"),
        (["--rates", "2"], "rates"),
        (["--layout", "b c t"], "dimensions"),
        (["--input", "1x3x6x16x16:bool"], "uint8"),
    ],
)
def test_wrong_use_is_explained(args: list[str], word: str) -> None:
    assert word in call("inspect", TINY, *SMALL, *args, code=2).stderr


def test_a_missing_model() -> None:
    message = call("inspect", "nothing.pt", code=2).stderr
    assert message.count("\n") == 1
    assert "nothing.pt does not exist" in message


def test_a_bug_of_ours_is_one_line_and_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("it broke\nat length")

    monkeypatch.setattr("dissect.workbench.stream_of", broken)
    message = call("inspect", TINY, *SMALL, code=2).stderr
    assert "RuntimeError: it broke\n" in message
    assert "--debug" in message
    shown = CliRunner().invoke(main, ["inspect", TINY, *SMALL, "--debug"])
    assert shown.exit_code == 2
    assert "Traceback" in shown.stderr


# convert


def test_convert_does_it_all(weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.onnx"
    result = call("convert", weights, "--arch", TINY, *SMALL, "-o", path, "--mean", "0,0,0", "--std", "1,1,1")
    for word in ("original = d3d", "step form = ONNX Runtime", "holds", "out.onnx", "sliding window", "times"):
        assert word in result.stdout
    assert os.listdir(tmp_path) == ["out.onnx"]
    run = dissect.Runner(path)
    assert run.preset == "d3d"
    assert dissect.Preprocess.from_json(run.preprocess) == dissect.Preprocess((16, 16), (0.0,) * 3, (1.0,) * 3)
    assert run.step(np.zeros((1, 3, 16, 16), np.float32)).shape == (1, 4)


def test_convert_as_json_and_nothing_else(weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.onnx"
    found = json.loads(call("convert", weights, "--arch", TINY, *SMALL, "-o", path, "--json").stdout)
    assert found["ok"]
    assert found["verification"]["ok"]
    assert found["file"] == str(path)
    assert found["bytes"] == path.stat().st_size
    assert found["speed"]["runtime"] == "ONNX Runtime"
    assert found["speed"]["step"]["median_ms"] > 0
    assert found["totals"]["delay"] == 0


def test_convert_in_the_native_cadence(tmp_path: Path, film: Path) -> None:
    torch.manual_seed(0)
    path, network = tmp_path / "net.onnx", f"{__name__}:Strided"
    options = ["--arch", network, *SMALL, "--preset", "exact", "--no-bench", "--json", "-o", path]
    native = json.loads(call("convert", *options, "--cadence", "native").stdout)
    assert dissect.Runner(path).period == 2
    assert native["totals"]["cadence"] == "native"
    assert "native cadence" in native["verification"]["rows"][-1]["what"]
    assert json.loads(call("bench", path, "--steps", 4, "--json").stdout)["step"]["calls"] == 4
    lines = [json.loads(line) for line in call("run", path, film, "--jsonl").stdout.splitlines()]
    assert [line["frame"] for line in lines] == list(range(0, 20, 2))
    torch.manual_seed(0)
    every = json.loads(call("convert", *options).stdout)
    first, second = 3 * 4 * 27 * 8 * 8, 4 * 6 * 27 * 8 * 8
    assert every["totals"]["multiply_adds_per_frame"] == first + second + 6 * 4
    assert native["totals"]["multiply_adds_per_frame"] == first + (second + 6 * 4) / 2
    assert native["totals"]["cache_bytes"] < every["totals"]["cache_bytes"]
    dense = [json.loads(line) for line in call("run", path, film, "--jsonl").stdout.splitlines()]
    for line in lines:
        (same,) = [other for other in dense if other["frame"] == line["frame"]]
        assert dict(line["top"]) == pytest.approx(dict(same["top"]), abs=1e-4)


def test_convert_names_the_file_by_the_model(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call("convert", weights, "--arch", TINY, *SMALL, *FAST)
    call("convert", TINY, *SMALL, *FAST, "--preset", "causal")
    assert sorted(os.listdir(tmp_path)) == ["Tiny.causal.onnx", "tiny.d3d.onnx"]


def test_a_broken_promise_is_exit_code_1_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dissect.reports import Check, Report

    broken = Report((Check("original = d3d", "a still scene", 0.5, 1e-4, False, "first parts at first"),))
    monkeypatch.setattr("dissect.verifying.verify", lambda *_, **__: broken)
    result = call("convert", TINY, *SMALL, "--no-bench", "-o", tmp_path / "out.onnx", code=1)
    assert "BROKEN" in result.stdout
    assert "first parts at first" in result.stderr
    assert not list(tmp_path.iterdir())


def test_an_interrupted_convert_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dissect.verifying.verify", interrupted)
    call("convert", TINY, *SMALL, "-o", tmp_path / "out.onnx", code=130)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_convert_that_is_told_to_end_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(*_: Any, **options: Any) -> None:
        written.append(options["onnx"])
        os.kill(os.getpid(), signal.SIGTERM)

    written: list[Path] = []
    monkeypatch.setattr("dissect.verifying.verify", told)
    call("convert", TINY, *SMALL, "-o", tmp_path / "out.onnx", code=143)
    assert not list(tmp_path.iterdir())
    assert not written[0].parent.exists()


@pytest.mark.parametrize("place", ["", "no/such/folder/out.onnx"])
def test_convert_to_where_nothing_can_be(tmp_path: Path, place: str) -> None:
    call("convert", TINY, *SMALL, *FAST, "-o", tmp_path / place, code=2)


def test_where_torch_cannot_export_the_clip_both_run_in_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise DissectError("The clip network cannot be exported to ONNX: no.")

    monkeypatch.setattr("dissect.benchmarking.onnx_window", refused)
    args = ["convert", TINY, *SMALL, "--no-verify", "-o", tmp_path / "out.onnx", "--json"]
    found = json.loads(call(*args).stdout)
    assert found["speed"]["runtime"] == "PyTorch"
    assert "both run in PyTorch" in found["speed"]["remark"]


# verify


@pytest.mark.parametrize("preset", ["d3d", "exact"])
def test_verify_takes_the_preset_of_the_file(weights: Path, steps: dict[str, Path], preset: str) -> None:
    args = ["verify", weights, steps[preset], "--arch", TINY, *SMALL]
    assert f"original = {preset}" in call(*args).stdout
    assert json.loads(call(*args, "--json").stdout)["verification"]["ok"]


def test_verify_another_network_is_exit_code_1(steps: dict[str, Path]) -> None:
    result = call("verify", TINY, steps["d3d"], *SMALL, code=1)
    assert "BROKEN" in result.stdout


def test_verify_what_is_no_step_model(weights: Path) -> None:
    assert "is not an ONNX file" in call("verify", weights, weights, "--arch", TINY, code=2).stderr


# bench


def test_bench_a_step(steps: dict[str, Path]) -> None:
    assert "median" in call("bench", steps["d3d"], "--steps", 5).stdout
    found = json.loads(call("bench", steps["d3d"], "--steps", 5, "--batch", 2, "--json").stdout)
    assert found["step"]["calls"] == 5
    assert found["batch"] == 2
    assert found["step"]["p95_ms"] >= found["step"]["median_ms"] > 0


def test_bench_against_the_window(weights: Path, steps: dict[str, Path]) -> None:
    args = ["bench", steps["d3d"], weights, "--arch", TINY, "--steps", 30, "--batch", 2]
    assert "sliding window" in call(*args).stdout
    found = json.loads(call(*args, "--json").stdout)
    assert found["runtime"] == "ONNX Runtime"
    assert found["times"] > 0
    assert found["window"]["calls"] == 3


# run


def test_run_prints_a_line_for_each_frame(steps: dict[str, Path], film: Path) -> None:
    result = call("run", steps["d3d"], film, "--top", 2)
    lines = result.stdout.splitlines()
    assert len(lines) == 20
    assert {"cake", "run", "jump", "swim"} & set(lines[0].split())
    assert "20 frames in" in result.stderr


@pytest.mark.parametrize("preset", ["d3d", "exact"])
def test_run_as_json_lines(steps: dict[str, Path], film: Path, preset: str) -> None:
    lines = [json.loads(line) for line in call("run", steps[preset], film, "--jsonl", "--top", 4).stdout.splitlines()]
    assert [line["frame"] for line in lines] == list(range(20))
    assert [line["time"] for line in lines] == pytest.approx([index / 25 for index in range(20)], abs=1e-5)
    assert all(line["delay"] == (2 if preset == "exact" else 0) for line in lines)
    assert set(lines[0]) == {"frame", "time", "delay", "top", "ms"}
    for line in lines:
        scores = [score for _, score in line["top"]]
        assert scores == sorted(scores, reverse=True)
        assert sum(scores) == pytest.approx(1)


def test_run_gives_what_the_runner_gives(steps: dict[str, Path], film: Path) -> None:
    lines = call("run", steps["exact"], film, "--jsonl", "--raw", "--top", 4).stdout.splitlines()
    run = dissect.Runner(steps["exact"])
    preprocess = dissect.Preprocess.from_json(run.preprocess)
    from dissect.video import frames

    outputs = [run.step(preprocess(picture.image)) for picture in frames(film)]
    wanted = [output for output in outputs if output is not None] + run.flush()
    assert len(lines) == len(wanted)
    for line, scores in zip(lines, wanted, strict=True):
        found = dict(json.loads(line)["top"])
        assert [found[label] for label in run.labels] == pytest.approx(scores[0].tolist(), abs=1e-6)


def test_run_stops_early_and_sums_up(steps: dict[str, Path], film: Path) -> None:
    found = json.loads(call("run", steps["d3d"], film, "--max-frames", 7, "--json").stdout)
    assert found["frames"] == 7
    assert found["dropped"] == 0
    assert found["median_ms"] > 0


def test_run_with_other_labels(steps: dict[str, Path], film: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("a\nb\nc\nd\n")
    line = call("run", steps["d3d"], film, "--labels", tmp_path / "labels.txt", "--max-frames", 1).stdout
    assert {"a", "b", "c", "d"} <= set(line.split())


def test_run_says_what_is_wrong_with_a_film(steps: dict[str, Path], film: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(film.read_bytes()[: film.stat().st_size // 2])
    result = call("run", steps["exact"], broken, code=2)
    played = len(result.stdout.splitlines())
    assert 0 < played < 20
    assert f"broke off after {played} frames" in result.stderr
    assert "does not exist" in call("run", steps["d3d"], tmp_path / "none.mp4", code=2).stderr
    (tmp_path / "text.mp4").write_text("hello")
    assert "no video" in call("run", steps["d3d"], tmp_path / "text.mp4", code=2).stderr
    assert "no step model" in call("run", clip_model(tmp_path), film, code=2).stderr


def clip_model(folder: Path) -> Path:
    """An ONNX file that is no step model."""
    import onnx

    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"])],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, [1])],
        [onnx.helper.make_tensor_value_info("y", 1, [1])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, folder / "clip.onnx")
    return folder / "clip.onnx"


def test_run_says_that_a_live_stream_is_too_fast(
    steps: dict[str, Path], film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dissect import video

    original = video.Video.__init__

    def live(self: video.Video, source: str, late: str = "drop") -> None:
        original(self, source, late)
        self.live = True  # a file that comes as fast as it can be read

    monkeypatch.setattr(video.Video, "__init__", live)
    slow = dissect.Runner.step

    def step(self: dissect.Runner, *frames: Any) -> Any:
        import time

        time.sleep(0.02)
        return slow(self, *frames)

    monkeypatch.setattr(dissect.Runner, "step", step)
    result = call("run", steps["d3d"], film)
    assert "Falling behind" in result.stderr
    assert "were dropped" in result.stderr
    assert len(result.stdout.splitlines()) < 20
    result = call("run", steps["d3d"], film, "--late", "wait")
    assert len(result.stdout.splitlines()) == 20


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of a POSIX shell")
def test_a_reader_that_leaves_is_no_error(steps: dict[str, Path], film: Path) -> None:
    command = f"{sys.executable} -m dissect run {steps['d3d']} {film} | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert "Error" not in done.stderr


# Other inputs than a clip of floats.


class Bytes(nn.Module):
    """Frames of bytes, channels last, (N, T, H, W, 3) to scores (N, T, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 2, 3, padding=1)

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        return self.conv(clip.permute(0, 4, 1, 2, 3).float() / 255).mean((3, 4)).transpose(1, 2)


class Pathways(nn.Module):
    """Two clips, the first with every second frame of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.slow, self.fast = nn.Conv3d(3, 2, 3, padding=1), nn.Conv3d(3, 2, 3, padding=1)

    def forward(self, slow: torch.Tensor, fast: torch.Tensor) -> torch.Tensor:
        return self.slow(slow).mean((2, 3, 4)) + self.fast(fast).mean((2, 3, 4))


@pytest.mark.parametrize(
    "args",
    [
        ("Bytes", "--input", "1x6x8x8x3:uint8", "--time-dim", "1"),
        ("Bytes", "--input", "1x6x8x8x3:uint8", "--layout", "b t h w c"),
        ("Pathways", "--input", "1x3x3x8x8", "--input", "1x3x6x8x8", "--rates", "2,1"),
    ],
    ids=["bytes", "layout", "rates"],
)
def test_other_inputs(args: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "step.onnx"
    call("convert", f"{__name__}:{args[0]}", *args[1:], "--preset", "exact", "--no-bench", "-o", file)
    run = dissect.Runner(file)
    for _ in range(3):
        run.step(*[np.zeros((1, *spec.shape[1:]), spec.dtype) for spec in run.inputs])
    assert run.inputs[0].dtype == ("uint8" if args[0] == "Bytes" else "float32")


@pytest.mark.parametrize("preset", ["d3d", "exact"])
def test_quantize_says_how_far_the_two_agree(steps: dict[str, Path], film: Path, tmp_path: Path, preset: str) -> None:
    np.save(tmp_path / "clips.npy", np.random.default_rng(0).standard_normal((2, 3, 9, 16, 16)).astype(np.float32))
    target = tmp_path / "small.onnx"
    streams = [film, tmp_path / "clips.npy"]
    found = json.loads(call("quantize", steps[preset], *streams, "-o", target, "--json").stdout)
    assert found["agreement"]["steps"] == 20 + 2 * 9
    assert found["agreement"]["error"] < 0.1
    assert found["agreement"]["before"] > 2 * found["agreement"]["after"]
    printed = call("quantize", steps[preset], film, "-o", target, "--frames", 4).stdout
    assert "layers" in printed
    assert "top-1 agreement" in printed
    run = call("run", target, film, "--jsonl").stdout.splitlines()
    assert len(run) == len(call("run", steps[preset], film, "--jsonl").stdout.splitlines())


def test_convert_to_8_bits_takes_films(weights: Path, film: Path, tmp_path: Path) -> None:
    options = ["--arch", TINY, *SMALL, "--no-bench", "--preset", "exact", "-o", tmp_path / "net.onnx"]
    found = json.loads(call("convert", weights, *options, "--dtype", "int8", "--calibrate", film, "--json").stdout)
    assert found["agreement"]["layers"] > 0
    assert {"int8", "uint8"} & {cache.dtype for cache in dissect.Runner(tmp_path / "net.onnx").caches}
    notes = [row["note"] for row in found["verification"]["rows"]]
    assert any("8" in note and "caches" in note for note in notes)


def test_8_bits_without_a_film_is_wrong_use(weights: Path, tmp_path: Path) -> None:
    options = ["--arch", TINY, *SMALL, *FAST, "-o", tmp_path / "net.onnx", "--dtype", "int8"]
    assert "--calibrate" in call("convert", weights, *options, code=2).stderr
    assert not (tmp_path / "net.onnx").exists()
