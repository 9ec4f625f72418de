"""The two forms of a dissected network, built mechanically from one template graph.

Clip form: whole clips in, one output a frame out; time is folded into the rows. Step form: one frame and the caches in,
one output and the new caches out. A third, the chunk form, takes any number of frames and the caches;
it is what proves that chunking changes nothing. All share one set of modules.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree  # the specs that torch.export itself hands out

from dissect import ledger
from dissect.inputs import Inputs
from dissect.primitives import CacheSpec, Clock, Primitive
from dissect.values import Dissected

__all__ = ["Cache", "Form", "build", "caches_of"]

Kind = Literal["clip", "chunk", "step"]


@dataclass(frozen=True)
class Cache:
    """A cache of the step model: its name, the layer it belongs to, and its shape without the batch.

    ``due`` is ``(start, gap)``: it is written at the frames ``t`` with ``t % gap == start`` (:mod:`dissect.cadence`).
    """

    name: str
    path: str
    spec: CacheSpec
    due: tuple[int, int] = (0, 1)


def caches_of(dissected: Dissected) -> tuple[Cache, ...]:
    """All caches in the order of the step form's arguments."""
    found: list[Cache] = []
    for node in dissected.graph.nodes:
        module = dissected.root.get_submodule(node.target) if node.op == "call_module" else None
        if not isinstance(module, Primitive):
            continue
        for spec in module.specs:
            path = spec.role if spec.role != "cache" else node.meta["path"] or "input"
            found.append(Cache(f"cache_{len(found):03d}.{path}", path, spec))
    return tuple(found)


class Structure:
    """How inputs and outputs nest; shared by all copies of a form, since nothing changes it."""

    def __init__(self, inputs: Inputs, outputs: pytree.TreeSpec) -> None:
        self.inputs = inputs
        self.outputs = outputs

    def __deepcopy__(self, memo: dict[int, Any]) -> Structure:
        return self


class Form(nn.Module):
    """One form of a dissected network; its modules and parameters stand at the original network's paths.

    ``graph`` is its :class:`torch.fx.Graph`, ``code`` the Python it runs.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, kind: Kind, dissected: Dissected, name: str) -> None:
        super().__init__()
        module = fx.GraphModule(root, graph, name)
        # The graph module is not a child: it shares this module's own tables, so that keys stay those of the original.
        self._modules = module._modules
        self._parameters = module._parameters
        self._buffers = module._buffers
        self._non_persistent_buffers_set = module._non_persistent_buffers_set
        self.__dict__["run"] = module
        self.kind = kind
        self.structure = Structure(dissected.inputs, dissected.captured.out_spec)
        self.literals = tuple(None if output.value is not None else (output.literal,) for output in dissected.outputs)

    @property
    def graph(self) -> fx.Graph:
        graph: fx.Graph = self.__dict__["run"].graph
        return graph

    @property
    def code(self) -> str:
        code: str = self.__dict__["run"].code
        return code

    def _apply(self, fn: Any, recurse: bool = True) -> Form:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, *args: Any, frames: int | None = None) -> Any:
        """The clip form takes the original's inputs, the others a frame or chunk and the caches.

        ``frames`` says how many there are where batch and time are merged.
        """
        inputs = self.structure.inputs
        given = inputs.spec.num_children if self.kind == "clip" else inputs.given
        if len(args) < given and not (self.kind == "clip" and len(args) == len(inputs.groups)):
            raise TypeError(f"the {self.kind} form takes {given} input{'s' * (given > 1)}, not {len(args)}")
        given = len(args) if self.kind == "clip" else given
        tensors = inputs.streams(args, frames) if self.kind == "clip" else pytree.tree_leaves(args[:given])
        values = self.__dict__["run"](*tensors, *args[given:])
        count = sum(literal is None for literal in self.literals)
        outputs = iter(values[:count])
        leaves = [next(outputs) if literal is None else literal[0] for literal in self.literals]
        result = pytree.tree_unflatten(leaves, self.structure.outputs)
        return result if self.kind == "clip" else (result, *values[count:])


class Join(nn.Module):
    """Puts the time axis of an output back where the original has it."""

    def __init__(self, axes: ledger.Axes) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor, frames: int) -> Tensor:
        return ledger.join(x, self.axes, frames)


def build(dissected: Dissected, kind: Kind) -> Form:
    """The template as a clip form, a chunk form or a step form."""
    graph = fx.Graph()
    env: dict[fx.Node, Any] = {}
    units = dissected.inputs.tensors
    first = {unit.group: node for unit, node in reversed(list(zip(units, dissected.placeholders, strict=True)))}
    taken = {
        node: graph.placeholder(node.name)
        for node in dissected.placeholders
        if kind == "clip" or node in first.values()
    }
    placeholders = [
        taken[node if kind == "clip" else first[unit.group]]
        for node, unit in zip(dissected.placeholders, units, strict=True)
    ]
    caches = caches_of(dissected)
    held = [graph.placeholder(cache.name.replace(".", "_")) for cache in caches] if kind != "clip" else []
    frames: fx.Node | None = None
    if kind == "step":
        env.update(zip(dissected.placeholders, placeholders, strict=True))
    else:
        clock = next(index for index, unit in enumerate(units) if unit.time is not None and unit.rate == 1)
        frames = graph.call_method("size", (placeholders[clock], units[clock].time))
        parts: dict[fx.Node, fx.Node] = {}
        for node, placeholder, unit in zip(dissected.placeholders, placeholders, units, strict=True):
            if placeholder not in parts:
                parts[placeholder] = graph.call_function(ledger.split, (placeholder, unit.time, frames))
            env[node] = parts[placeholder]
    new: list[fx.Node] = []
    for node in dissected.graph.nodes:
        if node.op == "placeholder" or node.op == "output":
            continue
        copied = graph.node_copy(node, env.__getitem__)
        env[node] = copied
        module = dissected.root.get_submodule(node.target) if node.op == "call_module" else None
        if not isinstance(module, Primitive):
            continue
        kwargs: dict[str, Any] = {"frames": frames}
        count = len(module.specs)
        if count and held:
            kwargs["caches"] = tuple(held[len(new) : len(new) + count])
        copied.kwargs = {**copied.kwargs, **kwargs}
        if count:
            env[node] = graph.call_function(operator.getitem, (copied, 0))
            made = graph.call_function(operator.getitem, (copied, 1))
            new += [graph.call_function(operator.getitem, (made, index)) for index in range(count)]
    outputs: list[Any] = []
    for output in dissected.outputs:
        if output.value is None:
            continue
        value = env.get(output.value.node)
        if output.value.constant:
            value = env[output.value.node]
        elif kind != "step":
            path = f"{dissected.home}.output_{len(outputs)}"
            if dissected.home not in dissected.root._modules:
                dissected.root.add_module(dissected.home, nn.Module())
            axes = output.value.axes
            if kind == "clip" and output.own is not None:
                path, axes = f"{dissected.home}.own_output_{len(outputs)}", output.own
            dissected.root.get_submodule(dissected.home).add_module(path.rpartition(".")[2], Join(axes))
            value = graph.call_module(path, (value, frames))
        outputs.append(value)
    graph.output((*outputs, *(new if kind != "clip" else ())))
    if kind == "clip":
        graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    name = f"{dissected.captured.name}{kind.title()}"
    return Form(dissected.root, graph, kind, dissected, name)


def fresh(
    caches: Sequence[Cache], batch: int, dtype: torch.dtype, device: torch.device | None = None
) -> tuple[Tensor, ...]:
    """The caches of fresh streams: all zeros."""
    return tuple(cache.spec.zeros(batch, dtype, device) for cache in caches)


def clock_of(dissected: Dissected) -> Clock | None:
    """The clock, where one is needed."""
    found = [module for module in dissected.root.modules() if isinstance(module, Clock)]
    live = {node.target for node in dissected.graph.nodes if node.op == "call_module"}
    return found[0] if found and f"{dissected.home}.clock" in live else None
