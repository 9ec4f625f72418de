"""Writes docs/coverage.md: what becomes of each pattern and each public network, as this version does it.

    python docs/make_coverage.py             # the patterns, and torchvision's networks at reduced size

Every row is measured: converted, and verified against the unmodified network.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import dissect
from dissect.registry import registered

HERE = Path(__file__).parent
PRESETS = ("exact", "causal", "d3d")


def main() -> None:
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(HERE.parent / "tests"))
    torch.set_num_threads(1)
    text = [
        "# Coverage",
        "",
        "Written by `python docs/make_coverage.py`; every row was converted and verified against the network as it is.",
        "",
        "## Patterns",
        "",
        "*exact*: no row of the plan is approximate. *approximate*: the plan names the rows and why. *kept*: all that the",
        "preset promises holds. *refused*: by name, with the reason.",
        "",
        "| network in the style of public code | what it shows | " + " | ".join(PRESETS) + " |",
        "| --- | --- |" + " --- |" * len(PRESETS),
        *patterns(),
        "",
        "## Public networks",
        "",
        "Of torchvision and pytorchvideo, with random weights and statistics. Delay and receptive field in frames; caches",
        "of one fp32 stream; *error* is the largest difference to the unmodified network, relative to its largest score.",
        "",
        "| network | clip | preset | delay | receptive field | caches | promise | error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *public(),
        "",
        "## Operators",
        "",
        "| family | operators |",
        "| --- | --- |",
        *operators(),
        "",
    ]
    (HERE / "coverage.md").write_text("\n".join(text))


def outcome(model: Any, clip: Any, preset: str, options: dict[str, Any]) -> tuple[str, Any, Any]:
    """``exact``, ``approximate (why)``, ``refused (why)`` or ``BROKEN``; the stream and its report."""
    try:
        stream = dissect.convert(model, clip, preset=preset, **options)
    except dissect.NotStreamable as error:
        refusal = error.refusals[0]
        return f"refused: `{refusal.op}`: {refusal.reason}", None, None
    report = dissect.verify(stream, model, runtime=False)
    if not report.ok:
        return "BROKEN", stream, report
    if preset != "exact" or stream.plan.exact:
        return "exact" if stream.plan.exact else "kept", stream, report
    rows = list(dict.fromkeys(f"{row.op}: {row.reason.split(';')[0]}" for row in stream.plan.approximate))
    return "approximate: " + "; ".join(rows), stream, report


def patterns() -> Iterator[str]:
    from styles import STYLES

    for name, style in STYLES.items():
        model, clip = style.build()
        what = (inspect.getdoc(style.network) or "").splitlines()[0]
        cells = [outcome(model, clip, preset, style.options)[0] for preset in PRESETS]
        print(name, cells, file=sys.stderr)
        yield f"| {name} | {what} | " + " | ".join(cells) + " |"


def public() -> Iterator[str]:
    import public_networks

    for name in public_networks.NETWORKS:
        size = 224 if name == "s3d" else 112
        try:
            model = public_networks.network(name)
        except BaseException as error:  # a library that is not installed skips
            print(name, error, file=sys.stderr)
            continue
        clip = public_networks.example(name, size=size)
        for preset in PRESETS:
            example = (clip,) if isinstance(clip, list) else clip
            try:
                verdict, stream, report = outcome(model, example, preset, {})
            except dissect.DissectError as error:
                yield f"| {name} | - | {preset} | | | | {str(error)[:80]} | |"
                continue
            print(name, preset, verdict, file=sys.stderr)
            if stream is None:
                yield f"| {name} | - | {preset} | | | | {verdict} | |"
                continue
            row = next((row for row in report.rows if row.pair.startswith("original") and row.error is not None), None)
            shape = "x".join(map(str, (clip[-1] if isinstance(clip, list) else clip).shape[1:]))
            timing = stream.timing
            error_text = "-" if row is None else f"{row.error:.0e}"
            yield (
                f"| {name} | {shape} | {preset} | {timing.delay} | {timing.receptive_field} | "
                f"{stream.cache_bytes / 1e6:.2f} MB | {verdict} | {error_text} |"
            )


def operators() -> Iterator[str]:
    families: dict[str, list[str]] = {}
    for op, function in registered().items():
        families.setdefault(function.__module__.rpartition(".")[2], []).append(str(op).removesuffix(".default"))
    for family, names in sorted(families.items()):
        yield f"| {family} | {', '.join(f'`{name}`' for name in sorted(names))} |"


if __name__ == "__main__":
    main()
