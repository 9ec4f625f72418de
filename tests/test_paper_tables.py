"""The paper's tables: every figure that needs no training comes out of our code."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dissect import zoo
from dissect.counting import multiply_adds, parameters

EXAMPLE = Path(__file__).parent.parent / "examples" / "paper_tables.py"


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("paper_tables", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


#: rows of each table, and how many of its figures the paper gives
ROWS = {
    "1": (3, 4 + 8 + 1 + 2 * (4 + 8 + 2)),
    "2": (3, 3 * 3),
    "3": (9, 3),
    "4": (9, 3 * 3 + 3 * 4 + 3 * 3),
    "5": (6, 3 * 2 + 3),
}


@pytest.mark.parametrize("table", ROWS)
def test_every_figure_of_the_paper_is_ours(tables: ModuleType, table: str) -> None:
    found = [figure for figure in tables.figures() if figure.table == table]
    compared = [figure for figure in found if figure.paper is not None]
    assert (len({figure.row for figure in found}), len(compared)) == ROWS[table]
    wrong = [str(figure) for figure in compared if not figure.ok]
    assert not wrong, "\n".join(wrong)
    for figure in compared:
        if "parameters, M" in figure.what or "cache" in figure.what:
            assert figure.digits == (1 if table == "3" else 2), figure
        elif figure.digits is None:
            assert figure.limit == (5 if table == "1" else 0.6), figure


def test_it_prints_all_of_them_and_ends_well(tables: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("Table" in line for line in lines) == 5
    count = sum(compared for _, compared in ROWS.values())
    assert lines[-1] == f"{count} of {count} figures are the paper's."


def test_a_figure_that_is_off_is_shown(
    tables: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    off: list[Any] = [
        tables.Figure("2", "row", "what", 20.664, 20.66, digits=2),
        tables.Figure("2", "row", "what", 20.666, 20.66, digits=2),
        tables.Figure("2", "row", "what", 1005.9, 1000.0, limit=0.6),
        tables.Figure("2", "row", "what", 993.9, 1000.0, limit=0.6),
    ]
    assert [figure.ok for figure in off] == [True, False, True, False]
    monkeypatch.setattr(tables, "figures", lambda: tuple(off))
    assert tables.main() == 1
    assert capsys.readouterr().out.count("DIFFERS") == 2


def test_a_row_is_the_network_that_it_names(tables: ModuleType) -> None:
    """A trunk and a head that were counted each by itself are the D-ResNet of the zoo."""
    stream = zoo.d_resnet(18, "lstm", seed=0)
    found = tables.trunk(18) + tables.head("lstm", 2)
    inputs = (torch.zeros(1, 3, 112, 112), *stream.caches())
    assert found.parameters == parameters(stream.clip)
    assert found.multiply_adds == multiply_adds(stream.step, inputs)
    assert found.counted == multiply_adds(stream.step, inputs, elementwise=True)
    assert found.caches == stream.cache_bytes
