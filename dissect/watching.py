"""Shows a step model at work on a video, live: :func:`watch`, what ``dissect run`` does. torch is never imported."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.live import Live

from dissect import rendering
from dissect.playing import Scores, play, preprocess_of, read_labels
from dissect.runner import Runner
from dissect.video import Picture, Video

__all__ = ["watch"]

_EVERY = 5.0  # seconds between two remarks that the stream falls behind
_LATE = 0.5  # seconds of lag that are worth a remark


def watch(
    runner: Runner,
    source: str,
    top: int = 5,
    jsonl: bool = False,
    softmax: bool = True,
    output: str | None = None,
    labels: Path | None = None,
    late: str = "drop",
    max_frames: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Play ``source`` through ``runner``, print the best labels of each frame, and give the sums at the end.

    Prints lines, or a table that is drawn anew where standard output is a terminal; with ``jsonl`` one object a
    frame; with ``quiet`` nothing. Remarks (a stream that falls behind, a guessed preprocessing) go to standard error.
    """
    err = rendering.notes()
    names = read_labels(labels) if labels else runner.labels
    preprocess, known = preprocess_of(runner)
    if not known:
        err.print(f"Note: the file names no preprocessing; taken: {preprocess.to_json()}", markup=False)
    began = time.monotonic()
    taken: list[float] = []
    count = 0
    with Video(source, late) as video:
        scores = play(runner, _watched(video, max_frames, err), preprocess, output, softmax)
        delay = runner.delay
        try:
            for printed in _shown(scores, names, top, delay, jsonl, quiet, softmax):
                count += 1
                if printed.ms:
                    taken.append(printed.ms)
        except KeyboardInterrupt:
            if not video.live:
                raise
        dropped, lag = video.dropped, video.lag
    seconds = time.monotonic() - began
    sums: dict[str, Any] = {
        "frames": count,
        "seconds": seconds,
        "frames_per_second": count / seconds,
        "dropped": dropped,
        "lag": lag,
    }
    sums["median_ms"] = float(np.median(taken)) if taken else None
    if not quiet:
        pace = f", {sums['median_ms']:.1f} ms each (median)" if taken else ""
        lost = f"; {dropped} pictures were dropped" if dropped else ""
        err.print(f"{count} frames in {seconds:.1f} s ({count / seconds:.1f} a second{pace}){lost}.", markup=False)
    return sums


def _watched(video: Video, most: int | None, err: Any) -> Iterator[Picture]:
    """The video's pictures, with a remark now and then while the network is too slow for them."""
    said, before = -_EVERY, 0
    for count, picture in enumerate(video, 1):
        if video.live and (video.dropped > before or video.lag > _LATE) and time.monotonic() - said > _EVERY:
            said = time.monotonic()
            if video.dropped > before:
                err.print(
                    f"Falling behind: {video.dropped} pictures dropped so far. --late wait keeps them all.",
                    markup=False,
                )
            else:
                err.print(f"Falling behind: {video.lag:.1f} s late. --late drop skips pictures instead.", markup=False)
            before = video.dropped
        yield picture
        if most is not None and count >= most:
            return


def _shown(
    scores: Iterator[Scores],
    names: Sequence[str] | None,
    top: int,
    delay: int,
    jsonl: bool,
    quiet: bool,
    softmax: bool,
) -> Iterator[Scores]:
    """Print each frame's best labels and pass it on."""
    if jsonl or quiet or not sys.stdout.isatty():
        for found in scores:
            best = found.top(top, names)
            if jsonl and not quiet:
                line = {
                    "frame": found.frame,
                    "time": round(found.time, 6),
                    "delay": delay,
                    "top": best,
                    "ms": round(found.ms, 3),
                }
                print(json.dumps(line), flush=True)
            elif not quiet:
                listed = "  ".join(f"{label} {score:.3f}" for label, score in best)
                print(f"{found.time:8.2f} s  {listed}", flush=True)
            yield found
        return
    with Live(console=rendering.console(), refresh_per_second=12, transient=False) as live:
        for found in scores:
            best = found.top(top, names)
            title = f"frame {found.frame}, {found.time:.2f} s" + (f", {found.ms:.1f} ms" if found.ms else "")
            whole = 1.0 if softmax else max((score for _, score in best), default=1.0)
            live.update(rendering.scores_table(title, best, whole))
            yield found
