"""Residual networks and their kin, as public action recognition code writes them."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Variable

from survey import network


def conv3x3x3(inputs: int, planes: int, stride: int = 1) -> nn.Conv3d:
    return nn.Conv3d(inputs, planes, kernel_size=3, stride=stride, padding=1, bias=False)


def downsample_basic_block(x: Tensor, planes: int, stride: int) -> Tensor:
    out = F.avg_pool3d(x, kernel_size=1, stride=stride)
    zero_pads = torch.Tensor(out.size(0), planes - out.size(1), out.size(2), out.size(3), out.size(4)).zero_()
    if isinstance(out.data, torch.cuda.FloatTensor):
        zero_pads = zero_pads.cuda()
    return Variable(torch.cat([out.data, zero_pads.to(out.data.dtype)], dim=1))


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: Any = None) -> None:
        super().__init__()
        self.conv1 = conv3x3x3(inplanes, planes, stride)
        self.bn1 = nn.BatchNorm3d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3x3(planes, planes)
        self.bn2 = nn.BatchNorm3d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            residual = self.downsample(x)
        out += residual
        return self.relu(out)


class PreActivationBlock(BasicBlock):
    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: Any = None) -> None:
        super().__init__(inplanes, planes, stride, downsample)
        self.bn1 = nn.BatchNorm3d(inplanes)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.conv1(self.relu(self.bn1(x)))
        out = self.conv2(self.relu(self.bn2(out)))
        if self.downsample is not None:
            residual = self.downsample(x)
        out += residual
        return out


class NextBottleneck(nn.Module):
    expansion = 2

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: Any = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm3d(planes)
        self.conv2 = nn.Conv3d(planes, planes, 3, stride, 1, groups=4, bias=False)
        self.bn2 = nn.BatchNorm3d(planes)
        self.conv3 = nn.Conv3d(planes, planes * 2, 1, bias=False)
        self.bn3 = nn.BatchNorm3d(planes * 2)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)).add_(residual))


class HaraResNet(nn.Module):
    block: Any = BasicBlock
    shortcut = "A"
    layers = (1, 1, 1, 1)
    last_norm = False
    clip_frames, clip_size = 16, 32

    def __init__(self) -> None:
        super().__init__()
        self.inplanes = 8
        self.conv1 = nn.Conv3d(3, 8, kernel_size=7, stride=(1, 2, 2), padding=(3, 3, 3), bias=False)
        self.bn1 = nn.BatchNorm3d(8)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool3d(kernel_size=(3, 3, 3), stride=2, padding=1)
        self.layer1 = self._make_layer(8, self.layers[0])
        self.layer2 = self._make_layer(8, self.layers[1], stride=2)
        self.layer3 = self._make_layer(16, self.layers[2], stride=2)
        self.layer4 = self._make_layer(16, self.layers[3], stride=2)
        last_duration = math.ceil(self.clip_frames / 16)
        last_size = math.ceil(self.clip_size / 32)
        self.avgpool = nn.AvgPool3d((last_duration, last_size, last_size), stride=1)
        self.fc = nn.Linear(16 * self.block.expansion, 7)
        for m in self.modules():
            if isinstance(m, nn.Conv3d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out")

    def _make_layer(self, planes: int, blocks: int, stride: int = 1) -> nn.Sequential:
        downsample: Any = None
        if stride != 1 or self.inplanes != planes * self.block.expansion:
            if self.shortcut == "A":
                downsample = partial(downsample_basic_block, planes=planes * self.block.expansion, stride=stride)
            else:
                out = planes * self.block.expansion
                downsample = nn.Sequential(nn.Conv3d(self.inplanes, out, 1, stride, bias=False), nn.BatchNorm3d(out))
        layers = [self.block(self.inplanes, planes, stride, downsample)]
        self.inplanes = planes * self.block.expansion
        layers += [self.block(self.inplanes, planes) for _ in range(1, blocks)]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = self.avgpool(x)
        x = x.view(x.size(0), -1)
        return self.fc(x)


@network((1, 3, 16, 32, 32))
class ResNetA(HaraResNet):
    """3D-ResNet, shortcut A through ``.data``, last pool as long as what is left of the clip."""


@network((1, 3, 32, 32, 32))
class ResNetLong(HaraResNet):
    """3D-ResNet, shortcut B, made for clips of 32 frames: two positions are left to the last pool."""

    shortcut = "B"
    clip_frames = 32


@network((1, 3, 16, 32, 32))
class PreActivationResNet(HaraResNet):
    """Pre-activation blocks, shortcut B."""

    block = PreActivationBlock
    shortcut = "B"


@network((1, 3, 16, 32, 32))
class ResNeXt3D(HaraResNet):
    """Grouped bottlenecks, shortcut B, in-place addition."""

    block = NextBottleneck
    shortcut = "B"


@network((1, 3, 16, 32, 32))
class P3D(nn.Module):
    """P3D: blocks A, B and C in turn, a 2D last stage, pools over time alone, an average of what is left."""

    class Block(nn.Module):
        def __init__(self, inputs: int, planes: int, kind: str, stride: int = 1) -> None:
            super().__init__()
            self.kind = kind
            self.conv1 = nn.Conv3d(inputs, planes, 1, bias=False, stride=(1, stride, stride))
            self.bn1 = nn.BatchNorm3d(planes)
            self.conv2 = nn.Conv3d(planes, planes, (1, 3, 3), padding=(0, 1, 1), bias=False)
            self.bn2 = nn.BatchNorm3d(planes)
            self.conv3 = nn.Conv3d(planes, planes, (3, 1, 1), padding=(1, 0, 0), bias=False)
            self.bn3 = nn.BatchNorm3d(planes)
            self.conv4 = nn.Conv3d(planes, planes * 2, 1, bias=False)
            self.bn4 = nn.BatchNorm3d(planes * 2)
            self.relu = nn.ReLU(inplace=True)
            self.downsample = nn.Sequential(
                nn.Conv3d(inputs, planes * 2, 1, (1, stride, stride), bias=False), nn.BatchNorm3d(planes * 2)
            )

        def forward(self, x: Tensor) -> Tensor:
            residual = self.downsample(x)
            out = self.relu(self.bn1(self.conv1(x)))
            if self.kind == "A":
                out = self.relu(self.bn2(self.conv2(out)))
                out = self.relu(self.bn3(self.conv3(out)))
            elif self.kind == "B":
                tmp = self.relu(self.bn2(self.conv2(out)))
                out = tmp + self.relu(self.bn3(self.conv3(out)))
            else:
                out = self.relu(self.bn2(self.conv2(out)))
                out = out + self.relu(self.bn3(self.conv3(out)))
            out = self.bn4(self.conv4(out))
            out += residual
            return self.relu(out)

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(3, 8, (1, 7, 7), (1, 2, 2), (0, 3, 3), bias=False)
        self.bn1 = nn.BatchNorm3d(8)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool3d((2, 3, 3), stride=2, padding=(0, 1, 1))
        self.maxpool_2 = nn.MaxPool3d((2, 1, 1), stride=(2, 1, 1))
        self.layer1 = self.Block(8, 4, "A")
        self.layer2 = self.Block(8, 8, "B", 2)
        self.layer3 = self.Block(16, 8, "C", 2)
        self.conv5 = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.avgpool = nn.AvgPool2d((2, 2), stride=1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.maxpool_2(self.layer1(x))
        x = self.maxpool_2(self.layer2(x))
        x = self.maxpool_2(self.layer3(x))
        sizes = x.size()
        x = x.view(-1, sizes[1], sizes[3], sizes[4])
        x = self.avgpool(self.conv5(x))
        x = x.view(-1, self.fc.in_features)
        return self.fc(F.dropout(x, 0.5, self.training))


@network((1, 3, 16, 16, 16))
class R2Plus1D(nn.Module):
    """(2+1)D with the middle width that keeps the parameters, strided over time in the temporal part."""

    class Factored(nn.Module):
        def __init__(self, inputs: int, out: int, kernel: tuple[int, int, int], stride: Any, padding: Any) -> None:
            super().__init__()
            middle = math.floor(
                (kernel[0] * kernel[1] * kernel[2] * inputs * out) / (kernel[1] * kernel[2] * inputs + kernel[0] * out)
            )
            self.spatial_conv = nn.Conv3d(
                inputs, middle, (1, *kernel[1:]), (1, *stride[1:]), (0, *padding[1:]), bias=False
            )
            self.bn = nn.BatchNorm3d(middle)
            self.relu = nn.ReLU()
            self.temporal_conv = nn.Conv3d(
                middle, out, (kernel[0], 1, 1), (stride[0], 1, 1), (padding[0], 0, 0), bias=False
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.temporal_conv(self.relu(self.bn(self.spatial_conv(x))))

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = self.Factored(3, 8, (3, 7, 7), (1, 2, 2), (1, 3, 3))
        self.conv2 = self.Factored(8, 8, (3, 3, 3), (1, 1, 1), (1, 1, 1))
        self.conv3 = self.Factored(8, 12, (3, 3, 3), (2, 2, 2), (1, 1, 1))
        self.short = nn.Conv3d(8, 12, 1, stride=2)
        self.norm2, self.norm3 = nn.BatchNorm3d(8), nn.BatchNorm3d(12)
        self.pool = nn.AdaptiveAvgPool3d(1)
        self.linear = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = F.relu(x + self.norm2(self.conv2(x)))
        x = F.relu(self.short(x) + self.norm3(self.conv3(x)))
        return self.linear(self.pool(x).view(-1, 12))


@network((1, 3, 16, 16, 16))
class ChannelSeparated(nn.Module):
    """ir-CSN: depthwise bottlenecks, an interaction-preserved one before it, last stages strided over time."""

    class Block(nn.Module):
        def __init__(self, inputs: int, out: int, stride: int, preserved: bool) -> None:
            super().__init__()
            self.conv1 = nn.Sequential(nn.Conv3d(inputs, out, 1, bias=False), nn.BatchNorm3d(out), nn.ReLU(True))
            middle: list[nn.Module] = [nn.Conv3d(out, out, 1, bias=False), nn.BatchNorm3d(out)] if preserved else []
            self.conv2 = nn.Sequential(*middle, nn.Conv3d(out, out, 3, stride, 1, groups=out, bias=False))
            self.bn2 = nn.BatchNorm3d(out)
            self.conv3 = nn.Sequential(nn.Conv3d(out, out, 1, bias=False), nn.BatchNorm3d(out))
            self.shortcut = nn.Sequential(nn.Conv3d(inputs, out, 1, stride=stride, bias=False), nn.BatchNorm3d(out))

        def forward(self, x: Tensor) -> Tensor:
            out = self.conv3(F.relu_(self.bn2(self.conv2(self.conv1(x)))))
            return F.relu_(out + self.shortcut(x))

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv3d(3, 8, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False),
            nn.BatchNorm3d(8),
            nn.ReLU(),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
        )
        self.stages = nn.ModuleList(
            [self.Block(8, 8, 1, True), self.Block(8, 12, 2, False), self.Block(12, 16, 2, False)]
        )
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.fc(x.flatten(2).mean(-1))


@network((1, 3, 16, 16, 16))
class RepVGG3D(nn.Module):
    """Three branches that a deployment would fuse: 3x3x3, 1x1x1 and a batch norm alone."""

    class Block(nn.Module):
        def __init__(self, inputs: int, out: int, stride: int = 1) -> None:
            super().__init__()
            self.dense = nn.Sequential(nn.Conv3d(inputs, out, 3, stride, 1, bias=False), nn.BatchNorm3d(out))
            self.point = nn.Sequential(nn.Conv3d(inputs, out, 1, stride, 0, bias=False), nn.BatchNorm3d(out))
            self.identity = nn.BatchNorm3d(inputs) if inputs == out and stride == 1 else None

        def forward(self, x: Tensor) -> Tensor:
            own = 0 if self.identity is None else self.identity(x)
            return F.relu(self.dense(x) + self.point(x) + own)

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(self.Block(3, 8, 2), self.Block(8, 8), self.Block(8, 12, 2), self.Block(12, 12))
        self.gap = nn.AdaptiveAvgPool3d(output_size=1)
        self.linear = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = self.gap(self.stages(x))
        return self.linear(out.view(out.size(0), -1))


@network((1, 3, 16, 16, 16))
class ARTNet(nn.Module):
    """SMART blocks: squared motion energy beside appearance, reduced after concatenation."""

    class Smart(nn.Module):
        def __init__(self, inputs: int, out: int, stride: Any) -> None:
            super().__init__()
            self.appearance = nn.Conv3d(inputs, out, (1, 3, 3), stride, (0, 1, 1), bias=False)
            self.bn_a = nn.BatchNorm3d(out)
            self.relation = nn.Conv3d(inputs, out, 3, stride, 1, bias=False)
            self.bn_r = nn.BatchNorm3d(out)
            self.cross = nn.Conv3d(out, out // 2, 1, groups=out // 2, bias=False)
            self.cross.weight.data.fill_(0.5)
            self.reduce = nn.Conv3d(out + out // 2, out, 1)

        def forward(self, x: Tensor) -> Tensor:
            a = F.relu(self.bn_a(self.appearance(x)))
            r = self.bn_r(self.relation(x))
            r = F.relu(self.cross(torch.pow(r, 2)))
            return self.reduce(torch.cat((a, r), dim=1))

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(self.Smart(3, 8, (2, 2, 2)), nn.ReLU(), self.Smart(8, 8, (2, 2, 2)))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.features(x), inplace=True)
        return self.fc(x.mean(4).mean(3).mean(2))


@network((1, 3, 8, 16, 16))
class CollaborativeCoST(nn.Module):
    """CoST(b): one 2D kernel shared by the three planes of the volume, mixed by a softmax over views."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 8, (1, 7, 7), (1, 2, 2), (0, 3, 3))
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3) * 0.1)
        self.bn = nn.BatchNorm3d(8)
        self.attention = nn.Linear(8, 3)
        self.fc = nn.Linear(8, 5)

    def cost(self, x: Tensor) -> Tensor:
        hw = F.conv3d(x, self.weight.unsqueeze(2), padding=(0, 1, 1))
        tw = F.conv3d(x, self.weight.unsqueeze(3), padding=(1, 0, 1))
        th = F.conv3d(x, self.weight.unsqueeze(4), padding=(1, 1, 0))
        views = torch.stack([hw, tw, th], dim=-1)
        pooled = torch.stack([F.adaptive_max_pool3d(view, 1).flatten(1) for view in (hw, tw, th)], 1)
        alpha = F.softmax(self.attention(pooled.mean(1)), dim=-1)
        return (views * alpha[:, None, None, None, None, :]).sum(-1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.bn(self.cost(x)) + x)
        return self.fc(F.adaptive_avg_pool3d(x, (1, 1, 1)).squeeze(-1).squeeze(-1).squeeze(-1))
