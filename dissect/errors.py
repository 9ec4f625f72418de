"""Every error that dissect raises on purpose.

    DissectError
    |-- LoadError            a file that is no network we can read, or that may not be unpickled
    |-- CaptureError         torch.export cannot turn the network into one graph
    |-- NotStreamable        operators with no streaming form, all of them at once
    |-- PlanError            an override or an option that fits no layer
    |-- VerificationError    a promise of the plan does not hold
    |-- ExportError          the step model cannot be written
    |-- ClipError            clips to learn from that do not fit the network
    |-- StreamError          a runner was given the wrong frame, or a file that is no step model
    `-- VideoError           a video or a camera that cannot be read

Catch :class:`DissectError` to catch them all. A message is one paragraph: the node, the fact, the fix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "CaptureError",
    "ClipError",
    "DissectError",
    "ExportError",
    "LoadError",
    "NotStreamable",
    "PlanError",
    "Refusal",
    "StreamError",
    "VerificationError",
    "VideoError",
]


class DissectError(Exception):
    """The base of every error that dissect raises on purpose."""


class LoadError(DissectError):
    """A file is no network that dissect can read, or may not be unpickled."""


class CaptureError(DissectError):
    """``torch.export`` cannot turn the network into one graph."""


class PlanError(DissectError):
    """An override or an option fits no layer, or asks for what cannot be."""


class VerificationError(DissectError):
    """A promise of the plan does not hold."""


class ExportError(DissectError):
    """The step model cannot be written."""


class ClipError(DissectError):
    """Clips to learn from do not fit the network or what is to be done with them."""


class StreamError(DissectError):
    """A runner was given a wrong frame, a wrong call, or a file that is no step model."""


class VideoError(DissectError):
    """A video or a camera cannot be read."""


@dataclass(frozen=True)
class Refusal:
    """One operator that has no streaming form: where it is, what it is, why, and what to do."""

    path: str
    op: str
    reason: str
    fix: str = ""
    source: str = ""

    def __str__(self) -> str:
        where = f"{self.path or '<top level>'}: {self.op}"
        if self.source:
            where += f" ({self.source})"
        return f"{where}: {self.reason}" + (f"; {self.fix}" if self.fix else "")


class NotStreamable(DissectError):
    """Operators without a streaming form; :attr:`refusals` holds all of them, not only the first."""

    def __init__(self, refusals: Sequence[Refusal]) -> None:
        self.refusals = tuple(refusals)
        head = (
            "1 operator cannot be streamed"
            if len(self.refusals) == 1
            else f"{len(self.refusals)} operators cannot be streamed"
        )
        super().__init__(f"{head}:\n" + "\n".join(f"  {refusal}" for refusal in self.refusals))
