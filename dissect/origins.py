"""Where a node comes from: its operator's name, the user's own line, the path of its module, all that it hangs on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

if TYPE_CHECKING:
    from dissect.capturing import Captured

__all__ = ["op_name", "path_of", "reached", "source_of"]


def op_name(target: Any) -> str:
    """``aten.conv3d`` for ``torch.ops.aten.conv3d.default``."""
    if callable(target) and not isinstance(target, torch._ops.OpOverload) and hasattr(target, "__name__"):
        return str(target.__name__)
    return re.sub(r"\.(default|Tensor|int|dim|using_ints|padding|Scalar|vec|input)$", "", str(target))


def source_of(node: fx.Node) -> str:
    """``file.py:12`` of the user's own line that made a node, where the graph knows it."""
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    for file, line in reversed(lines):
        if "torch" not in Path(file).parts:
            return f"{Path(file).name}:{line}"
    return ""


def path_of(node: fx.Node, captured: Captured) -> str:
    """The module path of a node: where its parameters live, or the module that ran it."""
    for arg in node.all_input_nodes:
        held = captured.tensors.get(arg.name)
        if held is not None and arg.op == "placeholder" and node.meta.get("nn_module_stack") is None:
            return held[0].rpartition(".")[0]
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    return re.sub(r"@\d+$", "", paths[-1]) if paths else ""


def reached(start: Iterable[fx.Node], beside: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """The nodes, and all that are reached from them: by way of their users, or of what they read."""
    found: set[fx.Node] = set()
    queue = list(start)
    while queue:
        node = queue.pop()
        if node not in found:
            found.add(node)
            queue += beside(node)
    return found
