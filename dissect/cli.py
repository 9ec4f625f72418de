"""The command line: ``dissect inspect | convert | quantize | distil | verify | bench | run``.

A command parses, calls the API and prints. torch is imported by the commands that need it, never by ``run``.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from dissect import __version__, options
from dissect.contract import CADENCES
from dissect.errors import NotStreamable

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
    from dissect import rendering, workbench

    work = workbench.work_of(model, rest)
    try:
        stream = workbench.stream_of(work, rest)
    except NotStreamable as error:
        if not as_json:  # all that is known of it; the error, which names the fixes, follows
            rendering.console().print(rendering.refusal_table(error.refusals))
        raise
    totals = workbench.totals(stream, work)
    if as_json:
        click.echo(json.dumps({"ok": True, **json.loads(stream.plan.to_json()), "totals": totals}))
    elif markdown:
        click.echo(stream.plan.to_markdown())
        click.echo("\n" + "\n".join(f"- {name}: {value}" for name, value in workbench.in_words(totals)))
    else:
        out = rendering.console()
        out.print(rendering.plan_table(stream.plan.rows))
        out.print(rendering.pairs([("plan", workbench.summary(stream)), *workbench.in_words(totals)]))


@main.command()
@click.argument("model", required=False)
@click.option("-o", "--output", type=STEP, help="Where the step model goes. [MODEL's name.PRESET.onnx]")
@options.network
@options.surgery
@options.pictures
@click.option(
    "--cadence",
    type=click.Choice(CADENCES),
    default="every",
    show_default=True,
    help="every: an output at each frame. native: those of the clip network alone, its late layers at their own rate.",
)
@options.precision
@click.option("--verify/--no-verify", "checked", default=True, help="Compare the step model with the original.")
@click.option("--bench/--no-bench", "measured", default=True, help="Measure a step against the sliding window.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads for the measurement. [one for each core]")
@options.common
def convert(model: str | None, output: Path | None, as_json: bool, **rest: Any) -> None:
    """Convert MODEL to a step model: one frame and caches in, one output and new caches out, as an ONNX file.

    MODEL is a file (a torch.export or TorchScript archive, a state_dict with --arch, a pickled module with --trust)
    or a factory, package.module:factory. Without it: a 3D-ResNet-18 of our own.
    """
    from dissect import benchmarking, rendering, workbench
    from dissect.runner import Runner

    out = rendering.notes() if as_json else rendering.console()
    path = output or Path(workbench.name_of(model, rest))
    found: dict[str, Any] = {"ok": True}
    with rendering.Stages(4 + rest["checked"] + rest["measured"]) as stage:
        stage("loading")
        work = workbench.work_of(model, rest)
        stage("dissecting")
        stream = workbench.stream_of(work, rest)
        pictures = workbench.describe(stream, rest)
        stage("counting")
        totals = workbench.totals(stream, work, rest["cadence"])
        found |= {"plan": json.loads(stream.plan.to_json()), "totals": totals}
        words = [("plan", workbench.summary(stream)), *workbench.in_words(totals), ("preprocessing", pictures)]
        stage.print(out, rendering.pairs(words))
        stage("writing")
        with workbench.written(stream, path, rest) as (file, agreement):
            if agreement is not None:
                found["agreement"] = asdict(agreement)
                stage.print(out, rendering.pairs(workbench.agreement_in_words(agreement)))
            if rest["checked"]:
                from dissect.verifying import verify as verified

                stage("verifying")
                report = verified(stream, work.network, onnx=file, progress=stage.detail)
                found["verification"] = workbench.plain(report)
                stage.print(out, rendering.report_table(report.rows))
                report.check()
        found |= {"file": str(path), "bytes": path.stat().st_size}
        stage.print(out, rendering.pairs([("file", f"{path}, {rendering.kilobytes(found['bytes'])}")]))
        if rest["measured"]:
            stage("measuring")
            runner = Runner(path, batch=stream.dissected.inputs.batch, threads=rest["threads"])
            comparison, remark = workbench.race(
                benchmarking.step_of(runner), work, rest["threads"], stream=stream, frames=runner.period, seconds=6
            )
            found["speed"] = {**comparison.to_dict(), "remark": remark}
    if rest["measured"]:
        rendering.print_comparison(out, comparison, remark)
    if as_json:
        click.echo(json.dumps(found))


@main.command()
@click.argument("step", type=STEP)
@click.argument("streams", nargs=-1, required=True)
@click.option("-o", "--output", type=STEP, help="Where the 8-bit step model goes. [STEP's name.int8.onnx]")
@click.option("--keep", multiple=True, help="Layers that stay float, by path pattern: 'layer4.*'. Repeatable.")
@click.option(
    "--frames", type=click.IntRange(min=1), default=200, show_default=True, help="Frames of each stream at most."
)
@click.option("--reduce-range", is_flag=True, help="Weights of 7 bits, for x86 processors without VNNI.")
@options.common
def quantize(
    step: Path, streams: tuple[str, ...], output: Path | None, as_json: bool, keep: tuple[str, ...], **rest: Any
) -> None:
    """Turn the float step model STEP into one of 8 bits, caches too, by what it sees in STREAMS.

    STREAMS are videos, or clips as the network takes them, (N, C, T, H, W), in .npy or .npz files. A few dozen of the kind that the
    model will see are enough. Prints how far the two agree.
    """
    from dissect import rendering, workbench
    from dissect.quantizing import quantize as quantized

    path = output or step.with_suffix(".int8.onnx")
    agreement = quantized(step, path, streams, keep=keep, **rest)
    if as_json:
        click.echo(json.dumps({"ok": True, "file": str(path), "agreement": asdict(agreement)}))
    else:
        words = [
            *workbench.agreement_in_words(agreement),
            ("file", f"{path}, {rendering.kilobytes(path.stat().st_size)}"),
        ]
        rendering.console().print(rendering.pairs(words))


@main.command()
@click.argument("model")
@click.argument("videos", nargs=-1, required=True)
@click.option("-o", "--output", type=STEP, help="Where the step model goes. [MODEL's name.PRESET.onnx]")
@options.network
@options.surgery
@options.pictures
@options.precision
@options.learning
@options.common
def distil(model: str, videos: tuple[str, ...], output: Path | None, as_json: bool, **rest: Any) -> None:
    """Convert MODEL, and let it teach the step network on VIDEOS (files, or folders of them); no labels are needed.

    First the batch norms take the statistics of the videos (with --reconstruct, the layers are fitted to MODEL's as well),
    then MODEL's answers to a sliding window are taught. Some of the clips are kept out, to tell how often both agree.
    """
    from dissect import rendering, schooling, workbench
    from dissect.verifying import verify as verified

    out = rendering.notes() if as_json else rendering.console()
    path = output or Path(workbench.name_of(model, rest))
    with rendering.Stages(3) as stage:
        stage("loading")
        work = workbench.work_of(model, rest)
        stage("dissecting")
        stream = workbench.stream_of(work, rest)
        workbench.describe(stream, rest)
        stage("reading")
        clips = schooling.read(stream, videos, rest, stage.detail)
    out.print(rendering.pairs([("clips", clips.told)]))
    lessons = schooling.teach(stream, work.network, clips, rest)
    out.print(rendering.pairs(lessons.in_words()))
    with rendering.Stages(2) as stage:
        stage("writing")
        with workbench.written(stream, path, {**rest, "cadence": "every"}) as (file, agreement):
            if agreement is not None:
                stage.print(out, rendering.pairs(workbench.agreement_in_words(agreement)))
            stage("verifying")
            report = verified(stream, onnx=file, progress=stage.detail)
            stage.print(out, rendering.report_table(report.rows))
            report.check()
    out.print(rendering.pairs([("file", f"{path}, {rendering.kilobytes(path.stat().st_size)}")]))
    if as_json:
        found = {"ok": True, "clips": clips.count, **lessons.to_dict(), "verification": workbench.plain(report)}
        click.echo(json.dumps({**found, "file": str(path), "bytes": path.stat().st_size}))


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
    from dissect import rendering, workbench
    from dissect.runner import Runner
    from dissect.verifying import verify as verified

    runner = Runner(step)
    source = click.get_current_context().get_parameter_source("preset")
    if source is not None and source.name == "DEFAULT" and runner.preset:
        rest["preset"] = runner.preset
    rest["shapes"] = rest["shapes"] or workbench.shapes_of(runner)
    with rendering.Stages(3) as stage:
        stage("loading")
        work = workbench.work_of(model, rest)
        stage("dissecting")
        stream = workbench.stream_of(work, rest)
        stage("verifying")
        report = verified(stream, work.network, onnx=step, progress=stage.detail)
    if as_json:
        click.echo(json.dumps({"ok": report.ok, "verification": workbench.plain(report)}))
    else:
        rendering.console().print(rendering.report_table(report.rows))
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
    step: Path,
    model: str | None,
    batch: int,
    steps: int,
    threads: int | None,
    provider: str | None,
    as_json: bool,
    **rest: Any,
) -> None:
    """Measure a step of STEP: median and p95 latency, frames a second; with MODEL, against the sliding window, too."""
    from dissect import benchmarking, rendering, workbench
    from dissect.runner import Runner

    runner = Runner(step, batch, provider, threads)
    call = benchmarking.step_of(runner, rest["seed"])
    out = rendering.notes() if as_json else rendering.console()
    found: dict[str, Any] = {"ok": True, "provider": runner.providers[0], "threads": threads, "batch": batch}
    if model is None:
        latency = benchmarking.measure(call, steps, frames=runner.period)
        found["step"] = latency.to_dict()
        out.print(rendering.latency_table([("step", latency)]))
    else:
        shapes = rest["shapes"] or workbench.shapes_of(runner)
        rest["shapes"] = [workbench.batched(shape, batch) for shape in shapes]
        with rendering.Stages(2) as stage:
            stage("loading")
            work = workbench.work_of(model, rest)
            stage("measuring")
            comparison, remark = workbench.race(
                call, work, threads, provider, max(3, steps // 10), frames=runner.period
            )
        found |= {**comparison.to_dict(), "remark": remark}
        rendering.print_comparison(out, comparison, remark)
    if as_json:
        click.echo(json.dumps(found))


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
    from dissect import watching
    from dissect.runner import Runner

    found = watching.watch(Runner(step, 1, provider, threads), video, **rest, quiet=as_json)
    if as_json:
        click.echo(json.dumps({"ok": True, **found}))
