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
from dissect.primitives import stacked, tap
from dissect.stream import Stream

__all__ = ["Affine", "LoweredConv", "lower"]


class LoweredConv(nn.Module):
    """A convolution of a step with its taps fixed: one over stacked channels, or one a tap and their sum."""

    def __init__(self, conv: FrameConv) -> None:
        super().__init__()
        assert conv.weight is not None
        self.conv = conv
        self.ages: Sequence[int] | None = conv.ages if isinstance(conv, TemporalConv) else None
        taps = conv.taps(conv.weight.detach())
        whole = isinstance(conv, TemporalConv) and conv.groups == 1
        kernels = [conv.stacked(taps)] if isinstance(conv, TemporalConv) and whole else list(taps)
        self.kernels = nn.ParameterList([nn.Parameter(kernel.contiguous(), requires_grad=False) for kernel in kernels])
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().clone(), requires_grad=False)
        conv.register_parameter("weight", None)
        conv.register_parameter("bias", None)

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

    def forward(self, known: Any, frames: None = None) -> Tensor:
        conv = self.conv
        if self.ages is None:
            return conv.space(known, self.kernels[0], self.bias, conv.groups)
        if len(self.kernels) == 1:
            return conv.space(stacked(known, self.ages), self.kernels[0], self.bias, conv.groups)
        total = conv.space(tap(known, self.ages[-1], None), self.kernels[-1], self.bias, conv.groups)
        for age, kernel in zip(self.ages[:-1], list(self.kernels)[:-1], strict=True):
            total = total + conv.space(tap(known, age, None), kernel, None, conv.groups)
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
    for node in module.graph.nodes:  # a cast to the network's own precision is one to that of the step
        if dtype != torch.float64 and node.op == "call_function":
            node.args = fx.node.map_aggregate(node.args, lambda leaf: dtype if leaf is torch.float64 else leaf)
            node.kwargs = fx.node.map_aggregate(node.kwargs, lambda leaf: dtype if leaf is torch.float64 else leaf)
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
    module.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))


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
                owner, _, leaf = str(at.target).rpartition(".")
                needed[at] = getattr(module.get_submodule(owner), leaf).detach()
            else:
                args, kwargs = fx.node.map_arg((at.args, at.kwargs), needed.__getitem__)
                needed[at] = at.target(*args, **kwargs)
    value: Tensor = needed[node]
    return value.clone()


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
