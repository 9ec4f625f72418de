"""Oracles: the original network where its clip's edges are, and the original with its edges moved.

Each runs the user's own unmodified graph, operator by operator, with ATen's own kernels; only the padding of
operators over time differs. They share the trace of where time lies with the dissector, and no other code.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dissect.ledger import Axes, Axis, Factor
from dissect.values import Value
from dissect.vectors import OPS

__all__ = ["Shifted", "Still", "Unshiftable"]

aten = torch.ops.aten
_CONV = {aten.conv1d: F.conv1d, aten.conv2d: F.conv2d, aten.conv3d: F.conv3d}
_TRANSPOSED = {
    aten.conv_transpose1d: F.conv_transpose1d,
    aten.conv_transpose2d: F.conv_transpose2d,
    aten.conv_transpose3d: F.conv_transpose3d,
}
_NORMS = (aten.group_norm, aten.instance_norm, aten.layer_norm)
_RESAMPLING = (
    OPS.frame_vectors,
    aten.repeat_interleave,
    *[
        getattr(aten, f"{name}{dims}d")
        for name in ("upsample_nearest", "_upsample_nearest_exact")
        for dims in (1, 2, 3)
    ],
    *(aten.upsample_linear1d, aten.upsample_bilinear2d, aten.upsample_trilinear3d),
)
_POOLS = {
    aten.max_pool1d: 1,
    aten.max_pool2d: 2,
    aten.max_pool3d: 3,
    aten.avg_pool1d: 1,
    aten.avg_pool2d: 2,
    aten.avg_pool3d: 3,
}


_ADAPTIVE = [getattr(aten, f"adaptive_{kind}_pool{dims}d") for kind in ("avg", "max") for dims in (1, 2, 3)]
_OVER_TIME = (
    *(aten.mean, aten.sum, aten.amax, aten.amin, aten.max, aten.min),
    *(aten.std, aten.var, aten.std_mean, aten.var_mean, aten.linalg_vector_norm),
    *_ADAPTIVE,
)


_OPEN = 1 << 31  # no clip is as long: an open end is a number far above
_VIEWS = (aten.view, aten.reshape, aten._unsafe_view, aten.unflatten)
_SHARES = (aten.softmax, aten._softmax)
_PICKS = (aten.unfold, aten.roll, aten.index_select, aten.index)


class Unshiftable(Exception):
    """This network has an operator whose edges cannot be moved; there is no such oracle for it."""


def offline(value: Value) -> Value:
    """A value as the original has it: what a stream keeps as a window of positions is its axis of time."""
    if value.constant or value.time is not None or sum(axis.kinds.count("K") for axis in value.axes.dims) != 1:
        return value
    timed = (Axis(tuple(Factor("T", f.size) if f.kind == "K" else f for f in axis.factors)) for axis in value.axes.dims)
    return replace(value, axes=Axes(tuple(timed)))


class _Edges(fx.Interpreter):
    """Runs the original with its temporal padding replaced; subclasses say by what."""

    def __init__(self, module: fx.GraphModule, trace: Mapping[str, Value]) -> None:
        super().__init__(module)
        self.trace = {name: offline(value) for name, value in trace.items()}

    def edge(self, x: Tensor, dim: int, reach: int, left: int, right: int, fill: float) -> Tensor:
        raise NotImplementedError

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function" or not isinstance(n.target, torch._ops.OpOverload):
            return super().run_node(n)
        main = self.main(n)
        if main is not None:
            return self.env[main]
        source = n.args[0] if n.args else None
        value = self.trace.get(source.name) if isinstance(source, fx.Node) else None
        packet = n.target.overloadpacket
        if packet is aten.index and isinstance(source, fx.Node) and source.name not in self.trace:
            raise Unshiftable("it compares each frame with its neighbours, the clip's edges among them")
        if value is None or value.time is None or not value.axes[value.time].is_time:
            return self.as_it_is(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if packet in _CONV:
            return self.conv(_CONV[packet], value.time, *args, **kwargs)
        if packet in _SHARES and args[1] % args[0].dim() == value.time:
            shares = n.target(self.newest(args[0], value), *args[1:], **kwargs)
            spare = args[0].shape[value.time] - shares.shape[value.time]  # positions that the original has not
            return F.pad(shares, [*[0, 0] * (shares.dim() - 1 - value.time), spare, 0])
        if packet in _OVER_TIME and self.ends(n, value):
            return n.target(self.newest(args[0], value), *args[1:], **kwargs)
        if packet in _ADAPTIVE and value.time >= len(value.shape) - len(args[1]):
            return self.adaptive(n.target, value, *args)
        if packet in _POOLS:
            x, kernel, *rest = args
            kernel, at = _spread(kernel, _POOLS[packet]), value.time - len(value.shape)
            if kernel[at] == value.shape[value.time] > 1:  # over the whole clip: over all positions there are
                x = self.newest(x, value)
                kernel[at] = min(kernel[at], x.shape[value.time])
            return self.pool(n.target, _POOLS[packet], value.time, x, kernel, *rest, **kwargs)
        if packet is aten.pad or packet is aten.constant_pad_nd:
            at = 2 * (len(value.shape) - 1 - value.time) + 1
            if at < len(args[1]) and args[1][at] < 0:  # a crop of the end
                return self.pad(value.time, self.cut(args[0], value, self.trace.get(n.name)), *args[1:], **kwargs)
            return self.pad(value.time, *args, **kwargs)
        if packet in _TRANSPOSED:
            return self.transposed(_TRANSPOSED[packet], value.time, *args, **kwargs)
        if packet is aten.diff and (args[2] if len(args) > 2 else -1) % args[0].dim() == value.time:
            x = args[0]
            for _ in range(args[1] if len(args) > 1 else 1):
                x = self.edge(x, value.time, 1, 1, 0, 0.0).diff(dim=value.time)
            return x
        if (
            n.name in self.trace
            and packet is aten.slice
            and (args[1] if len(args) > 1 else 0) % args[0].dim() == value.time
        ):
            if not self.trace[n.name].axes[value.time].is_time:  # the last few frames
                return super().run_node(n)
            step = args[4] if len(args) > 4 else 1
            return aten.slice(self.cut(args[0], value, self.trace.get(n.name)), value.time, None, None, step)
        return self.as_it_is(n)

    def as_it_is(self, n: fx.Node) -> Any:
        """An operator without edges; where the clip ends in it, it sees as many positions as in the original."""
        out = self.trace.get(n.name)
        if out is None or out.constant or out.time is not None:
            return super().run_node(n)

        def seen(node: fx.Node) -> Any:
            value, x = self.trace.get(node.name), self.env[node]
            timed = value is not None and not value.constant and value.time is not None
            return self.newest(x, value) if timed else x  # type: ignore[arg-type]

        args, kwargs = fx.node.map_arg((n.args, n.kwargs), seen)
        return n.target(*args, **kwargs)  # type: ignore[operator]

    def cut(self, x: Tensor, value: Value, out: Value | None) -> Tensor:
        """The positions of a slice, before its step: moved edges leave them all."""
        return x

    def main(self, n: fx.Node) -> fx.Node | None:
        """Of tensors that are put together along time, the one that goes on with the stream: the others are edges."""
        if n.target in (aten.cat.default, aten.stack.default):
            parts: list[Any] = list(n.args[0])  # type: ignore[arg-type]
            dim: Any = n.args[1] if len(n.args) > 1 else 0
        elif n.target in (aten.slice_scatter.default, aten.select_scatter.default):
            if n.target is aten.slice_scatter.default and len(n.args) > 5 and n.args[5] != 1:
                raise Unshiftable("it writes every so many frames")
            parts, dim = [n.args[0], n.args[1]], n.args[2] if len(n.args) > 2 else 0
            if n.target is aten.slice_scatter.default:  # the larger part, as for a concatenation
                size, written = (node.meta["val"].shape[dim] for node in parts)
                parts = parts[1:] if 2 * written >= size else parts[:1]
        else:
            return None
        out = self.trace.get(n.name)
        if out is None or out.constant or not out.axes[dim % len(out.shape)].is_time:
            return None
        found: list[Any] = []
        for part in parts:
            value = self.trace.get(part.name)
            if (
                value is not None
                and not value.constant
                and not value.clock.still
                and len(value.shape) == len(out.shape)
            ):
                axis = value.axes[dim]
                found += [(axis.size, len(found), part)] if axis.is_time else []
        if not found and (out.shape[dim] != self.frames(out) or out.clock.stride > 1):
            raise Unshiftable("it goes over a part of the clip's frames")
        if not found and len({part.target for part in parts}) > 1:
            raise Unshiftable("it puts single frames together, its edges among them")
        return max(found)[2] if found else None

    def frames(self, value: Value) -> int:
        """The positions that a value would have if nothing cut any off."""
        longest = max(
            other.shape[other.time] for other in self.trace.values() if not other.constant and other.time is not None
        )
        return -(-longest // value.clock.stride)

    def ends(self, n: fx.Node, value: Value) -> bool:
        """The operator leaves one position for the whole clip."""
        packet = n.target.overloadpacket  # type: ignore[union-attr]
        if packet in _ADAPTIVE:
            sizes: Any = n.args[1]
            at = value.time - (len(value.shape) - len(sizes))  # type: ignore[operator]
            return bool(at >= 0 and sizes[at] == 1)
        at = 2 if packet is aten.linalg_vector_norm else 1
        dims: Any = n.args[at] if len(n.args) > at else n.kwargs.get("dim")
        if dims is None or isinstance(dims, bool) or dims == []:
            return True
        return value.time in [dim % len(value.shape) for dim in ([dims] if isinstance(dims, int) else dims)]

    def newest(self, x: Tensor, value: Value) -> Tensor:
        """As many positions as the original has there, the newest: moved edges may leave more."""
        assert value.time is not None
        axis = value.axes[value.time]
        at = axis.kinds.index("T")
        count = axis.factors[at].size
        before = prod(factor.size for factor in axis.factors[:at])
        after = prod(factor.size for factor in axis.factors[at + 1 :])
        size, left = divmod(x.shape[value.time], before * after)
        if size <= count or left or "N" in axis.kinds:
            return x
        apart = x.unflatten(value.time, (before, size, after)).narrow(value.time + 1, size - count, count)
        flat: Tensor = apart.flatten(value.time, value.time + 2)
        return flat

    def conv(
        self,
        target: Any,
        time: int,
        x: Tensor,
        weight: Tensor,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        dims = weight.dim() - 2
        at = time - 2
        if at < 0:
            return target(x, weight, bias, stride, padding, dilation, groups)  # type: ignore[no-any-return]
        gaps = _spread(dilation, dims)
        if isinstance(padding, str):
            totals = [
                (size - 1) * gap if padding == "same" else 0 for size, gap in zip(weight.shape[2:], gaps, strict=True)
            ]
            pairs = [(total // 2, total - total // 2) for total in totals]
        else:
            pairs = [(side, side) for side in _spread(padding, dims)]
        left, right = pairs[at]
        pairs[at] = (0, 0)
        x = self.edge(x, time, (weight.shape[2 + at] - 1) * gaps[at], left, right, 0.0)
        x = F.pad(x, [width for pair in reversed(pairs) for width in pair])
        return target(x, weight, bias, stride, 0, dilation, groups)  # type: ignore[no-any-return]

    def transposed(
        self,
        target: Any,
        time: int,
        x: Tensor,
        weight: Tensor,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Tensor:
        dims = weight.dim() - 2
        steps, gaps, pads, extra = (_spread(value, dims) for value in (stride, dilation, padding, output_padding))
        at = time - 2
        if at < 0 or (weight.shape[2 + at], steps[at], pads[at], extra[at]) == (1, 1, 0, 0):
            return target(x, weight, bias, stride, padding, output_padding, groups, dilation)  # type: ignore[no-any-return]
        reach = (weight.shape[2 + at] - 1) * gaps[at]
        count = (x.shape[time] - 1) * steps[at] - 2 * pads[at] + reach + extra[at] + 1
        pads[at] = extra[at] = 0
        return self.phased(
            x, time, reach, steps[at], count, lambda y: target(y, weight, bias, steps, pads, extra, groups, gaps)
        )

    def phased(
        self, x: Tensor, time: int, reach: int, step: int, count: int, run: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """A transposed convolution over time: ``run`` without any padding, to be cut to ``count`` positions."""
        raise Unshiftable("it adds positions between others")

    def pool(
        self, target: Any, dims: int, time: int, x: Tensor, kernel: Any, stride: Any = (), padding: Any = 0, *rest: Any
    ) -> Tensor:
        at = time - (x.dim() - dims)
        size, pads = _spread(kernel, dims), _spread(padding, dims)
        step = _spread(stride, dims) if isinstance(stride, int) or len(stride) else size
        maximum = "max_pool" in str(target)
        gap = _spread(rest[0], dims)[at] if maximum and rest else 1
        options = list(rest)
        ceil = (
            options[1] if maximum and len(options) > 1 else options[0] if not maximum and options else False
        ) is True
        if size[at] == x.shape[time] and pads[at] == 0:
            return target(x, kernel, stride, padding, *rest)  # type: ignore[no-any-return]
        if (
            ceil
            or (not maximum and len(options) > 1 and options[1] is False and pads[at])
            or (not maximum and len(options) > 2 and options[2])
        ):
            raise Unshiftable
        x = self.edge(x, time, (size[at] - 1) * gap, pads[at], pads[at], float("-inf") if maximum else 0.0)
        pads[at] = 0
        return target(x, size, step, pads, *rest)  # type: ignore[no-any-return]

    def adaptive(self, target: Any, value: Value, x: Tensor, size: list[int]) -> Any:
        """An adaptive pool as the original has it, however many positions there are now: space first, then a plain pool."""
        time: Any = value.time
        dims, at = len(size), time - len(value.shape) + len(size)
        count, wanted = value.shape[time], size[at]
        if count % wanted:
            raise Unshiftable("an adaptive pool has bins of uneven length")
        y = target(x, [x.shape[time] if dim == at else width for dim, width in enumerate(size)])
        y = y[0] if isinstance(y, tuple) else y
        kernel = [count // wanted if dim == at else 1 for dim in range(dims)]
        maximum = "max" in str(target)
        if count > wanted:
            pool = getattr(aten, f"{'max' if maximum else 'avg'}_pool{dims}d").default
            y = self.pool(pool, dims, time, y, kernel)
        return (y, None) if maximum else y

    def pad(self, time: int, x: Tensor, widths: list[int], *rest: Any) -> Tensor:
        widths = list(widths)
        at = 2 * (x.dim() - 1 - time)
        if at < len(widths):
            left, right = widths[at], widths[at + 1]
            widths[at] = widths[at + 1] = 0
            x = self.edge(x, time, -1, left, right, 0.0)
        return F.pad(x, widths, *rest)


class Still(_Edges):
    """The original away from its edges: beyond them, the scene stands still (for a clip of one frame repeated)."""

    def edge(self, x: Tensor, dim: int, reach: int, left: int, right: int, fill: float) -> Tensor:
        count = x.shape[dim]
        index = torch.arange(-left, count + right, device=x.device).clamp(0, count - 1)
        return x.index_select(dim, index)

    def phased(
        self, x: Tensor, time: int, reach: int, step: int, count: int, run: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The mean over the phases: where the stride before is gone, nothing tells them apart."""
        y = run(self.edge(x, time, reach, reach + 1, reach + 1, 0.0))
        whole = (y.shape[time] - 2 * reach) // step * step
        y = y.narrow(time, reach, whole).mean(time, keepdim=True)
        return y.expand(*[count if dim == time else -1 for dim in range(y.dim())])


class Shifted(_Edges):
    """The original with its kernels shifted into the past: all padding on the left, none on the right.

    With ``repeated``, the first frame stands there instead of a padding. There is no such oracle for a network that adds
    positions between others, or shows each frame something of the whole clip.
    """

    def __init__(self, module: fx.GraphModule, trace: Mapping[str, Value], repeated: bool = False) -> None:
        super().__init__(module, trace)
        self.repeated = repeated
        self.ended: set[str] = set()  # values of the whole clip

    def run_node(self, n: fx.Node) -> Any:
        reads = n.all_input_nodes if n.target is not operator.getitem else n.all_input_nodes[0].all_input_nodes
        known = [self.trace[node.name] for node in reads if node.name in self.trace]
        out = self.trace.get(n.name)
        past = any(node.name in self.ended for node in n.all_input_nodes)
        for node in n.all_input_nodes:
            self.arrive(node, out)
        if past and out is not None and out.time is not None:
            raise Unshiftable("a value of the whole clip is broadcast back onto every frame")
        steady = out is None or out.constant or out.time is not None
        if past or (not steady and any(value.time is not None for value in known)):
            self.ended.add(n.name)
        source = n.args[0] if n.args else None
        value = self.trace.get(source.name) if isinstance(source, fx.Node) else None
        if value is not None and value.time is not None and isinstance(n.target, torch._ops.OpOverload):
            packet, after = n.target.overloadpacket, n.meta["val"]
            if packet in _PICKS and (
                len(n.args) < 2 or not isinstance(n.args[1], int) or n.args[1] % len(value.shape) == value.time
            ):
                raise Unshiftable("it picks or moves frames by their number")
            if packet in _VIEWS and out is not None and not out.constant and out.time is not None:
                frames, pieces = _positions(value), _positions(out)
                if frames > pieces:  # a view that cuts time into pieces: each ends with its newest frame
                    return self.cut_up(n, value, frames // pieces - 1)
            if packet in _RESAMPLING and after.shape[value.time] != value.shape[value.time]:
                raise Unshiftable("it resamples time")
            bins = (after[0] if isinstance(after, tuple) else after).shape if "adaptive" in str(packet) else value.shape
            if bins[value.time] not in (1, value.shape[value.time]):
                raise Unshiftable("it pools time into as many bins as it likes, whose edges follow the clip")
            inside = len(n.args[1]) if packet is aten.layer_norm else len(value.shape) - 2  # type: ignore[arg-type]
            own = packet is not aten.instance_norm or n.args[5]
            if packet is aten._native_batch_norm_legit or (
                packet in _NORMS and own and value.time >= len(value.shape) - inside
            ):
                raise Unshiftable("it normalises every frame by the whole clip")
        return super().run_node(n)

    def arrive(self, node: fx.Node, reader: Value | None) -> None:
        """Where a step waits for a crop no longer, nothing is there until the clip's first frame is."""
        value = self.trace.get(node.name)
        if self.repeated or value is None or value.constant or value.time is None or not value.axes[value.time].is_time:
            return
        carried = reader.clock.wait if reader is not None and not reader.constant else 0
        late = -(-value.clock.wait // value.clock.stride)
        x = self.env[node]
        if carried < value.clock.wait and isinstance(x, Tensor):
            gone = torch.arange(x.shape[value.time], device=x.device) < late
            self.env[node] = x.masked_fill(gone.reshape(-1, *[1] * (x.dim() - 1 - value.time)), 0)

    def cut_up(self, n: fx.Node, value: Value, late: int) -> Any:
        """A view of the clip as it was ``late`` positions before."""
        (x, *rest), kwargs = self.fetch_args_kwargs_from_env(n)
        time: Any = value.time
        if not value.axes[time].is_time or x.shape[time] != value.shape[time]:
            raise Unshiftable("it cuts time into pieces by their number")
        return n.target(self.edge(x, time, late, 0, 0, 0.0).narrow(time, 0, x.shape[time]), *rest, **kwargs)  # type: ignore[operator]

    def cut(self, x: Tensor, value: Value, out: Value | None) -> Tensor:
        """A crop of the clip's end shows what was there before."""
        late = 0
        if out is not None and not out.constant:  # what it must wait for still, or has waited for
            late = (out.clock.wait + out.clock.new - value.clock.wait - value.clock.new) // value.clock.stride
        if late <= 0 or value.time is None:
            return x
        count = x.shape[value.time]
        return F.pad(x, [0, 0] * (x.dim() - 1 - value.time) + [late, 0]).narrow(value.time, 0, count)

    def edge(self, x: Tensor, dim: int, reach: int, left: int, right: int, fill: float) -> Tensor:
        if reach < 0:  # a padding of its own: the next kernel brings its own
            return x
        if self.repeated:
            return torch.cat([x.narrow(dim, 0, 1)] * reach + [x], dim)
        widths = [0, 0] * (x.dim() - 1 - dim) + [reach, 0]
        return F.pad(x, widths, value=fill)


def _positions(value: Value) -> int:
    """The size of the factor that is time."""
    return next(factor.size for axis in value.axes.dims for factor in axis.factors if factor.kind == "T")


def _spread(value: Any, dims: int) -> list[int]:
    given = [value] if isinstance(value, int) else list(value)
    return given * dims if len(given) == 1 else given


def original(model: nn.Module | Any, example: tuple[Any, ...]) -> fx.GraphModule:
    """The user's network as a flat graph for exactly these inputs, parameters and constants in place."""
    from dissect.capturing import whole

    return whole(model, example)


_SIZED = {
    "view",
    "reshape",
    "expand",
    "new_zeros",
    "zeros",
    "ones",
    "full",
    "new_ones",
    "new_full",
    "arange",
    "_unsafe_view",
    "repeat",
}


def calls(graph: fx.Graph) -> list[tuple[str, Any]]:
    """Names and operators of a graph: where they are those of another, a name means the same node in both."""
    return [(node.name, node.target) for node in _called(graph)]


def _called(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "call_function"]


def differs(model: nn.Module | Any, example: tuple[Any, ...], captured: Any) -> bool:
    """Whether the network is another one for inputs of this shape.

    It has other operators then, or other settings of the same, a slice that ends beyond what there is, constants of another
    size, or an interpolation to a size, or a slice up to a place, that is the same while that of the clip is not.
    """

    def told(graph: fx.Graph) -> list[Any]:
        return [
            (
                str(node.target),
                None
                if str(node.target).split(".")[1:2] and str(node.target).split(".")[1] in _SIZED
                else _settings(node),
                _cut_short(node),
            )
            for node in _called(graph)
        ]

    theirs = original(model, example)
    held = (getattr(theirs, str(node.target)) for node in theirs.graph.nodes if node.op == "get_attr")
    sizes = sorted(tuple(tensor.shape) for tensor in held)
    if sizes != sorted(tuple(tensor.shape) for _, tensor in captured.tensors.values()):
        return True
    if told(theirs.graph) != told(captured.graph):
        return True
    pairs = list(zip(_called(theirs.graph), _called(captured.graph), strict=True))
    return any(_stretched(one, other) or _counted_off(one, other) for one, other in pairs)


def _stretched(one: fx.Node, other: fx.Node) -> bool:
    """Whether an interpolation of two captures goes from different sizes to the same."""
    if "upsample" not in str(one.target):
        return False
    (start, end), (first, last) = (
        (node.args[0].meta["val"].shape[2:], node.meta["val"].shape[2:])  # type: ignore[union-attr]
        for node in (one, other)
    )
    return any(a != b and c == d for a, b, c, d in zip(start, first, end, last, strict=True))


def _counted_off(one: fx.Node, other: fx.Node) -> bool:
    """Whether a slice of two captures ends at the same place, counted from the front, of tensors of different lengths."""
    if one.target is not torch.ops.aten.slice.Tensor or min(len(one.args), len(other.args)) < 4:
        return False
    end = one.args[3]
    sizes = [node.args[0].meta["val"].shape[node.args[1]] for node in (one, other)]  # type: ignore[union-attr]
    return sizes[0] != sizes[1] and isinstance(end, int) and end == other.args[3] and 0 <= end < max(sizes)


def _cut_short(node: fx.Node) -> bool:
    """Whether a slice ends where its tensor does not go any more, by a number that the network gave."""
    if node.target is not torch.ops.aten.slice.Tensor or len(node.args) < 4:
        return False
    source, dim, _, end = node.args[:4]
    value = source.meta.get("val") if isinstance(source, fx.Node) else None
    return isinstance(value, Tensor) and isinstance(end, int) and value.shape[dim] < end < _OPEN  # type: ignore[index]


def _settings(node: fx.Node) -> str:
    return str(
        fx.node.map_aggregate((node.args, node.kwargs), lambda leaf: "tensor" if isinstance(leaf, fx.Node) else leaf)
    )
