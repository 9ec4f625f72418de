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
from dissect.sessions import Provider, fingerprint, loaded, open_session
from dissect.wire import metadata, prune

__all__ = ["NO_FLUSH", "StepModel", "open_step"]

NO_FLUSH = "This model was exported without a flush, so the outputs that are still inside the stream are lost."


@dataclass(frozen=True)
class StepModel:
    """An open step model: its contract, all metadata of its file, its fingerprint, and one session a phase."""

    contract: Contract
    metadata: Mapping[str, str]
    fingerprint: str
    sessions: tuple[Any, ...]

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
) -> StepModel:
    """The step model in ``model``, a path or the bytes of a file; arguments as for :func:`~dissect.sessions.open_session`.

    Raises :class:`~dissect.errors.StreamError` for a file that is missing, no ONNX, no step model, or of a newer format.
    """
    name = "The model" if isinstance(model, bytes) else os.fspath(model)
    if isinstance(model, bytes) or not os.path.isfile(model) or os.path.getsize(model) == 0:
        found = metadata(model) if isinstance(model, bytes) else {}
        return _opened(model, found, name, providers, threads, options, spin)
    with open(model, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return _opened(model, metadata(mapped), name, providers, threads, options, spin, mapped)


def _opened(
    model: Any,
    found: Mapping[str, str],
    name: str,
    providers: Any,
    threads: int | None,
    options: Any,
    spin: bool | None,
    mapped: mmap.mmap | None = None,
) -> StepModel:
    if "dissect.cadence" not in found:
        session = open_session(model, providers, threads, options, spin)
        entries = dict(session.get_modelmeta().custom_metadata_map)
        contract, sessions = Contract.from_metadata(entries, name), (session,)
    else:
        entries, contract = dict(found), Contract.from_metadata(found, name)
        folder = None if isinstance(model, bytes) else os.path.dirname(os.path.abspath(model))
        opened: dict[tuple[str, ...], Any] = {}
        for phase in range(contract.period):
            outputs = contract.due(phase)
            if outputs not in opened:
                part = prune(model if mapped is None else mapped, outputs)
                opened[outputs] = open_session(part, providers, threads, options, spin, folder)
                providers = loaded(opened[outputs], providers)
        sessions = tuple(opened[contract.due(phase)] for phase in range(contract.period))
    return StepModel(contract, MappingProxyType(entries), fingerprint(model), sessions)
