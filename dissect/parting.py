"""Where two forms part: the first node of the graph at which they differ, for a report that says where to look."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree  # the specs that torch.export itself hands out

from dissect.ledger import join, split_frames
from dissect.stream import Stream

__all__ = ["first_part"]


class _Recorder(fx.Interpreter):
    """Keeps every node's value by name."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.seen: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.seen[n.name] = value
        return value


def first_part(stream: Stream, inputs: tuple[Any, ...], frames: int, model: Any = None) -> str:
    """``first parts at layer1.0.conv1 (aten.conv3d)``, or an empty string where no single node shows it.

    Without ``model`` the clip form is compared with the step form; with it, the original with the exact stream.
    """
    try:
        return _original(stream, inputs, frames, model) if model is not None else _steps(stream, inputs, frames)
    except Exception:  # a report must not fail because its hint does
        return ""


def _steps(stream: Stream, inputs: tuple[Any, ...], frames: int) -> str:
    clip = _Recorder(stream.clip.__dict__["run"])
    clip.run(*stream.dissected.inputs.streams(inputs))
    caches: Any = stream.caches(3)
    steps: list[dict[str, Any]] = []
    for time in range(frames):
        step = _Recorder(stream.step.__dict__["run"])
        leaves = pytree.tree_leaves(stream.frame(inputs, time))
        values = step.run(*leaves, *caches)
        caches = values[len(values) - len(caches) :]
        steps.append(step.seen)
    for name, value in clip.seen.items():
        parts = [seen.get(name) for seen in steps]
        if not isinstance(value, Tensor) or not all(isinstance(part, Tensor) for part in parts):
            continue
        rows = torch.stack(parts, 1).flatten(0, 1)  # type: ignore[arg-type]
        if rows.shape == value.shape and _differ(rows, value):
            return f"first parts at {name}"
    return ""


def _original(stream: Stream, inputs: tuple[Any, ...], frames: int, model: Any) -> str:
    from dissect.oracle import original

    own = stream.original(*inputs)
    offline = _Recorder(original(model, own))
    offline.run(*pytree.tree_leaves(own))
    recorder = _Recorder(stream.chunk.__dict__["run"])
    chunk = stream.chunk
    rows = stream.leaves(inputs)[0].shape[0]
    parts: dict[str, list[Tensor]] = {}

    def recorded(*args: Any) -> Any:  # clip and flush may come in several chunks
        out = _with(recorder, chunk, args)
        for name, value in recorder.seen.items():
            if isinstance(value, Tensor) and value.dim() and value.shape[0] % rows == 0:
                parts.setdefault(name, []).append(value.unflatten(0, (rows, -1)))
        return out

    stream.chunk = recorded  # type: ignore[assignment]
    try:
        stream.offline(*inputs)
    finally:
        stream.chunk = chunk
    seen = {name: torch.cat(part, 1).flatten(0, 1) for name, part in parts.items() if _fit(part)}
    total = frames + stream.flush_frames(frames)
    for name, value in stream.dissected.trace.items():
        wanted, got = offline.seen.get(name), seen.get(value.node.name)
        if value.constant or value.time is None or not isinstance(wanted, Tensor) or not isinstance(got, Tensor):
            continue
        if got.shape[0] % total:
            continue
        joined = join(got, value.axes, total)
        at = torch.arange(value.clock.delay, value.clock.last(frames) + 1, value.clock.stride)
        if at.numel() == 0 or int(at.min()) < 0 or int(at.max()) >= total:
            continue
        streamed = torch.stack([split_frames(joined, value.axes)[int(index)] for index in at])
        if _differ(streamed, torch.stack(split_frames(wanted, value.axes))):
            return f"first parts at {name}"
    return ""


def _fit(parts: list[Tensor]) -> bool:
    """They differ in the number of frames alone."""
    return len({(part.shape[0], part.shape[2:]) for part in parts}) == 1


def _with(recorder: _Recorder, form: Any, args: tuple[Any, ...]) -> Any:
    given = form.structure.inputs.given
    values = recorder.run(*pytree.tree_leaves(args[:given]), *args[given:])
    count = sum(literal is None for literal in form.literals)
    return (pytree.tree_unflatten(list(values[:count]), form.structure.outputs), *values[count:])


def _differ(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape:
        return True
    scale = float(right.abs().max()) or 1.0
    return float((left.double() - right.double()).abs().max()) / scale > (1e-7 if left.dtype == torch.float64 else 1e-3)
