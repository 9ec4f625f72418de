"""(e, f) Memory of a stream and of its conversion: bytes of the caches, and the most that a process ever held.

Every figure of a process is that of one made for it alone, which imports nothing but what it needs: a runner has no torch.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import arguments, number, report
from networks import NETWORKS

HERE = Path(__file__).parent

CONVERT = """
import sys, time; sys.path.insert(0, {here!r})
from networks import NETWORKS
import dissect, torch, onnx_ir, onnxscript
from measuring import peak
torch.set_num_threads({threads})
subject = NETWORKS[{name!r}]; network, example = subject.network(), subject.example()
before, began = peak(), time.perf_counter()
stream = dissect.convert(network, example, {preset!r}); captured = time.perf_counter()
stream.export({path!r}, cadence={cadence!r}); done = time.perf_counter()
print(before, peak(), captured - began, done - captured, stream.timing.delay)
"""
STEP = """
import sys; sys.path.insert(0, {here!r})
import numpy as np, dissect
from measuring import peak
run = dissect.Runner({path!r}, providers="cpu", threads={threads})
frames = [np.ones((1, *spec.shape[1:]), spec.dtype) for spec in run.inputs]
for _ in range(2 * run.period + 2): run.step(*frames)
assert "torch" not in sys.modules
print(peak(), run.cache_bytes)
"""
WINDOW = """
import sys; sys.path.insert(0, {here!r})
import numpy as np, onnxruntime
from measuring import peak
from dissect.sessions import open_session
session = open_session({path!r}, "cpu", {threads})
feed = {{entry.name: np.ones(entry.shape, np.float32) for entry in session.get_inputs()}}
for _ in range(2): session.run(None, feed)
assert "torch" not in sys.modules
print(peak())
"""
EXPORT = """
import sys; sys.path.insert(0, {here!r})
import torch, logging, warnings; warnings.simplefilter("ignore"); logging.disable(logging.CRITICAL)
from networks import NETWORKS
subject = NETWORKS[{name!r}]
torch.onnx.export(subject.network(), subject.example(), {path!r}, dynamo=True, verbose=False)
"""


def run(code: str, **values: object) -> list[float]:
    script = code.format(here=str(HERE), **values)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return [float(part) for part in done.stdout.split("\n")[-2].split()] if done.stdout.strip() else []


def main() -> None:
    options = arguments(
        "Memory of streams and conversions.", networks=list(NETWORKS), presets=["d3d", "exact", "native"]
    )
    rows = []
    for name in options.networks:
        with tempfile.TemporaryDirectory() as folder:
            clip = str(Path(folder) / "clip.onnx")
            try:
                run(EXPORT, name=name, path=clip)
                window = number(run(WINDOW, path=clip, threads=options.threads)[0])
            except RuntimeError as error:
                window = f"none: {str(error)[:60]}"
            for kind in options.presets:
                preset, cadence = ("exact", "native") if kind == "native" else (kind, "every")
                path = Path(folder) / f"{kind}.onnx"
                began = time.perf_counter()
                before, most, convert, export, delay = run(
                    CONVERT, name=name, preset=preset, cadence=cadence, path=str(path), threads=options.threads
                )
                spent = time.perf_counter() - began
                step, caches = run(STEP, path=str(path), threads=options.threads)
                rows.append(
                    [
                        name,
                        kind,
                        f"{delay:.0f}",
                        f"{caches / 1e6:.2f}",
                        number(path.stat().st_size / 1e6),
                        number(step),
                        window,
                        f"{convert:.0f} + {export:.0f}",
                        number(most - before),
                    ]
                )
                print(*rows[-1], f"{spent:.0f} s", sep="  ", flush=True)
    head = ["network", "preset", "delay", "caches, MB", "file, MB", "runner's memory, MB", "window's memory, MB"]
    report(options, [*head, "dissecting + writing, s", "memory more than before, MB"], rows)


if __name__ == "__main__":
    main()
