"""Efficient 3D-CNNs, as the well-known resource-efficient collections write them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from survey import network


class Fire(nn.Module):
    def __init__(self, inplanes: int, squeeze: int, expand: int, use_bypass: bool = False) -> None:
        super().__init__()
        self.use_bypass = use_bypass
        self.squeeze = nn.Conv3d(inplanes, squeeze, kernel_size=1)
        self.squeeze_bn = nn.BatchNorm3d(squeeze)
        self.expand1x1 = nn.Conv3d(squeeze, expand, kernel_size=1)
        self.expand1x1_bn = nn.BatchNorm3d(expand)
        self.expand3x3 = nn.Conv3d(squeeze, expand, kernel_size=3, padding=1)
        self.expand3x3_bn = nn.BatchNorm3d(expand)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.squeeze_bn(self.squeeze(x)))
        out1 = self.expand1x1_bn(self.expand1x1(out))
        out2 = self.expand3x3_bn(self.expand3x3(out))
        out = torch.cat([out1, out2], 1)
        if self.use_bypass:
            out += x
        return self.relu(out)


@network((1, 3, 16, 32, 32))
class SqueezeNet3D(nn.Module):
    """SqueezeNet 1.1: fire modules with a bypass, pools that halve time, a classifier that is a convolution and a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv3d(3, 8, kernel_size=3, stride=(1, 2, 2), padding=(1, 1, 1)),
            nn.BatchNorm3d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool3d(kernel_size=3, stride=2, padding=1),
            Fire(8, 4, 8),
            Fire(16, 4, 8, use_bypass=True),
            nn.MaxPool3d(kernel_size=3, stride=2, padding=1),
            Fire(16, 8, 8, use_bypass=True),
            nn.MaxPool3d(kernel_size=3, stride=2, padding=1),
        )
        final_conv = nn.Conv3d(16, 5, kernel_size=1)
        self.classifier = nn.Sequential(
            nn.Dropout(p=0.5), final_conv, nn.ReLU(inplace=True), nn.AvgPool3d((2, 2, 2), stride=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = self.classifier(x)
        return x.view(x.size(0), -1)


def conv_bn(inp: int, oup: int, stride: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(inp, oup, kernel_size=3, stride=stride, padding=(1, 1, 1), bias=False),
        nn.BatchNorm3d(oup),
        nn.ReLU(inplace=True),
    )


class DepthwiseBlock(nn.Module):
    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(inplanes, inplanes, 3, stride, 1, groups=inplanes, bias=False)
        self.bn1 = nn.BatchNorm3d(inplanes)
        self.conv2 = nn.Conv3d(inplanes, planes, 1, bias=False)
        self.bn2 = nn.BatchNorm3d(planes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)))


@network((1, 3, 16, 32, 32))
class MobileNet3D(nn.Module):
    """MobileNet: depthwise 3x3x3 and 1x1x1, a pool over all that is left by ``x.data.size()``."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv_bn(3, 8, (1, 2, 2)), DepthwiseBlock(8, 12, 2), DepthwiseBlock(12, 12), DepthwiseBlock(12, 16, 2)
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = F.avg_pool3d(x, x.data.size()[-3:])
        x = x.view(x.size(0), -1)
        return self.classifier(x)


class InvertedResidual(nn.Module):
    def __init__(self, inp: int, oup: int, stride: Any, expand_ratio: int) -> None:
        super().__init__()
        hidden_dim = round(inp * expand_ratio)
        self.use_res_connect = stride == (1, 1, 1) and inp == oup
        head: list[nn.Module] = []
        if expand_ratio != 1:
            head = [nn.Conv3d(inp, hidden_dim, 1, 1, 0, bias=False), nn.BatchNorm3d(hidden_dim), nn.ReLU6(inplace=True)]
        self.conv = nn.Sequential(
            *head,
            nn.Conv3d(hidden_dim, hidden_dim, 3, stride, 1, groups=hidden_dim, bias=False),
            nn.BatchNorm3d(hidden_dim),
            nn.ReLU6(inplace=True),
            nn.Conv3d(hidden_dim, oup, 1, 1, 0, bias=False),
            nn.BatchNorm3d(oup),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


@network((1, 3, 16, 32, 32))
class MobileNetV2(nn.Module):
    """MobileNetV2: inverted residuals, ReLU6, settings t, c, n, s."""

    settings = ((1, 8, 1, (1, 1, 1)), (2, 12, 2, (2, 2, 2)), (2, 16, 2, (2, 2, 2)), (3, 16, 1, (2, 2, 2)))

    def __init__(self) -> None:
        super().__init__()
        features: list[nn.Module] = [conv_bn(3, 8, (1, 2, 2))]
        channel = 8
        for t, c, n, s in self.settings:
            for i in range(n):
                features.append(InvertedResidual(channel, c, s if i == 0 else (1, 1, 1), t))
                channel = c
        features.append(
            nn.Sequential(nn.Conv3d(channel, 24, 1, bias=False), nn.BatchNorm3d(24), nn.ReLU6(inplace=True))
        )
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(24, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = F.avg_pool3d(x, x.data.size()[-3:])
        x = x.view(x.size(0), -1)
        return self.classifier(x)


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    batchsize, num_channels, depth, height, width = x.data.size()
    channels_per_group = num_channels // groups
    x = x.view(batchsize, groups, channels_per_group, depth, height, width)
    x = x.permute(0, 2, 1, 3, 4, 5).contiguous()
    return x.view(batchsize, num_channels, depth, height, width)


class ShuffleBottleneck(nn.Module):
    def __init__(self, in_planes: int, out_planes: int, stride: int, groups: int) -> None:
        super().__init__()
        self.stride, self.groups = stride, groups
        mid_planes = out_planes // 4
        if self.stride == 2:
            out_planes = out_planes - in_planes
        g = 1 if in_planes == 8 else groups
        self.conv1 = nn.Conv3d(in_planes, mid_planes, kernel_size=1, groups=g, bias=False)
        self.bn1 = nn.BatchNorm3d(mid_planes)
        self.conv2 = nn.Conv3d(mid_planes, mid_planes, 3, stride, padding=1, groups=mid_planes, bias=False)
        self.bn2 = nn.BatchNorm3d(mid_planes)
        self.conv3 = nn.Conv3d(mid_planes, out_planes, kernel_size=1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm3d(out_planes)
        self.relu = nn.ReLU(inplace=True)
        if stride == 2:
            self.shortcut = nn.AvgPool3d(kernel_size=(2, 3, 3), stride=2, padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = channel_shuffle(out, self.groups)
        out = self.bn2(self.conv2(out))
        out = self.bn3(self.conv3(out))
        if self.stride == 2:
            return self.relu(torch.cat([out, self.shortcut(x)], 1))
        return self.relu(out + x)


@network((1, 3, 16, 32, 32))
class ShuffleNetV1(nn.Module):
    """ShuffleNet: grouped convolutions, a shuffle, an average pool of even length in time as the shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv_bn(3, 8, (1, 2, 2))
        self.maxpool = nn.MaxPool3d(kernel_size=3, stride=2, padding=1)
        self.layer1 = nn.Sequential(ShuffleBottleneck(8, 16, 2, 2), ShuffleBottleneck(16, 16, 1, 2))
        self.layer2 = nn.Sequential(ShuffleBottleneck(16, 32, 2, 2), ShuffleBottleneck(32, 32, 1, 2))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(32, 5))

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer2(self.layer1(self.maxpool(self.conv1(x))))
        out = F.avg_pool3d(out, out.data.size()[-3:])
        out = out.view(out.size(0), -1)
        return self.classifier(out)


class ShuffleUnit(nn.Module):
    def __init__(self, inp: int, oup: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        inc = oup // 2
        if stride == 1:
            self.banch2 = self.branch(inc, inc, 1)
        else:
            self.banch1 = nn.Sequential(
                nn.Conv3d(inp, inp, 3, stride, 1, groups=inp, bias=False),
                nn.BatchNorm3d(inp),
                nn.Conv3d(inp, inc, 1, bias=False),
                nn.BatchNorm3d(inc),
                nn.ReLU(inplace=True),
            )
            self.banch2 = self.branch(inp, inc, stride)

    @staticmethod
    def branch(inp: int, inc: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv3d(inp, inc, 1, bias=False),
            nn.BatchNorm3d(inc),
            nn.ReLU(inplace=True),
            nn.Conv3d(inc, inc, 3, stride, 1, groups=inc, bias=False),
            nn.BatchNorm3d(inc),
            nn.Conv3d(inc, inc, 1, bias=False),
            nn.BatchNorm3d(inc),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            x1 = x[:, : (x.shape[1] // 2), :, :, :]
            x2 = x[:, (x.shape[1] // 2) :, :, :, :]
            out = torch.cat((x1, self.banch2(x2)), 1)
        else:
            out = torch.cat((self.banch1(x), self.banch2(x)), 1)
        return channel_shuffle(out, 2)


@network((1, 3, 16, 32, 32))
class ShuffleNetV2(nn.Module):
    """ShuffleNetV2: halves by slices of the channels, a pool over what is left."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv_bn(3, 8, (1, 2, 2))
        self.maxpool = nn.MaxPool3d(kernel_size=3, stride=2, padding=1)
        self.features = nn.Sequential(
            ShuffleUnit(8, 16, 2), ShuffleUnit(16, 16, 1), ShuffleUnit(16, 24, 2), ShuffleUnit(24, 24, 1)
        )
        self.conv_last = nn.Sequential(nn.Conv3d(24, 32, 1, bias=False), nn.BatchNorm3d(32), nn.ReLU(inplace=True))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(32, 5))

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv_last(self.features(self.maxpool(self.conv1(x))))
        out = F.avg_pool3d(out, out.data.size()[-3:])
        return self.classifier(out.view(out.size(0), -1))


class MemoryEfficientSwish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, i: Tensor) -> Tensor:
        result = i * torch.sigmoid(i)
        ctx.save_for_backward(i)
        return result

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        (i,) = ctx.saved_tensors
        sigmoid_i = torch.sigmoid(i)
        return grad_output * (sigmoid_i * (1 + i * (1 - sigmoid_i)))


def drop_connect(inputs: Tensor, p: float, training: bool) -> Tensor:
    if not training:
        return inputs
    keep = 1 - p
    noise = torch.floor(keep + torch.rand([inputs.shape[0], 1, 1, 1, 1], dtype=inputs.dtype))
    return inputs / keep * noise


class Conv3dStaticSamePadding(nn.Conv3d):
    """Padding of TensorFlow's SAME for an image size known in advance."""

    def __init__(self, *args: Any, image_size: tuple[int, int, int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        pads: list[int] = []
        for i, k, s in zip(reversed(image_size), reversed(self.kernel_size), reversed(self.stride), strict=True):
            pad = max((math.ceil(i / s) - 1) * s + k - i, 0)
            pads += [pad // 2, pad - pad // 2]
        self.static_padding = nn.ZeroPad3d(tuple(pads)) if any(pads) else nn.Identity()  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = self.static_padding(x)
        return F.conv3d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class MBConvBlock(nn.Module):
    def __init__(self, inp: int, oup: int, kernel: int, stride: int, size: tuple[int, int, int]) -> None:
        super().__init__()
        mid = inp * 2
        self.skip = stride == 1 and inp == oup
        self._expand_conv = Conv3dStaticSamePadding(inp, mid, 1, bias=False, image_size=size)
        self._bn0 = nn.BatchNorm3d(mid, momentum=0.01, eps=1e-3)
        self._depthwise_conv = Conv3dStaticSamePadding(
            mid, mid, kernel, stride=stride, groups=mid, bias=False, image_size=size
        )
        self._bn1 = nn.BatchNorm3d(mid, momentum=0.01, eps=1e-3)
        self._se_reduce = nn.Conv3d(mid, 2, 1)
        self._se_expand = nn.Conv3d(2, mid, 1)
        self._project_conv = nn.Conv3d(mid, oup, 1, bias=False)
        self._bn2 = nn.BatchNorm3d(oup, momentum=0.01, eps=1e-3)

    def forward(self, inputs: Tensor, drop_connect_rate: float | None = 0.2) -> Tensor:
        x = MemoryEfficientSwish.apply(self._bn0(self._expand_conv(inputs)))
        x = MemoryEfficientSwish.apply(self._bn1(self._depthwise_conv(x)))
        x_squeezed = F.adaptive_avg_pool3d(x, 1)
        x_squeezed = self._se_expand(MemoryEfficientSwish.apply(self._se_reduce(x_squeezed)))
        x = torch.sigmoid(x_squeezed) * x
        x = self._bn2(self._project_conv(x))
        if self.skip:
            if drop_connect_rate:
                x = drop_connect(x, p=drop_connect_rate, training=self.training)
            x = x + inputs
        return x


@network((1, 3, 16, 16, 16))
class EfficientNet3D(nn.Module):
    """EfficientNet: static SAME padding, squeeze-and-excitation in each block, swish as an autograd function."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = Conv3dStaticSamePadding(3, 8, 3, stride=2, bias=False, image_size=(16, 16, 16))
        self._bn0 = nn.BatchNorm3d(8)
        self._blocks = nn.ModuleList(
            [
                MBConvBlock(8, 8, 3, 1, (8, 8, 8)),
                MBConvBlock(8, 12, 5, 2, (8, 8, 8)),
                MBConvBlock(12, 12, 3, 1, (4, 4, 4)),
            ]
        )
        self._conv_head = nn.Conv3d(12, 16, 1, bias=False)
        self._bn1 = nn.BatchNorm3d(16)
        self._avg_pooling = nn.AdaptiveAvgPool3d(1)
        self._dropout = nn.Dropout(0.2)
        self._fc = nn.Linear(16, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        x = MemoryEfficientSwish.apply(self._bn0(self._conv_stem(inputs)))
        for idx, block in enumerate(self._blocks):
            x = block(x, drop_connect_rate=0.2 * float(idx) / len(self._blocks))
        x = MemoryEfficientSwish.apply(self._bn1(self._conv_head(x)))
        x = self._avg_pooling(x).flatten(start_dim=1)
        return self._fc(self._dropout(x))


@network((1, 3, 8, 32, 32))
class GhostNet3D(nn.Module):
    """Ghost modules: half of the features by a cheap depthwise convolution, cropped to what was asked for."""

    class Ghost(nn.Module):
        def __init__(self, inp: int, oup: int) -> None:
            super().__init__()
            self.oup = oup
            init = math.ceil(oup / 2)
            self.primary = nn.Sequential(
                nn.Conv3d(inp, init, 1, bias=False), nn.BatchNorm3d(init), nn.ReLU(inplace=True)
            )
            self.cheap = nn.Sequential(
                nn.Conv3d(init, init, 3, 1, 1, groups=init, bias=False), nn.BatchNorm3d(init), nn.ReLU(inplace=True)
            )

        def forward(self, x: Tensor) -> Tensor:
            x1 = self.primary(x)
            x2 = self.cheap(x1)
            out = torch.cat([x1, x2], dim=1)
            return out[:, : self.oup, :, :, :]

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8, (1, 2, 2))
        self.ghost1, self.ghost2 = self.Ghost(8, 13), self.Ghost(13, 8)
        self.down = nn.Conv3d(13, 13, (3, 5, 5), (2, 2, 2), (1, 2, 2), groups=13)
        self.short = nn.Sequential(nn.Conv3d(8, 8, (3, 3, 3), 2, 1, groups=8), nn.Conv3d(8, 8, 1))
        self.head = nn.Conv3d(8, 16, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.ghost2(self.down(self.ghost1(x))) + self.short(x)
        x = F.hardswish(self.head(F.adaptive_avg_pool3d(x, (1, 1, 1))))
        return self.fc(x.view(x.size(0), -1))


@network((1, 3, 8, 32, 32))
class MobileNetV3(nn.Module):
    """Hard swish by ReLU6, squeeze-and-excitation by views, a kernel of five frames."""

    class Squeeze(nn.Module):
        def __init__(self, channel: int) -> None:
            super().__init__()
            self.avg_pool = nn.AdaptiveAvgPool3d(1)
            self.fc = nn.Sequential(
                nn.Linear(channel, channel // 4), nn.ReLU(inplace=True), nn.Linear(channel // 4, channel)
            )

        def forward(self, x: Tensor) -> Tensor:
            b, c, _, _, _ = x.size()
            y = self.avg_pool(x).view(b, c)
            y = self.fc(y).view(b, c, 1, 1, 1)
            return x * (F.relu6(y + 3, inplace=True) / 6).expand_as(x)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(3, 8, 3, (1, 2, 2), 1, bias=False), nn.BatchNorm3d(8))
        self.expand = nn.Sequential(nn.Conv3d(8, 16, 1, bias=False), nn.BatchNorm3d(16))
        self.depth = nn.Sequential(nn.Conv3d(16, 16, 5, 2, 2, groups=16, bias=False), nn.BatchNorm3d(16))
        self.se = self.Squeeze(16)
        self.project = nn.Sequential(nn.Conv3d(16, 12, 1, bias=False), nn.BatchNorm3d(12))
        self.fc = nn.Linear(12, 5)

    @staticmethod
    def swish(x: Tensor) -> Tensor:
        return x * F.relu6(x + 3.0) / 6.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.swish(self.stem(x))
        x = self.swish(self.expand(x))
        x = self.project(self.swish(self.se(self.depth(x))))
        return self.fc(F.avg_pool3d(x, x.shape[-3:]).view(-1, 12))
