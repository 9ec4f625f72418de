"""Writes docs/coverage.md: what becomes of each pattern, operator and public network, as this version does it.

    python docs/make_coverage.py                    # everything, which takes an hour or two
    python docs/make_coverage.py public packages    # these sections alone; the others stay as they are

Every figure comes from a run: the network is converted as it is, and verified against itself, unmodified. A network
whose package is not installed is left out, and said to be. The exit code is 1 where a promise is broken.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import dissect
from dissect.counting import multiply_adds
from dissect.registry import registered

HERE = Path(__file__).parent
PAGE = HERE / "coverage.md"
PRESETS = ("exact", "causal", "d3d")

HEAD = """# Coverage

Written by `python docs/make_coverage.py`. Each network was converted as it is and verified against itself, unmodified.

- **exact**: no row of the plan is approximate. In `exact`, stream and flush give the network's own output for the clip.
- **kept**: the plan has approximate rows, as the preset has it, and all that the preset promises was measured and holds.
- **law**: as *kept*, but the original cannot be run the preset's way (see the note in `verify`), so that only the law
  (clip form = chunks = steps) was measured.
- **approximate**: rows of `exact` that cannot be exact, and why.
- **refused**: it has no streaming meaning; the reason that the error gives.
"""


@dataclass(frozen=True)
class Outcome:
    """What came of one network in one preset."""

    text: str
    stream: dissect.Stream | None = None
    error: float | None = None
    broken: bool = False


def measured(model: Any, example: Any, preset: str, options: dict[str, Any]) -> Outcome:
    """Convert and verify one network; notes every row of its plan for the table of operators."""
    try:
        with quiet():
            stream = dissect.convert(model, example, preset=preset, **options)
    except dissect.NotStreamable as refused:
        for refusal in refused.refusals:
            noted(refusal.op, preset, "refused")
        reasons = dict.fromkeys(f"`{refusal.op}`: {refusal.reason}" for refusal in refused.refusals)
        return Outcome("refused: " + "; ".join(reasons))
    except dissect.DissectError as error:
        return Outcome(f"refused: {str(error).splitlines()[0]}")
    for row in stream.plan:
        noted(row.op, preset, row.verdict)
    with quiet():
        report = dissect.verify(stream, model, runtime=False)
    if not report.ok:
        return Outcome("**BROKEN**", stream, None, True)
    compared = [row.error for row in report.rows if row.pair.startswith("original") and row.error is not None]
    worst = max(compared, default=None)
    if stream.plan.exact:
        return Outcome("exact" if compared else "law", stream, worst)
    if preset != "exact":
        return Outcome("kept" if compared else "law", stream, worst)
    rows = dict.fromkeys(f"`{row.op}`: {row.reason.split(';')[0]}" for row in stream.plan.approximate)
    return Outcome("approximate: " + "; ".join(rows), stream, worst)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing that a network prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


VERDICTS: dict[str, dict[str, set[str]]] = {}


def noted(op: str, preset: str, verdict: str) -> None:
    VERDICTS.setdefault(op, {}).setdefault(preset, set()).add(verdict)


def table(*heads: str) -> list[str]:
    return ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]


def row(*cells: Any) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def said(thing: Any) -> str:
    """The first sentence of a docstring."""
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def cells(name: str, build: Callable[[], tuple[Any, Any]], options: dict[str, Any], found: list[str]) -> list[str]:
    """The outcomes of one network in all presets."""
    texts = []
    for preset in PRESETS:
        model, example = build()
        outcome = measured(model, example, preset, options)
        if outcome.broken:
            found.append(f"{name}, {preset}")
        texts.append(outcome.text)
    print(name, texts, file=sys.stderr, flush=True)
    return texts


# -- the sections


def patterns(found: list[str]) -> Iterator[str]:
    """Small networks in the styles of public code."""
    from styles import STYLES

    yield "## Patterns"
    yield ""
    yield "Small networks, each for a way in which public code touches time (`tests/styles.py`)."
    yield ""
    yield from table("network", "what it shows", *PRESETS)
    for name, style in STYLES.items():
        yield row(name, said(style.network), *cells(name, style.build, style.options, found))


def family(name: str, found: list[str]) -> Iterator[str]:
    """One family of the survey."""
    from survey import families

    yield f"## Survey: {name}"
    yield ""
    yield f"Networks typed in the manner of public code, at reduced width (`tests/survey/{name}.py`)."
    yield ""
    yield from table("network", "what it is", *PRESETS)
    for key, network in families()[name].items():
        yield row(key, said(network.kind), *cells(key, network.build, dict(network.options), found))


def operators(verdicts: dict[str, dict[str, set[str]]]) -> Iterator[str]:
    """Every operator with a converter, by family, and what was seen of it in each preset."""
    from dissect.rewrite import op_name

    homes: dict[str, set[str]] = {}
    for op, function in registered().items():
        homes.setdefault(op_name(op), set()).add(function.__module__.rpartition(".")[2])
    yield "## Operators"
    yield ""
    yield "What the plans of all networks above say of each operator; one that only works inside a frame needs no row."
    yield ""
    yield from table("operator", "family", *PRESETS)
    for op in sorted({*homes, *verdicts}, key=lambda op: (sorted(homes.get(op, {"-"})), op)):
        seen = [", ".join(sorted(verdicts.get(op, {}).get(preset, ()))) for preset in PRESETS]
        if any(seen):
            yield row(f"`{op}`", ", ".join(sorted(homes.get(op, {"none"}))), *(text or "-" for text in seen))
    silent = sorted(set(homes) - set(verdicts))
    yield ""
    yield f"Converted as well, with no row of their own in these plans ({len(silent)}): " + ", ".join(
        f"`{op}`" for op in silent
    )


def header(cells: list[str]) -> list[str]:
    return [row(cells[0].removeprefix("| "), cells[1], *PRESETS)]


def totals(text: str) -> Iterator[str]:
    """How many networks of the page came out how."""
    yield "## Totals"
    yield ""
    counts: dict[str, dict[str, int]] = {preset: {} for preset in PRESETS}
    for name in SECTIONS:
        for line in section(text, name).splitlines():
            found = line.split(" | ")
            network = line.startswith("| ") and len(found) == 2 + len(PRESETS) and line != "".join(header(found))
            if network and found[2] != "---":
                for preset, cell in zip(PRESETS, found[2:], strict=True):
                    verdict = cell.removesuffix(" |").partition(":")[0]
                    counts[preset][verdict] = counts[preset].get(verdict, 0) + 1
    verdicts = sorted({verdict for found in counts.values() for verdict in found})
    yield "Patterns, survey and packages:"
    yield ""
    yield from table("preset", *verdicts)
    for preset in PRESETS:
        yield row(preset, *(counts[preset].get(verdict, 0) for verdict in verdicts))


def public(found: list[str]) -> Iterator[str]:
    """torchvision and pytorchvideo, at the size that each was made for."""
    import public_networks

    yield "## Public networks"
    yield ""
    yield "Of torchvision and pytorchvideo, unmodified, with random weights and statistics, float32. Delay and receptive"
    yield "field in frames; caches of one stream; *step* and *clip* are multiply-adds of one frame in the stream and of the"
    yield "whole clip. *Error* is the largest"
    yield "difference to the unmodified network, relative to its largest score. `pytest -m slow tests/test_model_zoos.py`"
    yield "runs them in ONNX Runtime too."
    yield ""
    heads = ("network", "clip", "preset", "delay", "receptive field", "caches", "step", "clip", "promise", "error")
    yield from table(*heads)
    for name in public_networks.NETWORKS:
        try:
            model = public_networks.network(name)
        except BaseException as error:  # pytest's skip is one
            yield row(name, "", "", "", "", "", "", "", f"not measured: {type(error).__name__}", "")
            continue
        whole = (public_networks.example(name),)
        of_clip = multiply_adds(model, whole)
        shape = "x".join(map(str, (whole[0][-1] if isinstance(whole[0], list) else whole[0]).shape[1:]))
        for preset in PRESETS:
            outcome = measured(model, whole, preset, {})
            print(name, preset, outcome.text, outcome.error, file=sys.stderr, flush=True)
            if outcome.broken:
                found.append(f"{name}, {preset}")
            if outcome.stream is None:
                yield row(name, shape, preset, "", "", "", "", f"{of_clip / 1e6:,.0f} M", outcome.text, "")
                continue
            stream = outcome.stream
            of_step = multiply_adds(stream.step, (*stream.frame(whole, 0), *stream.caches()))
            yield row(
                name,
                shape,
                preset,
                stream.timing.delay,
                stream.timing.receptive_field,
                f"{stream.cache_bytes / 1e6:.2f} MB",
                f"{of_step / 1e6:,.0f} M",
                f"{of_clip / 1e6:,.0f} M",
                outcome.text,
                "-" if outcome.error is None else f"{outcome.error:.0e}",
            )


def packages(found: list[str]) -> Iterator[str]:
    """Networks of packages on PyPI."""
    from survey.packages import PACKAGES

    yield "## Packages"
    yield ""
    yield "Networks of packages on PyPI, unmodified, made small by their own arguments (`tests/survey/packages.py`)."
    yield ""
    yield from table("network", "package", *PRESETS)
    missing = []
    for name, package in PACKAGES.items():
        try:
            with quiet():
                package.build()
        except ImportError:
            missing.append(name)
            continue
        yield row(name, package.distribution, *cells(name, package.build, dict(package.options), found))
    if missing:
        yield ""
        yield f"Not measured here, for their packages are not installed: {', '.join(missing)}."


FAMILIES = "residual inception mobile motion attention dense vital recurrent skeleton streams".split()
SECTIONS: dict[str, Callable[[list[str]], Iterator[str]]] = {
    "patterns": patterns,
    **{name: partial(family, name) for name in FAMILIES},
    "packages": packages,
    "public": public,
}


def main(asked: list[str]) -> int:
    unknown = set(asked) - set(SECTIONS)
    if unknown:
        print(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}", file=sys.stderr)
        return 2
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(HERE.parent / "tests"))
    torch.set_num_threads(1)
    found: list[str] = []
    for name in asked or SECTIONS:
        VERDICTS.clear()
        lines: list[str] = []
        for line in SECTIONS[name](found):
            lines.append(line)
            if line.startswith("| "):  # what there is is written at once: the whole takes long
                write(name, "\n".join(lines))
        write(name, "\n".join(lines))
    for broken in found:
        print(f"broken: {broken}", file=sys.stderr)
    return int(bool(found))


def section(text: str, name: str) -> str:
    """A section of the page, with the comment that holds the verdicts of its plans."""
    found = re.search(rf"<!-- {name} (.*?)-->\n(.*?)<!-- end of {name} -->\n", text, re.S)
    return found[0] if found else ""


def write(name: str, text: str) -> None:
    """Put one section into the page, leave the others as they are, and count anew."""
    old = PAGE.read_text() if PAGE.exists() else ""
    seen = {op: {preset: sorted(kinds) for preset, kinds in found.items()} for op, found in VERDICTS.items()}
    parts = {key: section(old, key) for key in SECTIONS}
    parts[name] = f"<!-- {name} {json.dumps(seen)} -->\n{text.strip()}\n<!-- end of {name} -->\n"
    verdicts: dict[str, dict[str, set[str]]] = {}
    for part in filter(None, parts.values()):
        held = json.loads(part.partition("\n")[0].split(" ", 2)[2].removesuffix(" -->"))
        for op, found in held.items():
            for preset, kinds in found.items():
                verdicts.setdefault(op, {}).setdefault(preset, set()).update(kinds)
    page = "\n".join([HEAD, *(part for part in parts.values() if part)])
    PAGE.write_text("\n".join([page, *totals(page), "", *operators(verdicts), ""]))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
