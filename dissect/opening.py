"""Opens a step model: what its file says of itself, and a session for each of its phases.

A file in the native cadence holds one graph of all layers; at each phase of the period only some of them are due. Every
phase whose outputs differ gets a session of the graph pruned to them, opened once; a file that is due at every frame
has one phase. Weights are in every session that needs them: the layers of a long stride, which hold most weights, are
in few.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from dissect.contract import Contract
from dissect.rings import moves
from dissect.sessions import Provider, fingerprint, loaded, open_session
from dissect.wire import copies, metadata, prune

__all__ = ["NO_FLUSH", "StepModel", "open_step"]

NO_FLUSH = "This model was exported without a flush, so the outputs that are still inside the stream are lost."


@dataclass(frozen=True)
class StepModel:
    """An open step model: its contract, all metadata of its file, its fingerprint, and one session a phase.

    ``moved``: the caches that become what another one was, by number; no session has outputs for them.
    """

    contract: Contract
    metadata: Mapping[str, str]
    fingerprint: str
    sessions: tuple[Any, ...]
    moved: Mapping[int, int]

    @property
    def distinct(self) -> list[Any]:
        """The sessions, each once."""
        return list({id(session): session for session in self.sessions}.values())


def open_step(
    model: str | os.PathLike[str] | bytes,
    providers: str | Sequence[Provider] | None = None,
    threads: int | None = None,
    options: Any = None,
    spin: bool | None = None,
    rings: bool = True,
) -> StepModel:
    """The step model in ``model``, a path or the bytes of a file; arguments as for :func:`~dissect.sessions.open_session`.

    ``rings=False``: the graph moves the caches on by itself, and a stream has two turns a period, no more.
    Raises :class:`~dissect.errors.StreamError` for a file that is missing, no ONNX, no step model, or of a newer format.
    """
    name = "The model" if isinstance(model, bytes) else os.fspath(model)
    opened = _Opening(name, providers, threads, options, spin, rings)
    if isinstance(model, bytes) or not os.path.isfile(model) or os.path.getsize(model) == 0:
        return opened.of(model, model if isinstance(model, bytes) else b"")
    with open(model, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return opened.of(model, mapped)


@dataclass
class _Opening:
    """How a file is opened."""

    name: str
    providers: Any
    threads: int | None
    options: Any
    spin: bool | None
    rings: bool

    def of(self, model: Any, content: bytes | mmap.mmap) -> StepModel:
        """The step model in ``model``, whose bytes are ``content``."""
        found = metadata(content)
        contract = Contract.from_metadata(found, self.name) if "dissect.format_version" in found else None
        moved = moves(contract.caches, copies(content)) if contract is not None and self.rings else {}
        if contract is None or (contract.period == 1 and not moved):
            session = self._session(model)
            entries = dict(session.get_modelmeta().custom_metadata_map)
            contract = Contract.from_metadata(entries, self.name)
            return StepModel(contract, MappingProxyType(entries), fingerprint(model), (session,), {})
        folder = None if isinstance(model, bytes) else os.path.dirname(os.path.abspath(model))
        left = {contract.caches[index].output for index in moved}
        wanted = [tuple(name for name in contract.due(phase) if name not in left) for phase in range(contract.period)]
        opened: dict[tuple[str, ...], Any] = {}
        for outputs in wanted:
            if outputs not in opened:
                opened[outputs] = self._session(prune(content, outputs), folder)
                self.providers = loaded(opened[outputs], self.providers)
        sessions = tuple(opened[outputs] for outputs in wanted)
        return StepModel(contract, MappingProxyType(dict(found)), fingerprint(model), sessions, moved)

    def _session(self, model: Any, folder: str | None = None) -> Any:
        return open_session(model, self.providers, self.threads, self.options, self.spin, folder)
