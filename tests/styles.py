"""Small networks typed in the styles of public video code, each with the clip that it takes.

None of them knows of dissect. They are oracles: a stream is compared with them, as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STYLES: dict[str, Style] = {}


@dataclass(frozen=True)
class Style:
    """A network's class, the shape of its clip, and how ``dissect.convert`` is told about it."""

    network: type[nn.Module]
    clip: tuple[int, ...] = (1, 3, 16, 16, 16)
    options: dict[str, Any] = field(default_factory=dict)
    integers: bool = False
    single: bool = False

    def build(self) -> tuple[nn.Module, Any]:
        """The network in eval mode with statistics in which no error can hide, and an example of its clip."""
        torch.manual_seed(0)
        model = self.network().eval()
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
        if not self.single:
            model = model.double()
        if self.integers:
            return model, torch.randint(0, 255, self.clip, dtype=torch.uint8)
        return model, torch.rand(self.clip, dtype=torch.float32 if self.single else torch.float64)


def style(*clip: int, integers: bool = False, single: bool = False, **options: Any) -> Callable[[type], type]:
    def register(network: type) -> type:
        STYLES[network.__name__] = Style(network, clip or (1, 3, 16, 16, 16), options, integers, single)
        return network

    return register


def conv_bn_relu(channels: int, out: int, kernel: Any = 3, stride: Any = 1, groups: int = 1) -> nn.Sequential:
    padding = kernel // 2 if isinstance(kernel, int) else tuple(size // 2 for size in kernel)
    conv = nn.Conv3d(channels, out, kernel, stride, padding, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm3d(out), nn.ReLU(inplace=True))


@style()
class DenseNet(nn.Module):
    """3D DenseNet: pre-activation, concatenated skips, functional dropout, transition by average pool."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv3d(3, 8, 7, (1, 2, 2), 3), nn.BatchNorm3d(8), nn.ReLU(True), nn.MaxPool3d(3, 2, 1)
        )
        self.layers = nn.ModuleList()
        for index in range(3):
            width = 8 + 4 * index
            self.layers.append(
                nn.Sequential(
                    nn.BatchNorm3d(width),
                    nn.ReLU(True),
                    nn.Conv3d(width, 8, 1),
                    nn.BatchNorm3d(8),
                    nn.ReLU(True),
                    nn.Conv3d(8, 4, 3, padding=1),
                )
            )
        self.transition = nn.Sequential(nn.BatchNorm3d(20), nn.ReLU(True), nn.Conv3d(20, 10, 1), nn.AvgPool3d(2, 2))
        self.fc = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, F.dropout(layer(x), 0.2, self.training)], 1)
        x = F.relu(self.transition(x))
        return self.fc(F.adaptive_avg_pool3d(x, (1, 1, 1)).view(x.size(0), -1))


@style()
class ShuffleNet(nn.Module):
    """3D ShuffleNet: grouped 1x1x1, channel shuffle by view and permute, depthwise, a pool as large as its input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 8, 3, (1, 2, 2))
        self.squeeze = nn.Conv3d(8, 8, 1, groups=2)
        self.depthwise = nn.Conv3d(8, 8, 3, padding=1, groups=8)
        self.expand = nn.Conv3d(8, 8, 1, groups=2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.relu(self.squeeze(x))
        batch, channels, t, h, w = y.data.size()
        y = y.view(batch, 2, channels // 2, t, h, w).permute(0, 2, 1, 3, 4, 5).contiguous().view(batch, -1, t, h, w)
        x = F.relu(x + self.expand(self.depthwise(y)))
        x = F.avg_pool3d(x, x.data.size()[-3:])
        return self.fc(x.view(x.size(0), -1))


def same_padding(x: Tensor, kernel: Any, stride: Any) -> Tensor:
    """TensorFlow's SAME, as ports of I3D compute it from the input's size."""
    widths: list[int] = []
    for size, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        total = max(k - s, 0) if size % s == 0 else max(k - size % s, 0)
        widths += [total // 2, total - total // 2]
    return F.pad(x, widths)


class Unit3D(nn.Module):
    def __init__(self, channels: int, out: int, kernel: Any, stride: Any = (1, 1, 1)) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.conv3d = nn.Conv3d(channels, out, kernel, stride, 0, bias=False)
        self.bn = nn.BatchNorm3d(out, eps=0.001, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv3d(same_padding(x, self.kernel, self.stride))))


class MaxPoolSame(nn.MaxPool3d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(same_padding(x, self.kernel_size, self.stride))


class Inception(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a = Unit3D(channels, 4, (1, 1, 1))
        self.b = nn.Sequential(Unit3D(channels, 4, (1, 1, 1)), Unit3D(4, 6, (3, 3, 3)))
        self.c = nn.Sequential(MaxPoolSame((3, 3, 3), (1, 1, 1)), Unit3D(channels, 4, (1, 1, 1)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x), self.c(x)], dim=1)


@style(1, 3, 16, 32, 32)
class InceptionI3D(nn.Module):
    """I3D as ported from TensorFlow: SAME padding by hand, zero-padded max pools, logits averaged over time."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            Unit3D(3, 8, (7, 7, 7), (2, 2, 2)),
            MaxPoolSame((1, 3, 3), (1, 2, 2)),
            Inception(8),
            MaxPoolSame((3, 3, 3), (2, 2, 2)),
            Inception(14),
            MaxPoolSame((2, 2, 2), (2, 2, 2)),
            Inception(14),
        )
        self.pool = nn.AvgPool3d((2, 2, 2), (1, 1, 1))
        self.logits = nn.Conv3d(14, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.logits(F.dropout(self.pool(self.features(x)), 0.5, self.training))
        return x.squeeze(3).squeeze(3).mean(2)


@style(1, 3, 16, 32, 32)
class PlainC3D(nn.Module):
    """C3D: plain stages, max pools, a linear layer over flattened time."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv3d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool3d((1, 2, 2), (1, 2, 2))]
        for channels, padding in ((4, 0), (8, 0), (8, (0, 1, 1))):
            layers += [nn.Conv3d(channels, 8, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2, 2, padding=padding)]
        self.features = nn.Sequential(*layers)
        self.fc6 = nn.Linear(8 * 2 * 3 * 3, 16)
        self.fc8 = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).view(-1, 8 * 2 * 3 * 3)
        return self.fc8(F.dropout(F.relu(self.fc6(x)), 0.5, self.training))


@style()
class Res2Net(nn.Module):
    """Channel groups that feed one another, scores by a 1x1x1 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 16)
        self.convs = nn.ModuleList([nn.Conv3d(4, 4, 3, padding=1) for _ in range(3)])
        self.head = nn.Conv3d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        groups = torch.split(x, 4, 1)
        outputs, last = [groups[0]], None
        for index, conv in enumerate(self.convs):
            last = F.relu(conv(groups[index + 1] if last is None else last + groups[index + 1]))
            outputs.append(last)
        return self.head(torch.cat(outputs, 1) + x).mean(dim=[2, 3, 4])


@style()
class PseudoP3D(nn.Module):
    """P3D: spatial and temporal convolutions in parallel, then a 2D trunk on merged batch and time, scores averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 8, (1, 7, 7), (1, 2, 2))
        self.space = nn.Conv3d(8, 8, (1, 3, 3), padding=(0, 1, 1))
        self.time = nn.Conv3d(8, 8, (3, 1, 1), padding=(1, 0, 0))
        self.pool = nn.MaxPool3d((2, 1, 1), (2, 1, 1))
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + F.relu(self.space(x)) + F.relu(self.time(x))
        x = self.pool(x)
        n, c, t, h, w = x.shape
        x = x.transpose(1, 2).contiguous().view(-1, c, h, w)
        x = F.avg_pool2d(F.relu(self.conv(x)), (h, w)).view(n, t, c)
        return self.fc(x).mean(1)


@style(1, 8, 16, 16, 3, integers=True, single=True, time_dim=1)
class ChannelsLast(nn.Module):
    """uint8 clips ``(B, T, H, W, C)``; log-probabilities for every frame."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.permute(0, 4, 1, 2, 3).float() / 255.0)
        return self.fc(x.mean((3, 4)).transpose(1, 2)).log_softmax(-1)


@style(1, 8, 3, 16, 16, time_dim=1)
class SegmentNetwork(nn.Module):
    """TSN: a 2D network on every frame, consensus by the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c, h, w = x.shape
        y = self.fc(F.adaptive_avg_pool2d(self.base(x.view(-1, c, h, w)), 1).flatten(1))
        return y.view(b, t, -1).mean(1)


@style(1, 8, 3, 16, 16, time_dim=1)
class ShiftNetwork(nn.Module):
    """TSM: channels shifted along time by assignments into zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, 1, 1)
        self.b = nn.Conv2d(8, 8, 3, 1, 1)
        self.fc = nn.Linear(8, 5)

    def shift(self, x: Tensor, n: int, fold: int = 2) -> Tensor:
        nt, c, h, w = x.size()
        x = x.view(nt // n, n, c, h, w)
        out = torch.zeros_like(x)
        out[:, :-1, :fold] = x[:, 1:, :fold]
        out[:, 1:, fold : 2 * fold] = x[:, :-1, fold : 2 * fold]
        out[:, :, 2 * fold :] = x[:, :, 2 * fold :]
        return out.view(nt, c, h, w)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c, h, w = x.shape
        y = F.relu(self.a(x.reshape(-1, c, h, w)))
        y = F.relu(y + self.b(self.shift(y, t)))
        return self.fc(y.mean((2, 3))).view(b, t, 5).mean(1)


@style()
class UNet(nn.Module):
    """Segmentation of the whole clip: max pool down, transposed convolution up, a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.down = conv_bn_relu(3, 4)
        self.deep = nn.Sequential(conv_bn_relu(4, 8), conv_bn_relu(8, 8))
        self.up = nn.ConvTranspose3d(8, 4, 2, 2)
        self.merge = conv_bn_relu(8, 4)
        self.head = nn.Conv3d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        y = self.up(self.deep(F.max_pool3d(skip, 2)))
        return torch.sigmoid(self.head(self.merge(torch.cat([y, skip], 1))))


@style()
class GroupNormNet(nn.Module):
    """Statistics over time: group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.norm(self.conv(x))).mean((2, 3, 4)))


@style()
class LipReader(nn.Module):
    """3D stem, 2D trunk on merged batch and time, GRU, the last step's scores."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 8, (5, 7, 7), (1, 2, 2), (2, 3, 3))
        self.bn = nn.BatchNorm3d(8)
        self.trunk = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.gru = nn.GRU(8, 6, 2, batch_first=True)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        b, c, t, h, w = x.shape
        x = self.trunk(x.transpose(1, 2).reshape(b * t, c, h, w)).view(b, t, -1)
        self.gru.flatten_parameters()
        x, _ = self.gru(x)
        return self.fc(x[:, -1])


@style()
class GatedDict(nn.Module):
    """Squeeze-and-excitation over the clip by hand; a dict of logits and features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 8, 3, (2, 2, 2), 1)
        self.gate = nn.Linear(8, 8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.hardswish(self.conv(x))
        weight = torch.sigmoid(self.gate(F.adaptive_avg_pool3d(x, 1).flatten(1)))
        x = x * weight[:, :, None, None, None]
        features = x.mean((3, 4))
        return {"logits": self.fc(features.mean(2)), "features": features}


@style()
class Unpadded(nn.Module):
    """Convolutions without padding; the skip is cropped to meet them; scores for every position."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv3d(3, 6, 3)
        self.b = nn.Conv3d(6, 6, 3)
        self.head = nn.Conv3d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        return self.head(self.b(y) + y[:, :, 1:-1, 1:-1, 1:-1])


@style()
class PyramidHead(nn.Module):
    """Features of three temporal rates, pooled and concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv_bn_relu(3, 4), conv_bn_relu(4, 4, 3, 2), conv_bn_relu(4, 4, 3, 2)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(a)
        c = self.c(b)
        return self.fc(torch.cat([y.mean((2, 3, 4)) for y in (a, b, c)], 1))


@style()
class SlowAndFast(nn.Module):
    """Two pathways out of one clip, a strided lateral convolution, both pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.fast = conv_bn_relu(3, 4, (5, 3, 3))
        self.slow = conv_bn_relu(3, 8, (1, 3, 3))
        self.lateral = nn.Conv3d(4, 8, (5, 1, 1), (4, 1, 1), (2, 0, 0))
        self.merged = conv_bn_relu(16, 8)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        fast = self.fast(x)
        slow = self.merged(torch.cat([self.slow(x[:, :, ::4]), self.lateral(fast)], 1))
        return self.fc(torch.cat([slow.mean((2, 3, 4)), fast.mean((2, 3, 4))], 1))


@style()
class StandardizedWeights(nn.Module):
    """Weights computed from parameters at every call, a slope a channel, a maximum over everything."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 6, 3, padding=1)
        self.slope = nn.PReLU(6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight
        weight = weight - weight.mean((1, 2, 3, 4), keepdim=True)
        weight = weight / (weight.std((1, 2, 3, 4), keepdim=True) + 1e-5)
        return self.fc(self.slope(F.conv3d(x, weight, self.conv.bias, padding=1)).amax((2, 3, 4)))


@style()
class Upsampled(nn.Module):
    """Time halved by a stride, and doubled again by interpolation."""

    def __init__(self) -> None:
        super().__init__()
        self.down = conv_bn_relu(3, 4, 3, 2)
        self.head = nn.Conv3d(4, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.interpolate(self.down(x), scale_factor=2, mode="trilinear", align_corners=False))


@style()
class SharedLayer(nn.Module):
    """One convolution used three times: one set of weights, a cache for each use."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 4)
        self.conv = nn.Conv3d(4, 4, 3, padding=1)
        self.head = nn.Conv3d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = F.relu(self.conv(x) + x)
        return self.head(x).mean((3, 4)).max(2)[0]
