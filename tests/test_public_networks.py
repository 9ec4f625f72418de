"""The oracles themselves: public networks react to every frame, to their order and to their batch norms."""

from __future__ import annotations

import pytest
import torch
from public_networks import PYTORCHVIDEO, TORCHVISION, example, network, random_clip
from torch import Tensor, nn


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / one.abs().max())


@pytest.mark.parametrize("name", [*TORCHVISION, *(pytest.param(name, marks=pytest.mark.slow) for name in PYTORCHVIDEO)])
def test_no_error_can_hide(name: str) -> None:
    built = network(name)

    def scores(seed: int = 0, backwards: bool = False) -> Tensor:
        clip = example(name, seed=seed)
        if backwards:
            clip = [pathway.flip(2) for pathway in clip] if isinstance(clip, list) else clip.flip(2)
        with torch.no_grad():
            return built(clip)

    expected = scores()
    assert not built.training
    assert expected.isfinite().all()
    assert expected.shape == (1, 400)
    assert _difference(expected, scores(seed=1)) > 0.02, "blind to the clip"
    if name != "c2d_r50":  # all that it does in time is an average
        assert _difference(expected, scores(backwards=True)) > 0.02, "blind to the order of frames"
    for layer in built.modules():
        if isinstance(layer, nn.BatchNorm3d):
            layer.running_mean.zero_()
    assert _difference(expected, scores()) > 0.02, "blind to the statistics of batch norms"


def test_a_seed_gives_the_same_network_again() -> None:
    first, second, other = (network("r3d_18", seed=seed, num_classes=3).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


def test_a_clip_changes_from_frame_to_frame() -> None:
    clip = random_clip((2, 3, 5, 40, 48), seed=3)
    assert torch.equal(clip, random_clip((2, 3, 5, 40, 48), seed=3))
    frames = clip.mean(dim=(3, 4))
    assert frames.std(dim=2).min() > 0.05
    assert clip.std().item() == pytest.approx(1, rel=0.2)
