"""The command line: ``dissect inspect | convert | verify | bench | run``.

A command parses, calls the API and prints. torch is imported by the commands that need it, never by ``run``.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dissect import __version__, options
from dissect.errors import DissectError, NotStreamable, PlanError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from dissect.benchmarking import Comparison
    from dissect.stream import Stream

__all__ = ["main"]

STEP = click.Path(dir_okay=False, path_type=Path)


@click.group(cls=options.Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dissect")
def main() -> None:
    """Dissect any 3D-CNN: turn a clip network into a step model that computes one frame at a time."""


@main.command()
@click.argument("model", required=False)
@options.network
@options.surgery
@click.option("--markdown", is_flag=True, help="Print the plan as a Markdown table.")
@options.common
def inspect(model: str | None, markdown: bool, as_json: bool, **rest: Any) -> None:
    """Print the plan for MODEL before anything is cut: what becomes of each layer, exact or not, and why.

    MODEL is a file (a torch.export or TorchScript archive, a state_dict with --arch, a pickled module with --trust)
    or a factory, package.module:factory. Without it: a 3D-ResNet-18 of our own.
    """
    from dissect import rendering

    network, example = _network(model, rest)
    try:
        stream = _convert(network, example, rest)
    except NotStreamable as error:
        _print_refused(network, example, rest, error, markdown, as_json)
        raise
    totals = _totals(stream, network, example)
    if as_json:
        click.echo(json.dumps({"ok": True, **json.loads(stream.plan.to_json()), "totals": totals}))
    elif markdown:
        click.echo(stream.plan.to_markdown())
        click.echo("\n" + "\n".join(f"- {name}: {value}" for name, value in _in_words(totals)))
    else:
        out = rendering.console()
        out.print(rendering.plan_table(*stream.plan.table()))
        out.print(rendering.pairs(_in_words(totals)))


@main.command()
@click.argument("model", required=False)
@click.option("-o", "--output", type=STEP, help="Where the step model goes. [MODEL's name.PRESET.onnx]")
@options.network
@options.surgery
@click.option("--labels", type=STEP, help="A text file with the names of the classes, one a line; kept in the file.")
@click.option("--mean", help="Mean of the pixels for each channel, with commas. [Kinetics: 0.43216,0.394666,0.37645]")
@click.option("--std", help="Deviation of the pixels for each channel. [Kinetics: 0.22803,0.22145,0.216989]")
@click.option("--verify/--no-verify", "checked", default=True, help="Compare the step model with the original.")
@click.option("--bench/--no-bench", "measured", default=True, help="Measure a step against the sliding window.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads for the measurement. [one for each core]")
@options.common
def convert(model: str | None, output: Path | None, as_json: bool, **rest: Any) -> None:
    """Convert MODEL to a step model: one frame and caches in, one output and new caches out, as an ONNX file.

    MODEL is a file (a torch.export or TorchScript archive, a state_dict with --arch, a pickled module with --trust)
    or a factory, package.module:factory. Without it: a 3D-ResNet-18 of our own.
    """
    from dissect import rendering

    out = rendering.notes() if as_json else rendering.console()
    found: dict[str, Any] = {"ok": True}
    with _Progress(4 + rest["checked"] + rest["measured"]) as progress:
        progress("loading")
        network, example = _network(model, rest)
        progress("dissecting")
        stream = _convert(network, example, rest)
        _describe(stream, rest)
        found["plan"] = json.loads(stream.plan.to_json())
        progress("counting")
        found["totals"] = totals = _totals(stream, network, example)
        out.print(rendering.pairs([("plan", _summary(stream)), *_in_words(totals)]))
        if rest["checked"]:
            from dissect import verify as verified

            progress("verifying")
            report = verified(stream, network)
            found["verification"] = _report(report)
            out.print(str(report), markup=False)
            report.check()
        progress("writing")
        path = output or Path(f"{_stem(model, rest)}.{rest['preset']}.onnx")
        stream.export(path)
        found |= {"file": str(path), "bytes": path.stat().st_size}
        out.print(rendering.pairs([("file", f"{path}, {rendering.kilobytes(found['bytes'])}")]))
        if rest["measured"]:
            progress("measuring")
            found["speed"] = _measure(stream, path, network, example, rest["threads"], out)
    if as_json:
        click.echo(json.dumps(found))


@main.command()
@click.argument("model")
@click.argument("step", type=STEP)
@options.network
@options.surgery
@options.common
def verify(model: str, step: Path, as_json: bool, **rest: Any) -> None:
    """Verify that the file STEP keeps its promise to MODEL; give the options that it was converted with.

    Exit code 1 where it does not.
    """
    from dissect import Runner, rendering
    from dissect import verify as verified

    runner = Runner(step)
    source = click.get_current_context().get_parameter_source("preset")
    if source is not None and source.name == "DEFAULT" and runner.preset:
        rest["preset"] = runner.preset
    if not rest["shapes"]:
        rest["shapes"] = _shapes_of(runner)
    with _Progress(3) as progress:
        progress("loading")
        network, example = _network(model, rest)
        progress("dissecting")
        stream = _convert(network, example, rest)
        progress("verifying")
        report = verified(stream, network, onnx=step)
    if as_json:
        click.echo(json.dumps({"ok": report.ok, "verification": _report(report)}))
    else:
        rendering.console().print(str(report), markup=False)
    report.check()


@main.command()
@click.argument("step", type=STEP)
@click.argument("model", required=False)
@options.network
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Streams side by side.")
@click.option("--steps", type=click.IntRange(min=1), default=200, show_default=True, help="Steps to measure.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads. [one for each core]")
@click.option("--provider", help="ONNX Runtime's provider: cpu, cuda, ... [CUDA where it works]")
@options.common
def bench(
    step: Path, model: str | None, batch: int, steps: int, threads: int | None, provider: str | None, as_json: bool, **rest: Any
) -> None:
    """Measure a step of STEP: median and p95 latency, frames a second; with MODEL, against the sliding window, too."""
    from dissect import Runner, benchmarking, rendering

    runner = Runner(step, batch, provider, threads)
    call = benchmarking.step_of(runner, rest["seed"])
    out = rendering.notes() if as_json else rendering.console()
    where = {"provider": runner.providers[0], "threads": threads, "batch": batch}
    if model is None:
        latency = benchmarking.measure(call, steps)
        out.print(rendering.comparison_table([("step", latency)]))
        found: dict[str, Any] = {"step": latency.to_dict()}
    else:
        rest["shapes"] = rest["shapes"] or _shapes_of(runner)
        rest["shapes"] = [_batched(shape, batch) for shape in rest["shapes"]]
        with _Progress(2) as progress:
            progress("loading")
            network, example = _network(model, rest)
            progress("measuring")
            window, remark = _window(network, example, threads, provider)
            turns = max(3, min(50, steps // 10))
            comparison = benchmarking.compare(call, window, remark or "ONNX Runtime", turns, batch=batch)
        _print_comparison(comparison, out)
        found = comparison.to_dict()
    if as_json:
        click.echo(json.dumps({"ok": True, **found, **where}))


@main.command()
@click.argument("step", type=STEP)
@click.argument("video")
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="Labels to print.")
@click.option("--jsonl", is_flag=True, help="Print one JSON object for each frame.")
@click.option("--softmax/--raw", default=True, help="Scores that add up to 1, or as the network gives them. [softmax]")
@click.option("--output", help="The output with the scores. [the first]")
@click.option("--labels", type=STEP, help="A text file with the names of the classes, one a line. [those of the file]")
@click.option(
    "--late",
    type=click.Choice(["drop", "wait"]),
    default="drop",
    show_default=True,
    help="What to do when a live stream is faster than the network: drop pictures or let the delay grow.",
)
@click.option("--max-frames", type=click.IntRange(min=1), help="Stop after so many pictures.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads. [one for each core]")
@click.option("--provider", help="ONNX Runtime's provider: cpu, cuda, ... [CUDA where it works]")
@options.common
def run(step: Path, video: str, threads: int | None, provider: str | None, as_json: bool, **rest: Any) -> None:
    """Run the step model STEP on VIDEO (a file, a camera such as 0, or rtsp://...) and print its best labels live."""
    from dissect import Runner, watching

    found = watching.watch(Runner(step, 1, provider, threads), video, **rest, quiet=as_json)
    if as_json:
        click.echo(json.dumps({"ok": True, **found}))
