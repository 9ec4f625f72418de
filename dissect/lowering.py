"""Lowering: the step form as a runtime wants it.

At one frame a temporal convolution of k taps is a 2D convolution over ``k * C`` stacked channels, so nothing
here has a time axis: no tensor above rank 4, no 3D operator. Weights are stacked once and for all, batch norms are
folded into the convolution before them, or become one multiplication and one addition. The law: a lowered step
equals the step form to rounding. The stream itself is not changed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dissect.cadence import Native
from dissect.convolution import FrameConv, TemporalConv
from dissect.forms import Form
from dissect.primitives import stacked
from dissect.stream import Stream
from dissect.wrapping import recast

__all__ = ["Affine", "LoweredConv", "lower"]


class LoweredConv(nn.Module):
    """A convolution of a step with its taps fixed: the sum of one convolution for each of ``pieces``.

    A piece is the ages that one convolution reads, stacked on the channels: all of them, or one tap where there are
    groups. None stands for a convolution of the present value alone.
    """

    def __init__(self, conv: FrameConv) -> None:
        super().__init__()
        assert conv.weight is not None
        self.conv = conv
        taps = conv.taps(conv.weight.detach())
        self.pieces: list[tuple[int, ...]] | None = None
        kernels = [taps[0]]
        if isinstance(conv, TemporalConv):
            whole = conv.groups == 1
            kernels = [conv.stacked(taps)] if whole else list(taps)
            self.pieces = [conv.ages] if whole else [(age,) for age in conv.ages]
        self.kernels = nn.ParameterList([nn.Parameter(kernel.contiguous(), requires_grad=False) for kernel in kernels])
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().clone(), requires_grad=False)
        conv.register_parameter("weight", None)
        conv.register_parameter("bias", None)

    def split(self, pieces: Sequence[Sequence[int]]) -> None:
        """Convolve ``pieces`` of the ages one by one instead of all of them at once."""
        assert self.pieces is not None
        assert len(self.pieces) == 1
        assert [age for piece in pieces for age in piece] == list(self.pieces[0])
        dim = 0 if self.conv.transposed else 1
        (whole,) = self.kernels
        channels = whole.shape[dim] // len(self.pieces[0])
        parts = whole.detach().split([len(piece) * channels for piece in pieces], dim)
        self.pieces = [tuple(piece) for piece in pieces]
        self.kernels = nn.ParameterList([nn.Parameter(part.contiguous(), requires_grad=False) for part in parts])

    @property
    def width(self) -> int:
        """The channels that it reads of one frame."""
        kernel = self.kernels[0]
        if self.conv.groups > 1:
            return len(kernel) if self.conv.transposed else int(kernel.shape[1]) * self.conv.groups
        read = len(kernel) if self.conv.transposed else int(kernel.shape[1])
        return read // (1 if self.pieces is None else len(self.pieces[0]))

    @property
    def depthwise(self) -> bool:
        """Whether every channel is convolved for itself."""
        kernel = self.kernels[0]
        return self.conv.groups > 1 and not self.conv.transposed and kernel.shape[1] == 1 and len(kernel) == self.width

    def widen(self, taken: int, given: int) -> None:
        """Read ``taken`` channels more, as if they were zero, and give ``given`` more, which are zero."""
        deep = self.depthwise
        for at, kernel in enumerate(self.kernels):
            taps = 1 if self.pieces is None or deep else len(self.pieces[at])
            apart = kernel.detach().unflatten(1, (taps, -1))
            spare = [0, 0] * (kernel.dim() - 2)
            apart = F.pad(apart, [*spare, 0, 0 if deep else taken, 0, 0, 0, given])
            self.kernels[at] = nn.Parameter(apart.flatten(1, 2), requires_grad=False)
        if self.bias is not None:
            self.bias = nn.Parameter(F.pad(self.bias.detach(), [0, given]), requires_grad=False)
        if deep:
            self.conv.groups += given

    def scale(self, factor: Tensor, shift: Tensor) -> None:
        """Fold ``y * factor + shift``, per output channel, into the weights."""
        dim = 1 if self.conv.transposed else 0
        for index, kernel in enumerate(self.kernels):
            shape = [1] * kernel.dim()
            if self.conv.transposed and self.conv.groups > 1:
                grouped = factor.reshape(self.conv.groups, 1, -1, *[1] * (kernel.dim() - 2))
                scaled = (kernel.unflatten(0, (self.conv.groups, -1)) * grouped).flatten(0, 1)
            else:
                shape[dim] = -1
                scaled = kernel * factor.reshape(shape)
            self.kernels[index] = nn.Parameter(scaled, requires_grad=False)
        bias = shift if self.bias is None else self.bias * factor + shift
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, known: Any, onto: Tensor | None = None, frames: None = None) -> Tensor:
        """The convolution; ``onto`` is what its sum begins with.

        The newest frame comes first, and each sum is written with the older frame's part in front: so ONNX Runtime
        fuses it into that part, which then waits for its turn instead of being computed ahead of everything.
        """
        conv, total = self.conv, onto
        last = len(self.kernels) - 1
        for at in range(last, -1, -1):
            x = known if self.pieces is None else stacked(known, self.pieces[at])
            part = conv.space(x, self.kernels[at], self.bias if at == last else None, conv.groups)
            total = part if total is None else part + total
        assert total is not None
        return total


class Affine(nn.Module):
    """A batch norm that no convolution stands before: one multiplication, one addition a channel."""

    def __init__(self, factor: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.factor = nn.Parameter(factor, requires_grad=False)
        self.shift = nn.Parameter(shift, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        shape = [1, -1, *[1] * (x.dim() - 2)]
        return x * self.factor.reshape(shape) + self.shift.reshape(shape)


def lower(stream: Stream | Native, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The step form of ``stream`` lowered, a :class:`fx.GraphModule`: frames and caches in, outputs and new caches out."""
    form: Form = copy.deepcopy(stream.step)
    module: fx.GraphModule = form.__dict__["run"]
    module.eval()
    module.to(dtype)  # the graph module itself: a copy of the form does not share its buffers with it
    if dtype != torch.float64:  # a cast to the network's own precision is one to that of the step
        recast(module, torch.float64, dtype)
    settle(module)
    fold(module)
    drop(module)
    flatten_shuffles(module)
    module.recompile()
    return module


def settle(module: fx.GraphModule) -> None:
    """Give layers that take their weights as arguments (shared or computed ones) weights of their own."""
    for node in list(module.graph.nodes):
        layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, FrameConv) and layer.weight is None:
            weight, bias = (_value(module, arg) for arg in (*node.args[1:], None)[:2])
            if weight is not None:
                layer.weight = nn.Parameter(weight, requires_grad=False)
                layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
                node.args = node.args[:1]
        elif node.target is F.batch_norm and len(node.args) == 8 and not node.args[5]:
            mean, var, weight, bias = (_value(module, arg) for arg in node.args[1:5])
            if mean is None or var is None:
                continue
            norm = nn.BatchNorm1d(mean.numel(), float(node.args[7]), affine=weight is not None)
            norm.running_mean, norm.running_var = mean, var
            if weight is not None:
                norm.weight = nn.Parameter(weight)
                norm.bias = nn.Parameter(torch.zeros_like(weight) if bias is None else bias)
            path = f"settled_{node.name}"
            module.add_submodule(path, norm)
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(module.graph.call_module(path, (node.args[0],)))
            module.graph.erase_node(node)
    compute(module)
    module.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))


def compute(module: fx.GraphModule) -> None:
    """Put what parameters alone give in the place of what computes it: ONNX may have no form for that (``matrix_exp``).

    What is much larger than those parameters, repeated for instance, is left to the runtime.
    """
    sizes: dict[fx.Node, int] = {}  # the numbers that a constant is computed from
    for node in list(module.graph.nodes):
        read = node.all_input_nodes
        if node.op == "get_attr":
            sizes[node] = _held(module, node).numel()
        elif node.op == "call_function" and all(at in sizes for at in read) and not _random(node):
            sizes[node] = sum(sizes[at] for at in read)
    for node in [node for node in sizes if node.op != "get_attr" and any(user not in sizes for user in node.users)]:
        value = _value(module, node)
        if isinstance(value, Tensor) and value.numel() <= max(4 * sizes[node], 1024):
            path = f"computed_{node.name}"
            module.register_buffer(path, value, persistent=False)
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(module.graph.get_attr(path))


def _random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _held(module: fx.GraphModule, node: fx.Node) -> Tensor:
    """The parameter or buffer that a node reads."""
    owner, _, leaf = str(node.target).rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(owner), leaf)
    return tensor.detach()


def _value(module: fx.GraphModule, node: Any) -> Tensor | None:
    """The value of a node that depends on parameters alone; None for any other."""
    if not isinstance(node, fx.Node):
        return None
    needed: dict[fx.Node, Any] = {}
    stack = [node]
    while stack:
        at = stack.pop()
        if at.op not in ("get_attr", "call_function"):
            return None
        needed[at] = None
        stack.extend(read for read in at.all_input_nodes if read not in needed)
    with torch.no_grad():
        for at in module.graph.nodes:
            if at not in needed:
                continue
            if at.op == "get_attr":
                needed[at] = _held(module, at)
            else:
                args, kwargs = fx.node.map_arg((at.args, at.kwargs), needed.__getitem__)
                needed[at] = at.target(*args, **kwargs)
    value: Any = needed[node]
    return value.clone() if isinstance(value, Tensor) else None


def fold(module: fx.GraphModule) -> None:
    """Fix every convolution's taps and fold every batch norm."""
    for node in list(module.graph.nodes):
        if node.op != "call_module":
            continue
        target = str(node.target)
        layer = module.get_submodule(target)
        if isinstance(layer, FrameConv) and layer.weight is not None:
            node.target = _replace(module, target, LoweredConv(layer))
        elif isinstance(layer, nn.modules.batchnorm._NormBase):
            factor, shift = affine_of(layer)
            source = node.args[0]
            before = (
                module.get_submodule(str(source.target))
                if isinstance(source, fx.Node) and source.op == "call_module"
                else None
            )
            if isinstance(source, fx.Node) and len(source.users) == 1 and isinstance(before, LoweredConv):
                before.scale(factor, shift)
                node.replace_all_uses_with(source)
                module.graph.erase_node(node)
            elif _scores(source) and isinstance(before, nn.Linear):
                before.weight = nn.Parameter(before.weight * factor[:, None], requires_grad=False)
                bias = shift if before.bias is None else before.bias * factor + shift
                before.bias = nn.Parameter(bias, requires_grad=False)
                node.replace_all_uses_with(source)
                module.graph.erase_node(node)
            else:
                node.target = _replace(module, target, Affine(factor, shift))


def _scores(source: Any) -> bool:
    """A value of features alone, with one reader: a linear layer's features are then a batch norm's channels."""
    return isinstance(source, fx.Node) and len(source.users) == 1 and len(source.meta.get("frame", ())) == 1


def affine_of(norm: nn.modules.batchnorm._NormBase) -> tuple[Tensor, Tensor]:
    """What a batch norm with running statistics does, as factor and shift a channel."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = torch.rsqrt(norm.running_var.detach() + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight.detach()
    shift = -norm.running_mean.detach() * factor
    if norm.bias is not None:
        shift = shift + norm.bias.detach()
    return factor, shift


def drop(module: fx.GraphModule) -> None:
    """Remove what does nothing in a step: dropout, and reshapes to the shape a tensor already has."""
    for node in list(module.graph.nodes):
        layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, nn.modules.dropout._DropoutNd) or node.target is torch.ops.aten.clone.default:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    used = {str(node.target) for node in module.graph.nodes if node.op == "call_module"}
    for name, child in list(module.named_modules()):
        if isinstance(child, nn.modules.batchnorm._NormBase) and name not in used:
            _replace(module, name, nn.Identity())


def flatten_shuffles(module: fx.GraphModule) -> None:
    """Reshape, permute, reshape (a channel shuffle) without the dimensions that only travel along.

    ``(B, g, c, H, W)`` to ``(B, c, g, H, W)`` is rank 5 for nothing: ``H, W`` stay neighbours, one dimension.
    """
    for node in module.graph.nodes:
        if node.target is not torch.permute or len(node.users) == 0:
            continue
        source, order = node.args[0], list(node.args[1])
        if len(order) < 5 or source.target is not torch.reshape or len(source.users) > 1:
            continue
        if any(user.target is not torch.reshape for user in node.users):
            continue
        runs: list[list[int]] = []
        for dim in order:
            if runs and dim > 1 and runs[-1][-1] == dim - 1:
                runs[-1].append(dim)
            else:
                runs.append([dim])
        shape = list(source.args[1])
        before = sorted(runs)
        sizes = [-1 if run[0] == 0 else math.prod(shape[dim] for dim in run) for run in before]
        source.args = (source.args[0], tuple(sizes))
        node.args = (source, tuple(before.index(run) for run in runs))


def _replace(module: nn.Module, path: str, layer: nn.Module) -> str:
    """Put ``layer`` where the module at ``path`` was, and return its path; what the network keeps inside that one stays."""
    owner, _, leaf = path.rpartition(".")
    children = dict(module.get_submodule(path).named_children())
    if any(hasattr(layer, name) for name in children):
        path, leaf = f"{path}_lowered", f"{leaf}_lowered"
    else:
        for name, child in children.items():
            layer.add_module(name, child)
    setattr(module.get_submodule(owner), leaf, layer)
    return path
