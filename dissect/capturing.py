"""Capture: a module or an exported program becomes one functional graph of ATen operators.

Non-strict ``torch.export`` only. Strict export, ``make_fx`` and ``torch.jit.trace`` were seen to freeze an
activation that a network reads through ``.data`` as a constant, silently; non-strict export raises there,
and the capture is tried once more with ``.data`` taken as ``detach`` and ``Variable`` as identity.

The batch of the example is replaced by a prime that no network has as a size, so that the ledger
can tell the batch from everything else. The user's module is not changed.
"""

from __future__ import annotations

import io
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.nn.utils import rnn
from torch.utils import _pytree as pytree  # the specs that torch.export itself hands out

from dissect.errors import CaptureError
from dissect.inputs import Inputs
from dissect.masking import chosen
from dissect.naming import names, renamed, viewed_once
from dissect.opaque import standing_aside
from dissect.origins import source_of
from dissect.precision import unify
from dissect.quiet import quiet
from dissect.rowcount import counted_alike, counts_rows
from dissect.shims import dataclasses_known, full_precision, legacy, masks_as_given
from dissect.simplifying import simplified

__all__ = ["Captured", "capture", "capturing", "copied", "dropout"]

#: stands for the batch while a network is captured; tried in turn
BATCHES = (13, 2, 1)


_CAPTURING = ContextVar("capturing", default=False)


def capturing() -> bool:
    """A network is being captured: what it calls may stand for itself as one operator."""
    return _CAPTURING.get()


@torch.library.custom_op("dissect::dropout", mutates_args=())
def dropout(x: Tensor, p: float, channels: bool) -> Tensor:
    """Dropout that survives capture in eval mode, so that a fine-tuned clip form drops again (``channels``: whole maps)."""
    return x.clone()


@dropout.register_fake
def _(x: Tensor, p: float, channels: bool) -> Tensor:
    return torch.empty_like(x)


@dataclass(frozen=True)
class Captured:
    """A network as one graph.

    graph       functional ATen, placeholders for inputs, parameters and constants
    tensors     placeholder name to (original name, tensor) of parameters, buffers and constants
    inputs      the user's input placeholders in flat order, with the example's tensors (or Python values)
    in_spec     pytree of the inputs ``(args, kwargs)``; ``out_spec`` that of the outputs
    batch       the batch size in the graph
    state       every parameter and buffer of the module by original name
    narrow      the float type that the network computes a part of itself in, where that is narrower than the clip's
    """

    graph: fx.Graph
    tensors: Mapping[str, tuple[str, Tensor]]
    inputs: tuple[str, ...]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    batch: int
    state: Mapping[str, Tensor]
    name: str
    narrow: torch.dtype | None = None


def copied(example: Any) -> tuple[Any, ...]:
    """The model's inputs as a fresh tuple; containers are copied (a forward may change a list it is given), tensors are not."""
    args = tuple(example) if isinstance(example, tuple) else (example,)
    return pytree.tree_map(lambda leaf: leaf, args)  # type: ignore[no-any-return]


def capture(
    model: nn.Module | ExportedProgram, example: tuple[Any, ...], inputs: Inputs, batches: Sequence[int] = BATCHES
) -> Captured:
    """Capture ``model`` for inputs like ``example``, laid out as ``inputs``; raises CaptureError with torch's own reason."""
    name = type(model).__name__
    if isinstance(model, ExportedProgram):
        model = model.module(check_guards=False)
    failures: dict[int, Exception] = {}
    batch = inputs.batch
    with evaluating(model), standing_aside(model, example):
        for shim in (False, True):
            for size in dict.fromkeys((*batches, batch)):
                args = example if size == batch else inputs.rebatched(size)
                try:
                    program = _known_export(model, args, shim, example)
                except Exception as error:
                    failures.setdefault(size, error)
                    continue
                captured = _read(program, size, name)
                if size == 1 or len(batches) == 1 or not counts_rows(captured):
                    return captured
                return _of_one(model, inputs, captured, shim)
    failure = failures[batch]  # not those of batches that nobody asked for
    raise failure if isinstance(failure, CaptureError) else CaptureError(_explain(model, failure, example))


def _of_one(model: nn.Module, inputs: Inputs, captured: Captured, shim: bool) -> Captured:
    """The capture, or that of one row where numbers of the network follow from how many rows it is given."""
    for size in (1, 2 if captured.batch != 2 else 3):
        try:
            other = _read(_export(model, inputs.rebatched(size), shim), size, captured.name)
        except Exception:
            continue
        if counted_alike(captured, other):
            return captured
        if size == 1:
            return other
        raise CaptureError(
            f"{captured.name} computes with how many rows its batch has (`x.size(0)`, `mask.sum()`), and cannot be run on one "
            "alone, which a stream is: count in each row for itself, as `mask.sum(1)`"
        )
    return captured


def whole(model: nn.Module | ExportedProgram, example: tuple[Any, ...]) -> fx.GraphModule:
    """The network as a flat, runnable graph for inputs of exactly these shapes, with capture's names."""
    module = model.module(check_guards=False) if isinstance(model, ExportedProgram) else model
    with evaluating(module):
        try:
            program = _export(module, example, False)
        except Exception:
            program = _export(module, example, True)
    program = _functional(program)
    held = {**program.state_dict, **program.constants}
    held_as = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs if spec.target is not None}
    called = names(program.graph)
    graph = fx.Graph()
    root: dict[str, Any] = {}
    env: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in held_as:
            key = f"held_{len(root)}"
            root[key] = held[held_as[node.name]].detach()
            env[node] = graph.get_attr(key)
        else:
            env[node] = graph.node_copy(node, env.__getitem__)
            if node.op == "output":
                env[node].args = (_results(program, env[node].args[0]),)
            env[node].name = called[node]  # a copy is renamed where the name is a builtin's, as `input` is
    return fx.GraphModule(root, graph)


def _known_export(model: nn.Module, args: tuple[Any, ...], shim: bool, example: tuple[Any, ...]) -> ExportedProgram:
    """The export, once more where torch did not know a dataclass that the network returns (for ``example``)."""
    try:
        return _export(model, copied(args), shim)
    except Exception as error:
        if "not a known type" not in str(error):
            raise
        with torch.no_grad():
            if not dataclasses_known(model(*copied(example))):
                raise
    return _export(model, copied(args), shim)


def _export(model: nn.Module, args: tuple[Any, ...], shim: bool) -> ExportedProgram:
    token = _CAPTURING.set(True)
    try:  # an export that fails is explained once, not in torch's log
        shims = legacy() if shim else nullcontext()
        with (
            quiet(),
            torch.no_grad(),
            masks_as_given(),
            redirect_stderr(io.StringIO()),
            shims,
            full_precision() as asked,
        ):
            program = torch.export.export(model, args, strict=False)
        program.graph_module.meta["asked"] = asked
        _known(program.graph, type(model).__name__)
        return program
    finally:
        _CAPTURING.reset(token)


def _functional(program: ExportedProgram) -> ExportedProgram:
    """Functional ATen, with dropout kept as one operator."""
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in _DROPOUTS:
            x, p = node.args[0], node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
            node.target, node.args, node.kwargs = torch.ops.dissect.dropout.default, (x, p, _DROPOUTS[node.target]), {}
    program = simplified(program)
    for node in list(program.graph.nodes):  # what export asserts of an example is no part of the network
        if node.op == "call_function" and node.target in _ASSERTIONS and not node.users:
            program.graph.erase_node(node)
    chosen(program.graph)
    _typed(program.graph)
    _laid_out(program.graph)
    viewed_once(program.graph)
    return program


def _typed(graph: fx.Graph) -> None:
    """New tensors with their type said: the default type is that of whoever runs the graph."""
    for node in graph.nodes:
        if node.target in _MADE and node.kwargs.get("dtype") is None:
            node.kwargs = {**node.kwargs, "dtype": node.meta["val"].dtype}


def _laid_out(graph: fx.Graph) -> None:
    """Reshapes as reshapes, without the copies that only a tensor's layout asks for.

    Whether ``reshape`` is a view or a copy, and ``contiguous`` anything at all, follows from the sizes of the example: for
    two examples the graphs would differ, and so would the names of all later nodes.
    """
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is _ATEN.clone.default and node.args[0].op != "placeholder":
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target in (_ATEN.view.default, _ATEN._unsafe_view.default):
            with graph.inserting_before(node):
                reshaped = graph.call_function(_ATEN.reshape.default, node.args)
            reshaped.meta = node.meta
            node.replace_all_uses_with(reshaped)
            graph.erase_node(node)


def _results(program: ExportedProgram, values: Any) -> tuple[Any, ...]:
    """What the network returns, of all that its graph gives: not what becomes of an input that it writes to."""
    specs = program.graph_signature.output_specs
    return tuple(value for value, spec in zip(values, specs, strict=True) if spec.kind == OutputKind.USER_OUTPUT)


def _read(program: ExportedProgram, batch: int, name: str) -> Captured:
    asked = program.graph_module.meta["asked"]
    program = _functional(program)
    signature = program.graph_signature
    tensors: dict[str, tuple[str, Tensor]] = {}
    inputs: list[str] = []
    for spec in signature.input_specs:
        placeholder = spec.arg.name
        if spec.kind == InputKind.USER_INPUT:
            inputs.append(placeholder)
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            assert spec.target is not None
            held = program.state_dict if spec.target in program.state_dict else program.constants
            tensors[placeholder] = (spec.target, held[spec.target])
        else:
            raise CaptureError(
                f"the network holds a {spec.kind.name.lower().replace('_', ' ')} ({spec.target}), which no graph can keep"
            )
    changed = [spec.target for spec in signature.output_specs if spec.kind == OutputKind.BUFFER_MUTATION]
    if changed:
        raise CaptureError(
            f"the network writes to its own buffers as it runs ({', '.join(map(str, changed))}); a step model keeps no hidden "
            "state: pass it through the forward, or freeze it"
        )
    output = next(node for node in program.graph.nodes if node.op == "output")
    output.args = (_results(program, output.args[0]),)
    narrow = unify(program.graph, inputs, tensors) or min(asked, key=str, default=None)
    in_spec, out_spec = program.call_spec.in_spec, program.call_spec.out_spec
    return Captured(
        renamed(program.graph), tensors, tuple(inputs), in_spec, out_spec, batch, dict(program.state_dict), name, narrow
    )


def _known(graph: fx.Graph, name: str) -> None:
    """Raise CaptureError where a size is read from a tensor, which no graph of one step can have."""
    if not any(node.target in _READ for node in graph.nodes):
        return
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and not all(isinstance(size, int) for size in value.shape):
            source = source_of(node)
            line = f" ({source})" if source else ""
            raise CaptureError(
                f"{name} cannot be captured: a size follows from what is read out of a tensor, with .tolist() or .item(){line}; "
                "compute it from x.shape in Python, as a[:, :, 1 : b.shape[2] + 1]"
            )


_ATEN = torch.ops.aten
_READ = {_ATEN.item.default, _ATEN._local_scalar_dense.default}
_MADE = {
    _ATEN.zeros.default,
    _ATEN.ones.default,
    _ATEN.full.default,
    _ATEN.empty.memory_format,
    _ATEN.eye.default,
    _ATEN.eye.m,
    _ATEN.arange.default,
    _ATEN.arange.start,
    _ATEN.arange.start_step,
    _ATEN.linspace.default,
    _ATEN.scalar_tensor.default,
}
_ASSERTIONS = {_ATEN._assert_tensor_metadata.default, _ATEN._assert_async.msg, _ATEN._assert_scalar.default}
_DROPOUTS = {
    _ATEN.dropout.default: False,
    _ATEN.dropout_.default: False,
    _ATEN.alpha_dropout.default: False,
    _ATEN.feature_dropout.default: True,
    _ATEN.feature_dropout_.default: True,
}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, flag by flag (some networks override ``eval()`` and return None or freeze layers).

    Afterwards each module's attributes are what they were, the very same objects with the very same contents: a
    forward may keep activations in lists of its own, and torch.export puts copies in the place of lists and tuples.
    """
    kept = [(module, dict(module.__dict__)) for module in model.modules()]
    contents: dict[int, tuple[Any, list[Any]]] = {}
    for _, attributes in kept:
        for value in attributes.values():
            _note(value, contents)
    try:
        for module, _ in kept:
            module.__dict__["training"] = False
        yield
    finally:
        for module, attributes in kept:
            module.__dict__.clear()
            module.__dict__.update(attributes)
        for container, items in contents.values():
            now = _items(container)
            if len(now) != len(items) or any(one is not other for one, other in zip(now, items, strict=True)):
                container.clear()
                if isinstance(container, dict):
                    container.update(zip(items[::2], items[1::2], strict=True))
                else:
                    (container.extend if isinstance(container, list) else container.update)(items)


def _items(container: Any) -> list[Any]:
    return [part for pair in container.items() for part in pair] if isinstance(container, dict) else list(container)


def _note(value: Any, contents: dict[int, tuple[Any, list[Any]]]) -> None:
    if isinstance(value, (list, dict, set, tuple)) and id(value) not in contents:
        items = _items(value)
        if not isinstance(value, tuple):
            contents[id(value)] = (value, items)
        for item in items:
            _note(item, contents)


def _explain(model: nn.Module, failure: Exception, example: tuple[Any, ...]) -> str:
    reason = str(failure).strip() or type(failure).__name__
    text = reason.splitlines()[0][:400].rstrip(".")
    kind = type(failure).__name__
    shapes = ", ".join(
        "x".join(map(str, leaf.shape)) for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor)
    )
    name = "the exported program" if isinstance(model, fx.GraphModule) else type(model).__name__
    scripted = [path for path, part in model.named_modules() if path and isinstance(part, torch.jit.ScriptModule)]
    if scripted:
        return (
            f"{name} cannot be captured: its submodule {scripted[0]} is TorchScript, which torch.export does not look into; build "
            "the network with the module that was scripted, or give the whole network as a file: "
            "torch.jit.trace(network, clip).save('model.pt')"
        )
    if _packed(failure):
        return (
            f"{name} cannot be captured: it packs its frames by their lengths (pack_padded_sequence), and a stream has no length; "
            "leave the packing out: for clips of one length it changes nothing"
        )
    if any(isinstance(held, nn.UninitializedParameter) for held in model.parameters()):
        return f"{name} cannot be captured: its lazy layers have no weights yet; run it once on a clip, or load its weights"
    if "data-dependent" in reason.lower() or "GuardOnDataDependent" in kind or "Could not guard" in reason:
        lines = re.findall(r'File "([^"]+)", line (\d+), in forward', reason)
        where = f" at {Path(lines[-1][0]).name}:{lines[-1][1]}" if lines else ""
        return (
            f"{name} cannot be captured: its forward branches on the values of a tensor{where}, and a stream needs one graph; "
            "make the branch depend on shapes or options only"
        )
    return (
        f"{name} cannot be captured with an example of {shapes}: {kind}: {text}; if the example is right, run "
        "`torch.export.export(model, (clip,), strict=False)` to see the whole of torch's report"
    )


def _packed(failure: Exception) -> bool:
    """Whether it happened to a packed sequence."""
    return any(
        frame.f_code.co_filename == rnn.__file__
        or any(isinstance(value, rnn.PackedSequence) for value in frame.f_locals.values())
        for frame, _ in traceback.walk_tb(failure.__traceback__)
    )
