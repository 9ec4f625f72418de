"""What several commands do with the API: build the network, dissect it, sum up, and measure it against the window."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dissect import benchmarking
from dissect.beside import beside
from dissect.errors import CaptureError, DissectError, ExportError, PlanError
from dissect.parameters import Shape, merged
from dissect.playing import read_labels
from dissect.preprocess import Preprocess
from dissect.rendering import amount, kilobytes

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

    from dissect.quantizing import Agreement
    from dissect.reports import Report
    from dissect.runner import Runner
    from dissect.stream import Stream

__all__ = [
    "Work",
    "agreement_in_words",
    "batched",
    "describe",
    "in_words",
    "name_of",
    "plain",
    "race",
    "shapes_of",
    "stream_of",
    "summary",
    "totals",
    "work_of",
    "written",
]

_CLIP = (1, 3, 16, 112, 112)


class Work:
    """A network and the example that goes into it."""

    def __init__(self, network: nn.Module | ExportedProgram, example: tuple[Any, ...]) -> None:
        """Keep both."""
        self.network, self.example = network, example

    @property
    def module(self) -> nn.Module:
        """The network as a module that can be called."""
        from torch import nn

        return self.network if isinstance(self.network, nn.Module) else self.network.module()


def work_of(model: str | None, given: Mapping[str, Any]) -> Work:
    """The network that the options name (none: a 3D-ResNet-18 of our own) and noise of the sizes that they give."""
    import torch

    from dissect.loading import load
    from dissect.zoo import resnet18

    random = torch.Generator().manual_seed(given["seed"])

    def noise(shape: Any) -> Any:
        if isinstance(shape, list):
            return [noise(part) for part in shape]
        dtype = getattr(torch, getattr(shape, "dtype", "float32"))
        if not dtype.is_floating_point:
            return torch.randint(0, 256, tuple(shape), generator=random, dtype=dtype)
        return torch.randn(tuple(shape), generator=random, dtype=torch.float64).to(dtype)

    example = tuple(noise(shape) for shape in given["shapes"] or [_CLIP])
    if model is None and given["arch"] is None:
        return Work(resnet18(seed=given["seed"], **(given["arch_args"] or {})).eval(), example)
    if model is None:
        return Work(load(given["arch"], arch_args=given["arch_args"]), example)
    network = load(model, given["arch"], given["arch_args"], given["trust"], example)
    if not given["shapes"] and not isinstance(network, torch.nn.Module) and network.example_inputs:
        example = tuple(network.example_inputs[0])  # an archive knows what it was exported with
    return Work(network, example)


def stream_of(work: Work, given: Mapping[str, Any]) -> Stream:
    """Dissect the network as the options say, with the user's own converters."""
    from torch import nn

    from dissect.registry import load_rules
    from dissect.stream import convert

    for rules in given["rules"]:
        load_rules(rules)
    try:
        return convert(
            work.network,
            work.example if len(work.example) > 1 or isinstance(work.example[0], list) else work.example[0],
            given["preset"],
            merged(given["settings"]),
            given["pool"],
            given["window"],
            given["time_dim"],
            _layouts(given["layouts"]),
            given["rates"],
            skip=given["skip"],
            fill=given["fill"],
            stem=given["stem"],
        )
    except CaptureError as error:
        if given["shapes"] or not isinstance(work.network, nn.Module) or "an example of" not in str(error):
            raise
        raise CaptureError(
            f"{error}. The example was {'x'.join(map(str, _CLIP))}, the default: give the network's own as --input."
        ) from error


def _layouts(given: Sequence[str]) -> str | tuple[str | None, ...] | None:
    """One layout for all inputs, or one each; a dash stands for an input without time."""
    if len(given) < 2:
        return given[0] if given else None
    return tuple(None if text == "-" else text for text in given)


def describe(stream: Stream, given: Mapping[str, Any]) -> str:
    """Give the stream the labels and the preprocessing that go into its file; in words what the latter is."""
    if given["labels"]:
        stream.labels = read_labels(given["labels"])
        _check_labels(stream, given["labels"])
    shape = tuple(stream.frame(stream.example, 0)[0].shape[1:]) if _is_picture(stream) else ()
    if not shape:
        if given["mean"] or given["std"]:
            raise PlanError("--mean and --std are for networks that take pictures of one or three channels.")
        return "none: its input is no picture"
    plain = Preprocess() if shape[0] == 3 else Preprocess(mean=(0.5,), std=(0.5,), color="gray")
    mean, std = _numbers("--mean", given["mean"]), _numbers("--std", given["std"])
    chosen = Preprocess(shape[1:], mean or plain.mean, std or plain.std, color=plain.color)
    stream.preprocess = asdict(chosen)
    origin = "as asked for" if mean and std else "those of Kinetics unless --mean and --std say otherwise"
    return f"{shape[1]}x{shape[2]} {chosen.color}, mean and deviation {origin}"


def _check_labels(stream: Stream, path: Path) -> None:
    """Raise where the labels are not as many as the classes, if the first output is scores."""
    value = stream.dissected.outputs[0].value
    frame = () if value is None or value.constant else value.axes.frame
    if len(frame) == 1 and frame[0] != len(stream.labels or ()):
        raise PlanError(f"{path} has {len(stream.labels or ())} names, and the network scores {frame[0]} classes.")


def name_of(model: str | None, given: Mapping[str, Any]) -> str:
    """The name of the step model's file, where none is given."""
    name = model or given["arch"] or "resnet18"
    stem = name.rpartition(":")[2] if ":" in name and not Path(name).exists() else Path(name).stem
    return f"{stem}.{given['preset']}.onnx"


def shapes_of(runner: Runner, frames: int = 16) -> list[tuple[int, ...]]:
    """The sizes of the clip that a step model's frames came from, with time at dimension 2."""
    return [(1, int(spec.shape[1]), frames, *(int(size) for size in spec.shape[2:])) for spec in runner.inputs]


def batched(shape: Any, batch: int) -> Any:
    """The sizes of an input, or of a list of them, with another batch."""
    if isinstance(shape, list):
        return [batched(part, batch) for part in shape]
    return Shape((batch, *shape[1:]), getattr(shape, "dtype", "float32"))


@contextmanager
def written(stream: Stream, path: Path, given: Mapping[str, Any]) -> Iterator[tuple[Path, Agreement | None]]:
    """Write the step model to a temporary file for the time of the block; to ``path`` if the block ends in peace.

    The block gets the file and, where it is in 8 bits, how far it agrees with the float one. The file moves by a
    rename, so that ``path`` is at any time what it was before or a whole step model. Raises
    :class:`~dissect.errors.ExportError` before anything is written where ``path`` is no place for a file.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise ExportError(
            f"{path} {'is a folder' if path.is_dir() else 'lies in no folder'}; name a file with --output."
        )
    with tempfile.TemporaryDirectory(prefix="dissect-") as folder:
        file, agreement = Path(folder) / path.name, None
        if given["dtype"] == "int8":
            from dissect.quantizing import quantize

            if not given["calibration"]:
                raise ExportError("--dtype int8 takes its ranges from streams: name videos or clips with --calibrate.")
            whole = stream.export(Path(folder) / "float.onnx", cadence=given["cadence"], live=given["live"])
            agreement = quantize(whole, file, given["calibration"])
            whole.unlink()
        else:
            stream.export(file, cadence=given["cadence"], dtype=given["dtype"], live=given["live"])
        yield file, agreement
        # The weights of a model past 2 GB lie in a file of their own, which must be there first.
        for part in sorted(Path(folder).iterdir(), key=lambda part: part == file):
            with beside(path.parent / part.name) as copy:
                os.replace(shutil.copyfile(part, copy), path.parent / part.name)


def agreement_in_words(agreement: Agreement) -> list[tuple[str, str]]:
    """How far an 8-bit step model agrees with the float one, as names and values to read."""
    same = "" if agreement.top1 is None else f"top-1 agreement {agreement.top1:.1%}, "
    return [
        ("8 bits", f"{agreement.layers} of {agreement.weighted} layers"),
        ("caches", f"{kilobytes(agreement.after)} a stream instead of {kilobytes(agreement.before)}"),
        ("against float32", f"{same}relative error {agreement.error:.3f} over {agreement.steps} steps"),
    ]


def plain(report: Report) -> dict[str, Any]:
    """A verification report as plain values."""
    return {"ok": report.ok, "rows": [asdict(row) for row in report.rows]}


def totals(stream: Stream, work: Work, cadence: str = "every") -> dict[str, Any]:
    """Delay, receptive field, warm-up and stride in frames, bytes of the caches, multiply-adds a frame and a clip.

    In the native cadence, multiply-adds a frame are the mean over a period.
    """
    from dissect.cadence import native
    from dissect.counting import multiply_adds

    timing = stream.timing
    frame = stream.frame(work.example, 0)
    batch = stream.dissected.inputs.batch
    found = {
        "preset": stream.options.preset,
        "exact": stream.plan.exact,
        "delay": timing.delay,
        "receptive_field": timing.receptive_field,
        "warmup": timing.warmup,
        "stride": timing.stride,
        "cadence": cadence,
        "cache_bytes": stream.cache_bytes,
    }
    sparse = native(stream) if cadence == "native" else None
    try:
        if sparse is None:
            found["multiply_adds_per_frame"] = multiply_adds(stream.step, (*frame, *stream.caches(batch))) // batch
        else:
            caches = sparse.caches(stream, batch)
            found["cache_bytes"] = sum(cache.nbytes // batch for cache in caches)
            counts = [multiply_adds(sparse.phase(phase), (*frame, *caches)) for phase in range(sparse.period)]
            found["multiply_adds_per_frame"] = sum(counts) / sparse.period / batch
        found["multiply_adds_per_clip"] = multiply_adds(work.module, work.example) // batch
    except DissectError:
        raise
    except Exception as error:  # a count is a comfort; a network that cannot be counted can still be dissected
        found["multiply_adds_unknown"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return found


def summary(stream: Stream) -> str:
    """How many layers touch time, and how many of them are approximate."""
    rows = len(stream.plan.rows)
    loose = sum(row.verdict == "approximate" for row in stream.plan.rows)
    return f"preset {stream.options.preset}: {rows} operators touch time, {rows - loose} exact, {loose} approximate"


def in_words(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Totals as names and values to read."""
    words = [
        ("delay", _frames(found["delay"])),
        ("receptive field", _frames(found["receptive_field"])),
        ("warm-up", _frames(found["warmup"])),
        ("caches", f"{kilobytes(found['cache_bytes'])} a stream"),
    ]
    if "multiply_adds_per_frame" in found:
        step, clip = found["multiply_adds_per_frame"], found["multiply_adds_per_clip"]
        share = f", {clip / step:.1f} times a frame's" if step else ""
        words.append(("multiply-adds", f"{amount(step)} a frame; {amount(clip)} a clip{share}"))
    return words


def race(
    step: benchmarking.Call,
    work: Work,
    threads: int | None,
    providers: Any = None,
    turns: int = 20,
    stream: Stream | None = None,
    frames: int = 1,
    seconds: float = 30.0,
) -> tuple[benchmarking.Comparison, str]:
    """A step against the sliding window, both in ONNX Runtime; and a remark where that could not be.

    It takes ``seconds`` at most, but for three turns.

    Where torch cannot export the clip network, its window runs in PyTorch, and so does the step if ``stream`` has one.
    ``frames``: the step's time is the mean over so many, a period of its cadence.
    """
    batch = int(_first(work.example).shape[0]) if stream is None else stream.dissected.inputs.batch
    try:
        window, runtime, remark = (
            benchmarking.onnx_window(work.module, work.example, threads, providers),
            "ONNX Runtime",
            "",
        )
    except DissectError as error:
        window = benchmarking.eager_window(work.module, work.example)
        if stream is None:
            runtime, remark = "mixed", f"{error} Its window runs in PyTorch instead, the step in ONNX Runtime."
        else:
            step = benchmarking.eager_step(stream, work.example)
            runtime, remark = "PyTorch", f"{error} So both run in PyTorch."
    remark = f"{remark} A step's time is the mean over {frames} frames.".strip() if frames > 1 else remark
    return benchmarking.compare(step, window, runtime, turns, seconds=seconds, batch=batch, frames=frames), remark


def _first(example: Sequence[Any]) -> Any:
    return _first(example[0]) if isinstance(example[0], list | tuple) else example[0]


def _is_picture(stream: Stream) -> bool:
    """True where the network takes one frame of one or three channels."""
    frame = stream.frame(stream.example, 0)
    return len(frame) == 1 and getattr(frame[0], "ndim", 0) == 4 and frame[0].shape[1] in (1, 3)


def _numbers(name: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise PlanError(f"{name} {text!r} is no list of numbers with commas.") from error


def _frames(count: int) -> str:
    return f"{count} frame" + ("" if count == 1 else "s")
