"""Single frames in front of a clip and behind it: which frame each is, and when it is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dissect.context import Context, Refused, Value
from dissect.meeting import lateness, positions
from dissect.timing import Timing


@dataclass(frozen=True)
class Part:
    """One frame of a concatenation: position ``index`` of ``value``, from its start, or from its end (1 is the last).

    ``at`` picks it out of a value of the whole clip that holds several side by side. ``tensor`` is a constant frame instead.
    """

    value: Value
    index: int
    end: bool = False
    axis: int | None = None
    at: int = 0


def due(y: Value, left: list[Part]) -> int:
    """The time at which the first frame in front of the main part can be there, if the others come at their places."""
    clock = y.clock
    here = (source(part) - at * clock.stride for at, part in enumerate(left) if not part.value.constant)
    return max([0, clock.delay - len(left) * clock.stride, *here])


def since(y: Value, left: list[Part]) -> int:
    """The same time; refuses a front that waits for the clip's end."""
    start = due(y, left)
    before = len(left) * y.clock.stride
    wraps = start >= max(y.clock.delay, 0) + (positions(y.axes) or 0) * y.clock.stride - before
    if wraps and others(y, left):
        raise Refused(*_TWO)
    if wraps:
        raise Refused(
            "a concatenation that puts the end of the clip in front of its beginning: the first frame would wait for the last",
            "shift with zeros, or with the first frame",
            clipwise=any(drawn(part, y) for part in left),
        )
    return start


def repeated(main: Value, left: list[Part]) -> tuple[int, ...]:
    """Which positions of the main part its front is made of, the nearest first; none, if of anything else, or of what would
    be there too late for the first of them."""
    clock = main.clock
    own = all(part.value.node is main.node and part.axis is None and not part.end for part in left)
    places = [source(part) - clock.delay for part in reversed(left)] if own else [-1]
    if any(place < 0 or place % clock.stride for place in places) or clock.delay + max(places) > due(main, left):
        return ()
    sliced = any(part.value.clock.delay != clock.delay for part in left)
    if sliced or max(places) >= ((positions(main.axes) or 0) - 1) * clock.stride:
        since(main, left)
    while places[-2:-1] == places[-1:]:  # the last one stands further on anyway
        places.pop()
    return tuple(place // clock.stride for place in places)


def others(main: Value, parts: Sequence[Part]) -> int:
    """How many of the parts are frames of another tensor that goes on with the stream."""
    return sum(
        part.axis is None
        and not part.value.constant
        and part.value.node is not main.node
        and part.value.clock.length(64) > 2
        for part in parts
    )


def drawn(part: Part, main: Value) -> bool:
    """An entry of what was made of more frames than the main part's positions are, not a position that was selected."""
    if part.axis is None or part.value.constant:
        return False
    return part.value.clock.old - part.value.clock.new > main.clock.old - main.clock.new


def apart(main: Value, parts: Sequence[Part], size: int) -> None:
    """Refuse to leave out of a concatenation the levels of a pyramid: half as long as the main part, and at another rate;
    and what was drawn from the whole clip."""
    if any(drawn(part, main) for part in parts):
        raise Refused(*_TWO)
    rates = {part.value.clock.removed * part.value.clock.stride for part in parts if not part.value.constant}
    if 2 * others(main, parts) >= size and rates != {main.clock.removed * main.clock.stride}:
        raise Refused(*_TWO)


_TWO = (
    "a concatenation along time of two tensors that both go on with the stream: one would begin where the other ends",
    "concatenate them along channels, or bring one to the positions of the other and add it",
    True,  # clipwise
)


def silent(part: Part) -> bool:
    """A frame of zeros."""
    tensor = part.value.tensor
    return tensor is not None and part.value.name is None and not bool(tensor.narrow(part.axis or 0, part.at, 1).any())


def source(part: Part) -> int:
    """The time at which the frame exists, from the start of the stream."""
    clock = part.value.clock
    return clock.delay if part.axis is not None else clock.delay + part.index * clock.stride


def offset(ctx: Context, part: Part, clock: Timing, at: int) -> int | None:
    """How long after the frame its place comes, ``at`` positions behind the main part's last; None for one of the clip's first."""
    if part.value.constant:
        return 0
    if not part.end:
        return None
    own = part.value.clock
    pairs = zip(reversed(lateness(clock, ctx.frames)), reversed(lateness(own, ctx.frames)), strict=False)
    gaps = {end - other for end, other in pairs}
    if len(gaps) != 1:
        raise Refused("a concatenation along time of parts whose lengths do not go together", clipwise=True)
    return gaps.pop() + at * clock.stride + (part.index - 1) * own.stride
