"""A survey: networks in the manner of well-known public code keep what each preset promises, or are refused with the reason."""

from __future__ import annotations

import pytest
import torch
from laws import close, streamed
from survey import Network, families
from survey.packages import PACKAGES
from torch.utils import _pytree as pytree

import dissect

NETWORKS = {name: network for family in families().values() for name, network in family.items()}

#: a few for every run, of as many kinds; the others are marked slow
QUICK = (
    ("C3D", "exact"),
    ("ResNetA", "d3d"),
    ("TSM", "causal"),
    ("TemporalAttentionPool", "exact"),
    ("DeepPhys", "exact"),
    ("SqueezedOutputs", "d3d"),
    ("BidirectionalLSTM", "exact"),
)


def cases() -> list[object]:
    slow = pytest.mark.slow
    pairs = [(name, preset) for name in NETWORKS for preset in ("exact", "causal", "d3d")]
    assert set(QUICK) <= set(pairs)
    return [pytest.param(*pair, marks=() if pair in QUICK else slow, id="-".join(pair)) for pair in pairs]


@pytest.mark.parametrize(("name", "preset"), cases())
def test_keeps_its_promises(name: str, preset: str) -> None:
    network = NETWORKS[name]
    model, args = network.build()
    if preset in network.refused:
        with pytest.raises(dissect.NotStreamable, match=network.refused[preset]) as refused:
            dissect.convert(model, args, preset=preset, **network.options)
        assert all(refusal.op and refusal.reason and refusal.fix for refusal in refused.value.refusals)
        return
    stream = dissect.convert(model, args, preset=preset, **network.options)
    dissect.verify(stream, model).check()
    if preset != "exact":
        assert stream.timing.delay == 0
    elif stream.plan.exact:
        whole(stream, model, args, network)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["exact", "causal", "d3d"])
@pytest.mark.parametrize("name", PACKAGES)
def test_packages_keep_their_promises(name: str, preset: str) -> None:
    """Unmodified networks of packages on PyPI; a refusal names the operator, the reason, and what one could do."""
    package = PACKAGES[name]
    try:
        model, args = package.build()
    except ImportError:
        pytest.skip(f"{package.distribution} is not installed")
    try:
        stream = dissect.convert(model, args, preset=preset, **package.options)
    except dissect.NotStreamable as refused:
        assert [r for r in refused.refusals if not (r.op and r.reason and r.fix)] == []  # noqa: PT017
        return
    dissect.verify(stream, model).check()


def whole(stream: dissect.Stream, model: torch.nn.Module, args: tuple[object, ...], network: Network) -> None:
    """Stream and flush give the network's own output for a clip that is not the example."""
    generator = torch.Generator().manual_seed(1)
    clip = pytree.tree_map(lambda leaf: torch.rand(leaf.shape, generator=generator, dtype=leaf.dtype), args)
    with torch.no_grad():
        dense, frames = stream.dense(*clip), stream.dissected.inputs.frames
        wanted = model(*pytree.tree_map(torch.clone, stream.original(*dense)))  # its pathways show the same frames
        got = streamed(stream, *dense, frames=frames)
        if network.squeezed:  # a batch of one
            wanted = pytree.tree_map(lambda leaf: leaf.unsqueeze(0), wanted)
        close(got, stream.apart(wanted, frames, original=True))
