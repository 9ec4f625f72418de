"""The plan: one row for each node that touches time, what becomes of it, and whether that is exact.

A preset makes the plan; path patterns edit it. The residual-branch rule of the ``d3d`` preset is here too: it
works on the graph alone, where a branch is what lies between a fork and the addition (or concatenation) that ends it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from dissect.errors import PlanError

__all__ = ["OVERRIDES", "PRESETS", "Options", "Plan", "Row", "Settings"]

PRESETS = ("d3d", "causal", "exact")
POOLS = ("window", "cumulative", "none")
SKIPS = ("concat", "sum", "none")
FILLS = ("zeros", "replicate")

#: what an override may say of a layer, and what it means
OVERRIDES: dict[str, tuple[type[Any], str]] = {
    "depth": (int, "taps of a temporal convolution or pool; dropped taps are folded into the nearest kept one"),
    "skip": (str, "concat, sum or none: how a convolution takes in what it cached (d3d alone)"),
    "fill": (str, "zeros or replicate: what a convolution or a pool sees before the first frame (not exact)"),
    "pool": (str, "window, cumulative or none: what a global pool over time becomes"),
    "window": (int, "positions in the window of a global pool over time"),
    "wait": (bool, "a pool that is broadcast back onto every frame waits for the whole clip: exact, with delay"),
}

_CHOICES = {"pool": POOLS, "skip": SKIPS, "fill": FILLS}


@dataclass(frozen=True)
class Row:
    """One node that touches time. ``kernel``, ``stride`` and ``padding`` are those in time, of the original.

    ``future`` says that offline every frame sees the whole clip through this node, which no stream can without waiting.
    ``placed`` says that the original treats each position of the clip in a way of its own: to it no scene stands still.
    """

    path: str
    op: str
    decision: str
    verdict: str
    reason: str = ""
    kernel: int | None = None
    stride: int | None = None
    padding: tuple[int, int] | None = None
    dilation: int | None = None
    cache_shape: tuple[int, ...] | None = None
    cache_bytes: int = 0
    future: bool = False
    placed: bool = False
    source: str = ""


@dataclass(frozen=True)
class Options:
    """What was asked for: the preset, what becomes of pools, temporal skips and first frames, and edits by path pattern.

    preset, pool, window  the policy, what global pools over time become, and their window
    skip   temporal skip connections of the ``d3d`` preset: the cached frame is put beside the present one (``concat``),
           added to it before one convolution without time (``sum``), or dropped (``none``); never those of a stem
    fill   what stands before the first frame: ``zeros``, or that frame again (``replicate``)
    stem   frames that a stem sees in the ``d3d`` preset
    """

    preset: str = "d3d"
    pool: str = "window"
    window: int | None = None
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    skip: str = "concat"
    fill: str = "zeros"
    stem: int = 3

    @classmethod
    def checked(
        cls,
        preset: str,
        pool: str,
        window: int | None,
        overrides: Mapping[str, Mapping[str, Any]] | None,
        skip: str = "concat",
        fill: str = "zeros",
        stem: int | None = None,
    ) -> Options:
        """Options that make sense; raises PlanError that names the wrong one and what there is."""
        if preset not in PRESETS:
            raise PlanError(f"preset {preset!r} is unknown; there are {', '.join(PRESETS)}")
        for name, value in (("pool", pool), ("skip", skip), ("fill", fill)):
            if value not in _CHOICES[name]:
                raise PlanError(f"{name} {value!r} is unknown; there are {', '.join(_CHOICES[name])}")
        for name, count, what in (("window", window, "positions"), ("stem", stem, "frames")):
            if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
                raise PlanError(f"{name} must be a number of {what} of at least 1, not {count!r}")
        if stem is not None and preset != "d3d":
            raise PlanError(f"stem={stem} is for the preset d3d: {preset} keeps every tap")
        _fits("", {"skip": skip, "fill": fill}, preset)
        for pattern, changes in (overrides or {}).items():
            for key, value in changes.items():
                if key not in OVERRIDES:
                    raise PlanError(f"override {pattern!r}: no setting {key!r}; there are {', '.join(OVERRIDES)}")
                kind, meaning = OVERRIDES[key]
                wrong = isinstance(value, bool) or value < 1 if kind is int and isinstance(value, int) else False
                if not isinstance(value, kind) or wrong:
                    raise PlanError(
                        f"override {pattern!r}: {key}={value!r} is no {kind.__name__} that fits ({meaning})"
                    )
                if key in _CHOICES and value not in _CHOICES[key]:
                    there = ", ".join(_CHOICES[key])
                    raise PlanError(f"override {pattern!r}: {key}={value!r} is unknown; there are {there}")
            _fits(f"override {pattern!r}: ", changes, preset)
        return cls(preset, pool, window, dict(overrides or {}), skip, fill, 3 if stem is None else stem)

    def of(self, path: str) -> dict[str, Any]:
        """The overrides that apply to a path; later patterns win."""
        found: dict[str, Any] = {}
        for pattern, changes in self.overrides.items():
            if fnmatchcase(path, pattern):
                found.update(changes)
        return found

    def check_heard(self, heard: Collection[tuple[str, str]], paths: Sequence[str]) -> None:
        """Raise PlanError for an override that changed nothing.

        ``heard`` are pairs of a path and a setting that its layer has asked for, ``paths`` those of layers that touch time.
        """
        paths = list(dict.fromkeys(paths))
        for pattern, changes in self.overrides.items():
            fits = [path for path in paths if fnmatchcase(path, pattern)]
            if not fits:
                there = ", ".join(filter(None, paths))
                raise PlanError(f"override {pattern!r} fits no layer that touches time; these do: {there}")
            for key in changes:
                if not any((path, key) in heard for path in fits):
                    there = ", ".join(fits[:4]) + ", ..." * (len(fits) > 4)
                    raise PlanError(
                        f"override {pattern!r}: {key} changes nothing at {there} in the preset {self.preset}; it says of a "
                        f"layer: {OVERRIDES[key][1]}"
                    )


class Settings(dict[str, Any]):
    """The overrides for the layer at a path; what is asked of them is noted in ``heard``, set or not."""

    def __init__(self, changes: Mapping[str, Any], path: str, heard: set[tuple[str, str]]) -> None:
        super().__init__(changes)
        self.path, self.heard = path, heard

    def get(self, key: str, default: Any = None) -> Any:
        """The setting, or ``default`` where the overrides leave it open."""
        self.heard.add((self.path, key))
        return super().get(key, default)


def _fits(where: str, settings: Mapping[str, Any], preset: str) -> None:
    """Raise PlanError for a skip or a fill that the preset has no use for."""
    if preset != "d3d" and settings.get("skip", "concat") != "concat":
        raise PlanError(f"{where}skip={settings['skip']} is for the preset d3d: {preset} keeps every tap")
    if preset == "exact" and settings.get("fill", "zeros") != "zeros":
        raise PlanError(f"{where}fill={settings['fill']} is not for exact: its edges are those of the original network")


@dataclass(frozen=True)
class Plan:
    """The decisions of one conversion, in the order of the graph."""

    preset: str
    rows: tuple[Row, ...]

    @property
    def exact(self) -> bool:
        """No row is approximate."""
        return all(row.verdict == "exact" for row in self.rows)

    @property
    def approximate(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.verdict == "approximate")

    @property
    def cache_bytes(self) -> int:
        """Bytes of all caches of one stream that rows account for."""
        return sum(row.cache_bytes for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def to_json(self, indent: int | None = 2) -> str:
        """The plan as JSON: ``{"preset", "exact", "rows": [...]}``."""
        return json.dumps(
            {"preset": self.preset, "exact": self.exact, "rows": [asdict(row) for row in self.rows]}, indent=indent
        )

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Head and cells of the plan as text."""
        head: tuple[str, ...] = (
            "layer",
            "operator",
            "kernel",
            "stride",
            "padding",
            "decision",
            "verdict",
            "why",
            "cache",
        )
        cells: list[tuple[str, ...]] = [
            (
                row.path or "-",
                row.op,
                "" if row.kernel is None else str(row.kernel),
                "" if row.stride is None else str(row.stride),
                "" if row.padding is None else f"{row.padding[0]},{row.padding[1]}",
                row.decision,
                row.verdict,
                row.reason,
                f"{row.cache_bytes:,} B" if row.cache_bytes else "",
            )
            for row in self.rows
        ]
        return head, cells

    def to_markdown(self) -> str:
        """The plan as a Markdown table."""
        head, cells = self.table()
        lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        return "\n".join(lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells])

    def __str__(self) -> str:
        head, cells = self.table()
        widths = [max(len(row[i]) for row in [head, *cells]) for i in range(len(head))]
        text = "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in [head, *cells]
        )
        promise = "exact" if self.exact else f"{len(self.approximate)} of {len(self.rows)} rows approximate"
        return f"{text}\npreset {self.preset}: {promise}"


class Branches:
    """Forks and merges of a graph of activations, found by data flow.

    ``inputs`` gives, for each node in topological order, the nodes it reads; ``merges`` are the additions and
    concatenations of two or more of them; ``strided`` are the nodes that reduce the frame's size.
    """

    def __init__(self, inputs: Mapping[Any, Sequence[Any]], merges: Sequence[Any], strided: Sequence[Any]) -> None:
        self.inputs = inputs
        index = {node: at for at, node in enumerate(inputs)}
        order = list(inputs)
        self.above: dict[Any, int] = {}
        for node, reads in inputs.items():
            mask = 1 << index[node]
            for read in reads:
                mask |= self.above[read]
            self.above[node] = mask
        self.index = index
        self.ends: set[Any] = set(merges)
        self.inside = 0
        for merge in merges:
            shared = ~0
            for read in inputs[merge]:
                shared &= self.above[read]
            if shared <= 0:
                continue
            fork = order[shared.bit_length() - 1]
            self.ends.add(fork)
            below = sum(
                1 << index[node]
                for node in order[index[fork] + 1 : index[merge]]
                if self.above[node] >> index[fork] & 1
            )
            self.inside |= below & self.above[merge]
        self.strided = {node for node in strided if not self.in_branch(node)}

    def in_branch(self, node: Any) -> bool:
        return bool(self.inside >> self.index[node] & 1)

    def first(self, node: Any, others: set[Any]) -> bool:
        """No node of ``others`` lies between ``node`` and the fork, merge or stage that it follows."""
        if node in self.strided:
            return True
        seen, stack = set(), list(self.inputs[node])
        while stack:
            read = stack.pop()
            if read in seen:
                continue
            seen.add(read)
            if read in self.ends:
                continue
            if read in others:
                return False
            if read not in self.strided:
                stack.extend(self.inputs[read])
        return True

    def any_above(self, node: Any, others: set[Any]) -> bool:
        """One of ``others`` feeds ``node``, however far away."""
        return any(other is not node and self.above[node] >> self.index[other] & 1 for other in others)
