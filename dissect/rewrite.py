"""The rewrite: one walk over the captured graph that traces time, plans, and builds the dissected graph.

The result is one template graph on frame tensors (see :mod:`dissect.ledger`) in which only temporal
primitives mix time; :mod:`dissect.forms` turns it into the clip form and the step form. Converters do
the work of each operator through :class:`~dissect.context.Context`; they name primitives and know nothing of caches.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import lcm
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg

from dissect import ledger, rowcount
from dissect.capturing import Captured
from dissect.carried import carried
from dissect.carrying import FILLED, Carrying, recurring
from dissect.collected import collected
from dissect.context import Context
from dissect.errors import DissectError, Refusal
from dissect.inputs import Inputs
from dissect.ledger import LedgerError
from dissect.neighbours import neighbours
from dissect.origins import op_name, path_of, reached
from dissect.plan import Branches, Options
from dissect.primitives import Clock, Primitive
from dissect.registry import find, is_patient
from dissect.rewording import reworded
from dissect.sinking import sunk
from dissect.timing import Timing
from dissect.trailing import trailing
from dissect.unrolling import Loop, duplicate, loops, rolled, unlisted
from dissect.unwrapping import unwrapped
from dissect.values import POISON, Dissected, Output, Refused, Value
from dissect.windows import apply, outward

__all__ = ["converted", "rewrite"]

#: what helps wherever a converter has no better advice
FIX = "end the network in front of it, or register a converter of your own with --rules"


def _merges(captured: Captured) -> tuple[dict[Any, list[Any]], list[Any], list[Any]]:
    aten = torch.ops.aten
    active: dict[Any, list[Any]] = {}
    merges, strided = [], []
    for node in captured.graph.nodes:
        if node.op == "placeholder":
            if node.name in captured.inputs:
                active[node] = []
        elif node.op == "call_function" and node.target not in FILLED:
            reads = [arg for arg in dict.fromkeys(node.all_input_nodes) if arg in active]
            if not reads:
                continue
            active[node] = reads
            shape = getattr(node.meta.get("val"), "shape", None)
            wide = [arg for arg in reads if getattr(arg.meta.get("val"), "shape", None) is not None]
            sums = node.target is aten.add.Tensor and all(arg.meta["val"].shape == shape for arg in wide)
            if len(wide) > 1 and (sums or node.target is aten.cat.default):
                merges.append(node)
            before = getattr(wide[0].meta["val"], "shape", ()) if wide else ()
            if (
                shape is not None
                and len(shape) == len(before)
                and len(shape) > 3
                and any(after < size for after, size in zip(shape[2:], before[2:], strict=True))
            ):
                strided.append(node)
    return active, merges, strided


def rewrite(captured: Captured, options: Options, inputs: Inputs) -> Dissected:
    """The template of a captured network; refusals are collected, not raised."""
    work = _unrolled(collected(neighbours(sunk(unwrapped(unlisted(captured, inputs))))), options, inputs)
    done = _walk(work, options, inputs)
    cuts = [refusal for refusal in done.refusals if "cuts through the time axis" in refusal.reason]
    while done.refusals and reworded(work, done.trace):
        work = _unrolled(work, options, inputs)
        done = _walk(work, options, inputs)
    ending = trailing(work, done.trace)
    if ending is not None:
        counted = _walk(ending, options, inputs)
        if len(counted.refusals) <= len(done.refusals):
            work, done = ending, counted
    flat = bool(done.refusals)
    if flat:  # copies as many as there are frames need not be of a value at every frame
        apart = _walk(work, options, inputs, flat=True)
        done = done if apart.refusals else apart
    if done.refusals:  # a cut that was reworded brings a stride: what is refused now may follow from it
        return replace(done, captured=captured, refusals=tuple(dict.fromkeys([*cuts, *done.refusals])))
    whole: frozenset[str] = frozenset()
    again = done
    while again.doubted - whole and not again.refusals:
        # More than the newest position is read of what was made of a whole window: perhaps windows all along will do.
        whole |= again.doubted
        again = _walk(work, options, inputs, whole, flat)
    if not again.refusals and all(row.verdict == "exact" for row in again.rows):
        done = again
    return replace(done, captured=captured)


def _unrolled(work: Captured, options: Options, inputs: Inputs) -> Captured:
    """The graph without loops over frames that were written out."""
    written_out: set[str] = set()  # loops that are better left so
    while True:
        found, chained = loops(work), recurring(work)
        if not found and not chained:
            return work
        before = _walk(work, options, inputs)
        trace = before.trace
        over_time = [loop for loop in found if _over_time(loop, trace)]
        if over_time:  # the outermost of those that hold each other
            outermost = [loop for loop in over_time if not any(loop.end in other.inside for other in over_time)]
            work = rolled(work, outermost)
            continue
        chains = [loop for loop in chained if loop.nodes[0].name not in written_out and _over_time(loop, trace)]
        if not chains:
            return work
        spare, name, plain = duplicate(work), chains[0].nodes[0].name, chains[0].plain
        work = carried(work, chains[0])
        if not plain and len(_walk(work, options, inputs).refusals) > len(before.refusals):
            work = spare
            written_out.add(name)


def _over_time(loop: Loop | Carrying, trace: Mapping[str, Value]) -> bool:
    """Whether a loop goes over the frames of its sources, and takes nothing else that has frames."""
    sources = [(trace.get(node.name), dim) for node, dim in loop.sources]
    shared = [trace.get(node.name) for node in loop.shared]
    return all(value is not None and value.axes[dim].is_time for value, dim in sources) and all(
        value is not None and value.time is None for value in shared
    )


def _walk(
    captured: Captured, options: Options, inputs: Inputs, whole: frozenset[str] = frozenset(), flat: bool = False
) -> Dissected:
    """One walk over the graph; ``whole`` names products across time that every position of a window asks, and with
    ``flat`` copies of a value of the whole clip stand beside one another in the frame, however many they are."""
    ctx = Context(captured, options)
    ctx.whole, ctx.flat = whole, flat
    active, merges, strided = _merges(captured)
    ctx.branches = Branches(active, merges, strided)
    values: dict[fx.Node, Any] = {}
    refusals: list[Refusal] = []
    outputs: list[Output] = []
    ctx.frames = inputs.frames
    placeholders: list[fx.Node] = []
    users = [node for node in captured.graph.nodes if node.op == "placeholder" and node.name in captured.inputs]
    for node, unit in zip(users, inputs.tensors, strict=True):
        placeholder = ctx.graph.placeholder(node.name)
        clock = Timing(fill=0.0, nonneg=not unit.dtype.is_floating_point)
        if unit.rate > 1:
            spacing = 1 if options.preset == "d3d" else unit.rate
            clock = clock.but(stride=spacing, removed=unit.rate, length=clock.length.then(-1, unit.rate))
        placeholders.append(placeholder)
        values[node] = Value(placeholder, unit.sized(captured.batch).inner, clock, unit.dtype)
        if unit.timed and unit.dtype.is_floating_point:
            ctx.element_size = unit.dtype.itemsize
        if ctx.like is None and unit.timed:
            ctx.like = placeholder
    # sums that count the positions of a clip
    counts = {name for name, shape, _ in rowcount.sums(captured.graph) if ctx.frames in shape}
    for node in captured.graph.nodes:
        ctx.node = node
        if "fixed" in node.meta or node.name in counts:
            ctx.grain = lcm(ctx.grain, ctx.frames)
        if node.op == "placeholder":
            if node.name in captured.tensors:
                name, tensor = captured.tensors[node.name]
                values[node] = Value(
                    ctx.get(name, tensor), ledger.plain(tensor.shape), None, tensor.dtype, tensor, name
                )
            continue
        if node.op == "output":
            outputs = [
                Output(values[leaf]) if isinstance(leaf, fx.Node) else Output(None, leaf) for leaf in node.args[0]
            ]
            continue
        try:
            values[node] = converted(ctx, node, values)
        except (Refused, LedgerError) as refused:
            fix = refused.fix or FIX
            refusals.append(Refusal(ctx.path, op_name(node.target), str(refused), fix, ctx.source))
            values[node] = POISON
    if not refusals:
        _finish(ctx, values, outputs)
    trace = {node.name: value for node, value in values.items() if isinstance(value, Value)}
    return Dissected(
        ctx.root,
        ctx.graph,
        inputs,
        tuple(placeholders),
        tuple(outputs),
        tuple(ctx.rows),
        tuple(refusals),
        captured,
        trace,
        ctx.grain,
        frozenset(
            name for name, rows in ctx.matrices.items() if ctx.exact and any(ctx.rows[row].future for row in rows)
        ),
        ctx.home,
        frozenset(ctx.heard),
    )


def converted(ctx: Context, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """One captured node, its arguments' values known."""
    ctx.node, ctx.path = node, path_of(node, ctx.captured)
    args, kwargs = map_arg((node.args, dict(node.kwargs)), values.__getitem__)
    return map_aggregate(_convert(ctx, node, list(args), dict(kwargs)), ctx.confirmed)


def _convert(ctx: Context, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if node.op == "get_attr" or node.op == "call_module":
        raise Refused(
            "control flow that depends on data (a sub-graph) has no step form", "take the branch out of the forward"
        )
    leaves: list[Any] = []
    map_aggregate((args, kwargs), leaves.append)
    if any(leaf is POISON for leaf in leaves):
        return POISON
    if node.target is operator.getitem:
        return args[0][args[1]]
    held = [leaf for leaf in leaves if isinstance(leaf, Value)]
    if all(value.constant for value in held):
        return _constant(ctx, node, args, kwargs)
    found = find(node.target)
    if found is None:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise Refused("control flow inside the graph has no step form", "take it out of the forward")
        raise Refused(
            "no converter for this operator",
            f"register one with @dissect.converter(torch.ops.{op_name(node.target)}...) in a file given by --rules",
        )
    if not is_patient(node.target):
        args, kwargs = map_aggregate((args, kwargs), ctx.sure)
    return map_aggregate(apply(ctx, found, args, kwargs), _of_rows)


def _of_rows(value: Any) -> Any:
    """The value, which has a batch: one of one may be lost in a network that joins what it has along the batch."""
    if isinstance(value, Value) and not value.constant and "N" not in value.axes.kinds:
        raise Refused("what comes out of it has no batch any more", "keep the batch in a dimension of its own")
    return value


def _constant(ctx: Context, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """An operator on constants alone: evaluated now, and emitted, so that training reaches the parameters behind it."""
    tensors, tensor_kwargs = map_aggregate(
        (args, kwargs), lambda leaf: leaf.tensor if isinstance(leaf, Value) else leaf
    )
    if node.target is torch.ops.aten.as_strided.default:  # of a tensor as it lies in memory
        whole = ctx.constant(tensors[0].contiguous())
        args, tensors = [whole, *args[1:]], [whole.tensor, *tensors[1:]]
    if "device" in kwargs:
        tensor_kwargs = {**tensor_kwargs, "device": torch.device("cpu")}
    with torch.no_grad():
        result = node.target(*tensors, **tensor_kwargs)  # type: ignore[operator]
    emitted = ctx.graph.call_function(node.target, ctx.arg(tuple(args)), ctx.arg(kwargs))  # type: ignore[arg-type]
    if isinstance(result, Tensor):
        return Value(emitted, ledger.plain(result.shape), None, result.dtype, result)
    if isinstance(result, (tuple, list)):
        parts = []
        for index, part in enumerate(result):
            item = ctx.graph.call_function(operator.getitem, (emitted, index))
            parts.append(
                Value(item, ledger.plain(part.shape), None, part.dtype, part) if isinstance(part, Tensor) else part
            )
        return tuple(parts)
    return result


def _finish(ctx: Context, values: Mapping[fx.Node, Any], outputs: list[Output]) -> None:
    """Bring the outputs to one delay, write the output node, install what is read, drop what is not."""
    outputs[:] = [replace(output, value=ctx.sure(output.value)) for output in outputs]
    moving = [output.value for output in outputs if output.value is not None and not output.value.constant]
    if not moving:
        raise DissectError("the network's output does not depend on the clip; there is nothing to stream")
    ctx.path = "output"
    latest = max(0, *(value.clock.delay for value in moving))
    for index, output in enumerate(outputs):
        if output.value is not None and not output.value.constant:
            value = outward(ctx, output.value)
            if value.time is not None and value.shape[value.time] > 1:
                ctx.mixes(value)
            wait = latest - value.clock.delay
            late = any(
                clip <= value.clock.last(clip) + wait
                for clip in range(1, max(ctx.frames, 64))
                if value.clock.length(clip) > 0
            )
            if ctx.exact and late and not _told(ctx, moving):
                value = ctx.gate(value)  # no layer asks when the clip ends, but the flush must be told
            value = ctx.delay(value, wait)
            apart = ledger.apart(value.axes)
            outputs[index] = Output(replace(value, axes=apart), own=None if apart is value.axes else value.axes)
    ctx.graph.output(tuple(output.value.node for output in outputs if output.value is not None))
    ctx.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    live = {node.target for node in ctx.graph.nodes if node.op == "get_attr"}
    for name, tensor in ctx.captured.tensors.values():
        if name in live and not ctx.has(name):
            owner, _, leaf = name.rpartition(".")
            home = ctx.container(owner)
            if name in ctx.captured.state and isinstance(ctx.captured.state[name], nn.Parameter):
                home.register_parameter(leaf, nn.Parameter(tensor.detach().clone()))
            else:
                home.register_buffer(leaf, tensor.detach().clone(), persistent=name in ctx.captured.state)
    if ctx.clock is not None:
        clock = ctx.clock[0]
        # Length expressions are linear in whole periods, so an age may turn back by one once every delay lies behind it.
        clock.period = lcm(*(query.stride for query in clock.queries)) if clock.flushes or clock.phased else 1
        reach = max(query.delay + query.shift + query.stride * (query.positions + 1) for query in clock.queries)
        clock.settled = -(-(max(reach, 0) + 1) // clock.period) * clock.period
    _account(ctx)


def _told(ctx: Context, values: Sequence[Value]) -> bool:
    """Whether something that ``values`` are made of asks when the clip ends; what was built and is not read does not count."""
    if ctx.clock is None or not ctx.clock[0].flushes:
        return False
    return ctx.clock[1] in reached((value.node for value in values), lambda at: at.all_input_nodes)


def _account(ctx: Context) -> None:
    """Write each live cache into the row of the layer that first asked for it."""
    for node in ctx.graph.nodes:
        module = ctx.root.get_submodule(node.target) if node.op == "call_module" else None
        if not isinstance(module, Primitive) or isinstance(module, Clock) or not module.specs:
            continue
        size = sum(ctx.bytes(spec.shape) for spec in module.specs)
        for index, row in enumerate(ctx.rows):
            if row.path == node.meta["path"] and not row.cache_bytes:
                ctx.rows[index] = replace(row, cache_shape=module.specs[0].shape, cache_bytes=size)
                break
