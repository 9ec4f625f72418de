"""Clips out of videos: every frame at its place, evenly drawn, and each fault named with its file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from films import film

from dissect.cutting import VideoClips, video_clips, video_files
from dissect.errors import ClipError, VideoError
from dissect.preprocess import Preprocess
from dissect.video import frames

GRAY = Preprocess((12, 16), (0.4,), (0.2,), color="gray")
COLOUR = Preprocess((12, 16), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


@pytest.mark.parametrize("preprocess", [GRAY, COLOUR], ids=["gray", "colour"])
@pytest.mark.parametrize("time_dim", [1, 2])
def test_a_clip_holds_the_frames_that_run_would_show(tmp_path: Path, preprocess: Preprocess, time_dim: int) -> None:
    file = film(tmp_path / "a.mp4", 23)
    cut = video_clips([file], 6, preprocess, time_dim=time_dim)
    assert [cut.name(index) for index in range(len(cut))] == [
        f"{file}, frames {first} to {first + 5}" for first in (0, 6, 12)
    ]
    pictures = [preprocess(picture.image) for picture in frames(file)]
    for index in range(3):
        wanted = torch.from_numpy(np.stack(pictures[6 * index : 6 * index + 6], time_dim - 1))
        assert cut[index].shape == wanted.shape
        # Levels are rounded to whole ones: half of one, in units of the deviation.
        assert float((cut[index] - wanted).abs().max()) <= 0.5 / 255 / 0.2 + 1e-5


def test_steps_and_strides(tmp_path: Path) -> None:
    file = film(tmp_path / "a.mp4", 23)
    assert len(video_clips([file], 6, GRAY, step=2)) == 9
    strided = Preprocess((12, 16), (0.4,), (0.2,), color="gray", frame_stride=3)
    cut = video_clips([file], 6, strided)
    assert len(cut) == 1
    pictures = [GRAY(picture.image) for picture in frames(file)][::3][:6]
    assert float((cut[0] - torch.from_numpy(np.stack(pictures, 1))).abs().max()) < 0.02


@pytest.mark.slow
def test_clips_are_drawn_evenly_and_by_the_seed(tmp_path: Path) -> None:
    files = [film(tmp_path / f"{name}.mp4", 30, (24, 32)) for name in "ab"]

    def drawn(seed: int) -> list[str]:
        cut = video_clips(files, 3, GRAY, most=5, seed=seed)
        return [cut.name(index) for index in range(len(cut))]

    assert drawn(0) == drawn(0)
    assert len(drawn(0)) == len(set(drawn(0))) == 5
    counts: dict[str, int] = {}
    for seed in range(40):
        for name in drawn(seed):
            counts[name] = counts.get(name, 0) + 1
    assert len(counts) == 20, "every clip is kept by some seed"
    assert max(counts.values()) < 25  # each is expected 10 times


def test_folders_stand_for_their_videos(tmp_path: Path) -> None:
    for name in ("b.mp4", "a.MOV", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "more").mkdir()
    assert [file.name for file in video_files([tmp_path, tmp_path / "b.mp4"])] == ["a.MOV", "b.mp4", "b.mp4"]


def test_what_cannot_be_cut_is_named(tmp_path: Path) -> None:
    short = film(tmp_path / "short.mp4", 5)
    with pytest.raises(ClipError, match=r"short.mp4 has 5 frames, and clips of 6 are wanted: leave it out, or ask"):
        video_clips([short], 6, GRAY)
    with pytest.raises(ClipError, match=r"has 2 frames, of which every 3. counts"):
        video_clips([short], 6, Preprocess((12, 16), (0.4,), (0.2,), color="gray", frame_stride=3))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(VideoError, match="empty is a folder without a video; put some in, or name the files"):
        video_clips([empty], 6, GRAY)
    with pytest.raises(VideoError, match="away does not exist"):
        video_clips([tmp_path / "away"], 6, GRAY)
    with pytest.raises(VideoError, match="There are no videos"):
        video_clips([], 6, GRAY)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(short.read_bytes()[:400])
    with pytest.raises(VideoError, match=r"broken.mp4"):
        video_clips([broken], 6, GRAY)


def test_memory_holds_what_is_kept_and_no_more(tmp_path: Path) -> None:
    cut: VideoClips = video_clips([film(tmp_path / "a.mp4", 60)], 6, GRAY, most=2)
    assert [images.dtype for _, _, images in cut._cut] == [np.uint8] * 2
