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
from torch.nn import functional as F

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
            strange = isinstance(node.target, torch._ops.OpOverload) and find(node.target) is None
            if strange or (node.target is _IM2COL and _line(*node.args)):
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


def _line(x: Any, kernel: list[int], dilation: list[int], padding: list[int], stride: list[int]) -> int | None:
    """The dimension that patches lie along, of a batch of pictures, where they are one wide in the other."""
    rank = x.dim() if isinstance(x, Tensor) else x.meta["val"].dim()
    for at in (0, 1):
        if rank == 4 and kernel[at] > 1 and (kernel[1 - at], padding[1 - at], stride[1 - at]) == (1, 0, 1):
            return 2 + at
    return None


def _in_line(x: Tensor, kernel: list[int], dilation: list[int], padding: list[int], stride: list[int]) -> Any:
    """``F.unfold`` along one dimension: the tensor, shifted, side by side among the channels; it may be time."""
    dim = _line(x, kernel, dilation, padding, stride)
    if dim is None:
        return NotImplemented
    taps, gap, pad, step = (given[dim - 2] for given in (kernel, dilation, padding, stride))
    if pad:
        x = F.pad(x, [pad, pad] if dim == 3 else [0, 0, pad, pad])
    start, end = [slice(None)] * dim, [slice(None)] * (3 - dim)
    shifted = [x[(*start, slice(at * gap, -(taps - 1 - at) * gap or None, step), *end)] for at in range(taps)]
    return torch.stack(shifted, 2).flatten(3).flatten(1, 2)


_IM2COL = torch.ops.aten.im2col.default
_OWN: dict[Any, Callable[..., Any]] = {torch.ops.aten._cdist_forward.default: _distances, _IM2COL: _in_line}


@cache
def _core() -> dict[Any, Callable[..., Any]]:
    from torch._decomp import core_aten_decompositions

    return dict(core_aten_decompositions())
