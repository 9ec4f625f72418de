"""Checkpoints: where a run of training stands, in a file, so that it can go on after it was cut off.

Laws: the file is at any time what it was before or a whole new one (written beside, then renamed); what goes on from it
ends where a run that was never cut off ends; a file of another network or of other settings is refused by name. It holds
tensors and plain values, and is read as such: no code in it is run.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dissect.errors import LoadError

if TYPE_CHECKING:
    from dissect.stream import Stream

__all__ = ["Checkpoint", "Saver", "fingerprint"]

_VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """The file of one run, or of none (``path`` None); ``settings`` are those that a run must share to go on from it."""

    path: Path | None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, path: str | os.PathLike[str] | None, stream: Stream, task: str, **settings: Any) -> Checkpoint:
        """The checkpoint of a task on a stream; raises :class:`~dissect.LoadError` where there is no folder for it."""
        if path is None:
            return cls(None)
        file = Path(path)
        if file.is_dir() or not file.parent.is_dir():
            raise LoadError(
                f"{file} {'is a folder' if file.is_dir() else 'lies in no folder'}; name a file for the checkpoint"
            )
        return cls(file, {"task": task, "network": fingerprint(stream), **settings})

    def load(self) -> dict[str, Any] | None:
        """What was saved last, or None; raises :class:`~dissect.LoadError` for a file that is of another run, or none."""
        if self.path is None or not self.path.exists():
            return None
        try:
            found = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise LoadError(f"{self.path} is no checkpoint that can be read; delete it to begin anew") from error
        if not isinstance(found, dict) or found.get("dissect.checkpoint") != _VERSION:
            raise LoadError(f"{self.path} is no checkpoint of this version of dissect; delete it to begin anew")
        for name, wanted in self.settings.items():
            there = found["settings"].get(name)
            if there != wanted:
                what = f"of another {name}" if name == "network" else f"of a run with {name}={there!r}, not {wanted!r}"
                raise LoadError(f"{self.path} is {what}; give the checkpoint another name, or delete it to begin anew")
        state: dict[str, Any] = found["state"]
        return state

    def save(self, state: Mapping[str, Any]) -> None:
        """Put a state there in one move."""
        if self.path is None:
            return
        whole = {"dissect.checkpoint": _VERSION, "settings": dict(self.settings), "state": dict(state)}
        handle, beside = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save(whole, file)
            os.replace(beside, self.path)
        except BaseException:
            Path(beside).unlink(missing_ok=True)
            raise


class Saver:
    """Saves ``state()`` to a checkpoint every ``every`` seconds while a run goes on, and when it is told to."""

    def __init__(self, checkpoint: Checkpoint, every: float, state: Callable[[], Mapping[str, Any]]) -> None:
        self.checkpoint, self.every, self.state = checkpoint, every, state
        self.written = time.monotonic()

    def tick(self) -> None:
        """A step is done: save, if it is time."""
        if self.checkpoint.path is not None and time.monotonic() - self.written >= self.every:
            self.save()

    def save(self) -> None:
        """Save now."""
        self.checkpoint.save(self.state())
        self.written = time.monotonic()


def fingerprint(stream: Stream) -> str:
    """What network a stream was made of, and how: a digest of the original's weights and of the options."""
    digest = hashlib.sha256(repr(stream.options).encode())
    for name, tensor in sorted(stream.dissected.captured.state.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
