"""The experiment's tables, as Markdown, and its plots, from whatever results are there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from causality import LOOKING_BACK
from training import FRAMES, WINDOW, mean_and_spread

ROWS = (  # name in the table, stage, part of its result, costs
    ("conventional, sliding window", "conventional", None, "sliding window"),
    ("exact", "exact", None, "exact"),
    ("d3d, as cut (folded)", "folded", None, "d3d"),
    ("d3d, recalibrated", "recalibrated", None, "d3d"),
    ("d3d, reconstructed", "reconstructed", None, "d3d"),
    ("d3d, distilled", "distilled", None, "d3d"),
    ("d3d, fine-tuned with labels", "fine-tuned", None, "d3d"),
    ("d3d, trained from scratch with labels", "scratch", None, "d3d"),
    ("d3d, distilled, skip sum", "distilled-sum", None, "d3d, skip sum"),
    ("d3d, distilled, skip none", "distilled-none", None, "d3d, skip none"),
    ("d3d, distilled, head fc", "heads", "fc", "d3d, fc"),
    ("d3d, distilled, head GRU", "heads", "gru", "d3d, gru"),
    ("d3d, distilled, head LSTM", "heads", "lstm", "d3d, lstm"),
    ("causal, as cut", "causal", None, "causal"),
    ("causal, recalibrated", "causal-recalibrated", None, "causal"),
    ("causal, reconstructed", "causal-reconstructed", None, "causal"),
    ("causal, distilled", "causal-distilled", None, "causal"),
)


def results(folder: Path, stage: str) -> list[Any]:
    """A stage's results, one a seed."""
    return [json.loads(file.read_text())["result"] for file in sorted(folder.glob(f"{stage}-[0-9]*.json"))]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """``93.2 ± 0.4``, or a dash."""
    if not values:
        return "-"
    mean, deviation = mean_and_spread(list(values))
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if len(values) > 1 else "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def accuracies(folder: Path) -> str:
    """Accuracy of every network beside what it costs."""
    costs = (results(folder, "costs") or [{}])[0]
    rows = []
    for name, stage, part, cost in ROWS:
        found = [result if part is None else result[part] for result in results(folder, stage)]
        if not found:
            continue
        price = costs.get(cost, {})
        cells = [spread([one[key] for one in found if key in one]) for key in ("all", "single", "ordered")]
        money = ["-"] * 3
        if price:
            money = [
                f"{price['multiply_adds'] / 1e6:.2f} M",
                f"{price['cache_bytes'] / 1e3:.1f} kB",
                f"{price['ms']:.2f}",
            ]
        rows.append([name, *cells, str(len(found)), *money])
    head = ("network", "accuracy", "single", "order only", "seeds", "multiply-adds a frame", "caches", "ms a frame")
    return table(head, rows)


def by_tenths(folder: Path) -> str:
    """The first half of Figure 7."""
    found = results(folder, "causality")
    rows = [
        [kind, *(spread([one[kind]["tenths"][at] for one in found], 0) for at in range(10))]
        for kind in (LOOKING_BACK if found else ())
    ]
    return table(("head", *(f"{at + 1}." for at in range(10))), rows)


def by_erasure(folder: Path) -> str:
    """The second half of Figure 7."""
    found = results(folder, "causality")
    if not found:
        return ""
    rows = [
        [kind, *(spread([one[kind]["erased"][at] for one in found], 0) for at in range(len(found[0]["erased"])))]
        for kind in LOOKING_BACK
    ]
    return table(("head", *(f"{percent}%" for percent in found[0]["erased"])), rows)


def following(folder: Path) -> str:
    """Figure 2 in numbers."""
    found = results(folder, "dynamics")
    names = list(found[0]) if found else []
    keys = ("median", "mean", "follows", "right before", "right at the end")
    rows = [[name, *(spread([one[name][key] for one in found]) for key in keys)] for name in names]
    head = ("network", "frames, median", "frames, mean", "follows, %", "right before, %", "right at the end, %")
    return table(head, rows)


def at_cuts(folder: Path) -> str:
    """What a scene cut does."""
    found = results(folder, "cuts")
    picks = (0, 3, 7, 11, 15, FRAMES - 1)
    rows = [
        [
            name,
            spread([one[name]["all"] for one in found]),
            *(spread([one[name]["by frame"][at] for one in found]) for at in picks),
        ]
        for name in (list(found[0]) if found else [])
    ]
    return table(("at the cut", f"mean of frames {WINDOW} to {FRAMES}", *(f"frame {at + 1}" for at in picks)), rows)


TABLES = {
    "Accuracy and cost": accuracies,
    "By tenths of long videos": by_tenths,
    "With the middle of long videos erased": by_erasure,
    "Following a change": following,
    "After a scene cut": at_cuts,
}


def drawn(folder: Path) -> list[Path]:
    """Plots of Figures 7 and 2, where their results are there."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made = []
    found = results(folder, "causality")
    if found:
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
        for kind in LOOKING_BACK:
            for axis, key in ((left, "tenths"), (right, "erased")):
                columns = list(zip(*(one[kind][key] for one in found), strict=True))
                middles = [mean_and_spread(list(column)) for column in columns]
                across = range(1, 11) if key == "tenths" else found[0]["erased"]
                axis.errorbar(
                    across, [mean for mean, _ in middles], [error for _, error in middles], label=kind, capsize=2
                )
        left.set(xlabel="tenth of the video", ylabel="accuracy, %", title="by tenths")
        right.set(xlabel="erased from the middle, %", title="with the middle erased")
        right.legend()
        made.append(folder / "causality.png")
        figure.savefig(made[-1], dpi=120)
        pyplot.close(figure)
    found = results(folder, "cuts")
    if found:
        figure, axis = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
        for name in found[0]:
            columns = zip(*(one[name]["by frame"] for one in found), strict=True)
            axis.plot(range(1, FRAMES + 1), [mean_and_spread(list(column))[0] for column in columns], label=name)
        axis.set(xlabel="frame after the cut", ylabel="accuracy, %", title="a stream after a scene cut")
        axis.legend()
        made.append(folder / "cuts.png")
        figure.savefig(made[-1], dpi=120)
        pyplot.close(figure)
    return made
