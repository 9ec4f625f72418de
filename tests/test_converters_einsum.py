"""Einsum, with time under one label, two, or none."""

from __future__ import annotations

import pytest
import torch
from laws import law, offline
from torch import Tensor, nn

import dissect
from dissect.converters.einsum import parsed


class Einsum(nn.Module):
    def __init__(self, equation: str, last: bool) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 4, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(4, 5))
        self.equation, self.last = equation, last

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        left, _, _ = self.equation.partition("->")
        shapes = {
            "nctv": x.flatten(3),
            "ncthw": x,
            "ntc": x.mean((3, 4)).transpose(1, 2),
            "nsc": x.amax((3, 4)).transpose(1, 2),
            "nt...": x.movedim(2, 1),
            "...c": x.movedim(1, -1),
            "cd": self.weight,
            "nmtc": x.mean(4).permute(0, 3, 2, 1),
            "nc": x.mean((2, 3, 4)),
        }
        y = torch.einsum(self.equation, [shapes[term] for term in left.split(",")])
        return y[:, -1] if self.last else y


EXACT = {
    "ncthw,cd->ndthw": False,
    "ntc,ntc->nt": False,
    "ntc,cd->ntd": False,
    "...c,cd->...d": False,
    "nt...,cd->nt...cd": False,
    "nctv,nctv->nctv": False,
    "nmtc,nmtc->ntm": False,
    "ntc,nsc->nts": True,
    "ntc->nc": False,
    "ntc,ntc->nc": False,
    "nctv,ntc->nv": False,
    "ntc,nsc->n": False,
    "ntc,nsc->nt": True,
    "ntc->tn": False,
}


@pytest.mark.parametrize("equation", EXACT)
def test_einsum(equation: str) -> None:
    torch.manual_seed(0)
    last = EXACT[equation]
    network = Einsum(equation, last).double().eval()
    clip = torch.randn(2, 2, 6, 3, 2, dtype=torch.float64)
    for preset in ("causal", "d3d"):
        dissect.verify(dissect.convert(network, clip, preset=preset), network, runtime=False).check()
    stream = dissect.convert(network, clip, preset="exact")
    law(stream, clip, chunks=(2,))
    assert stream.plan.exact
    lengths = (6,) if equation == "ntc,nsc->nts" else (6, 5, 3)  # the window of keys is as long as the example
    assert offline(stream, network, clip, lengths) == len(lengths)


@pytest.mark.parametrize("equation", ["ncthw,cd->ndthw", "ntc,nsc->nts", "ntc,ntc->nc"])
def test_a_step_is_an_onnx_model(equation: str) -> None:
    torch.manual_seed(0)
    network = Einsum(equation, EXACT[equation]).eval()
    dissect.verify(dissect.convert(network, torch.randn(1, 2, 6, 3, 2), preset="exact"), network).check()


def test_a_sum_over_the_batch_is_refused() -> None:
    with pytest.raises(dissect.NotStreamable, match="over the batch"):
        dissect.convert(Einsum("ntc,ntc->tc", False).eval(), torch.randn(2, 2, 6, 3, 2))


@pytest.mark.parametrize(
    ("equation", "ranks", "labels", "out"),
    [
        ("ab,bc->ac", [2, 2], ["ab", "bc"], "ac"),
        ("ab,bc", [2, 2], ["ab", "bc"], "ac"),
        ("ba", [2], ["ba"], "ab"),
        ("a...,b->b...a", [3, 1], [["a", -2, -1], "b"], ["b", -2, -1, "a"]),
        ("...a,...b->...", [3, 2], [[-2, -1, "a"], [-1, "b"]], [-2, -1]),
        (" i j , j k -> i k ", [2, 2], ["ij", "jk"], "ik"),
    ],
)
def test_equations(equation: str, ranks: list[int], labels: list[str], out: str) -> None:
    assert parsed(equation, ranks) == ([list(names) for names in labels], list(out))
