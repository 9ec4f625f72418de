"""(b) Against continual-inference on the same network with the same weights: its eager step, and its ONNX where that works.

It converts no network with a ``forward`` of its own, so r3d_18 is composed of its modules here, by hand, and checked to
be the same network: on a clip, and on a stream once both are warm (its streams differ before that, since their caches
begin with zeros where a clip has padding). Two networks are compared: torchvision's r3d_18, whose temporal strides make
both libraries skip outputs (ours in the native cadence), and the same without temporal strides, where both give an
output at every frame. A time is the mean of a frame over a period of eight.

Needs ``pip install continual-inference``, which changes torch.nn when it is imported: it comes last.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import Call, arguments, number, paired, ratio, report
from networks import NETWORKS
from torch import Tensor, nn

import dissect
from dissect.benchmarking import step_of
from dissect.sessions import open_session

PERIOD = 8


def composed(network: Any, positions: int) -> Any:
    """r3d_18 of continual-inference's modules, with the weights of ``network``, up to its pool of ``positions``."""
    import continual as co

    def conv(layer: Any) -> Any:
        made = co.Conv3d(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, bias=False
        )
        made.weight = layer.weight
        return made

    def block(layer: Any) -> list[Any]:
        main = co.Sequential(conv(layer.conv1[0]), layer.conv1[1], nn.ReLU(), conv(layer.conv2[0]), layer.conv2[1])
        if layer.downsample is None:
            return [co.Residual(main, temporal_fill="zeros"), nn.ReLU()]
        skip = co.Sequential(conv(layer.downsample[0]), layer.downsample[1])
        return [co.BroadcastReduce(skip, main, reduce="sum", auto_delay=True), nn.ReLU()]

    stages = (network.layer1, network.layer2, network.layer3, network.layer4)
    blocks = [part for stage in stages for layer in stage for part in block(layer)]
    pool = co.AdaptiveAvgPool3d((1, 1, 1), kernel_size=positions)
    return co.Sequential(conv(network.stem[0]), network.stem[1], nn.ReLU(), *blocks, pool).eval()


def same(theirs: Any, network: Any, ours: list[Any], frames: Tensor, warm: int) -> float:
    """The largest difference of features: on a clip, and on a stream after both warm-ups; relative to the largest one."""
    with torch.inference_mode():
        clip = frames[:, :, :16]
        pooled = network.avgpool(network.layer4(network.layer3(network.layer2(network.layer1(network.stem(clip))))))
        wanted = [network.fc(pooled.flatten(1))]
        got = [network.fc(theirs.forward(clip).flatten(1))]
        theirs.clean_state()
        for time in range(frames.shape[2]):
            out = theirs.forward_step(frames[:, :, time])
            if isinstance(out, Tensor) and time >= warm and ours[time] is not None:
                wanted.append(torch.from_numpy(ours[time]))
                got.append(network.fc(out.flatten(1)))
    assert len(wanted) > 1, "the stream is too short: nothing was compared"
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, wanted, strict=True))


def onnx_step(theirs: Any, frame: Tensor, threads: int, frames: int) -> Call | str:
    """A call of its exported step, or why there is none; after ``frames`` frames it should have an output."""
    import continual as co

    wrapper, state, out = co.onnx.OnnxWrapper(theirs), None, None
    with torch.no_grad():
        for _ in range(frames):  # its export wants values for all that it keeps
            out, state = theirs._forward_step(frame, state)
            if isinstance(out, Tensor):
                break
        else:
            return f"with its state handed in it gives no output in {frames} frames"
    kept = leaves(state, theirs._state_shape)
    names = ["input", *wrapper.state_input_names]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = str(Path(folder) / "step.onnx")
        outputs = ["output", *(f"n{name}" for name in names[1:])]
        try:
            torch.onnx.export(
                wrapper, (frame, *kept), file, input_names=names, output_names=outputs, dynamo=False, opset_version=16
            )
            session = open_session(file, "cpu", threads)
            feed = {
                entry.name: dict(zip(names, (frame, *kept), strict=True))[entry.name].detach().numpy()
                for entry in session.get_inputs()
            }
            results = session.run(None, feed)
        except Exception as error:
            return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:90]}"
    made = [entry.name for entry in session.get_outputs()]
    with torch.no_grad():
        wanted, _ = theirs._forward_step(frame, state)
    if not isinstance(wanted, Tensor) or not np.allclose(results[0], wanted.numpy(), rtol=1e-3, atol=1e-3):
        return "its output is not that of its step: counters are constants of the trace"

    def call() -> None:
        results = dict(zip(made, session.run(None, feed), strict=True))
        feed.update({name: results[f"n{name}"] for name in feed if f"n{name}" in results})

    return call


def leaves(state: Any, shape: Any) -> list[Tensor]:
    """What its modules keep, in the order in which its export names it."""
    if isinstance(shape, int):
        return list(state) if shape else []
    return [leaf for part, inner in zip(state, shape, strict=True) for leaf in leaves(part, inner)]


def cache_bytes(theirs: Any) -> int:
    """Bytes of all that its modules keep of the past, once they are warm."""
    return sum(buffer.nbytes for name, buffer in theirs.named_buffers() if name.endswith("state_buffer"))


def several(call: Call) -> Call:
    return lambda: [call() for _ in range(PERIOD)]


def main() -> None:
    options = arguments("Against continual-inference.", variants=["strides", "no strides"])
    logging.disable(logging.WARNING)
    opened = []
    for variant in options.variants:
        network: Any = NETWORKS["r3d_18"].network()
        if variant == "no strides":
            for layer in network.modules():
                if isinstance(layer, nn.Conv3d):
                    layer.stride = (1, *layer.stride[1:])
        stream = dissect.convert(network, NETWORKS["r3d_18"].example(), "exact")
        with tempfile.TemporaryDirectory() as folder:
            path = stream.export(Path(folder) / "step.onnx", cadence="native")
            opened.append((variant, network, stream, dissect.Runner(path, providers="cpu", threads=options.threads)))
    rows = []
    for variant, network, stream, runner in opened:
        theirs = composed(network, 2 if variant == "strides" else 16)
        warm = stream.timing.warmup
        count = warm + 2 * PERIOD
        frames = torch.randn(1, 3, count, 112, 112, generator=torch.Generator().manual_seed(0))
        error = same(theirs, network, [runner.step(frames[:, :, time].numpy()) for time in range(count)], frames, warm)
        frame = frames[:, :, 0].contiguous()

        def eager(theirs: Any = theirs, frame: Tensor = frame) -> None:
            with torch.inference_mode():
                theirs.forward_step(frame)

        calls = {"ours": several(step_of(runner)), "theirs": several(eager)}
        kept = cache_bytes(theirs)
        exported = onnx_step(theirs, frame, options.threads, count)
        if not isinstance(exported, str):
            calls["their ONNX"] = several(exported)
        times = paired(calls, seconds=options.seconds, clock=options.clock)
        each = {name: number(found.median / PERIOD) for name, found in times.items()}
        rows.append(
            [
                variant,
                f"{error:.0e}",
                each["ours"],
                each["theirs"],
                ratio(times["theirs"], times["ours"]),
                each.get("their ONNX", str(exported)),
                ratio(times["their ONNX"], times["ours"]) if "their ONNX" in times else "-",
                f"{number(runner.cache_bytes / 1e6)} / {number(kept / 1e6)}",
                f"{kept / runner.cache_bytes:.2f}",
            ]
        )
        print(*rows[-1], sep="  ", flush=True)
    head = ["r3d_18 with", "largest difference", "dissect, ONNX Runtime, ms", "continual-inference, eager, ms", "times"]
    report(options, [*head, "its ONNX, ms", "times", "caches, MB, ours / theirs", "times"], rows)


if __name__ == "__main__":
    np.seterr(all="ignore")
    main()
