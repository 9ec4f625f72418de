"""(c) How near a step comes to what the machine allows: its multiply-adds at the rate of a large matrix product.

The rate is measured in the same run, in ONNX Runtime and in PyTorch, with the same threads. Small layers, caches,
activations and everything but convolutions and matrix products count as loss.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from measuring import Call, arguments, files, number, paired, report
from networks import NETWORKS, count_of, step_file
from onnx import TensorProto, helper

import dissect
from dissect.benchmarking import step_of
from dissect.sessions import open_session

SIDE = 1024


def product_ort(threads: int) -> Call:
    """A square matrix product in ONNX Runtime, its right-hand side a weight as a layer's is."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((SIDE, SIDE), dtype=np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [SIDE, SIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [SIDE, SIDE])],
        [helper.make_tensor("w", TensorProto.FLOAT, [SIDE, SIDE], weight.tobytes(), raw=True)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    session = open_session(model.SerializeToString(), "cpu", threads)
    feed = {"x": random.standard_normal((SIDE, SIDE), dtype=np.float32)}
    return lambda: session.run(None, feed)


def product_torch() -> Call:
    """The same in PyTorch."""
    left, right = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)

    def call() -> Any:
        with torch.inference_mode():
            return left @ right

    return call


def main() -> None:
    options = arguments(
        "A step against the rate of a matrix product.", networks=list(NETWORKS), presets=["d3d", "exact"]
    )
    rows = []
    for name, preset in [(name, preset) for name in options.networks for preset in options.presets]:
        with files(options) as folder:
            path = step_file(name, preset, "every", folder)
            count, runner = count_of(path), dissect.Runner(path, providers="cpu", threads=options.threads)
        times = paired(
            {"step": step_of(runner), "ORT": product_ort(options.threads), "PyTorch": product_torch()},
            seconds=options.seconds,
            clock=options.clock,
        )
        limit = np.asarray(times["ORT"].samples) * count / SIDE**3
        shares = np.divide(times["step"].samples, limit)
        low, high = np.percentile(shares, [25, 75])
        rates = [number(2 * SIDE**3 / times[runtime].median / 1e6) for runtime in ("ORT", "PyTorch")]
        rows.append(
            [
                name,
                preset,
                number(count / 1e6),
                " / ".join(rates),
                number(float(np.median(limit))),
                str(times["step"]),
                f"{np.median(shares):.2f} ({low:.2f} to {high:.2f})",
            ]
        )
        print(*rows[-1], sep="  ", flush=True)
    head = ["network", "preset", "multiply-adds, M", "product, GFLOP/s, ORT / PyTorch", "limit, ms", "step, ms"]
    report(options, [*head, "step over limit"], rows)


if __name__ == "__main__":
    main()
