"""What the teacher says is what the original says, window by window; what is said is what the step form says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import CLIP, FRAMES, clips, cut, tiny
from torch import Tensor, nn

import dissect
from dissect.clips import Batch, Clips
from dissect.teaching import Teacher, said

CLIPS = clips(2, 9)


def batch(videos: Tensor = CLIPS) -> Batch:
    return Batch((videos,), None, videos.shape[2])


def test_lessons_are_the_originals_answers_to_every_window() -> None:
    model = tiny()
    (lesson,) = Teacher(cut(model), model, None).lessons(batch())
    assert lesson.frames == (5, 6, 7, 8)
    assert lesson.scores
    for frame, answer in zip(lesson.frames, lesson.answers, strict=True):
        with torch.no_grad():
            wanted = model(CLIPS[:, :, frame - FRAMES + 1 : frame + 1])
        torch.testing.assert_close(answer, wanted, rtol=0, atol=1e-12)


def test_fewer_windows_are_drawn_by_torchs_random_numbers() -> None:
    model = tiny()
    teacher = Teacher(cut(model), model, None)
    drawn = []
    for seed in (0, 0, 1, 2, 3):
        torch.manual_seed(seed)
        (lesson,) = teacher.lessons(batch(), 2)
        drawn.append(lesson.frames)
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1
    assert all(len(frames) == 2 and frames[0] < frames[1] for frames in drawn)


@pytest.mark.parametrize("preset", ["d3d", "causal"])
def test_what_is_said_is_what_the_step_form_says(preset: str) -> None:
    stream = cut(tiny(), preset=preset)
    rows = said(stream, stream.clip(CLIPS), 0, range(9))
    caches: Any = stream.caches(2)
    for frame in range(9):
        out, *caches = stream.step(CLIPS[:, :, frame], *caches)
        torch.testing.assert_close(rows[frame], out, rtol=0, atol=1e-10)


def test_an_exported_program_is_asked_in_batches_of_its_own() -> None:
    model = tiny()
    program = torch.export.export(model, (CLIPS[:1, :, :FRAMES],))
    stream = dissect.convert(program, CLIPS[:1, :, :FRAMES])
    (lesson,) = Teacher(stream, program, None).lessons(batch())
    (wanted,) = Teacher(cut(model), model, None).lessons(batch())
    torch.testing.assert_close(lesson.answers, wanted.answers, rtol=0, atol=1e-10)


class Dense(nn.Module):
    """A map for every second frame, and scores for the clip, in a dict; and it has modes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 2, 3, stride=(2, 1, 1), padding=1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.dropout(self.conv(x))
        return {"map": x, "scores": x.mean((2, 3, 4))}


def test_outputs_with_time_are_compared_at_the_frames_of_their_positions() -> None:
    torch.manual_seed(0)
    model = Dense().train()
    stream = dissect.convert(model, CLIP.float())
    videos = CLIPS.float()
    lessons = {lesson.output: lesson for lesson in Teacher(stream, model, None).lessons(batch(videos))}
    assert model.training
    assert model.dropout.training
    wanted = model.eval()(videos)["map"].detach()
    assert lessons[0].frames == (0, 2, 4, 6, 8)
    assert not lessons[0].scores
    torch.testing.assert_close(lessons[0].answers, wanted.movedim(2, 0), rtol=0, atol=1e-6)
    assert lessons[1].frames == (5, 6, 7, 8)
    out = stream.clip(videos)
    assert said(stream, out, 0, lessons[0].frames).shape == lessons[0].answers.shape
    assert said(stream, out, 1, lessons[1].frames).shape == lessons[1].answers.shape


class Merged(nn.Module):
    """Frames beside the batch, as 2D trunks take them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3)).reshape(-1, FRAMES, 3).mean(1)


def test_inputs_that_merge_batch_and_time() -> None:
    torch.manual_seed(0)
    model = Merged().eval()
    example = torch.zeros(FRAMES, 1, 8, 8)
    stream = dissect.convert(model, example, layout="(b t=6) c h w")
    videos = [clip[0, :, None].float() for clip in CLIPS[:, :, :FRAMES]]
    taken: Iterator[Batch] = Clips(stream, videos).epoch()
    (lesson,) = Teacher(stream, model, None).lessons(next(taken))
    torch.testing.assert_close(lesson.answers[0], model(videos[0]).detach())
