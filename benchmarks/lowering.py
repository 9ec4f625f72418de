"""(g) What the form of a step gains: in 3D operators, lowered to 2D, tuned, tuned with one rule left out, and in 8 bits.

All forms are the same step of the same network, exported by the same exporter; they are checked to give the same
outputs. ``3D`` keeps a convolution over time a 3D convolution, over frames that are joined on an axis of their own.
Ratios are over the tuned step: above 1, the tuned one is faster.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from measuring import arguments, files, paired, ratio, report
from networks import NETWORKS, converted
from torch import Tensor, fx, nn
from torch.nn import functional as F

import dissect
from dissect.benchmarking import step_of
from dissect.lowering import LoweredConv, lower
from dissect.primitives import tap
from dissect.tuning import Tuned


class Solid(nn.Module):
    """A convolution of a step as one in 3D, over frames ``(rows, channels, height, width)``."""

    def __init__(self, layer: LoweredConv) -> None:
        super().__init__()
        conv = layer.conv
        self.ages = None if layer.pieces is None else [age for piece in layer.pieces for age in piece]
        taps = [kernel.detach() for kernel in layer.kernels]
        if self.ages is not None and len(taps) == 1:
            taps = list(taps[0].unflatten(1, (len(self.ages), -1)).unbind(1))
        self.weight = nn.Parameter(torch.stack(taps, 2), requires_grad=False)
        self.bias = layer.bias
        self.stride, self.dilation = (1, *conv.stride), (1, *conv.dilation)
        self.padding, self.groups = (0, *(left for left, _ in conv.padding)), conv.groups

    def forward(self, known: Any, frames: None = None) -> Tensor:
        values = [known] if self.ages is None else [tap(known, age, None) for age in self.ages]
        x = torch.cat([value.unsqueeze(2) for value in values], 2)
        return F.conv3d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups).squeeze(2)


def solid(stream: Any, *options: Any) -> nn.Module:
    """The lowered step with every 2D convolution in 3D again."""
    module = lower(stream, *options)
    for path, layer in list(module.named_modules()):
        if isinstance(layer, LoweredConv) and layer.conv.dims == 2 and not layer.conv.transposed:
            owner, _, leaf = path.rpartition(".")
            setattr(module.get_submodule(owner), leaf, Solid(layer))
    return module


def plain(module: fx.GraphModule, caches: Any, frames: Any, **_: Any) -> Tuned:
    return Tuned(module, tuple(caches))


def unchanged(module: Any, caches: Any, *_: Any) -> Any:
    return tuple(caches)


def nothing(*_: Any) -> None:
    return None


FORMS: dict[str, dict[str, Any]] = {
    "tuned": {},
    "3D": {"dissect.exporting.lower": solid, "dissect.exporting.tune": plain},
    "2D": {"dissect.exporting.tune": plain},
    "stacked caches": {"dissect.slots.WORTH": 1 << 40},
    "joined taps": {"dissect.tuning.split": nothing},
    "sums apart": {"dissect.tuning.onto": nothing, "dissect.tuning.append": nothing},
    "not widened": {"dissect.tuning.widen": unchanged},
    "not flattened": {"dissect.tuning.flatten": lambda module, given, caches: tuple(caches)},
    "gates apart": {"dissect.tuning.shared": nothing},
}


@contextmanager
def patched(changes: dict[str, Any]) -> Iterator[None]:
    """The exporter with some of its stages replaced."""
    patches = [patch(target, value) for target, value in changes.items()]
    for change in patches:
        change.start()
    try:
        yield
    finally:
        for change in patches:
            change.stop()


def exported(name: str, preset: str, forms: list[str], folder: Path) -> dict[str, Path]:
    """A file for each form; those that are there are used again."""
    paths = {form: folder / f"{name}.{preset}.{form.replace(' ', '-')}.onnx" for form in forms}
    if any(not path.exists() for path in paths.values()):
        stream = converted(name, preset)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for form, path in paths.items():
                if form == "int8" and not path.exists():
                    clip = np.random.default_rng(0).standard_normal(NETWORKS[name].clip).astype(np.float32)
                    whole = stream.export(folder / f"{name}.{preset}.float.onnx")
                    dissect.quantize(whole, path, [clip])
                elif not path.exists():
                    with patched(FORMS[form]):
                        stream.export(path)
    return paths


def difference(paths: dict[str, Path], threads: int) -> float:
    """The largest difference of an output to the tuned step's, after several frames; relative to the largest one."""
    runners = {form: dissect.Runner(path, providers="cpu", threads=threads) for form, path in paths.items()}
    random = np.random.default_rng(0)
    found = 0.0
    for _ in range(3 + runners["tuned"].delay):
        frame = random.standard_normal(tuple(runners["tuned"].inputs[0].shape[1:])).astype(np.float32)
        out = {form: runner.step(frame) for form, runner in runners.items()}
        if out["tuned"] is not None:
            scale = np.abs(out["tuned"]).max()
            found = max(
                [found, *(float(np.abs(out[form] - out["tuned"]).max() / scale) for form in out if form != "int8")]
            )
    return found


def main() -> None:
    options = arguments(
        "The forms of a step.",
        networks=["3D-ResNet-18", "r3d_18", "x3d_s"],
        presets=["exact"],
        forms=[*FORMS, "int8"],
    )
    rows = []
    for name, preset in [(name, preset) for name in options.networks for preset in options.presets]:
        with files(options) as folder:
            paths = exported(name, preset, ["tuned", *(form for form in options.forms if form != "tuned")], folder)
            error = difference(paths, options.threads)
            calls: dict[str, Callable[[], Any]] = {
                form: step_of(dissect.Runner(path, providers="cpu", threads=options.threads))
                for form, path in paths.items()
            }
        times = paired(calls, seconds=options.seconds, clock=options.clock)
        ratios = [ratio(times[form], times["tuned"]) for form in calls if form != "tuned"]
        rows.append([name, preset, f"{error:.0e}", str(times["tuned"]), *ratios])
        print(*rows[-1], sep="  ", flush=True)
    forms = [form for form in ["tuned", *options.forms] if form != "tuned"]
    report(options, ["network", "preset", "largest difference", "tuned, ms", *forms], rows)


if __name__ == "__main__":
    main()
