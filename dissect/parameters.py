"""The words of a command: shapes, numbers, edits of the plan and JSON objects, as click reads them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import click

__all__ = ["INPUT", "Arguments", "Numbers", "Setting", "Shape", "Shapes", "merged"]


class Shape(tuple[int, ...]):
    """The sizes of an input, and its ``dtype`` by torch's name."""

    dtype: str

    def __new__(cls, sizes: Iterable[int], dtype: str = "float32") -> Shape:
        """Sizes and dtype."""
        made = super().__new__(cls, tuple(sizes))
        made.dtype = dtype
        return made


class Shapes(click.ParamType):  # type: ignore[type-arg]
    """One input of a network: ``1x3x16x112x112``, or a list of them, ``[1x3x8x224x224,1x3x32x224x224]``.

    A dtype may follow after a colon: ``1x16x27x48x3:uint8``.
    """

    name = "shape"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Sizes as a :class:`Shape`, or a list of them."""
        if not isinstance(value, str):
            return value
        text = value.replace(" ", "")
        listed = text.startswith("[") and text.endswith("]")
        found = [_SHAPE.fullmatch(part) for part in (text[1:-1].split(",") if listed else [text])]
        shapes = [Shape(map(int, part[1].split("x")), part[2] or "float32") for part in found if part]
        if len(shapes) < len(found):
            self.fail(
                f"{value!r} is no shape; write the sizes of a clip with x between: 1x3x16x112x112, "
                f"and a dtype other than float32 after a colon ({', '.join(_DTYPES)}): 1x16x27x48x3:uint8.",
                param,
                ctx,
            )
        return shapes if listed else shapes[0]


class Numbers(click.ParamType):  # type: ignore[type-arg]
    """Whole numbers above 0 with commas between: ``4,1``."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The numbers as a tuple."""
        if not isinstance(value, str):
            return value
        parts = value.replace(" ", "").split(",")
        if not all(re.fullmatch(r"[1-9]\d*", part) for part in parts):
            self.fail(f"{value!r} is no list of whole numbers; write 4,1.", param, ctx)
        return tuple(map(int, parts))


class Setting(click.ParamType):  # type: ignore[type-arg]
    """An edit of the plan: ``layer1.*.conv1: depth=3`` (more of them after commas)."""

    name = "pattern: key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A pair of the pattern and its settings."""
        if not isinstance(value, str):
            return value
        pattern, colon, rest = value.rpartition(":")
        settings = dict(part.strip().split("=", 1) for part in rest.split(",") if "=" in part)
        if not colon or not pattern.strip() or not settings or len(settings) != len(rest.split(",")):
            self.fail(f"{value!r} is no setting; write 'layer1.*.conv1: depth=3'.", param, ctx)
        return pattern.strip(), {key.strip(): _number(text.strip()) for key, text in settings.items()}


class Arguments(click.ParamType):  # type: ignore[type-arg]
    """A JSON object."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The object as a dict."""
        if not isinstance(value, str):
            return value
        try:
            found = json.loads(value)
        except ValueError as error:
            self.fail(f"{value!r} is no JSON ({error}); write '{{\"num_classes\": 27}}'.", param, ctx)
        if not isinstance(found, dict):
            self.fail(f"{value!r} is no JSON object; write '{{\"num_classes\": 27}}'.", param, ctx)
        return found


_DTYPES = ("float32", "float64", "float16", "uint8", "int64", "int32")
_SHAPE = re.compile(rf"([1-9]\d*(?:x[1-9]\d*)+)(?::({'|'.join(_DTYPES)}))?")
INPUT = Shapes()


def merged(settings: tuple[tuple[str, Mapping[str, Any]], ...]) -> dict[str, dict[str, Any]]:
    """The ``--set`` options as overrides, in their order."""
    found: dict[str, dict[str, Any]] = {}
    for pattern, values in settings:
        found[pattern] = {**found.pop(pattern, {}), **values}
    return found


def _number(text: str) -> int | str:
    return int(text) if re.fullmatch(r"-?\d+", text) else text
