"""Random networks keep every promise, or are refused by name; there is no other outcome."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, seed, settings
from laws import Ranks, close, law, leaves, offline
from random_networks import Drawn, networks
from torch import Tensor

import dissect
from dissect.errors import NotStreamable
from dissect.forms import fresh
from dissect.lowering import lower
from dissect.squeezing import squeeze
from dissect.tuning import tune

CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much, HealthCheck.large_base_example]
LIMITS = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": CHECKS, "print_blob": False}
PRESETS = pytest.mark.parametrize("preset", ["d3d", "causal", "exact"])


def lowers(stream: dissect.Stream, clip: Tensor) -> None:
    """What is exported is the step form, lowered and tuned, and of rank 4 at most."""
    module = lower(stream, torch.float64)
    squeeze(module, [*stream.frame((clip,), 0), *stream.caches(2)])
    ours: Any = stream.caches(2)
    theirs: Any = ours
    with torch.no_grad():
        for time in range(4):
            out, *ours = stream.step(clip[:, :, time], *ours)
            recorder = Ranks(module)
            values = recorder.run(clip[:, :, time], *theirs)
            count = len(leaves(out))
            theirs = values[count:]
            close((values[:count], theirs), (leaves(out), tuple(ours)), 1e-9, "lowered against the step form")
            assert recorder.highest <= max(4, *(leaf.dim() for leaf in leaves(out))) or volumetric(stream)
    tuned = tune(module, stream.cache_list, stream.frame((clip[:1],), 0))
    ours, held = stream.caches(2), fresh(tuned.caches, 2, torch.float64)
    with torch.no_grad():
        for time in range(clip.shape[2]):
            out, *ours = stream.step(clip[:, :, time], *ours)
            values = tuned.module(clip[:, :, time], *held)
            held = values[len(leaves(out)) :]
            close(values[: len(leaves(out))], leaves(out), 1e-9, f"tuned against the step form, frame {time}")


def volumetric(stream: dissect.Stream) -> bool:
    """A frame has three dimensions of its own, all above 1: a window of pictures, or time that has ended and was padded."""
    return any(
        len(value.axes.frame) == 4 and min(value.axes.frame[1:]) > 1
        for value in stream.dissected.trace.values()
        if not value.constant
    )


def keeps_its_promises(drawn: Drawn, preset: str, lengths: int = 4) -> None:
    """The law, the promise that the preset makes about the original, and, for ``exact``, streams of other lengths."""
    try:
        stream = dissect.convert(drawn.network, drawn.clip, preset=preset)
    except NotStreamable as error:
        refusals = error.refusals
    else:
        refusals = ()
    if refusals:
        assert all(refusal.path and refusal.reason for refusal in refusals), str(refusals)
        event(f"refused: {refusals[0].reason}")
        return
    frames = drawn.clip.shape[2]
    generator = torch.Generator().manual_seed(1)
    clip = torch.randn(
        2, drawn.clip.shape[1], frames + 5, *drawn.clip.shape[3:], generator=generator, dtype=torch.float64
    )
    law(stream, clip, chunks=(3,))
    lowers(stream, clip)
    if preset == "exact" and stream.plan.exact:
        picked = [drawn.lengths[0], *drawn.lengths[1 :: max(1, len(drawn.lengths) // lengths)]]
        assert offline(stream, drawn.network, clip, picked[: lengths + 1]) > 0 or not finite(drawn)
    elif preset != "exact":
        report = dissect.verify(stream, drawn.network, runtime=False).check()
        event(f"{preset}: {'compared' if report.rows[-1].error is not None else 'law alone'}")


def finite(drawn: Drawn) -> bool:
    out = drawn.network(drawn.clip)
    return all(
        leaf.numel() and bool(leaf.isfinite().all()) for leaf in (out.values() if isinstance(out, dict) else [out])
    )


@PRESETS
@settings(max_examples=30, phases=(Phase.generate, Phase.shrink), **LIMITS)
@given(drawn=networks())
def test_promises(preset: str, drawn: Drawn) -> None:
    keeps_its_promises(drawn, preset)


@pytest.mark.slow
@PRESETS
@pytest.mark.parametrize("draw", range(10))
def test_many_more(draw: int, preset: str) -> None:
    """A thousand networks in each preset, of other draws than those of every run."""

    @seed(draw)
    @settings(max_examples=100, phases=(Phase.generate, Phase.shrink), **{**LIMITS, "derandomize": False})
    @given(drawn=networks())
    def drawn_anew(drawn: Drawn) -> None:
        keeps_its_promises(drawn, preset)

    drawn_anew()
