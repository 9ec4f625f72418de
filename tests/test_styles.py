"""Networks in the styles of public code keep every promise, in every preset, as they are."""

from __future__ import annotations

import pytest
from styles import STYLES

import dissect

#: what has no streaming form there, and what the refusal must name
REFUSED: dict[tuple[str, str], str] = {}


@pytest.mark.parametrize("preset", ["exact", pytest.param("causal", marks=pytest.mark.slow), "d3d"])
@pytest.mark.parametrize("name", STYLES)
def test_keeps_its_promises(name: str, preset: str) -> None:
    style = STYLES[name]
    model, clip = style.build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if (name, preset) in REFUSED:
        with pytest.raises(dissect.NotStreamable, match=REFUSED[name, preset]):
            dissect.convert(model, clip, preset=preset, **style.options)
        return
    stream = dissect.convert(model, clip, preset=preset, **style.options)
    dissect.verify(stream, model).check()
    assert all((before[key] == value).all() for key, value in model.state_dict().items())
    if preset != "exact":
        assert stream.timing.delay == 0
