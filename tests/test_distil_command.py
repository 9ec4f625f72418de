"""``dissect distil``: from videos to a step model, and what it says of videos that do not do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from films import film
from torch import nn

import dissect
from dissect.cli import main

SMALL = ["--input", "1x3x6x16x16"]


class Small(nn.Module):
    """Clips (N, 3, T, H, W) to 3 scores."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(3, 4, 3, stride=(1, 2, 2), padding=1)
        self.bn1 = nn.BatchNorm3d(4)
        self.conv2 = nn.Conv3d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 3)

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(clip)))
        return self.fc(torch.relu(self.conv2(x)).mean(dim=(2, 3, 4)))


class Map(nn.Module):
    """Clips to clips."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 2, 3, padding=1)

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        return self.conv(clip)


def call(*args: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["distil", *(str(arg) for arg in args)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "small.pt"
    torch.save(Small().state_dict(), path)
    return [path, "--arch", f"{__name__}:Small", *SMALL]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    film(folder / "a.mp4", 40, seed=1)
    film(folder / "b.mp4", 30, seed=2)
    return folder


def test_a_folder_of_videos_becomes_a_step_model(model: list[object], videos: Path, tmp_path: Path) -> None:
    path, *rest = model
    out, labels = tmp_path / "net.onnx", tmp_path / "labels.txt"
    labels.write_text("a\nb\nc\n")
    given = ["--steps", 4, "--batch", 2, "--labels", labels, "--json", "-o", out]
    result = CliRunner().invoke(main, ["distil", *map(str, [path, videos, *rest, *given])])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["ok"]
    assert found["clips"] == 3 + 2
    assert 0 <= found["agreement_before"] <= 1
    assert 0 <= found["agreement_after"] <= 1
    run = dissect.Runner(out)
    assert run.labels == ("a", "b", "c")
    assert np.isfinite(run.step(np.zeros((1, 3, 16, 16), np.float32))).all()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_file_with_a_checkpoint_or_without(
    model: list[object], videos: Path, tmp_path: Path
) -> None:
    path, *rest = model
    outs = []
    for index, more in enumerate(([], ["--checkpoint", tmp_path / "run"])):
        out = tmp_path / f"{index}.onnx"
        call(path, videos, *rest, "--steps", 3, "--batch", 2, "-o", out, *more)
        run = dissect.Runner(out)
        outs.append(np.stack([run.step(np.full((1, 3, 16, 16), 0.1 * at, np.float32)) for at in range(4)]))
    assert np.array_equal(outs[0], outs[1])


@pytest.mark.slow
def test_least_squares_alone(model: list[object], videos: Path, tmp_path: Path) -> None:
    path, *rest = model
    result = call(path, videos, *rest, "--steps", 0, "--reconstruct", "-o", tmp_path / "net.onnx")
    assert "of the windows as cut" in result.output


def test_outputs_that_are_no_scores(videos: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(Map().state_dict(), tmp_path / "map.pt")
    given = ["--arch", f"{__name__}:Map", *SMALL, "--steps", 1, "--batch", 2, "-o", tmp_path / "net.onnx"]
    assert "not measured" in call(tmp_path / "map.pt", videos, *given).output


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["short.mp4"], "short.mp4 has 8 frames, and clips of 12 are wanted"),
        (["empty"], "empty is a folder without a video"),
        (["away.mp4"], "away.mp4 does not exist"),
        (["broken.mp4"], "broken.mp4"),
        (["short.mp4", "--frames", 4], "--frames 4 is shorter than the 6 frames that the network looks at"),
        (["short.mp4", "--preset", "exact"], "there is nothing to learn; use convert"),
        (["short.mp4", "--frames", 6, "--device", "abacus"], "device 'abacus' is unknown"),
    ],
)
def test_what_does_not_do_is_one_paragraph(
    model: list[object], tmp_path: Path, given: list[object], words: str
) -> None:
    film(tmp_path / "short.mp4", 8)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.mp4").write_bytes((tmp_path / "short.mp4").read_bytes()[:500])
    path, *rest = model
    first, *more = given
    result = call(path, tmp_path / str(first), *rest, *more, "-o", tmp_path / "net.onnx", code=2)
    assert words in result.output
    assert not (tmp_path / "net.onnx").exists()


def test_a_network_that_takes_no_pictures(videos: Path, tmp_path: Path) -> None:
    torch.save(nn.Conv3d(5, 2, 3, padding=1).state_dict(), tmp_path / "net.pt")
    given = ["--arch", "torch.nn:Conv3d", "--arch-args", '{"in_channels": 5, "out_channels": 2, "kernel_size": 3}']
    result = call(tmp_path / "net.pt", videos, *given, "--input", "1x5x6x16x16", "-o", tmp_path / "o.onnx", code=2)
    assert "make clips of its inputs yourself and call dissect.distil" in result.output
