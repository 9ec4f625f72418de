"""Several inputs, several rates, several results: SlowFast, two-stream fusion, gesture, sound, forgery, pyramids."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from survey import network


def unit(inputs: int, out: int, kernel: Any, stride: Any = 1) -> nn.Sequential:
    padding = tuple(size // 2 for size in kernel)
    return nn.Sequential(
        nn.Conv3d(inputs, out, kernel, stride, padding, bias=False), nn.BatchNorm3d(out), nn.ReLU(True)
    )


@network((1, 3, 4, 32, 32), (1, 3, 16, 32, 32), listed=True)
class SlowFast(nn.Module):
    """SlowFast: a list of two pathways, lateral convolutions with temporal stride, heads pooled apart and concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.slow1, self.fast1 = unit(3, 8, (1, 7, 7), (1, 2, 2)), unit(3, 4, (5, 7, 7), (1, 2, 2))
        self.fuse = nn.Sequential(
            nn.Conv3d(4, 8, (7, 1, 1), (4, 1, 1), (3, 0, 0), bias=False), nn.BatchNorm3d(8), nn.ReLU()
        )
        self.slow2, self.fast2 = unit(16, 8, (1, 3, 3), (1, 2, 2)), unit(4, 4, (3, 3, 3), (1, 2, 2))
        self.slow3, self.fast3 = unit(8, 8, (3, 3, 3)), unit(4, 4, (3, 3, 3))
        self.projection = nn.Linear(12, 5)

    def forward(self, x: list[Tensor]) -> Tensor:
        x[0], x[1] = self.slow1(x[0]), self.fast1(x[1])
        x[0] = torch.cat([x[0], self.fuse(x[1])], 1)
        x = [self.slow3(self.slow2(x[0])), self.fast3(self.fast2(x[1]))]
        pooled = [F.avg_pool3d(part, part.shape[2:], stride=1) for part in x]
        y = torch.cat(pooled, 1).permute((0, 2, 3, 4, 1))
        y = self.projection(y)
        if not self.training:
            y = F.softmax(y, dim=4).mean([1, 2, 3])
        return y.view(y.shape[0], -1)


@network((1, 3, 32, 16, 16))
class SlowFastInside(nn.Module):
    """SlowFast that makes its pathways itself by strides, laterals by strided pooling of time into channels."""

    def __init__(self) -> None:
        super().__init__()
        self.fast, self.slow = unit(3, 4, (5, 3, 3), (1, 2, 2)), unit(3, 8, (1, 3, 3), (1, 2, 2))
        self.lateral = nn.Conv3d(4, 8, (5, 1, 1), (8, 1, 1), (2, 0, 0))
        self.fast2, self.slow2 = unit(4, 4, (3, 1, 1)), unit(16, 8, (3, 3, 3))
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        fast = self.fast(x[:, :, ::2, :, :])
        slow = self.slow(x[:, :, ::16, :, :])
        slow = self.slow2(torch.cat([slow, self.lateral(fast)], dim=1))
        fast = self.fast2(fast)
        x1 = F.adaptive_avg_pool3d(fast, 1).view(-1, fast.size(1))
        x2 = F.adaptive_avg_pool3d(slow, 1).view(-1, slow.size(1))
        return self.fc(F.dropout(torch.cat([x1, x2], dim=1), 0.5, self.training))


class Tiny3D(nn.Module):
    def __init__(self, inputs: int, classes: int = 5) -> None:
        super().__init__()
        self.features = nn.Sequential(unit(inputs, 8, (3, 3, 3), (1, 2, 2)), nn.MaxPool3d(2), unit(8, 8, (3, 3, 3)))
        self.fc = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.features(x)
        return self.fc(x.mean((2, 3, 4))), x


@network((1, 3, 8, 16, 16), (1, 2, 8, 16, 16))
class TwoStream(nn.Module):
    """Two streams, frames and flow, fused late: the mean of two softmaxes."""

    def __init__(self) -> None:
        super().__init__()
        self.rgb, self.flow = Tiny3D(3), Tiny3D(2)

    def forward(self, rgb: Tensor, flow: Tensor) -> Tensor:
        return (F.softmax(self.rgb(rgb)[0], 1) + F.softmax(self.flow(flow)[0], 1)) / 2


@network((1, 3, 8, 16, 16), (1, 1, 8, 16, 16))
class GestureMTUT(nn.Module):
    """MTUT: colour and depth networks, their scores, and the correlation matrices of their features over the whole clip."""

    def __init__(self) -> None:
        super().__init__()
        self.rgb, self.depth = Tiny3D(3), Tiny3D(1)

    def forward(self, rgb: Tensor, depth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, fa = self.rgb(rgb)
        b, fb = self.depth(depth)
        fa = F.normalize(fa.flatten(2), dim=2)
        fb = F.normalize(fb.flatten(2), dim=2)
        difference = torch.bmm(fa, fa.transpose(1, 2)) - torch.bmm(fb, fb.transpose(1, 2))
        return a, b, difference.pow(2).sum((1, 2))


@network((1, 3, 8, 16, 16), (1, 1, 8, 20))
class AudioVisual(nn.Module):
    """Sound and sight: a spectrogram with a column a frame, features concatenated frame by frame, a GRU, scores a frame."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = unit(3, 8, (5, 3, 3), (1, 2, 2))
        self.audio = nn.Sequential(nn.Conv2d(1, 4, (3, 5), padding=(1, 2)), nn.ReLU(), nn.AvgPool2d((1, 4)))
        self.gru = nn.GRU(8 + 4 * 5, 6, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, frames: Tensor, spectrogram: Tensor) -> Tensor:
        v = self.visual(frames).mean((3, 4)).transpose(1, 2)
        a = self.audio(spectrogram).permute(0, 2, 1, 3).flatten(2)
        y, _ = self.gru(torch.cat((v, a), 2))
        return self.head(y)


@network((1, 3, 9, 16, 16))
class ForgeryDetector(nn.Module):
    """Forgery: each frame beside its residual to the one before, the worst frame counts."""

    def __init__(self) -> None:
        super().__init__()
        self.frame = nn.Conv2d(3, 8, 3, 2, 1)
        self.residual = nn.Conv3d(3, 8, (3, 3, 3), (1, 2, 2), 1)
        self.fc = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        still = x[:, :, 1:].transpose(1, 2).reshape(-1, c, h, w)
        still = F.relu(self.frame(still)).mean((2, 3)).view(b, t - 1, 8)
        moved = F.relu(self.residual(x[:, :, 1:] - x[:, :, :-1])).mean((3, 4)).transpose(1, 2)
        scores = F.softmax(self.fc(torch.cat((still, moved), 2)), -1)[..., 1]
        return torch.stack([scores.max(1)[0], scores.mean(1), scores.topk(3, dim=1)[0].mean(1)], 1)


@network((1, 3, 16, 16, 16))
class TemporalPyramidPooling(nn.Module):
    """A temporal pyramid: adaptive pools to 1, 2 and 4 positions, flattened and concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.features = Tiny3D(3).features
        self.fc = nn.Linear(8 * 7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        parts = [F.adaptive_max_pool3d(x, (n, 1, 1)).flatten(1) for n in (1, 2, 4)]
        return self.fc(torch.cat(parts, 1))


@network((1, 3, 16, 16, 16))
class TPN(nn.Module):
    """Temporal pyramid network: two levels at rates of their own, brought to one length by pools, flows down and up."""

    def __init__(self) -> None:
        super().__init__()
        self.res4, self.res5 = unit(3, 8, (3, 3, 3), (1, 2, 2)), unit(8, 8, (3, 3, 3), (1, 2, 2))
        self.rate4, self.rate5 = (
            nn.Conv3d(8, 8, (3, 1, 1), padding=(1, 0, 0)),
            nn.Conv3d(8, 8, (5, 1, 1), padding=(2, 0, 0)),
        )
        self.level_fusion = nn.Conv3d(16, 12, 1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        c4 = self.res4(x)
        c5 = self.res5(c4)
        c4 = F.max_pool3d(c4, (1, 2, 2), (1, 2, 2))
        p4 = F.max_pool3d(self.rate4(c4), (8, 1, 1), (8, 1, 1))
        p5 = F.max_pool3d(self.rate5(c5), (4, 1, 1), (4, 1, 1))
        p4 = p4 + F.interpolate(p5, p4.shape[2:])
        p5 = F.adaptive_max_pool3d(p5, p4.shape[2:])
        y = F.relu(self.level_fusion(torch.cat([p4, p5], 1)))
        return self.fc(y.mean((2, 3, 4)))


@network((1, 16, 16, 16, 3), time_dim=1)
class ShotBoundary(nn.Module):
    """Shot boundaries: dilated 3D convolutions, similarity of each frame to its neighbours, two outputs for every frame."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            [nn.Conv3d(3, 4, 3, dilation=(d, 1, 1), padding=(d, 1, 1), bias=False) for d in (1, 2, 4)]
        )
        self.bn = nn.BatchNorm3d(12, eps=1e-3)
        self.similarity, self.fc1 = nn.Linear(7, 4), nn.Linear(16, 8)
        self.cls_layer1, self.cls_layer2 = nn.Linear(8, 1), nn.Linear(8, 1)

    def forward(self, inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = inputs.permute([0, 4, 1, 2, 3]).float().to(inputs.dtype).div(1.0)
        x = F.relu(self.bn(torch.cat([conv(x) for conv in self.convs], dim=1)))
        f = x.mean(dim=[3, 4]).transpose(1, 2)
        n = F.normalize(f, p=2, dim=2)
        batch, frames = n.shape[0], n.shape[1]
        similarities = torch.bmm(n, n.transpose(1, 2))
        padded = F.pad(similarities, [3, 3])
        batch_indices = torch.arange(batch).view([batch, 1, 1]).repeat([1, frames, 7])
        time_indices = torch.arange(frames).view([1, frames, 1]).repeat([batch, 1, 7])
        lookup = torch.arange(7).view([1, 1, 7]).repeat([batch, frames, 1]) + time_indices
        s = F.relu(self.similarity(padded[batch_indices, time_indices, lookup]))
        y = F.relu(self.fc1(torch.cat((s, f), 2)))
        return self.cls_layer1(y), {"many_hot": self.cls_layer2(y)}


@network((1, 3, 16, 16, 16), squeezed=True)
class SqueezedOutputs(nn.Module):
    """``squeeze()`` without a dimension, as people write it, for batches of more than one; features beside the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.features = Tiny3D(3).features
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.features(x)
        x = F.avg_pool3d(x, (x.size(2), x.size(3), x.size(4)))
        feature = x.squeeze()
        return self.fc(feature), feature
