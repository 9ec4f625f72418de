"""Tokens: what is joined to the frames to be attended to with them (a class token), and what is a frame at the clip's edge.

Both are a concatenation along time. A frame at the edge has its place in the stream, in front of the first frame; a
token has none: it stands beside every window of frames that the network sees.
"""

from __future__ import annotations

import torch
from torch import fx

from dissect.origins import reached

__all__ = ["attended", "ended"]

aten = torch.ops.aten
_SOFTMAX = (aten.softmax.int, aten._softmax.default)
#: what looks at the neighbours of a position
_NEIGHBOURS = ("conv", "pool", "lstm", "gru", "rnn", "pad", "roll", "cumsum", "unfold", "upsample", "diff")


def attended(node: fx.Node, dim: int, frames: int) -> bool:
    """Whether all that a concatenation along ``dim`` joins to ``frames`` positions is attended to as one, and no output
    has positions any more."""
    size = node.meta["val"].shape[dim]
    after = reached([node], lambda at: at.users)
    over = [at for at in after if size in _keys(at)]
    if not over:
        return False
    between = after & reached(over, lambda at: at.all_input_nodes)
    if any(word in str(at.target) for at in between for word in _NEIGHBOURS):
        return False
    if ended(node, dim, frames):  # whatever the sizes of the outputs are: eight classes of eight frames
        return True
    outputs = node.graph.output_node()
    return not any({size, frames} & set(at.meta["val"].shape[1:]) for at in outputs.all_input_nodes if at in after)


def ended(node: fx.Node, dim: int, frames: int) -> bool:
    """Whether what becomes of a concatenation along ``dim`` with ``frames`` positions is one for all of them before it is an
    output."""
    sizes = {int(node.meta["val"].shape[dim]), frames}
    return node.graph.output_node() not in reached([node], lambda at: [] if _ends(at, sizes) else at.users)


def _ends(node: fx.Node, sizes: set[int]) -> bool:
    """Whether one position is picked, or made, out of so many."""
    values = [at.meta.get("val") for at in (*node.all_input_nodes, node)]
    if len(values) != 2 or not all(isinstance(value, torch.Tensor) for value in values):
        return False
    before, after = (list(value.shape) for value in values)  # type: ignore[union-attr]
    gone = [at for at in range(1, len(before)) if before[at] in sizes and before[at] > 1]
    return any(after in (before[:at] + before[at + 1 :], [*before[:at], 1, *before[at + 1 :]]) for at in gone)


def _keys(node: fx.Node) -> set[int]:
    """How many positions an attention weighs."""
    if node.target in _SOFTMAX:
        return {node.meta["val"].shape[node.args[1]]}
    if node.target is aten.scaled_dot_product_attention.default:
        return {node.args[1].meta["val"].shape[-2]}  # type: ignore[union-attr]
    return set()
