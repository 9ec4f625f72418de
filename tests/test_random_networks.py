"""Random networks keep every promise, or are refused by name; there is no other outcome."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, settings
from laws import law, offline
from random_networks import Drawn, networks

import dissect
from dissect.errors import NotStreamable

CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much, HealthCheck.large_base_example]
LIMITS = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": CHECKS, "print_blob": False}
PRESETS = pytest.mark.parametrize("preset", ["d3d", "causal", "exact"])


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    """torch's own objects are many and live for ever: keep the collector from going through them again and again."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def keeps_its_promises(drawn: Drawn, preset: str, lengths: int = 4) -> None:
    """The law, the promise that the preset makes about the original, and, for ``exact``, streams of other lengths."""
    try:
        stream = dissect.convert(drawn.network, drawn.clip, preset=preset)
    except NotStreamable as refused:
        refusals = refused.refusals
        assert all(refusal.op and refusal.reason for refusal in refusals), [str(refusal) for refusal in refusals]
        event(f"refused: {refusals[0].reason}")
        return
    frames = drawn.clip.shape[2]
    generator = torch.Generator().manual_seed(1)
    clip = torch.randn(
        2, drawn.clip.shape[1], frames + 5, *drawn.clip.shape[3:], generator=generator, dtype=torch.float64
    )
    law(stream, clip, chunks=(3,))
    if preset == "exact" and stream.plan.exact:
        picked = [drawn.lengths[0], *drawn.lengths[1 :: max(1, len(drawn.lengths) // lengths)]]
        assert offline(stream, drawn.network, clip, picked[: lengths + 1]) > 0 or not finite(drawn)
    elif preset == "d3d":  # causal: the shifted oracle does not know every drawn pool yet; the law holds above
        report = dissect.verify(stream, drawn.network, runtime=False).check()
        event(f"{preset}: {'compared' if report.rows[-1].error is not None else 'law alone'}")


def finite(drawn: Drawn) -> bool:
    out = drawn.network(drawn.clip)
    return all(
        leaf.numel() and bool(leaf.isfinite().all()) for leaf in (out.values() if isinstance(out, dict) else [out])
    )


@PRESETS
@settings(max_examples=100, phases=(Phase.generate, Phase.shrink), **LIMITS)
@given(drawn=networks())
def test_promises(preset: str, drawn: Drawn) -> None:
    keeps_its_promises(drawn, preset)
