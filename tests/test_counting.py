"""Counting: every layer's multiply-adds against the arithmetic of its definition."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dissect.counting import multiply_adds, parameters
from dissect.errors import DissectError


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        pytest.param(nn.Conv3d(8, 4, 3, padding=1), (2, 8, 4, 5, 6), 2 * 8 * 4 * 27 * 120, id="conv"),
        pytest.param(nn.Conv3d(8, 4, 3, padding=1, groups=2), (1, 8, 4, 5, 6), 8 * 4 // 2 * 27 * 120, id="grouped"),
        pytest.param(nn.Conv3d(8, 8, 3, padding=1, groups=8), (1, 8, 4, 5, 6), 8 * 27 * 120, id="depthwise"),
        pytest.param(nn.Conv3d(8, 16, 3, padding=1, groups=8), (1, 8, 4, 5, 6), 16 * 27 * 120, id="multiplier"),
        pytest.param(nn.Conv3d(8, 4, 3, stride=(1, 2, 2)), (1, 8, 4, 7, 7), 8 * 4 * 27 * 2 * 3 * 3, id="strided"),
        pytest.param(nn.Conv2d(8, 8, 3, groups=8), (1, 8, 7, 7), 8 * 9 * 25, id="depthwise-2d"),
        pytest.param(
            nn.ConvTranspose3d(8, 4, 3, stride=2, groups=2), (1, 8, 4, 5, 6), 8 * 2 * 27 * 120, id="transposed"
        ),
        pytest.param(nn.Linear(8, 4), (2, 3, 8), 2 * 3 * 32, id="linear"),
        pytest.param(nn.LSTM(8, 16, 2, batch_first=True), (1, 5, 8), 5 * 4 * 16 * (24 + 32), id="lstm"),
        pytest.param(nn.GRU(8, 16, 2, batch_first=True), (1, 5, 8), 5 * 3 * 16 * (24 + 32), id="gru"),
        pytest.param(nn.BatchNorm3d(8), (1, 8, 4, 5, 6), 0, id="batch-norm"),
        pytest.param(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
            (1, 5, 8),
            5 * 8 * (4 * 8 + 2 * 16) + 2 * 25 * 8,
            id="transformer",
        ),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_multiply_adds_are_those_of_the_definition(
    layer: nn.Module, shape: tuple[int, ...], expected: int, training: bool
) -> None:
    assert multiply_adds(layer.train(training), torch.zeros(shape)) == expected


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        pytest.param(nn.BatchNorm3d(8), (1, 8, 4, 5, 6), 2 * 8 * 120, id="batch-norm"),
        pytest.param(nn.ReLU(), (1, 8, 4, 5, 6), 8 * 120, id="relu"),
        pytest.param(nn.ReLU(inplace=True), (1, 8, 4, 5, 6), 8 * 120, id="relu-inplace"),
        pytest.param(nn.MaxPool3d(3, 2, 1), (1, 8, 4, 6, 6), 27 * 8 * 2 * 3 * 3, id="max-pool"),
        pytest.param(nn.MaxPool3d((1, 3, 3), (1, 2, 2)), (1, 8, 4, 7, 7), 9 * 8 * 4 * 3 * 3, id="spatial-max-pool"),
        pytest.param(nn.MaxPool2d(2), (1, 8, 4, 6), 4 * 8 * 2 * 3, id="max-pool-2d"),
        pytest.param(nn.Linear(8, 4), (1, 8), 32, id="linear"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_elementwise_adds_norms_activations_and_pools(
    layer: nn.Module, shape: tuple[int, ...], expected: int, training: bool
) -> None:
    assert multiply_adds(layer.train(training), torch.zeros(shape), elementwise=True) == expected


def test_attention_counts_both_products() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    assert multiply_adds(Attention(), torch.zeros(1, 2, 5, 8)) == 2 * 2 * 25 * 8


def test_inputs_may_be_nested() -> None:
    class TwoPathways(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slow, self.fast = nn.Linear(3, 5), nn.Linear(4, 5)

        def forward(self, pathways: list[Tensor], gain: Tensor) -> Tensor:
            return gain * (self.slow(pathways[0]) + self.fast(pathways[1]))

    assert multiply_adds(TwoPathways(), ([torch.zeros(1, 3), torch.zeros(1, 4)], torch.ones(1))) == 15 + 20


def test_a_huge_input_costs_nothing() -> None:
    layer = nn.Conv3d(64, 64, 3, padding=1, bias=False)
    clip = torch.empty(1, 1, 1, 1, 1).expand(64, 64, 64, 512, 512)  # 256 GiB, were it real
    assert multiply_adds(layer, clip) == 64 * 64 * 27 * clip.numel() // 64


def test_the_module_is_left_as_it_is() -> None:
    module = nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4)).train()
    before = copy.deepcopy(module.state_dict())
    multiply_adds(module, torch.randn(2, 3, 4, 5, 5))
    after = module.state_dict()
    assert all(type(after[key]) is type(before[key]) and torch.equal(after[key], before[key]) for key in before)
    assert torch.backends.mha.get_fastpath_enabled()
    assert module(torch.randn(2, 3, 4, 5, 5)).isfinite().all()


def test_a_forward_that_reads_values_is_refused() -> None:
    class Reads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum().item() > 0 else -x

    with pytest.raises(DissectError, match="Reads: multiply-adds cannot be counted"):
        multiply_adds(Reads(), torch.ones(2))


def test_a_shared_parameter_counts_once() -> None:
    layer = nn.Linear(3, 5)
    assert parameters(nn.Sequential(layer, nn.BatchNorm1d(5), nn.Linear(5, 3), layer)) == 20 + 10 + 18
