"""Operators that no converter knows, in terms of simpler ones, as torch itself defines them.

``torch.export`` keeps a network's operators as they were called: ``torch.concat`` and ``torch.cat``, ``x.divide(y)`` and
``x / y`` are different ones. Whatever has no converter is replaced by torch's own definition of it, and that again,
until every operator has a converter or no definition. What has a converter is never taken apart, nor what makes a
constant, which torch computes as it stands, to the last bit.

Source: the composite kernels of ATen, and ``torch._decomp.core_aten_decompositions``, whose results are core ATen.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from dissect.registry import find

__all__ = ["simplified"]

#: definitions within definitions: torch's deepest are four
ROUNDS = 6
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


def simplified(program: ExportedProgram) -> ExportedProgram:
    """A functional program, without operators that have no converter but a definition."""
    table = _definitions(program)
    for _ in range(ROUNDS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = program.run_decompositions(table)
        table = _definitions(program)
        if not table:
            break
    return program


def _definitions(program: ExportedProgram) -> dict[Any, Callable[..., Any]]:
    """torch's own definitions of the operators that no converter knows, where it has some."""
    found = {target: _definition(target) for target in _strangers(program)}
    return {target: definition for target, definition in found.items() if definition is not None}


def _strangers(program: ExportedProgram) -> set[Any]:
    """The operators on something that the clip gives which no converter knows."""
    given = set(program.graph_signature.user_inputs)
    moving = {node for node in program.graph.nodes if node.op == "placeholder" and node.name in given}
    found = set()
    for node in program.graph.nodes:
        if node.op == "call_function" and not moving.isdisjoint(node.all_input_nodes):
            moving.add(node)
            if isinstance(node.target, torch._ops.OpOverload) and find(node.target) is None:
                found.add(node.target)
    return found


def _definition(target: Any) -> Callable[..., Any] | None:
    """torch's own definition of an operator by others; None where it has none, as a size has (of what a mask picks)."""
    if target.namespace != "aten" or not any("Tensor" in str(out.type) for out in target._schema.returns):
        return None
    if target in _OWN:
        return _OWN[target]
    if torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), _COMPOSITE.name):
        return partial(target._op_dk, _COMPOSITE)
    return _core().get(target)


def _distances(x: Tensor, y: Tensor, p: float, mode: int | None = None) -> Tensor:
    """``torch.cdist`` of few rows, for which torch has a kernel of its own."""
    each: Tensor = torch.linalg.vector_norm(x.unsqueeze(-2) - y.unsqueeze(-3), p, -1)
    return each


_OWN: dict[Any, Callable[..., Any]] = {torch.ops.aten._cdist_forward.default: _distances}


@cache
def _core() -> dict[Any, Callable[..., Any]]:
    from torch._decomp import core_aten_decompositions

    return dict(core_aten_decompositions())
