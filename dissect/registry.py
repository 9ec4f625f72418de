"""The registry of converters: which function says how an operator lives in time.

    from dissect import converter, pointwise

    pointwise(torch.ops.mylib.swish.default)  # every element by itself: nothing about it changes in a stream

    @converter(torch.ops.mylib.last.default)
    def last(ctx, x): ...

A converter is called with the :class:`~dissect.context.Context` and the operator's own arguments, tensors
as :class:`~dissect.values.Value`; it returns the operator's result as a Value. Keys are operator
objects (``torch.ops.aten.relu.default``), never names. Registering twice is an error.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from dissect.errors import DissectError

__all__ = ["converter", "find", "find_windowed", "load_rules", "pointwise", "registered", "windowed"]

Converter = Callable[..., Any]
Function = TypeVar("Function", bound=Converter)

_CONVERTERS: dict[Any, Converter] = {}
_WINDOWED: dict[Any, Converter] = {}
_PATIENT: set[Any] = set()
_BROADCAST: set[Any] = set()


def converter(*ops: Any) -> Callable[[Function], Function]:
    """Register the decorated function as the converter of ``ops``; raises DissectError for an operator that has one."""

    def register(function: Function) -> Function:
        for op in ops:
            if op in _CONVERTERS:
                raise DissectError(
                    f"{op} has a converter already ({_CONVERTERS[op].__module__}.{_CONVERTERS[op].__name__}); "
                    "an operator has one converter"
                )
            _CONVERTERS[op] = function
        return function

    return register


def patient(*ops: Any) -> None:
    """Say that the converters of ``ops`` know of ``Timing.wait`` and ``first``; others get values that need neither."""
    _PATIENT.update(ops)


def is_patient(op: Any) -> bool:
    """Whether an operator's converter takes values whose positions are not certain yet."""
    return op in _PATIENT


def windowed(*ops: Any, broadcast: bool = False) -> Callable[[Function], Function]:
    """Register how ``ops`` treat an operand with a window axis: called with the context, their converter, and their arguments.

    An operator without such a rule sees the newest entry of the window alone. ``broadcast``: its operands broadcast, so
    that one may have its frames where another is repeated; then the rule makes a window of one of them.
    """

    def register(function: Function) -> Function:
        _WINDOWED.update(dict.fromkeys(ops, function))
        if broadcast:
            _BROADCAST.update(ops)
        return function

    return register


def find_windowed(op: Any) -> Converter | None:
    """The rule of an operator for a window axis, or None."""
    _load_shipped()
    return _WINDOWED.get(op)


def is_broadcast(op: Any) -> bool:
    """Whether the rule of an operator takes operands whose frames lie along different dimensions."""
    return op in _BROADCAST


def pointwise(*ops: Any) -> None:
    """Register operators that treat every element by itself: nothing about them changes in a stream."""

    def convert(ctx: Any, *args: Any, **kwargs: Any) -> Any:
        from dissect.converters.pointwise import pointwise as apply

        return apply(ctx, ctx.node.target, args, kwargs)

    for op in ops:
        converter(op)(convert)


def find(op: Any) -> Converter | None:
    """The converter of an operator, or None."""
    _load_shipped()
    return _CONVERTERS.get(op)


def registered() -> dict[Any, Converter]:
    """All converters, by operator."""
    _load_shipped()
    return dict(_CONVERTERS)


@cache
def _load_shipped() -> None:
    try:
        package = importlib.import_module("dissect.converters")
    except ModuleNotFoundError as error:
        raise DissectError(
            "dissect.converters is not importable: this checkout is not installed; run `pip install -e .` in it"
        ) from error
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"dissect.converters.{module.name}")
    for entry in entry_points(group="dissect.converters"):
        entry.load()


def load_rules(path: str | Path) -> None:
    """Import a user's file of converters (``--rules my_rules.py``); raises DissectError where it fails."""
    file = Path(path).resolve()
    name = f"dissect_rules_{abs(hash(file))}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise DissectError(f"{path}: no such Python file of converters")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise (
            error if isinstance(error, DissectError) else DissectError(f"{path}: {type(error).__name__}: {error}")
        ) from error
