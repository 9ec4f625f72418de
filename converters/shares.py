"""Sums over a window: entries that are no positions are zero, and a mean is over those that are."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import fx

from dissect.context import Context, Value
from dissect.ledger import Axes
from dissect.windows import kept, masked, windows

aten = torch.ops.aten
Labels = Sequence[Hashable]


def zeroed(ctx: Context, values: Sequence[Value], labels: Sequence[Labels], label: Hashable) -> list[Value]:
    """The operands, one of which is zero where the window under ``label`` has no position."""
    at = [index for index, names in enumerate(labels) if label in names and not values[index].constant]
    dims = {index: list(labels[index]).index(label) for index in at}
    if any(
        factor.window is not None and factor.window.zero
        for index in at
        for factor in windows(Axes((values[index].axes[dims[index]],)))
    ):
        return list(values)
    last = at[-1]
    return [masked(ctx, value, 0.0, dims[last]) if index == last else value for index, value in enumerate(values)]


def divided(ctx: Context, values: Sequence[Value], labels: Sequence[Labels], label: Hashable) -> list[Any]:
    """Where weights were divided by the number of keys of a whole clip, the window to divide by as many as there are."""
    nodes = list(fx.node.map_aggregate(list(ctx.node.all_input_nodes), lambda node: node))
    for node in nodes:
        number = divisor(node)
        if number is None:
            continue
        for value, names in zip(values, labels, strict=True):
            if label in names and not value.constant:
                axis = value.axes[list(names).index(label)]
                if abs(number - axis.size) < 1e-6 * axis.size:
                    return [(windows(Axes((axis,)))[0], kept(Axes((axis,)))[1])]
    return []


def divisor(node: fx.Node) -> float | None:
    """The number that an activation was divided by last, through reshapes."""
    through = (
        aten.view.default,
        aten.reshape.default,
        aten.transpose.int,
        aten.permute.default,
        aten.clone.default,
        aten._unsafe_view.default,
        aten.expand.default,
    )
    while node.op == "call_function" and node.target in through:
        node = node.args[0]  # type: ignore[assignment]
    if (
        node.op == "call_function"
        and node.target in (aten.div.Tensor, aten.div.Scalar)
        and isinstance(node.args[1], (int, float))
    ):
        return float(node.args[1])
    if (
        node.op == "call_function"
        and node.target in (aten.mul.Tensor, aten.mul.Scalar)
        and isinstance(node.args[1], float)
        and node.args[1]
    ):
        return 1 / node.args[1]
    return None
