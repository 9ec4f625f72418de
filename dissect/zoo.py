"""Conventional 3D-CNNs of our own: what ``dissect convert`` takes apart when it is given no model.

The 3D-ResNets are those of Hara et al. (CVPR 2018) and Köpüklü et al. (2019), from which the D3D paper sets out:
kernels of 3x3x3, a stem of 7x7x7, temporal stride 2 in the stem's pool and in every stage but the first. They accept
clips ``(N, in_channels, T, H, W)`` of any length and size and give scores ``(N, num_classes)``.

Weights are random: Kaiming normal over the fan out, from ``seed``, or from torch's generator where it is None.
Batch-norm statistics are those of a fresh layer, mean 0 and variance 1. As torchvision's do, the factories return the
network in training mode: call ``.eval()`` before you use it.

With shortcut A, a 400-class head and no biases in the convolutions, the parameters are the paper's to its last digit.
So are the multiply-adds of a clip of 16 frames at 112x112 with a 600-class head, when they are counted as the paper
must have counted (`dissect.counting.multiply_adds` with ``elementwise=True``); convolutions and the last layer alone
make 0.3 to 0.6% less. All in millions:

    =========  ==========  =========  ==================  ===========  =========
    network    parameters  the paper  convolutions and fc  elementwise  the paper
    =========  ==========  =========  ==================  ===========  =========
    resnet18      33.2353      33.24              8296.4       8323.3       8323
    resnet34      63.5449          -             12684.7            -          -
    resnet50      44.2420      44.24              9779.3       9834.6       9835
    resnet101     83.2881      83.29             13600.7      13663.6      13664
    =========  ==========  =========  ==================  ===========  =========
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dissect.errors import PlanError
from dissect.headed import Headed, with_head
from dissect.heads import Plain, head
from dissect.stream import Stream, convert

__all__ = [
    "C3D",
    "ResNet",
    "c3d",
    "d_resnet",
    "headed_resnet",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
]

Shortcut = Literal["A", "B"]


class SubsampleAndPad(nn.Module):
    """Shortcut A: keep every `stride`-th position and append channels of zeros; it has no parameters.

    ``(N, C, T, H, W)`` becomes ``(N, C + new_channels, ceil(T / stride), ceil(H / stride), ceil(W / stride))``.
    """

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels = new_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool3d(x, kernel_size=1, stride=self.stride)
        zeros = x.new_zeros(x.shape[0], self.new_channels, *x.shape[2:])
        return torch.cat([x, zeros], dim=1)

    def extra_repr(self) -> str:
        return f"new_channels={self.new_channels}, stride={self.stride}"


class BasicBlock(nn.Module):
    """Two 3x3x3 convolutions with a shortcut around them; it gives `planes` channels."""

    expansion = 1

    def __init__(self, channels: int, planes: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(channels, planes, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm3d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv3d(planes, planes, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm3d(planes)
        self.downsample = _shortcut(shortcut, channels, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        out: Tensor = self.relu(x + skip)
        return out


class Bottleneck(nn.Module):
    """1x1x1, 3x3x3 and 1x1x1 convolutions with a shortcut around them; it gives ``4 * planes`` channels."""

    expansion = 4

    def __init__(self, channels: int, planes: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        out_channels = planes * self.expansion
        self.conv1 = nn.Conv3d(channels, planes, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm3d(planes)
        self.conv2 = nn.Conv3d(planes, planes, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm3d(planes)
        self.conv3 = nn.Conv3d(planes, out_channels, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm3d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(shortcut, channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        out: Tensor = self.relu(x + skip)
        return out


class ResNet(nn.Module):
    """A conventional 3D-ResNet: a clip ``(N, in_channels, T, H, W)`` in, scores ``(N, num_classes)`` out.

    `depths` are the blocks of each of the four stages, whose blocks have `width`, 2, 4 and 8 times `width` planes.
    `shortcut` says what a skip connection does where the size changes: "A" subsamples and pads the channels with zeros,
    "B" is a 1x1x1 convolution and a batch norm. `neck` adds the paper's "conv last", a 1x1x1 convolution to that many
    channels, without bias or batch norm, before the global average pool.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        *,
        num_classes: int = 400,
        shortcut: Shortcut = "A",
        in_channels: int = 3,
        width: int = 64,
        neck: int | None = None,
    ) -> None:
        super().__init__()
        if shortcut not in ("A", "B"):
            raise ValueError(f"shortcut must be 'A' or 'B', not {shortcut!r}")
        self.conv1 = nn.Conv3d(in_channels, width, kernel_size=7, stride=(1, 2, 2), padding=3, bias=False)
        self.bn1 = nn.BatchNorm3d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool3d(kernel_size=3, stride=2, padding=1)
        expansion = block.expansion
        self.layer1 = _stage(block, depths[0], width, width, 1, shortcut)
        self.layer2 = _stage(block, depths[1], width * expansion, width * 2, 2, shortcut)
        self.layer3 = _stage(block, depths[2], width * 2 * expansion, width * 4, 2, shortcut)
        self.layer4 = _stage(block, depths[3], width * 4 * expansion, width * 8, 2, shortcut)
        features = width * 8 * expansion
        self.neck = None if neck is None else nn.Conv3d(features, neck, kernel_size=1, bias=False)
        self.avgpool = nn.AdaptiveAvgPool3d(1)
        self.fc = nn.Linear(neck or features, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        if self.neck is not None:
            x = self.neck(x)
        scores: Tensor = self.fc(self.avgpool(x).flatten(1))
        return scores


class C3D(nn.Module):
    """A plain stack like that of Tran et al. (ICCV 2015): eight 3x3x3 convolutions, five pools, three linear layers.

    A clip ``(N, in_channels, T, H, W)`` in, scores ``(N, num_classes)`` out. The linear layers read the flattened
    volume, which fixes the size: 112x112 and 16 to 31 frames. With ``average=True`` they read its global average, and
    16 frames of 16x16 or anything larger will do.
    """

    def __init__(
        self,
        *,
        num_classes: int = 400,
        in_channels: int = 3,
        width: int = 64,
        hidden: int = 4096,
        average: bool = False,
    ) -> None:
        super().__init__()

        def conv(channels: int, planes: int) -> nn.Conv3d:
            return nn.Conv3d(channels, planes, kernel_size=3, padding=1)

        self.conv1 = conv(in_channels, width)
        self.conv2 = conv(width, width * 2)
        self.conv3a, self.conv3b = conv(width * 2, width * 4), conv(width * 4, width * 4)
        self.conv4a, self.conv4b = conv(width * 4, width * 8), conv(width * 8, width * 8)
        self.conv5a, self.conv5b = conv(width * 8, width * 8), conv(width * 8, width * 8)
        self.pool1 = nn.MaxPool3d(kernel_size=(1, 2, 2), stride=(1, 2, 2))
        self.pool2, self.pool3, self.pool4 = nn.MaxPool3d(2), nn.MaxPool3d(2), nn.MaxPool3d(2)
        self.pool5 = nn.MaxPool3d(kernel_size=2, stride=2, padding=(0, 1, 1))
        self.avgpool = nn.AdaptiveAvgPool3d(1) if average else None
        self.fc6 = nn.Linear(width * 8 * (1 if average else 4 * 4), hidden)
        self.fc7 = nn.Linear(hidden, hidden)
        self.fc8 = nn.Linear(hidden, num_classes)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(0.5)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.relu(self.conv1(x)))
        x = self.pool2(self.relu(self.conv2(x)))
        x = self.pool3(self.relu(self.conv3b(self.relu(self.conv3a(x)))))
        x = self.pool4(self.relu(self.conv4b(self.relu(self.conv4a(x)))))
        x = self.pool5(self.relu(self.conv5b(self.relu(self.conv5a(x)))))
        if self.avgpool is not None:
            x = self.avgpool(x)
        x = self.dropout(self.relu(self.fc6(x.flatten(1))))
        x = self.dropout(self.relu(self.fc7(x)))
        scores: Tensor = self.fc8(x)
        return scores


def resnet18(
    num_classes: int = 400,
    shortcut: Shortcut = "A",
    in_channels: int = 3,
    width: int = 64,
    seed: int | None = None,
    neck: int | None = None,
) -> ResNet:
    """A 3D-ResNet-18: basic blocks, 2 + 2 + 2 + 2. See `ResNet` for the arguments."""
    return _resnet(BasicBlock, (2, 2, 2, 2), num_classes, shortcut, in_channels, width, seed, neck)


def resnet34(
    num_classes: int = 400,
    shortcut: Shortcut = "A",
    in_channels: int = 3,
    width: int = 64,
    seed: int | None = None,
    neck: int | None = None,
) -> ResNet:
    """A 3D-ResNet-34: basic blocks, 3 + 4 + 6 + 3. See `ResNet` for the arguments."""
    return _resnet(BasicBlock, (3, 4, 6, 3), num_classes, shortcut, in_channels, width, seed, neck)


def resnet50(
    num_classes: int = 400,
    shortcut: Shortcut = "A",
    in_channels: int = 3,
    width: int = 64,
    seed: int | None = None,
    neck: int | None = None,
) -> ResNet:
    """A 3D-ResNet-50: bottlenecks, 3 + 4 + 6 + 3. See `ResNet` for the arguments."""
    return _resnet(Bottleneck, (3, 4, 6, 3), num_classes, shortcut, in_channels, width, seed, neck)


def resnet101(
    num_classes: int = 400,
    shortcut: Shortcut = "A",
    in_channels: int = 3,
    width: int = 64,
    seed: int | None = None,
    neck: int | None = None,
) -> ResNet:
    """A 3D-ResNet-101: bottlenecks, 3 + 4 + 23 + 3. See `ResNet` for the arguments."""
    return _resnet(Bottleneck, (3, 4, 23, 3), num_classes, shortcut, in_channels, width, seed, neck)


def c3d(
    num_classes: int = 400,
    width: int = 64,
    in_channels: int = 3,
    hidden: int = 4096,
    average: bool = False,
    seed: int | None = None,
) -> C3D:
    """A plain stack of convolutions and pools for clips of 16x112x112. See `C3D` for the arguments."""
    with _seeded(seed):
        return C3D(num_classes=num_classes, in_channels=in_channels, width=width, hidden=hidden, average=average)


def headed_resnet(
    depth: int,
    *,
    head: str | nn.Module | None = "fc",
    num_classes: int | None = 600,
    in_channels: int = 3,
    width: int = 64,
    seed: int | None = None,
    **settings: Any,
) -> Headed:
    """A conventional 3D-ResNet of `depth` 18, 34, 50 or 101 with a head in place of its last pool and layer.

    What the paper's D-ResNets are cut from: shortcut A with basic blocks, B and a neck of ``8 * width`` features with
    bottlenecks. `head` is a name out of `dissect.heads.HEADS`, to which `settings` go (``frames``, ``layers``,
    ``hidden``, ``dropout``, ``first``), or a module that takes vectors ``(N, T, 8 * width)``; without one the newest vector
    comes out. A clip ``(N, in_channels, T, H, W)`` in, scores ``(N, num_classes)`` out; it comes in training mode.
    """
    if depth not in _RESNETS:
        raise PlanError(f"there is no 3D-ResNet-{depth} in the zoo; there are {', '.join(map(str, _RESNETS))}")
    features = 8 * width
    deep = depth >= 50
    made = _RESNETS[depth](1, "B" if deep else "A", in_channels, width, seed, features if deep else None)
    made.fc = nn.Identity()  # type: ignore[assignment]
    return with_head(made, _head(head, features, num_classes, seed, settings), at="avgpool")


def d_resnet(
    depth: int,
    head: str | nn.Module | None = "fc",
    num_classes: int | None = 600,
    *,
    skip: str = "concat",
    fill: str = "zeros",
    stem: int | None = None,
    in_channels: int = 3,
    width: int = 64,
    frames: int = 16,
    size: int = 112,
    seed: int | None = None,
    **settings: Any,
) -> Stream:
    """The paper's D-ResNet-18, 34, 50 or 101: a conventional 3D-ResNet with a head, dissected by the preset ``d3d``.

    `skip`, `fill` and `stem` are those of `dissect.convert`; `head` and `settings` those of `headed_resnet`, and
    `frames` the vectors that an ``fc`` head sees. It takes frames ``(N, in_channels, size, size)``.
    """
    if head == "fc":
        settings = {"frames": frames, **settings}
    network = headed_resnet(
        depth, head=head, num_classes=num_classes, in_channels=in_channels, width=width, seed=seed, **settings
    )
    clip = torch.zeros(1, in_channels, frames, size, size)
    return convert(network.eval(), clip, skip=skip, fill=fill, stem=stem)


_RESNETS = {18: resnet18, 34: resnet34, 50: resnet50, 101: resnet101}


def _head(
    given: str | nn.Module | None, features: int, classes: int | None, seed: int | None, settings: Any
) -> nn.Module:
    if isinstance(given, str):
        return head(given, features, classes, seed=seed, **settings)
    if settings:
        raise PlanError(f"{', '.join(settings)}: settings of a head by name; this one is given as it is")
    return Plain(features) if given is None else given


def _resnet(
    block: type[BasicBlock] | type[Bottleneck],
    depths: tuple[int, int, int, int],
    num_classes: int,
    shortcut: Shortcut,
    in_channels: int,
    width: int,
    seed: int | None,
    neck: int | None,
) -> ResNet:
    with _seeded(seed):
        return ResNet(
            block,
            depths,
            num_classes=num_classes,
            shortcut=shortcut,
            in_channels=in_channels,
            width=width,
            neck=neck,
        )


def _stage(
    block: Callable[[int, int, int, Shortcut], BasicBlock | Bottleneck],
    depth: int,
    channels: int,
    planes: int,
    stride: int,
    shortcut: Shortcut,
) -> nn.Sequential:
    stage = nn.Sequential(first := block(channels, planes, stride, shortcut))
    for _ in range(depth - 1):
        stage.append(block(planes * first.expansion, planes, 1, shortcut))
    return stage


def _shortcut(kind: Shortcut, channels: int, out_channels: int, stride: int) -> nn.Module | None:
    if stride == 1 and channels == out_channels:
        return None
    if kind == "A":
        return SubsampleAndPad(out_channels - channels, stride)
    return nn.Sequential(
        nn.Conv3d(channels, out_channels, kernel_size=1, stride=stride, bias=False),
        nn.BatchNorm3d(out_channels),
    )


def _initialise(network: nn.Module) -> None:
    for layer in network.modules():
        if isinstance(layer, nn.Conv3d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Draw from `seed` inside the block, and leave torch's own generator as it was; None changes nothing."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
