"""A network and clips small enough to train on in a second, for the tests of everything that learns."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dissect

FRAMES = 6
CLIP = torch.zeros(1, 1, FRAMES, 8, 8)


class Tiny(nn.Module):
    """A stem, a residual branch, a temporal stride, and a global pool: 3 classes from clips (N, 1, T, 8, 8)."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(1, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm3d(4)
        self.conv2 = nn.Conv3d(4, 4, 3, padding=1)
        self.conv3 = nn.Conv3d(4, 4, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm3d(4)
        self.conv4 = nn.Conv3d(4, 8, 3, stride=2, padding=1, groups=2)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = x + self.bn3(self.conv3(self.conv2(x).relu())).relu()
        x = self.conv4(x).relu()
        scores: Tensor = self.fc(self.dropout(x.mean((2, 3, 4))))
        return scores


def tiny(seed: int = 0, dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> Tiny:
    """The network, its batch norms with statistics and factors in which no error can hide."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Tiny(dropout)
        for norm in (model.bn1, model.bn3):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.3)
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.5, 1.5)
    return model.to(dtype).eval()


def cut(model: nn.Module, **options: object) -> dissect.Stream:
    """The network, dissected, in its own precision."""
    return dissect.convert(model, CLIP.to(next(model.parameters()).dtype), **options)  # type: ignore[arg-type]


def clips(count: int, frames: int = FRAMES, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """Scenes that move smoothly: (count, 1, frames, 8, 8)."""
    random = torch.Generator().manual_seed(seed)
    place, speed = torch.rand(2, count, 1, 1, 1, 1, generator=random) * 6.0
    times = torch.arange(frames).reshape(1, 1, -1, 1, 1)
    grid = torch.arange(8).reshape(1, 1, 1, 1, -1) + 0.3 * torch.arange(8).reshape(1, 1, 1, -1, 1)
    noise = 0.2 * torch.randn(count, 1, frames, 8, 8, generator=random)
    return (torch.sin(grid + place + 0.3 * speed * times) + noise).to(dtype)


def labelled(
    count: int, frames: int = FRAMES, seed: int = 1, dtype: torch.dtype = torch.float64
) -> list[tuple[Tensor, int]]:
    """Clips with labels."""
    return [(clip, index % 3) for index, clip in enumerate(clips(count, frames, seed, dtype))]


def weights(stream: dissect.Stream) -> dict[str, Tensor]:
    """A copy of all that a stream has learnt."""
    return {name: tensor.clone() for name, tensor in stream.clip.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Equal to the last bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class Breaking:
    """Clips that break off: number ``at``, counted over all epochs, raises KeyboardInterrupt."""

    def __init__(self, items: object, at: int) -> None:
        self.items, self.at, self.asked = list(items), at, 0  # type: ignore[call-overload]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> object:
        self.asked += 1
        if self.asked == self.at:
            raise KeyboardInterrupt
        return self.items[index]
