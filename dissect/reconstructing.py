"""Reconstruct: layer by layer least squares, so that the kept taps say what the original layer said.

Folding keeps a still scene; what moves, the dropped taps saw and the kept ones do not. From unlabelled clips the kept
taps are chosen anew: for each convolution in turn, the weights whose output is nearest to the original layer's output on
the same clips, in the least-squares sense, given the inputs that the dissected network itself produces (as the layers
before it, rebuilt already, make them). The normal equations are summed up over all clips; a ridge draws the solution
towards the folded weights where the clips say nothing. Then the batch norms in between take the statistics of what they
now get.

Where the original removed frames by a temporal stride, its positions are compared at the frames that they are centred on
(:mod:`dissect.centring`), and every position stands for the frames until the next.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree  # the specs that torch.export itself hands out

from dissect import oracle
from dissect.advancing import Advance
from dissect.centring import named_centres
from dissect.checkpoints import Checkpoint, Saver
from dissect.clips import Batch, Clips
from dissect.convolution import FrameConv
from dissect.errors import ClipError, PlanError
from dissect.learning import placed
from dissect.least_squares import NormalEquations
from dissect.ledger import split_frames
from dissect.recalibrating import batch_norms
from dissect.rendering import Bar
from dissect.stream import Stream
from dissect.values import Value

__all__ = ["reconstruct"]


def reconstruct(
    stream: Stream,
    model: nn.Module | ExportedProgram,
    clips: Any,
    *,
    ridge: float = 1e-3,
    device: str | torch.device | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    every: float = 60.0,
    progress: bool = True,
) -> Stream:
    """Choose the weights of every convolution of ``stream`` anew; it is changed and returned.

    ``model`` is the original network, ``clips`` are clips as it takes them (see :mod:`dissect.clips`), all of one length;
    they are held in memory, with the values at one place of both networks. Some dozens do, hundreds do better; twice as
    long as the original's own clip, so that most frames are not the first ones. Left as they were: transposed
    convolutions, weights that several layers share, and layers that see no frames.

    ``ridge`` is relative to the inputs' mean square. ``checkpoint`` is a file from which a run that was cut off goes on
    with the next layer, given the same clips; it is written every ``every`` seconds.

    Raises :class:`~dissect.ClipError` for clips that do not fit, :class:`~dissect.PlanError` for the preset ``exact``.
    """
    if stream.options.preset == "exact":
        raise PlanError("the preset exact gives the original's own numbers: there is nothing to reconstruct")
    batches = list(Clips(stream, clips, batch=1).epoch())
    if len(shapes := {_shapes(taken) for taken in batches}) > 1:
        one, two = sorted(shapes)[:2]
        raise ClipError(f"clips for reconstruct are of one shape, not {one} and {two}: cut them to one length")
    checkpointed = Checkpoint.of(checkpoint, stream, "reconstruct", ridge=ridge, clips=len(batches))
    done: list[str] = []
    if (saved := checkpointed.load()) is not None:
        done = list(saved["done"])
        stream.clip.load_state_dict(saved["weights"])
    layers = _layers(stream)
    saver = Saver(checkpointed, every, lambda: {"done": done, "weights": stream.clip.state_dict()})
    with placed(stream, device) as where, torch.no_grad(), Bar("reconstructing", len(layers), progress) as bar:
        batches = [taken.to(where) for taken in batches]
        bar.start(len(done))
        frames = batches[0].frames
        form = stream.clip.__dict__["run"]
        new = Advance(form, [stream.dissected.inputs.streams(taken.inputs) for taken in batches])
        graph = oracle.original(model, batches[0].inputs)
        if where is not None:
            graph = copy.deepcopy(graph).to(where)
        old = Advance(graph, [pytree.tree_leaves(taken.inputs) for taken in batches])
        places = {node.name: node for node in graph.graph.nodes}
        centres = named_centres(stream.dissected)
        norms = dict(batch_norms(form))
        for node in new.nodes:
            new.before(node)
            if node.op != "call_module":
                continue
            if node.target in norms:
                _measure(norms[node.target], [new.read(index, node.args[0]) for index in range(len(batches))])
            name, value = layers.get(str(node.target), ("", None))
            if value is None or name not in places or str(node.target) in done or not old.before(places[name]):
                continue
            old.step()
            layer = form.get_submodule(node.target)
            free = bool(node.users) and all(user.target in norms for user in node.users)
            if _rebuilt(layer, node, places[name], value, centres[name], frames, new, old, free, ridge):
                done.append(str(node.target))
            bar.advance(str(node.target))
            saver.tick()
        saver.save()
    return stream


def _shapes(taken: Batch) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(leaf.shape) for leaf in pytree.tree_leaves(taken.inputs) if isinstance(leaf, Tensor))


def _layers(stream: Stream) -> dict[str, tuple[str, Value]]:
    """By path, the convolutions with weights of their own: the name of the original's node, and what is known of it."""
    found: dict[str, tuple[str, Value]] = {}
    for name, value in stream.dissected.trace.items():
        if value.constant or value.time is None or value.node.op != "call_module":
            continue
        path = str(value.node.target)
        layer = stream.dissected.root.get_submodule(path)
        if isinstance(layer, FrameConv) and layer.weight is not None and not layer.transposed and layer.dims <= 2:
            found.setdefault(path, (name, value))
    return found


def _rebuilt(
    layer: nn.Module,
    node: fx.Node,
    place: fx.Node,
    value: Value,
    centre: int,
    frames: int,
    new: Advance,
    old: Advance,
    free: bool,
    ridge: float,
) -> bool:
    """Solve for one layer: its positions in the original against the frames for which they stand."""
    assert isinstance(layer, FrameConv)
    sums = NormalEquations(layer, free)
    for index, wanted in enumerate(old.of(place)):
        positions = split_frames(wanted, value.axes)
        held = [(frame - centre) // value.clock.removed for frame in range(frames)]
        kept = [frame for frame in range(frames) if 0 <= held[frame] < len(positions)]
        if not kept:
            return False
        answers = torch.stack([positions[held[frame]] for frame in kept])
        sums.add(new.read(index, node.args[0]), answers, kept, frames)
    sums.solve(ridge)
    return True


def _measure(norm: nn.Module, values: Sequence[Tensor]) -> None:
    """Give a batch norm the mean and the variance of all values, over all but their channels."""
    mean, square, count = torch.zeros(()), torch.zeros(()), 0
    for x in values:
        columns = x.transpose(0, 1).flatten(1).double()
        mean = mean.to(columns) + columns.sum(1)
        square = square.to(columns) + columns.square().sum(1)
        count += columns.shape[1]
    mean, square = mean / count, square / count
    buffers = dict(norm.named_buffers(recurse=False))
    buffers["running_mean"].copy_(mean)
    buffers["running_var"].copy_((square - mean.square()).clamp(min=0) * count / max(1, count - 1))
