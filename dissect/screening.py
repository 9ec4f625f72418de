"""Says what in a ``torch.export`` archive could run code while it is loaded, so that loading one needs no trust.

Law: from an archive without findings, ``torch.export.load`` (told to unpickle tensors only) runs nothing but
arithmetic on sizes, and its graph holds no operator from outside ``torch.ops``.

``torch.export`` itself warns that it unpickles. Besides, it hands shape expressions to ``sympy.sympify`` and guards to
``exec``, and looks operators up as attributes of ``torch``. An ordinary archive needs only the tame part of all that.
"""

from __future__ import annotations

import ast
import json
import re
import zipfile
from collections.abc import Iterator

__all__ = ["findings"]

_PROGRAMS = ("models/", "serialized_exported_program.json")
_COMPILED = ("data/aotinductor/", "data/executorch/", "data/mtia")
_OBJECTS = ("data/constants/custom_obj_", "data/constants/opaque_obj_")
_LOOKED_UP = ("torch", "_operator", "math", "#")
_OPERATOR = re.compile(
    r"torch\.ops(\.(?!__)\w+){2,3}|_operator\.(?!__|attrgetter|methodcaller|call)\w+|math\.\w+|torch\._?sym_\w+"
)
_FUNCTIONS = frozenset(
    """Abs Add And CeilDiv CeilToInt CleanDiv Equality Eq Float FloatPow FloatTrueDiv FloorDiv FloorToInt Ge GreaterThan
    Gt Identity IntTrueDiv Integer LShift Le LessThan Lt Max Min Mod ModularIndexing Mul Ne Not Or Pow PowByNatural
    PythonMod RShift Rational RoundDecimal RoundToInt StrictGreaterThan StrictLessThan Symbol ToFloat TruncToFloat
    TruncToInt Unequality Where bool ceiling float floor int len max min round""".split()
)
_ATTRIBUTES = frozenset(("size", "shape", "stride", "storage_offset", "dim", "ndim", "item", "isnan", "inf"))
_ARITHMETIC = (
    *(ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.Subscript, ast.Tuple, ast.List),
    *(ast.Name, ast.keyword, ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context),
)


def findings(archive: zipfile.ZipFile) -> list[str]:
    """Everything in the archive that could run code at load, in words; empty for an ordinary archive.

    Raises ``ValueError`` where a program in it is no JSON.
    """
    found: list[str] = []
    for name in archive.namelist():
        # A new archive has one top folder, the file's stem; an old one has none.
        path = name if name.startswith(_PROGRAMS) else name.partition("/")[2]
        if path.startswith(_COMPILED):
            found.append(f"a compiled part, {path}")
        elif path.startswith(_OBJECTS):
            found.append(f"a pickled object, {path}")
        elif path.startswith(_PROGRAMS):
            found.extend(_program(json.loads(archive.read(name))))
    return found


def _program(program: object) -> Iterator[str]:
    """What stands out in one serialised program: operators and expressions that go beyond arithmetic on tensors."""
    for key, value in _strings(program):
        if key in ("target", "as_operator"):
            if value.startswith(_LOOKED_UP) and "." in value and not _OPERATOR.fullmatch(value):
                yield f"an operator outside torch.ops, {value[:60]}"
        elif key in ("expr_str", "guards_code") and not _is_arithmetic(value):
            yield f"an expression that is no arithmetic, {value[:60]!r}"


def _is_arithmetic(text: str) -> bool:
    """True where the text is one Python expression of numbers, names, sizes and known functions of them."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError):
        return False
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            tame = isinstance(node.func, ast.Attribute) or (
                isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
            )
        elif isinstance(node, ast.Attribute):
            tame = node.attr in _ATTRIBUTES
        elif isinstance(node, ast.Constant):
            # sympify evaluates the text inside a string again: only plain names pass.
            tame = not isinstance(node.value, str | bytes) or re.fullmatch(r"\w*", str(node.value)) is not None
        else:
            tame = isinstance(node, _ARITHMETIC)
        if not tame:
            return False
    return True


def _strings(tree: object) -> Iterator[tuple[str, str]]:
    """Every string in a JSON tree with the key that it stands under."""
    stack: list[tuple[str, object]] = [("", tree)]
    while stack:
        key, node = stack.pop()
        if isinstance(node, str):
            yield key, node
        elif isinstance(node, dict):
            stack.extend(node.items())
        elif isinstance(node, list):
            stack.extend((key, item) for item in node)
