"""Whole modules as opaque per-frame units: :func:`per_frame`.

A module that treats each frame by itself may do what no graph can hold. Marked with ``per_frame``, it is not traced:
the step calls it as it is, on one frame. The user's class and modules are not changed; only while a
network is captured does such a module stand aside for one operator.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree  # the specs that torch.export itself hands out

from dissect.errors import CaptureError

__all__ = ["OPAQUE", "per_frame", "standing_aside"]

Kind = TypeVar("Kind", bound=type[nn.Module])

#: the classes marked so far
OPAQUE: set[type[nn.Module]] = set()

_UNITS: list[tuple[str, nn.Module, tuple[int, ...], tuple[int, ...], torch.dtype]] = []


def per_frame(kind: Kind) -> Kind:
    """Mark a class of modules as a unit that treats each frame by itself, and return it (a decorator, or a call).

    Such a module takes one tensor and gives one, and must give for a clip of frames what it gives for each of them.
    ``verify`` finds out where it does not.
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"per_frame takes a class of modules, not {kind!r}")
    OPAQUE.add(kind)
    return kind


@torch.library.custom_op("dissect::per_frame", mutates_args=())
def unit(x: Tensor, index: int) -> Tensor:
    """The module number ``index``, opaque to a capture."""
    raise RuntimeError("an opaque unit runs only inside a dissected network")


@unit.register_fake
def _(x: Tensor, index: int) -> Tensor:
    _, _, given, made, dtype = _UNITS[index]
    return x.new_empty((made[0] * x.shape[0] // given[0], *made[1:]), dtype=dtype)


def module_of(index: int) -> tuple[str, nn.Module]:
    """The path and a copy of an opaque module."""
    path, module, *_ = _UNITS[index]
    return path, copy.deepcopy(module)


@contextmanager
def standing_aside(model: nn.Module, example: tuple[Any, ...]) -> Iterator[None]:
    """While a network is captured, its opaque modules are one operator each; their shapes come from one run."""
    units = [(path, module) for path, module in model.named_modules() if type(module) in OPAQUE]
    if not units:
        yield
        return
    shapes: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        if len(args) != 1 or not isinstance(args[0], Tensor) or not isinstance(result, Tensor):
            raise CaptureError(
                f"{type(module).__name__} is marked per_frame, and takes or gives more than one tensor; wrap it in one that does not"
            )
        shapes[module] = (args[0], result)

    handles = [module.register_forward_hook(note) for _, module in units]
    try:
        with torch.no_grad():
            model(*pytree.tree_map(lambda leaf: leaf, example))
    finally:
        for handle in handles:
            handle.remove()
    try:
        for path, module in units:
            if module not in shapes:
                continue
            given, made = shapes[module]
            _UNITS.append((path, module, tuple(given.shape), tuple(made.shape), made.dtype))
            module.__dict__["forward"] = _call(len(_UNITS) - 1)
        yield
    finally:
        for _, module in units:
            module.__dict__.pop("forward", None)


def _call(index: int) -> Any:
    return lambda x: torch.ops.dissect.per_frame(x, index)
