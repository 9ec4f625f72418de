"""Public networks of torchvision and pytorchvideo, unmodified, at their own size: minutes each, so marked slow."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from laws import close, streamed
from public_networks import NETWORKS, PYTORCHVIDEO, example, network
from torch import nn

import dissect

pytestmark = pytest.mark.slow
PRESETS = ["exact", "causal", "d3d"]

#: what makes them approximate in ``exact``: squeeze-and-excitation in the middle, which can wait for the whole clip
WAITING = {name: {"*norm_b.1": {"wait": True}} for name in NETWORKS if name.startswith("x3d")}


@cache
def built(name: str) -> nn.Module:
    return network(name)


def given(name: str, **options: Any) -> Any:
    """The example as the network's inputs: pytorchvideo's take one argument, which may be a list."""
    return (example(name, **options),)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", NETWORKS)
def test_converted_verified_and_run(name: str, preset: str) -> None:
    stream = dissect.convert(built(name), given(name), preset=preset)
    report = dissect.verify(stream, built(name)).check()
    compared = any(row.pair.startswith("original") and row.error is not None for row in report.rows)
    # kernels cannot be shifted where a value of the whole clip goes back onto every frame
    assert compared is (preset != "causal" or name not in WAITING)
    assert any("ONNX Runtime" in row.pair for row in report.rows)
    if preset == "exact":
        assert stream.plan.exact or all("wait" in row.reason for row in stream.plan.approximate)
        assert stream.plan.exact is (name not in WAITING)


@pytest.mark.parametrize("name", [name for name in PYTORCHVIDEO if name not in WAITING])
def test_exact_is_the_unmodified_network(name: str) -> None:
    network = built(name).double()
    clip = given(name)
    clip = torch.utils._pytree.tree_map(torch.Tensor.double, clip)
    try:
        stream = dissect.convert(network, clip, preset="exact")
        with torch.no_grad():
            wanted = network(*torch.utils._pytree.tree_map(torch.Tensor.clone, clip))
            dense = stream.dense(*clip)
            close(streamed(stream, *dense, frames=stream.dissected.inputs.frames), wanted, 1e-8)
    finally:
        network.float()


@pytest.mark.parametrize("name", WAITING)
def test_waiting_buys_exactness(name: str) -> None:
    network = built(name).double()
    try:
        clip = given(name)[0].double()
        stream = dissect.convert(network, clip, preset="exact", overrides=WAITING[name])
        assert stream.plan.exact
        with torch.no_grad():
            close(streamed(stream, clip, frames=clip.shape[2]), network(clip), 1e-8)
    finally:
        network.float()
