"""The zoo: its networks have the paper's sizes and behave as torchvision's do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from dissect import zoo
from dissect.counting import multiply_adds, parameters

FACTORIES = [zoo.resnet18, zoo.resnet34, zoo.resnet50, zoo.resnet101]


@pytest.mark.parametrize(
    ("factory", "millions"), [(zoo.resnet18, "33.24"), (zoo.resnet50, "44.24"), (zoo.resnet101, "83.29")]
)
def test_parameters_are_those_of_the_paper(factory: Callable[..., zoo.ResNet], millions: str) -> None:
    with torch.device("meta"):
        network = factory(num_classes=400, shortcut="A")
    assert f"{parameters(network) / 1e6:.2f}" == millions


@pytest.mark.parametrize(("factory", "millions"), [(zoo.resnet18, 8323), (zoo.resnet50, 9835), (zoo.resnet101, 13664)])
def test_multiply_adds_are_those_of_the_paper(factory: Callable[..., zoo.ResNet], millions: int) -> None:
    with torch.device("meta"):
        network, clip = factory(num_classes=600, shortcut="A"), torch.empty(1, 3, 16, 112, 112)
    assert round(multiply_adds(network, clip, elementwise=True) / 1e6) == millions
    assert multiply_adds(network, clip) / 1e6 == pytest.approx(millions, rel=0.006)


def test_c3d_has_the_parameters_of_the_original() -> None:
    with torch.device("meta"):
        network = zoo.c3d(num_classes=101)
    assert f"{parameters(network) / 1e6:.2f}" == "78.41"


@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("factory", FACTORIES)
def test_resnets_give_scores_for_any_clip(factory: Callable[..., zoo.ResNet], shortcut: zoo.Shortcut) -> None:
    network = factory(num_classes=5, shortcut=shortcut, in_channels=2, width=4, seed=0).eval()
    with torch.no_grad():
        for frames, height, width in [(16, 32, 32), (7, 33, 48), (1, 8, 8)]:
            scores = network(torch.randn(2, 2, frames, height, width))
            assert scores.shape == (2, 5)
            assert scores.isfinite().all()


@pytest.mark.parametrize(
    ("average", "frames", "size"), [(False, 16, 112), (False, 31, 112), (True, 16, 16), (True, 40, 50)]
)
def test_c3d_gives_scores(average: bool, frames: int, size: int) -> None:
    network = zoo.c3d(num_classes=5, width=2, hidden=6, average=average, seed=0).eval()
    with torch.no_grad():
        assert network(torch.randn(2, 3, frames, size, size)).shape == (2, 5)


def test_shortcut_a_subsamples_and_pads_with_zeros() -> None:
    skip = zoo.SubsampleAndPad(new_channels=3, stride=2)
    x = torch.randn(2, 4, 5, 6, 7)
    y = skip(x)
    assert torch.equal(y[:, :4], x[:, :, ::2, ::2, ::2])
    assert y.shape == (2, 7, 3, 3, 4)
    assert not y[:, 4:].any()
    assert not list(skip.parameters())


def test_the_neck_adds_its_weights_and_narrows_the_head() -> None:
    with torch.device("meta"):
        plain, necked = zoo.resnet50(num_classes=10), zoo.resnet50(num_classes=10, neck=512)
    assert necked.fc.in_features == 512
    assert parameters(necked) - parameters(plain) == 2048 * 512 - (2048 - 512) * 10


def test_a_seed_fixes_the_weights_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first, second, other = (zoo.resnet18(num_classes=3, width=2, seed=seed).state_dict() for seed in (7, 7, 8))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def test_networks_come_in_training_mode_with_fresh_statistics() -> None:
    network = zoo.resnet18(num_classes=3, width=2)
    assert network.training
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm3d)]
    assert len(norms) == 17
    assert all(norm.running_mean is not None and not norm.running_mean.any() for norm in norms)


def test_an_unknown_shortcut_is_refused() -> None:
    with pytest.raises(ValueError, match="'A' or 'B'"):
        zoo.resnet18(shortcut="C")  # type: ignore[arg-type]
