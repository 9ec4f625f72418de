"""What ``dissect distil`` does between a network and its step model: videos into clips, and the clips' lessons."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dissect.cutting import VideoClips, video_clips, video_files
from dissect.distilling import agreement, distil
from dissect.errors import ClipError, PlanError
from dissect.preprocess import Preprocess
from dissect.recalibrating import batch_norms, recalibrate
from dissect.reconstructing import reconstruct

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

    from dissect.stream import Stream

__all__ = ["Lessons", "Some", "read", "teach"]

_EIGHTH = 8  # one clip of so many is kept out


class Some:
    """Some of the clips that were cut, which know the names of their videos."""

    def __init__(self, clips: VideoClips, chosen: Sequence[int]) -> None:
        """Choose by number."""
        self._clips, self._chosen = clips, chosen

    def __len__(self) -> int:
        """How many."""
        return len(self._chosen)

    def __getitem__(self, index: int) -> Tensor:
        """One of them."""
        return self._clips[self._chosen[index]]

    def name(self, index: int) -> str:
        """Its video and frames."""
        return self._clips.name(self._chosen[index])


@dataclass(frozen=True)
class Cut:
    """Clips to learn from, clips that were kept out (the same, where there are too few), and what to say of them."""

    learn: Some
    judge: Some
    count: int
    told: str


@dataclass(frozen=True)
class Lessons:
    """How often the best class was the network's own, before and after (None: it gives no scores)."""

    before: float | None
    after: float | None

    def in_words(self) -> list[tuple[str, str]]:
        """For people."""
        if self.before is None or self.after is None:
            return [("agreement", "not measured: the outputs are no scores of classes")]
        return [("agreement", f"{self.before:.1%} of the windows as cut, {self.after:.1%} now")]

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        return {"agreement_before": self.before, "agreement_after": self.after}


def read(
    stream: Stream, videos: Sequence[str], given: Mapping[str, Any], progress: Callable[[str], None] | None = None
) -> Cut:
    """Cut clips for a stream from video files and folders, and keep some out."""
    if stream.options.preset == "exact":
        raise PlanError("the preset exact gives the network's own numbers: there is nothing to learn; use convert")
    if stream.preprocess is None or not stream.dissected.inputs.plain:
        raise PlanError(
            "this network does not take one picture of one or three channels a frame: make clips of its inputs yourself "
            "and call dissect.distil in Python"
        )
    window = int(stream.dissected.inputs.frames)
    frames = given["frames"] or 2 * window
    if frames < window:
        raise PlanError(f"--frames {frames} is shorter than the {window} frames that the network looks at.")
    files = video_files(videos)
    preprocess = Preprocess.from_json(stream.preprocess)
    cut = video_clips(
        files,
        frames,
        preprocess,
        most=given["most"],
        time_dim=given["time_dim"],
        seed=given["seed"],
        progress=progress,
    )
    held = list(range(0, len(cut), _EIGHTH)) if len(cut) > 1 else []
    learn = [index for index in range(len(cut)) if index not in held]
    told = f"{len(cut)} of {frames} frames from {len(files)} video{'s' * (len(files) > 1)}"
    told += f", {len(held)} of them kept out" if held else "; too few to keep one out"
    return Cut(Some(cut, learn), Some(cut, held or learn), len(cut), told)


def teach(stream: Stream, model: nn.Module | ExportedProgram, clips: Cut, given: Mapping[str, Any]) -> Lessons:
    """Statistics, least squares if asked for, and distillation; and how often the two agree, before and after."""

    def agreed() -> float | None:
        try:
            return agreement(stream, model, clips.judge, batch=given["batch"], windows=given["windows"], device=device)
        except ClipError:
            return None

    device = given["device"]
    before = agreed()
    if given["reconstruct"]:
        reconstruct(stream, model, clips.learn, device=device)
    elif batch_norms(stream.clip):
        recalibrate(stream, clips.learn, batch=given["batch"], device=device)
    if given["steps"]:
        distil(
            stream,
            model,
            clips.learn,
            steps=given["steps"],
            batch=given["batch"],
            lr=given["lr"],
            windows=given["windows"],
            seed=given["seed"],
            device=device,
            checkpoint=given["checkpoint"],
        )
    return Lessons(before, agreed())
