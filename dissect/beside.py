"""Beside: a file that is not whole yet lies in a folder beside its place, to be renamed when it is."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["beside"]


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A path of the target's name on the target's file system; its folder is gone afterwards, whatever happens."""
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        yield Path(folder) / target.name
