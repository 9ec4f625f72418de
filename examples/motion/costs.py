"""What each network costs a frame: multiply-adds, caches, and milliseconds in ONNX Runtime on one thread."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from causality import KINDS
from torch import nn
from training import CLIP, conventional

import dissect
from dissect import benchmarking
from dissect.counting import multiply_adds


def of_window(model: nn.Module) -> dict[str, float]:
    """The sliding window: a whole clip for every frame; its cache are the frames that it keeps."""
    call = benchmarking.onnx_window(model, (CLIP,), threads=1)
    return {
        "multiply_adds": multiply_adds(model, (CLIP,)),
        "cache_bytes": CLIP.numel() * 4,
        "ms": benchmarking.measure(call, 300).median,
    }


def of_stream(stream: dissect.Stream) -> dict[str, float]:
    """A step."""
    with tempfile.TemporaryDirectory() as folder:
        runner = dissect.Runner(stream.export(Path(folder) / "step.onnx"), threads=1)
        ms = benchmarking.measure(benchmarking.step_of(runner), 1000).median
    frame = stream.frame((CLIP,), 0)
    return {
        "multiply_adds": multiply_adds(stream.step, (*frame, *stream.caches(1))),
        "cache_bytes": stream.cache_bytes,
        "ms": ms,
        "delay": stream.timing.delay,
    }


def measured(few: bool = False) -> dict[str, Any]:
    """Every network of the tables, or, for a test, the first few; costs do not depend on weights."""
    model = conventional(0).eval()
    found: dict[str, Any] = {"sliding window": of_window(model)}
    cuts: dict[str, dict[str, Any]] = {
        "d3d": {},
        "d3d, skip none": {"skip": "none"},
        "d3d, skip sum": {"skip": "sum"},
        "causal": {"preset": "causal"},
        "exact": {"preset": "exact"},
    }
    for name, options in list(cuts.items())[: 1 if few else None]:
        found[name] = of_stream(dissect.convert(model, CLIP, **options))
    for kind, head in list(KINDS.items())[: 1 if few else None]:
        torch.manual_seed(0)
        headed = dissect.with_head(conventional(0).eval(), head(), at="avgpool").eval()
        found[f"d3d, {kind}"] = of_stream(dissect.convert(headed, CLIP))
    return found


@torch.no_grad()
def exact_error(model: nn.Module, videos: torch.Tensor) -> float:
    """The largest difference between the clip network and its exact stream with a flush, relative to the scores."""
    stream = dissect.convert(model, CLIP, preset="exact")
    wanted = model(videos)
    got = stream.offline(videos)
    clock = stream.leaf_timings[0]
    last = got[:, :, clock.last(videos.shape[2]) - stream.timing.delay]
    return float((last - wanted).abs().max() / wanted.abs().max())
