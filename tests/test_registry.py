"""The registry of converters: by operator object, one each, extended from outside."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dissect
from dissect.registry import find, load_rules, registered


def test_every_shipped_operator_is_an_operator_object() -> None:
    assert len(registered()) > 150
    assert all(callable(op) for op in registered())  # objects, never names


def test_registering_twice_is_an_error() -> None:
    with pytest.raises(dissect.DissectError, match="has a converter already"):
        dissect.converter(torch.ops.aten.relu.default)(lambda ctx, x: x)
    assert find(torch.ops.aten.relu.default) is not None


RULES = """
import torch
import dissect

@torch.library.custom_op("dissect_tests::cube", mutates_args=())
def cube(x: torch.Tensor) -> torch.Tensor:
    return x**3

cube.register_fake(torch.empty_like)
dissect.pointwise(torch.ops.dissect_tests.cube.default)
"""


class Cubed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.dissect_tests.cube(self.conv(x)).mean((2, 3, 4))


def test_rules_of_ones_own(tmp_path: Path) -> None:
    rules = tmp_path / "my_rules.py"
    rules.write_text(RULES)
    load_rules(rules)
    load_rules(rules)  # a second time is the same file
    model, clip = Cubed().double().eval(), torch.rand(1, 2, 5, 6, 6, dtype=torch.float64)
    stream = dissect.convert(model, clip, preset="exact")
    dissect.verify(stream, model, runtime=False).check()


def test_a_missing_converter_is_named_with_place_and_fix() -> None:
    @torch.library.custom_op("dissect_tests::unknown", mutates_args=())
    def unknown(x: Tensor) -> Tensor:
        return x.clone()

    unknown.register_fake(torch.empty_like)

    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.dissect_tests.unknown(x)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stage = nn.Sequential(nn.Conv3d(2, 3, 3, padding=1), Inner())

        def forward(self, x: Tensor) -> Tensor:
            return self.stage(x).mean((2, 3, 4))

    with pytest.raises(dissect.NotStreamable) as caught:
        dissect.convert(Outer().eval(), torch.rand(1, 2, 5, 6, 6))
    (refusal,) = caught.value.refusals
    assert refusal.path == "stage.1"
    assert "dissect_tests.unknown" in refusal.op
    assert "--rules" in refusal.fix
    assert refusal.source.startswith("test_registry.py:")


@pytest.mark.parametrize("text", [None, "import nonsense_that_is_not_there", "def broken(:"])
def test_a_file_of_rules_that_does_not_load_says_so(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / f"rules_{text and len(text)}.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(dissect.DissectError, match=path.name):
        load_rules(path)
