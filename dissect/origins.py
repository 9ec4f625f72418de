"""Where a captured node comes from: its operator's name, the user's own line, the path of its module."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import fx

from dissect.capturing import Captured

__all__ = ["op_name", "path_of", "source_of"]


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
