"""Clips out of video files: :func:`video_clips`.

Laws: memory grows with the number of clips that are kept, not with the length of the videos, and the same files, settings
and seed give the same clips. Which of them are kept is drawn evenly over all videos, while they are read, once.
"""

from __future__ import annotations

import os
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from dissect.errors import ClipError, VideoError
from dissect.preprocess import Preprocess
from dissect.video import frames as pictures_of

__all__ = ["VideoClips", "video_clips", "video_files"]

_SUFFIXES = ".avi .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .webm .wmv".split()


class VideoClips(Dataset[Tensor]):
    """Clips that were cut from videos, preprocessed; :meth:`name` says where each comes from.

    An item is a clip (C, frames, H, W), float32, with time at ``time_dim - 1``.
    """

    def __init__(
        self, cut: Sequence[tuple[str, int, NDArray[np.uint8]]], preprocess: Preprocess, time_dim: int
    ) -> None:
        self._cut, self._time_dim = cut, time_dim
        low, high = preprocess.range
        mean, std = (np.asarray(part, np.float64) for part in (preprocess.mean, preprocess.std))
        shape = (1, -1, 1, 1) if preprocess.layout == "nchw" else (1, 1, 1, -1)
        self._scale = torch.tensor((high - low) / 255.0 / std, dtype=torch.float32).reshape(shape)
        self._shift = torch.tensor((low - mean) / std, dtype=torch.float32).reshape(shape)

    def __len__(self) -> int:
        return len(self._cut)

    def __getitem__(self, index: int) -> Tensor:
        frames = torch.from_numpy(self._cut[index][2]).float() * self._scale + self._shift
        return frames.movedim(0, self._time_dim - 1).contiguous()

    def name(self, index: int) -> str:
        """``street.mp4, frames 32 to 47``."""
        file, first, images = self._cut[index]
        return f"{file}, frames {first} to {first + len(images) - 1}"


def video_files(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Video files, in order; a folder stands for the videos that lie in it, by name.

    Raises :class:`~dissect.VideoError` for a path that is not there, and for a folder without a video.
    """
    found: list[Path] = []
    for given in map(Path, paths):
        if not given.exists():
            raise VideoError(f"{given} does not exist.")
        if not given.is_dir():
            found.append(given)
            continue
        inside = sorted(file for file in given.iterdir() if file.suffix.lower() in _SUFFIXES and file.is_file())
        if not inside:
            raise VideoError(
                f"{given} is a folder without a video; put some in, or name the files ({', '.join(_SUFFIXES)})."
            )
        found += inside
    if not found:
        raise VideoError("There are no videos; name files or folders.")
    return found


def video_clips(
    paths: Iterable[str | os.PathLike[str]],
    frames: int,
    preprocess: Preprocess,
    *,
    most: int = 256,
    step: int | None = None,
    time_dim: int = 2,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> VideoClips:
    """Cut clips of ``frames`` frames from videos and folders of videos, one beginning every ``step`` frames (``frames``).

    ``preprocess`` makes a network's frames of the pictures, as ``dissect run`` does (rounded to whole levels of 255 in
    between, which is what is kept). Of all clips, ``most`` are kept. ``progress`` is told the name of each file.

    Raises :class:`~dissect.VideoError` for what cannot be read, :class:`~dissect.ClipError` for a video that is too short.
    """
    channels = len(preprocess.mean)
    plain = replace(preprocess, mean=(0.0,) * channels, std=(1.0,) * channels, range=(0.0, 255.0))
    draw = random.Random(seed)
    kept: list[tuple[str, int, NDArray[np.uint8]]] = []
    count = 0
    every = frames if step is None else step
    for file in video_files(paths):
        if progress is not None:
            progress(file.name)
        recent: deque[NDArray[Any]] = deque(maxlen=frames)
        seen = 0
        for picture in pictures_of(file):
            if picture.index % preprocess.frame_stride:
                continue
            recent.append(np.clip(np.rint(plain(picture.image)), 0, 255).astype(np.uint8))
            seen += 1
            if seen < frames or (seen - frames) % every:
                continue
            # Reservoir sampling: after n clips, each of them has been kept with probability most / n.
            place = count if count < most else draw.randrange(count + 1)
            count += 1
            if place < most:
                clip = (str(file), seen - frames, np.stack(recent))
                kept[place : place + 1] = [clip]
        if seen < frames:
            raise ClipError(
                f"{file} has {seen} frame{'s' * (seen != 1)}"
                + (f", of which every {preprocess.frame_stride}. counts" if preprocess.frame_stride > 1 else "")
                + f", and clips of {frames} are wanted: leave it out, or ask for shorter clips"
            )
    return VideoClips(kept, preprocess, time_dim)
