"""Dissect any 3D-CNN: turn a clip network into a step network that computes one frame at a time.

    stream = dissect.convert(model, clip)              # preset="d3d"
    print(stream.plan)                                 # what was done to each layer
    dissect.verify(stream, model).check()
    dissect.export(stream, "net.onnx")

    run = dissect.Runner("net.onnx")                   # numpy and ONNX Runtime alone
    for frame in camera:
        scores = run.step(frame)

Names are imported when they are first used, so that ``import dissect`` costs nothing and a
deployment that only runs step models never imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "CaptureError": "errors",
    "ClipError": "errors",
    "DissectError": "errors",
    "ExportError": "errors",
    "LoadError": "errors",
    "NotStreamable": "errors",
    "PlanError": "errors",
    "Refusal": "errors",
    "Refused": "values",
    "StreamError": "errors",
    "VerificationError": "errors",
    "VideoError": "errors",
    "Plan": "plan",
    "Preprocess": "preprocess",
    "Runner": "runner",
    "Stream": "stream",
    "StreamPool": "pool",
    "agreement": "distilling",
    "convert": "stream",
    "converter": "registry",
    "deflate": "inflation",
    "distil": "distilling",
    "export": "exporting",
    "fine_tune": "fine_tuning",
    "heads": "",
    "inflate": "inflation",
    "load": "loading",
    "per_frame": "opaque",
    "pointwise": "registry",
    "quantize": "quantizing",
    "recalibrate": "recalibrating",
    "reconstruct": "reconstructing",
    "verify": "verifying",
    "video_clips": "cutting",
    "with_head": "headed",
    "zoo": "",
}

__all__ = [
    "CaptureError",
    "ClipError",
    "DissectError",
    "ExportError",
    "LoadError",
    "NotStreamable",
    "Plan",
    "PlanError",
    "Preprocess",
    "Refusal",
    "Refused",
    "Runner",
    "Stream",
    "StreamError",
    "StreamPool",
    "VerificationError",
    "VideoError",
    "__version__",
    "agreement",
    "convert",
    "converter",
    "deflate",
    "distil",
    "export",
    "fine_tune",
    "heads",
    "inflate",
    "load",
    "per_frame",
    "pointwise",
    "quantize",
    "recalibrate",
    "reconstruct",
    "verify",
    "video_clips",
    "with_head",
    "zoo",
]

if TYPE_CHECKING:
    from dissect import heads as heads
    from dissect import zoo as zoo
    from dissect.cutting import video_clips
    from dissect.distilling import agreement, distil
    from dissect.errors import (
        CaptureError,
        ClipError,
        DissectError,
        ExportError,
        LoadError,
        NotStreamable,
        PlanError,
        Refusal,
        StreamError,
        VerificationError,
        VideoError,
    )
    from dissect.exporting import export
    from dissect.fine_tuning import fine_tune
    from dissect.headed import with_head
    from dissect.inflation import deflate, inflate
    from dissect.loading import load
    from dissect.opaque import per_frame
    from dissect.plan import Plan
    from dissect.pool import StreamPool
    from dissect.preprocess import Preprocess
    from dissect.quantizing import quantize
    from dissect.recalibrating import recalibrate
    from dissect.reconstructing import reconstruct
    from dissect.registry import converter, pointwise
    from dissect.runner import Runner
    from dissect.stream import Stream, convert
    from dissect.values import Refused
    from dissect.verifying import verify


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dissect' has no attribute {name!r}")
    home = _HOME[name]
    if not home:
        return import_module(f"dissect.{name}")
    # Modules are named unlike their functions (`loading.load`): importing one must never shadow the other.
    value = getattr(import_module(f"dissect.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
