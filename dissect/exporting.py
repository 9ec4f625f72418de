"""Export: the lowered step form as an ONNX file that any runtime drives.

The contract is that of :mod:`dissect.contract`: frames and caches in, outputs and new caches out, batch first and
dynamic, and everything a runner needs in the file's own metadata. The file is written beside its place and
then renamed, so that a killed export leaves nothing half-written.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from itertools import count
from math import isclose
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnxscript.optimizer import fold_constants
from torch.utils import _pytree as pytree  # the specs that torch.export itself hands out

from dissect.beside import beside
from dissect.cadence import CADENCES, Native, native
from dissect.contract import CacheSpec, Contract, InputSpec, OutputSpec
from dissect.errors import ExportError
from dissect.forms import Cache, fresh
from dissect.gating import steady
from dissect.lowering import lower
from dissect.squeezing import squeeze
from dissect.stream import Stream
from dissect.tuning import Tuned, tune
from dissect.wrapping import Flat, Resetting, recast

__all__ = ["contract_of", "export"]

#: above this, weights go to a file of their own (a protobuf holds no more)
LIMIT = 2_000_000_000
ROWS = 3  # the batch of the trace; the file's is dynamic

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)

#: names that a step model's inputs and caches have
_INPUTS = re.compile(r"frame(_\d+)?|reset|(new_)?cache_\d+.*")

#: what weights and caches may be
PRECISIONS = {"float32": torch.float32, "float16": torch.float16}


def export(
    stream: Stream,
    path: str | os.PathLike[str],
    *,
    preprocess: Any = None,
    labels: Sequence[str] | None = None,
    reset: bool = False,
    cadence: str = "every",
    dtype: str = "float32",
    calibration: Iterable[Any] = (),
    live: bool = False,
) -> Path:
    """Write the step model of ``stream`` to ``path`` and return the path.

    Args:
        stream: what :func:`dissect.convert` gave.
        path: the new file.
        preprocess: a :class:`~dissect.Preprocess`, kept in the file's metadata.
        labels: the names of the classes, kept there too.
        reset: adds a boolean input ``reset``, ``(batch,)``, that clears a row's caches before the step.
        cadence: ``"every"``, an output at every frame, or ``"native"``, the outputs of the offline network alone, whose
            late layers then run only at the frames that need them (see :mod:`dissect.cadence`).
        dtype: of weights and caches; frames and outputs are float32. ``"float16"`` is for GPUs, ``"int8"`` needs
            ``calibration``, see :func:`dissect.quantize`.
        calibration: the streams that the ranges of ``"int8"`` are taken from: videos, clips or frames.
        live: leaves out what only the warm-up and the end of a stream need; outputs during the warm-up are then not
            the original's, and there is no flush.

    Raises :class:`~dissect.ExportError` where ONNX has no form for an operator.
    """
    if dtype not in (*PRECISIONS, "int8"):
        raise ExportError(f"dtype={dtype!r}: a step model is float32, float16 or int8.")
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir():
        raise ExportError(
            f"{target}: {'is a folder' if target.is_dir() else 'its folder does not exist'}; name a file in a folder"
        )
    if dtype == "int8":
        from dissect.quantizing import quantize

        with beside(target) as whole:
            options = {"preprocess": preprocess, "labels": labels, "reset": reset, "cadence": cadence, "live": live}
            quantize(export(stream, whole, **options), target, calibration)
        return target
    model = to_model(stream, preprocess, labels, reset, cadence, dtype, live)
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    with beside(target) as partial:
        if size > LIMIT:
            ir.save(model, partial, external_data=f"{target.name}.data")
            data = partial.with_name(f"{target.name}.data")
            os.replace(data, target.with_name(data.name))
        else:
            ir.save(model, partial)
        os.replace(partial, target)
    return target


def to_model(
    stream: Stream,
    preprocess: Any = None,
    labels: Sequence[str] | None = None,
    reset: bool = False,
    cadence: str = "every",
    dtype: str = "float32",
    live: bool = False,
) -> ir.Model:
    """The step model as an ``onnx_ir`` model, with its metadata."""
    if cadence not in CADENCES:
        raise ExportError(f"cadence {cadence!r} is unknown; there are {', '.join(CADENCES)}")
    sparse = native(stream) if cadence == "native" else None
    if sparse is not None and reset:
        raise ExportError("reset=True clears a row at any frame, and with cadence='native' rows share their phase")
    if sparse is not None and live:
        raise ExportError("live=True leaves out the clock, and with cadence='native' the phases need it")
    source = stream if sparse is None else sparse
    frames = [
        leaf[:1].float() if leaf.is_floating_point() else leaf[:1]
        for leaf in pytree.tree_leaves(stream.frame(stream.example, 0))
    ]
    frames = [frame.expand(ROWS, *frame.shape[1:]).contiguous().cpu() for frame in frames]
    precision = PRECISIONS[dtype]
    tuned = _tuned(source, frames, live, blocked=precision == torch.float32)
    step: Any = tuned.module
    if precision != torch.float32:
        recast(step, torch.float32, precision)
    args = (*frames, *fresh(tuned.caches, ROWS, precision))
    contract = contract_of(stream, preprocess, labels, tuned.caches, precision, sparse)
    names = [spec.name for spec in contract.inputs] + [cache.input for cache in contract.caches]
    outs = [spec.name for spec in contract.outputs] + [cache.output for cache in contract.caches]
    if reset:
        step = Resetting(step, len(frames))
        args = (*args, torch.zeros(ROWS, dtype=torch.bool))
        names.append("reset")
    batch = torch.export.Dim("batch", min=1, max=1 << 20)
    kept = [output.moves for output in stream.dissected.outputs if output.value is not None]
    flat = Flat(step, len(frames), kept, precision)
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(
                flat.eval(), args, dynamic_shapes=(tuple({0: batch} for _ in args),), strict=False
            )
            exported = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False)
            assert exported is not None
            fold_constants(exported.model)
            _say_small(exported.model)
            exported.optimize()
    except Exception as error:
        raise ExportError(f"the step model does not go to ONNX: {_reason(error)}") from error
    model = exported.model
    _tidy(model)
    for value, name in zip((*model.graph.inputs, *model.graph.outputs), (*names, *outs), strict=True):
        value.name = name
    _set_apart(model, {*names, *outs})
    _name_batch(model)
    model.metadata_props.update(contract.to_metadata())
    return model


def _reason(error: BaseException) -> str:
    """What went wrong at the bottom of torch's report, which is pages long, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:400]}"


def _tuned(source: Any, frames: list[torch.Tensor], live: bool, blocked: bool) -> Tuned:
    """The lowered step, tuned.

    Tuning changes speed and nothing else, so a fault of ours in it costs speed and no model: it is told, and the step stays
    as it was lowered.
    """

    def lowered() -> Any:
        step: Any = lower(source)
        squeeze(step, (*frames, *fresh(source.cache_list, ROWS, torch.float32)))
        return step

    try:
        return tune(lowered(), source.cache_list, frames, live=live, blocked=blocked)
    except ExportError:
        raise  # what cannot be, not what went wrong
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        warnings.warn(f"the step model is right but not tuned for speed ({text}); please report this", stacklevel=3)
        step = lowered()
        kept = steady(step, source.cache_list) if live else tuple(source.cache_list)
        step.recompile()
        return Tuned(step, kept)


def _say_small(model: ir.Model) -> None:
    """Numbers next to 0 or 1 as vectors of one entry: as scalars, the exporter's optimizer takes ``x + 1e-8`` for ``x``.

    Source: onnxscript's rules ``add_0`` and ``mul_by_1``, which match a scalar within an absolute 1e-8 or a relative 1e-5.
    """
    values = [value for node in model.graph.all_nodes() for value in node.outputs]
    for value in (*values, *model.graph.initializers.values()):
        const = value.const_value
        if const is None or const.dtype not in _FLOATS or const.shape.rank() != 0:
            continue
        number = float(const.numpy())
        ends = [end for end in (0.0, 1.0) if number != end and isclose(number, end, rel_tol=1e-5, abs_tol=1e-8)]
        for user, at in tuple(value.uses()) if ends else ():
            other = user.inputs[1 - at] if user.op_type in ("Add", "Sub", "Mul", "Div") else None
            if user.graph is not None and other is not None and other.shape is not None and other.shape.rank() > 0:
                vector = ir.node("Constant", [], {"value": ir.tensor(const.numpy().reshape(1))})
                vector.outputs[0].name = f"{value.name}_{user.outputs[0].name}"
                user.graph.insert_before(user, vector)
                user.replace_input_with(at, vector.outputs[0])


def _tidy(model: ir.Model) -> None:
    """No path of the building machine, and no graph input that is a graph output without a node between."""
    graph = model.graph
    graph.doc_string = None
    model.doc_string = None
    graph.metadata_props.clear()
    for node in graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None
    for function in model.functions.values():
        function.metadata_props.clear()
    seen: set[int] = {id(value) for value in graph.inputs}
    for index, value in enumerate(graph.outputs):
        if id(value) in seen or value.producer() is None:
            copy = ir.node("Identity", [value])
            copy.outputs[0].name = f"{value.name}_copy"
            copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
            graph.append(copy)
            graph.outputs[index] = copy.outputs[0]
        seen.add(id(graph.outputs[index]))


def _set_apart(model: ir.Model, taken: set[str]) -> None:
    """No value inside has the name of an input or an output, as that of an operator has where a network says ``{"mean": ...}``."""
    ends = {id(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if value.name in taken and id(value) not in ends:
                value.name = f"{value.name}_inside"


def _name_batch(model: ir.Model) -> None:
    """The one dynamic dimension is called ``batch``, whatever torch named it; so many times the batch is another size."""
    graph = model.graph
    made = [value for node in graph.all_nodes() for value in node.outputs]
    for value in dict.fromkeys((*graph.inputs, *graph.outputs, *made)):
        size = value.shape[0] if value.shape else None
        if isinstance(size, ir.SymbolicDim):
            times, star, _ = str(size.value).partition("*")
            rest = value.shape.dims[1:]  # type: ignore[union-attr]
            value.shape = ir.Shape([f"{times}*batch" if star else "batch", *rest])  # as it is, it may be frozen


def contract_of(
    stream: Stream,
    preprocess: Any = None,
    labels: Sequence[str] | None = None,
    kept: Sequence[Cache] | None = None,
    precision: torch.dtype = torch.float32,
    sparse: Native | None = None,
) -> Contract:
    """All that a runner must know of the step model.

    ``kept``: its caches, if they are not those of the step form; ``sparse``: the native cadence, where it has one.
    """
    from dissect import __version__

    dissected = stream.dissected
    leaves = pytree.tree_leaves(stream.frame(stream.example, 0))
    names = ["frame"] if len(leaves) == 1 else [f"frame_{index}" for index in range(len(leaves))]
    inputs = tuple(
        InputSpec(
            name,
            ("batch", *map(int, leaf.shape[1:])),
            _dtype(torch.float32 if leaf.is_floating_point() else leaf.dtype),
            unit.rate,
        )
        for name, leaf, unit in zip(names, leaves, dissected.inputs.groups, strict=True)
    )
    moving = [
        (name, output.value)
        for name, output in zip(output_names(stream), dissected.outputs, strict=True)
        if output.value is not None
    ]
    outputs = tuple(
        OutputSpec(name, value.clock.stride, value.clock.delay, tuple(value.clock.length.steps))
        for name, value in moving
        if value.timing is not None
    )
    caches = tuple(
        CacheSpec(
            cache.name,
            f"new_{cache.name}",
            ("batch", *cache.spec.shape),
            _dtype(cache.spec.dtype or precision),
            cache.path,
            cache.spec.role,
            cache.due,
        )
        for cache in (stream.cache_list if kept is None else kept)
    )
    indices = iter(range(len(outputs)))
    positions = [next(indices) if output.moves else _FIXED for output in dissected.outputs]
    structure = _plain(pytree.tree_unflatten(positions, dissected.captured.out_spec))
    preprocess = preprocess if preprocess is not None else stream.preprocess
    timing = stream.timing
    return Contract(
        inputs=inputs,
        outputs=outputs,
        caches=caches,
        structure=structure,
        preset=stream.options.preset,
        delay=timing.delay,
        receptive_field=timing.receptive_field,
        warmup=timing.warmup,
        stride=timing.stride,
        preprocess=preprocess if preprocess is None or isinstance(preprocess, dict) else asdict(preprocess),
        labels=tuple(labels or stream.labels or ()) or None,
        cadence="every" if sparse is None else "native",
        period=1 if sparse is None else sparse.period,
        source={"model": dissected.captured.name, "dissect": __version__, "torch": torch.__version__.split("+")[0]},
    )


def output_names(stream: Stream) -> list[str]:
    """``output`` for one tensor, the keys of a dict, or numbers for a tuple."""
    spec = stream.dissected.captured.out_spec
    paths = [
        path for path, _ in pytree.tree_leaves_with_path(pytree.tree_unflatten(list(range(spec.num_leaves)), spec))
    ]
    if len(paths) == 1 and not paths[0]:
        return ["output"]
    names: list[str] = []
    for path in paths:
        atoms = [str(getattr(entry, "key", getattr(entry, "idx", getattr(entry, "name", entry)))) for entry in path]
        name = "_".join(["output", *atoms] if atoms[0].isdigit() else atoms)
        name = f"output_{name}" if _INPUTS.fullmatch(name) else name
        more = (f"{name}_{at}" for at in count(2))
        names.append(name if name not in names else next(free for free in more if free not in names))
    return names


#: stands for a result that is the same for every clip, in the structure of the outputs
_FIXED = object()


def _plain(structure: Any) -> Any:
    """Dicts and lists, whatever the containers are; a dataclass is a dict of the fields that the network fills."""
    if is_dataclass(structure) and not isinstance(structure, type):
        filled = {field.name: getattr(structure, field.name, None) for field in fields(structure)}
        structure = {name: value for name, value in filled.items() if value is not None}
    if isinstance(structure, dict):
        return {str(key): _plain(value) for key, value in structure.items()}
    if isinstance(structure, (list, tuple)):
        return [_plain(value) for value in structure]
    return None if structure is _FIXED else structure


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's own progress lines and warnings, which speak of its insides."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
