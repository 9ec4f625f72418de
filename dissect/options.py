"""What the commands of the command line have in common: their options, and what becomes of an error.

Law: exit code 0 is done, 1 a promise that broke (verification), 2 wrong use, an unsupported network or a bug of ours;
130 is a user's Ctrl-C, 143 a SIGTERM. An error is one paragraph on standard error; ``--debug`` shows where it comes
from.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from dissect.errors import DissectError, VerificationError
from dissect.parameters import INPUT, Arguments, Numbers, Setting
from dissect.plan import FILLS, POOLS, PRESETS, SKIPS

__all__ = ["Commands", "common", "learning", "network", "pictures", "precision", "surgery"]

_DEBUG = "dissect.debug"
Function = TypeVar("Function", bound=Callable[..., Any])


class Commands(click.Group):
    """The commands, with the house's exit codes and one paragraph for an error."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; errors end it with the code that they deserve."""
        try:
            with _remarks(), _ended_tidily():
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            click.echo("Stopped.", err=True)
            ctx.exit(130)
        except BrokenPipeError:  # whoever read standard output has left
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(0)
        except Exception as error:
            if ctx.meta.get(_DEBUG):
                traceback.print_exc()
            known = isinstance(error, DissectError)
            text = str(error) if known else f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            click.echo(click.style("Error: ", fg="red") + text, err=True)
            if not known and not ctx.meta.get(_DEBUG):
                click.echo(
                    "This is a bug of dissect, or of your --rules: run it again with --debug to see where.", err=True
                )
            if ctx.meta.get("dissect.json"):
                click.echo(json.dumps({"ok": False, "error": {"type": type(error).__name__, "message": text}}))
            ctx.exit(1 if isinstance(error, VerificationError) else 2)


def common(function: Function) -> Function:
    """``--json`` and ``--debug``."""
    for option in (
        click.option(
            "--debug",
            is_flag=True,
            expose_value=False,
            callback=lambda ctx, _, on: ctx.meta.__setitem__(_DEBUG, on),
            help="Show where an error comes from.",
        ),
        click.option(
            "--json",
            "as_json",
            is_flag=True,
            callback=lambda ctx, _, on: ctx.meta.__setitem__("dissect.json", on) or on,
            help="Print one JSON object and nothing else on standard output.",
        ),
    ):
        function = option(function)
    return function


def network(function: Function) -> Function:
    """What says which network is meant, and what goes into it."""
    for option in (
        click.option("--seed", type=int, default=0, show_default=True, help="Seed of the noise in the example clip."),
        click.option(
            "--trust",
            is_flag=True,
            help="Load a pickled module, though that runs code from the file. Only from where you trust.",
        ),
        click.option(
            "--arch-args", type=Arguments(), help="Arguments of the factory, as JSON: '{\"num_classes\": 27}'."
        ),
        click.option("--arch", metavar="PACKAGE.MODULE:FACTORY", help="What builds the network for a state_dict."),
        click.option(
            "--input",
            "shapes",
            type=INPUT,
            multiple=True,
            help="The clip's sizes, batch first [1x3x16x112x112]. Once for each input; a list of inputs in brackets.",
        ),
    ):
        function = option(function)
    return function


def surgery(function: Function) -> Function:
    """How the network is to be dissected."""
    for option in (
        click.option(
            "--rules",
            type=click.Path(dir_okay=False, path_type=Path),
            multiple=True,
            help="A Python file with converters of your own.",
        ),
        click.option(
            "--set",
            "settings",
            type=Setting(),
            multiple=True,
            help="Edit the plan by path pattern: 'layer1.*.conv1: depth=3'. Repeatable; later ones win.",
        ),
        click.option(
            "--window", type=click.IntRange(min=1), help="Positions in the window of a global pool. [the clip's]"
        ),
        click.option(
            "--pool",
            type=click.Choice(POOLS),
            default="window",
            show_default=True,
            help="What a global pool over time becomes.",
        ),
        click.option(
            "--rates",
            type=Numbers(),
            help="Frames from one of its own to the next, for each clip of a network with several: 4,1. [by the lengths]",
        ),
        click.option(
            "--layout",
            "layouts",
            multiple=True,
            help="The dimensions of an input by name, b the batch and t time: 'b t h w c', '(b t=8) c h w', "
            "'b (t=8 c) h w', or 't b c h w' for a list of frames. Once, or once for each input (none: -).",
        ),
        click.option(
            "--fill",
            type=click.Choice(FILLS),
            default="zeros",
            show_default=True,
            help="What stands before the first frame: zeros, or that frame again.",
        ),
        click.option("--stem", type=click.IntRange(min=1), help="Frames that the stem sees, in the preset d3d. [3]"),
        click.option(
            "--skip",
            type=click.Choice(SKIPS),
            default="concat",
            show_default=True,
            help="d3d: what a convolution does with the frame that it cached. sum and none are cheaper, and see less.",
        ),
        click.option("--time-dim", type=int, default=2, show_default=True, help="The clip's dimension that is time."),
        click.option(
            "--preset",
            type=click.Choice(PRESETS),
            default="d3d",
            show_default=True,
            help="d3d: cheapest, to be trained. causal: no delay. exact: the clip network's own outputs, delayed.",
        ),
    ):
        function = option(function)
    return function


def precision(function: Function) -> Function:
    """What the step model computes in, and what it leaves out."""
    for option in (
        click.option("--live", is_flag=True, help="Without what only the warm-up and the end of a stream need."),
        click.option(
            "--calibrate",
            "calibration",
            multiple=True,
            metavar="STREAM",
            help="A video, or clips in a .npy or .npz file, that the ranges of int8 are taken from. Repeatable.",
        ),
        click.option(
            "--dtype",
            type=click.Choice(["float32", "float16", "int8"]),
            default="float32",
            show_default=True,
            help="Of weights and caches. float16 is for GPUs; int8 needs --calibrate.",
        ),
    ):
        function = option(function)
    return function


def pictures(function: Function) -> Function:
    """What goes into a step model's file beside the network: labels, and what becomes of a picture."""
    for option in (
        click.option("--std", help="Deviation of the pixels for each channel. [Kinetics: 0.22803,0.22145,0.216989]"),
        click.option(
            "--mean", help="Mean of the pixels for each channel, with commas. [Kinetics: 0.43216,0.394666,0.37645]"
        ),
        click.option(
            "--labels",
            type=click.Path(dir_okay=False, path_type=Path),
            help="A text file with the names of the classes, one a line; kept in the file.",
        ),
    ):
        function = option(function)
    return function


def learning(function: Function) -> Function:
    """What is learnt from, and how long."""
    for option in (
        click.option(
            "--checkpoint", type=click.Path(dir_okay=False, path_type=Path), help="Go on from here if cut off."
        ),
        click.option("--device", help="Where to train: cpu, cuda, cuda:1. [cpu]"),
        click.option(
            "--reconstruct",
            is_flag=True,
            help="First fit each layer to the network's own by least squares. Holds all clips in memory.",
        ),
        click.option(
            "--lr", type=click.FloatRange(min=0, min_open=True), default=1e-3, show_default=True, help="Rate."
        ),
        click.option(
            "--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Clips side by side in a step."
        ),
        click.option(
            "--windows",
            type=click.IntRange(min=1),
            default=4,
            show_default=True,
            help="Windows of each clip that the network is asked for in a step; more cost more.",
        ),
        click.option(
            "--steps",
            type=click.IntRange(min=0),
            default=1000,
            show_default=True,
            help="Steps of training; 0 leaves it at statistics (and --reconstruct).",
        ),
        click.option(
            "--clips",
            "most",
            type=click.IntRange(min=1),
            default=256,
            show_default=True,
            help="Clips to keep in memory.",
        ),
        click.option("--frames", type=click.IntRange(min=1), help="Frames of a clip. [twice the network's]"),
    ):
        function = option(function)
    return function


@contextmanager
def _ended_tidily() -> Iterator[None]:
    """A request to end (SIGTERM) ends the command as an error would, temporary files removed; exit code 143."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def _remarks() -> Iterator[None]:
    """Warnings of our own come as one line on standard error; those of libraries do not concern the user."""

    def show(message: Warning | str, category: type[Warning], filename: str, *_: Any) -> None:
        if Path(filename).parent == Path(__file__).parent:
            click.echo(f"Note: {message}", err=True)

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = show  # type: ignore[assignment]
        yield
