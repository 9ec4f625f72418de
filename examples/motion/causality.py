"""What a head remembers of a video: the paper's Figure 7, and the accuracy of heads on frozen frame vectors.

The taught step network gives a vector a frame; heads are trained on stored vectors, as the paper trains its recurrent
ones. Long videos have eighty frames, and the second half of an ordered class begins in the middle fifth: a head that
looks back over sixteen frames sees it pass, one that remembers knows it at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from scenes import LABELS, Videos
from torch import Tensor, nn
from torch.nn import functional as F
from training import CLIP, FRAMES, WINDOW, Scale, accuracy, conventional, descend

import dissect
from dissect import heads

FEATURES, HIDDEN, LONG, TENTHS = 64, 128, 80, 10
LOOKING_BACK = "fc", "lstm"  # the paper's Figure 7 has these two
ERASED = (0, 20, 40, 60, 70, 80, 90, 95)  # percent of the video, from its middle outwards
KINDS: dict[str, Callable[[], nn.Module]] = {
    "fc": lambda: heads.FC(FEATURES, len(LABELS), frames=WINDOW),
    "gru": lambda: heads.GRU(FEATURES, len(LABELS), layers=1, hidden=HIDDEN),
    "lstm": lambda: heads.LSTM(FEATURES, len(LABELS), layers=1, hidden=HIDDEN),
}


def backbone(weights: dict[str, Tensor]) -> dissect.Stream:
    """The stream of frame vectors that a taught network gives before its pool."""
    network = dissect.with_head(conventional().eval(), heads.Plain(FEATURES), at="avgpool")
    stream = dissect.convert(network, CLIP)
    own = stream.clip.state_dict()
    stream.clip.load_state_dict({name: weights[name] for name in own})
    return stream


@torch.no_grad()
def vectors(stream: dissect.Stream, videos: Tensor) -> Tensor:
    """Frame vectors (N, frames, FEATURES) of videos (N, 1, frames, ...)."""
    return torch.cat([stream.clip(part).transpose(1, 2) for part in videos.split(30)])


def seen(stream: dissect.Stream, videos: Videos) -> tuple[Tensor, Tensor]:
    """The vectors of all videos, a few at a time, and their labels."""
    parts, labels = [], []
    for first in range(0, len(videos), 60):
        pairs = [videos[index] for index in range(first, min(first + 60, len(videos)))]
        parts.append(vectors(stream, torch.stack([video for video, _ in pairs])))
        labels += [label for _, label in pairs]
    return torch.cat(parts), torch.tensor(labels)


def erased(videos: Tensor, percent: int, random: torch.Generator) -> Tensor:
    """The videos with their middle replaced by noise."""
    frames = videos.shape[2]
    count = round(frames * percent / 100)
    first = (frames - count) // 2
    found = videos.clone()
    found[:, :, first : first + count] = torch.randn(found[:, :, first : first + count].shape, generator=random)
    return found


def every(head: nn.Module, kind: str, sequence: Tensor) -> Tensor:
    """A head's answer at every frame of sequences (N, frames, FEATURES): (N, frames, classes)."""
    if kind == "fc":
        padded = F.pad(sequence, (0, 0, WINDOW - 1, 0)).unfold(1, WINDOW, 1).transpose(2, 3)
        return head(padded.flatten(0, 1)).unflatten(0, padded.shape[:2])
    return head.fc(head.rnn(sequence)[0])


def taught(kind: str, sequences: Tensor, labels: Tensor, noise: Tensor, scale: Scale, seed: int) -> nn.Module:
    """Train a head on stored vectors: `fc` on windows at random places, the others on the whole, as the paper does.

    ``noise`` are vectors of frames of noise: for recurrent heads a random part of each sequence is replaced by them.
    """
    torch.manual_seed(seed)
    head = KINDS[kind]()
    optimizer = torch.optim.AdamW(head.parameters(), 2e-3, weight_decay=0.01)
    steps = scale.head_epochs * max(1, len(sequences) // 100)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, max(steps, 2))
    for _ in range(steps):
        rows = torch.randint(len(sequences), (min(100, len(sequences)),))
        batch, wanted, frames = sequences[rows], labels[rows], sequences.shape[1]
        if kind == "fc":
            start = int(torch.randint(frames - WINDOW + 1, ()))
            scores = head(batch[:, start : start + WINDOW])
        else:
            share = float(torch.rand(())) if frames > FRAMES else 0.0  # short videos are judged whole
            count = int(share * frames)
            first = int(torch.randint(frames - count + 1, ()))
            picks = torch.randint(len(noise), (len(batch), count))
            batch = torch.cat([batch[:, :first], noise[picks], batch[:, first + count :]], 1)
            scores = head(batch + 0.07 * torch.randn_like(batch))  # the paper's variance of 0.005
        descend(optimizer, F.cross_entropy(scores, wanted))
        schedule.step()
    return head.eval()


def short_heads(weights: dict[str, Tensor], scale: Scale, seed: int) -> tuple[dict[str, Any], dict[str, nn.Module]]:
    """Heads on videos of FRAMES frames: accuracy of each, and the heads."""
    stream = backbone(weights)
    learn = seen(stream, Videos(scale.head_videos, FRAMES, seed=300 + seed))
    judge = seen(stream, Videos(scale.videos, FRAMES, validation=True, seed=seed))
    found, made = {}, {}
    for kind in KINDS:
        head = taught(kind, *learn, learn[0].flatten(0, 1), scale, seed)
        with torch.no_grad():
            scores = every(head, kind, judge[0])[:, WINDOW - 1 :].softmax(2)
        scores = scores.mean(1) if kind == "fc" else scores[:, -1]
        found[kind], made[kind] = accuracy(scores, judge[1]), head
    return found, made


def analysed(weights: dict[str, Tensor], scale: Scale, seed: int) -> dict[str, Any]:
    """Figure 7: accuracy by tenths of long videos, and with their middle erased."""
    stream = backbone(weights)
    learn = seen(stream, Videos(scale.long_videos, LONG, seed=400 + seed))
    random = torch.Generator().manual_seed(seed)
    noise = vectors(stream, torch.randn(4, 1, 60, *CLIP.shape[3:], generator=random))[:, WINDOW:].flatten(0, 1)
    videos, labels = Videos(scale.videos // 3, LONG, validation=True, seed=seed).stacked()
    # What a stream makes of the frames around the noise depends on the noise: so it sees the erased video itself.
    sequences = {percent: vectors(stream, erased(videos, percent, random)) for percent in ERASED}
    found: dict[str, Any] = {"erased": list(ERASED)}
    for kind in LOOKING_BACK:
        head = taught(kind, *learn, noise, scale, seed)
        with torch.no_grad():
            whole = every(head, kind, sequences[0]).softmax(2)
            tenths = [accuracy(part.mean(1), labels)["all"] for part in whole.split(LONG // TENTHS, 1)]
            ends = []
            for percent in ERASED:
                scores = every(head, kind, sequences[percent]).softmax(2)
                ends.append(accuracy(scores[:, WINDOW - 1 :].mean(1) if kind == "fc" else scores[:, -1], labels)["all"])
        found[kind] = {"tenths": tenths, "erased": ends}
    return found
