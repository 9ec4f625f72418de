"""What becomes of a clip network when it is dissected: an experiment on videos of digits that move.

    python examples/motion/experiment.py                          everything, three seeds: hours on one core
    python examples/motion/experiment.py --only distilled costs   some stages (and what they need)
    python examples/motion/experiment.py --quick                  the whole way with toy settings, for a test: a minute

Every stage writes its result to a file of the folder --results and is not run again while that is there, so that the
experiment may be stopped and gone on with at any time. At the end, tables are printed and plots are drawn from what is
there. Needs `pip install -e '.[motion]'`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import causality
import costs
import dynamics
import figures
import torch
from scenes import Videos
from torch import nn
from training import CLIP, QUICK, Scale, accuracy, conventional, stream_loss, streamed, trained, window_loss, windowed

import dissect


class Lab:
    """One seed's networks and results, in a folder."""

    def __init__(self, folder: Path, seed: int, scale: Scale) -> None:
        self.folder, self.seed, self.scale = folder, seed, scale
        folder.mkdir(parents=True, exist_ok=True)
        self._judged: Any = None

    def model(self) -> nn.Module:
        """The conventional network, trained."""
        model = conventional()
        model.load_state_dict(torch.load(self.file("conventional", "pt"), weights_only=True))
        return model.eval()

    def cut(self, model: nn.Module, **options: Any) -> dissect.Stream:
        """The network, dissected."""
        return dissect.convert(model, CLIP, **options)

    def learnt(self, name: str, **options: Any) -> dissect.Stream:
        """A dissected network with the weights of a stage."""
        stream = self.cut(self.model(), **options)
        stream.clip.load_state_dict(torch.load(self.file(name, "pt"), weights_only=True))
        return stream

    def file(self, name: str, suffix: str) -> Path:
        """Where a stage's result lies."""
        return self.folder / f"{name}-{self.seed}.{suffix}"

    def keep(self, name: str, network: nn.Module) -> None:
        """Keep weights, in one move."""
        beside = self.file(name, "pt.part")
        torch.save(network.state_dict(), beside)
        os.replace(beside, self.file(name, "pt"))

    def judged(self) -> Any:
        """The validation videos and their labels."""
        if self._judged is None:
            self._judged = Videos(self.scale.videos, 20, validation=True, seed=self.seed).stacked()
        return self._judged

    def unlabelled(self) -> Videos:
        """Clips for recalibrate and reconstruct."""
        return Videos(self.scale.clips, self.scale.clip_frames, seed=100 + self.seed)

    def scored(self, stream: dissect.Stream) -> dict[str, float]:
        """A stream's accuracy on the validation videos."""
        videos, labels = self.judged()
        return accuracy(streamed(stream, videos), labels)


def train_conventional(lab: Lab) -> dict[str, float]:
    """The clip network, from labels, by sliding window."""
    model = conventional(lab.seed)
    trained(model, window_loss(model), lab.scale.steps, lab.scale.batch, lab.seed)
    lab.keep("conventional", model)
    videos, labels = lab.judged()
    return accuracy(windowed(model, videos), labels)


def folded(lab: Lab, **options: Any) -> dict[str, float]:
    """As cut: the dropped taps folded, and nothing learnt."""
    return lab.scored(lab.cut(lab.model(), **options))


def recalibrated(lab: Lab, **options: Any) -> dict[str, float]:
    """With the statistics of unlabelled clips."""
    stream = dissect.recalibrate(lab.cut(lab.model(), **options), lab.unlabelled(), progress=False)
    return lab.scored(stream)


def reconstructed(lab: Lab, **options: Any) -> dict[str, float]:
    """With weights by least squares from unlabelled clips."""
    model = lab.model()
    stream = dissect.reconstruct(lab.cut(model, **options), model, lab.unlabelled(), progress=False)
    if not options:
        lab.keep("reconstructed", stream.clip)
    return lab.scored(stream)


def distilled(name: str, **options: Any) -> Callable[[Lab], dict[str, float]]:
    """A stage: reconstructed, and then taught by the clip network on unlabelled clips."""

    def stage(lab: Lab) -> dict[str, float]:
        model, scale = lab.model(), lab.scale
        if options:
            stream = dissect.reconstruct(lab.cut(model, **options), model, lab.unlabelled(), progress=False)
        else:
            done(lab, "reconstructed")
            stream = lab.learnt("reconstructed")
        clips = Videos(scale.distil_steps * scale.distil_batch, scale.distil_frames, seed=200 + lab.seed)
        dissect.distil(
            stream,
            model,
            clips,
            steps=scale.distil_steps,
            batch=scale.distil_batch,
            lr=3e-3,
            windows=scale.distil_windows,
            seed=lab.seed,
            checkpoint=lab.file(name, "checkpoint"),
            progress=False,
        )
        lab.keep(name, stream.clip)
        lab.file(name, "checkpoint").unlink()
        return lab.scored(stream)

    return stage


def scratch(lab: Lab) -> dict[str, float]:
    """The dissected network trained from random weights, from labels: half as many videos, each of which answers five times."""
    stream = lab.cut(conventional(lab.seed + 50).eval())
    trained(stream.clip, stream_loss(stream.clip), lab.scale.steps, lab.scale.batch // 2, lab.seed)
    lab.keep("scratch", stream.clip)
    return lab.scored(stream)


def fine_tuned(lab: Lab) -> dict[str, float]:
    """From the recalibrated cut, with labels, by the paper's recipe; the videos are new ones in every epoch."""
    stream = dissect.recalibrate(lab.cut(lab.model()), lab.unlabelled(), progress=False)
    scale = lab.scale
    videos = Videos(scale.tune_videos, 20, seed=500 + lab.seed, fresh=True)
    dissect.fine_tune(
        stream,
        videos,
        epochs=scale.tune_epochs,
        batch=min(16, scale.tune_videos),
        lr=0.05,
        patience=1,
        seed=lab.seed,
        checkpoint=lab.file("fine-tuned", "checkpoint"),
        progress=False,
    )
    lab.file("fine-tuned", "checkpoint").unlink()
    lab.keep("fine-tuned", stream.clip)
    return lab.scored(stream)


def exact(lab: Lab) -> dict[str, float]:
    """The exact stream is the clip network: it has its accuracy, if its scores are the same."""
    videos, _ = lab.judged()
    error = costs.exact_error(lab.model(), videos[:8, :, :16])
    if error > 1e-4:
        raise AssertionError(f"the exact stream differs from the clip network by {error:.1e}")
    return {**done(lab, "conventional"), "error": error}


def with_heads(lab: Lab) -> dict[str, Any]:
    """Heads on the taught network's frame vectors, which are frozen."""
    weights = torch.load(lab.file("distilled", "pt"), weights_only=True)
    found, made = causality.short_heads(weights, lab.scale, lab.seed)
    for kind, head in made.items():
        lab.keep(f"head-{kind}", head)
    return found


def with_long_videos(lab: Lab) -> dict[str, Any]:
    """Figure 7."""
    return causality.analysed(torch.load(lab.file("distilled", "pt"), weights_only=True), lab.scale, lab.seed)


STAGES: dict[str, Callable[[Lab], Any]] = {
    "conventional": train_conventional,
    "folded": folded,
    "recalibrated": recalibrated,
    "reconstructed": reconstructed,
    "distilled": distilled("distilled"),
    "distilled-none": distilled("distilled-none", skip="none"),
    "distilled-sum": distilled("distilled-sum", skip="sum"),
    "scratch": scratch,
    "causal": lambda lab: folded(lab, preset="causal"),
    "causal-recalibrated": lambda lab: recalibrated(lab, preset="causal"),
    "causal-reconstructed": lambda lab: reconstructed(lab, preset="causal"),
    "causal-distilled": distilled("causal-distilled", preset="causal"),
    "fine-tuned": fine_tuned,
    "exact": exact,
    "heads": with_heads,
    "causality": with_long_videos,
    "dynamics": lambda lab: dynamics.measured(
        lab.model(), lambda **options: lab.learnt("distilled", **options), lab.scale, lab.seed
    ),
    "cuts": lambda lab: dynamics.cuts(lab.learnt("distilled"), *lab.judged()),
    "costs": lambda lab: costs.measured(few=lab.scale is QUICK),
}


def main() -> None:
    """Run what is asked for and is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("motion-results"), help="where results are kept")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), help="stages to run")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="toy settings, one seed, in a folder of its own")
    given = parser.parse_args()
    folder = given.results / "quick" if given.quick else given.results
    for seed in [0] if given.quick else given.seeds:
        lab = Lab(folder, seed, QUICK if given.quick else Scale())
        for name in given.only:
            if name != "costs" or seed == 0:  # they are the same for all seeds
                done(lab, name)
    for title, table in figures.TABLES.items():
        print(f"\n{title}\n\n{table(folder)}")
    for plot in figures.drawn(folder):
        print(f"\ndrawn: {plot}")


def done(lab: Lab, name: str) -> Any:
    """The result of a stage, run now if it is not there."""
    file = lab.file(name, "json")
    if not file.exists():
        began, used = time.monotonic(), time.process_time()
        result = STAGES[name](lab)
        result = {"result": result, "seconds": time.monotonic() - began, "of_cpu": time.process_time() - used}
        file.with_suffix(".part").write_text(json.dumps(result, indent=1))
        os.replace(file.with_suffix(".part"), file)
        print(f"seed {lab.seed}, {name}: {json.dumps(result['result'])[:160]} ({result['seconds']:.0f} s)", flush=True)
    return json.loads(file.read_text())["result"]


if __name__ == "__main__":
    main()
