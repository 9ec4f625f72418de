"""The tensors of a network's output, whatever its structure: rows, positions in time, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree  # the specs that torch.export itself hands out

__all__ = ["cloned", "rows", "select", "stack", "tensors", "unstack"]


def cloned(inputs: Any) -> Any:
    """Inputs that a forward may write to."""
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, inputs)


def tensors(out: Any) -> list[Any]:
    """The leaves of a runner's result that are outputs of its file."""
    return [leaf for leaf in pytree.tree_leaves(out) if leaf is not None]


def unstack(leaf: Tensor, axes: Any) -> list[Tensor]:
    """The clip form's output as frame tensors, one a frame."""
    from dissect.ledger import split_frames

    return split_frames(leaf, axes)


def rows(leaf: Tensor, axes: Any, row: int) -> Tensor:
    """One of three rows of an output of the clip form."""
    dim = axes.rows + (axes.time is None and axes.rows >= min(2, len(axes)))
    size = leaf.shape[dim] // 3
    return leaf.narrow(dim, row * size, size)


def select(leaf: Tensor, axes: Any) -> Tensor:
    frames = unstack(leaf, axes)
    return frames[-1]


def stack(column: Sequence[Tensor], axes: Any) -> Tensor:
    from dissect.ledger import join

    return join(torch.stack(tuple(column), 1).flatten(0, 1), axes, len(column))
