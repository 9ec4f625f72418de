"""The measuring of ``benchmarks/``: what it says is what was there. The scripts themselves are run by hand."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dissect import benchmarking

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SHARED = {"measuring", "networks"}
SCRIPTS = sorted(file for file in BENCHMARKS.glob("*.py") if file.stem not in SHARED)


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import measuring

    return measuring


def test_a_ratio_is_that_of_the_times(measuring: object) -> None:
    def busy(seconds: float) -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    times = measuring.paired(  # type: ignore[attr-defined]
        {"one": lambda: busy(0.002), "three": lambda: busy(0.006)}, turns=5, clock="cpu", least=0.01
    )
    assert times["one"].median == pytest.approx(2, rel=0.2)
    assert float(measuring.ratio(times["three"], times["one"]).split()[0]) == pytest.approx(3, rel=0.2)  # type: ignore[attr-defined]
    assert [len(found.samples) for found in times.values()] == [5, 5]


def test_quartiles_and_words(measuring: object) -> None:
    times = measuring.Times((1.0, 2.0, 3.0, 4.0, 100.0))  # type: ignore[attr-defined]
    assert (times.median, times.quartiles) == (3.0, (2.0, 4.0))
    assert str(times) == "3 (2 to 4)"
    assert measuring.table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"  # type: ignore[attr-defined]
    assert "2 thread(s) used, processor time" in measuring.machine(2, "cpu")  # type: ignore[attr-defined]


class Pathways(nn.Module):
    """Changes the list that it is given, as two-pathway networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv3d(3, 2, 1), nn.Conv3d(3, 2, 1)])

    def forward(self, x: list[Tensor]) -> Tensor:
        for index, layer in enumerate(self.layers):
            x[index] = layer(x[index]).mean((2, 3, 4))
        return x[0] + x[1]


def test_a_window_is_asked_again_and_again() -> None:
    inputs = ([torch.rand(1, 3, 2, 4, 4), torch.rand(1, 3, 4, 4, 4)],)
    network = Pathways().eval()
    for call in (benchmarking.eager_window(network, inputs), benchmarking.onnx_window(network, inputs, 1)):
        first, second = call(), call()
        assert torch.equal(torch.as_tensor(first[0]), torch.as_tensor(second[0]))
    assert inputs[0][0].shape == (1, 3, 2, 4, 4)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_says_what_it_measures_and_is_in_the_documentation(script: Path) -> None:
    assert len(ast.get_docstring(ast.parse(script.read_text())) or "") > 80
    assert f"benchmarks/{script.name}" in (BENCHMARKS.parent / "docs" / "performance.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", [script for script in SCRIPTS if script.stem != "peers"], ids=lambda script: script.stem
)
def test_a_script_has_options(script: Path) -> None:
    command = [sys.executable, "-W", "ignore", str(script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "--threads" in done.stdout
