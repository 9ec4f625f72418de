"""Inception's children: I3D, S3D-G, C3D, ECO, BN-Inception over segments."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from survey import network


class MaxPool3dSamePadding(nn.MaxPool3d):
    def compute_pad(self, dim: int, s: int) -> int:
        if s % self.stride[dim] == 0:
            return max(self.kernel_size[dim] - self.stride[dim], 0)
        return max(self.kernel_size[dim] - (s % self.stride[dim]), 0)

    def forward(self, x: Tensor) -> Tensor:
        _, _, t, h, w = x.size()
        pad_t = self.compute_pad(0, t)
        pad_h = self.compute_pad(1, h)
        pad_w = self.compute_pad(2, w)
        pad_t_f = pad_t // 2
        pad_h_f = pad_h // 2
        pad_w_f = pad_w // 2
        x = F.pad(x, (pad_w_f, pad_w - pad_w_f, pad_h_f, pad_h - pad_h_f, pad_t_f, pad_t - pad_t_f))
        return super().forward(x)


class Unit3D(nn.Module):
    def __init__(
        self,
        in_channels: int,
        output_channels: int,
        kernel_shape: Any = (1, 1, 1),
        stride: Any = (1, 1, 1),
        activation_fn: Any = F.relu,
        use_batch_norm: bool = True,
        use_bias: bool = False,
    ) -> None:
        super().__init__()
        self._kernel_shape, self._stride = kernel_shape, stride
        self._activation_fn = activation_fn
        self.conv3d = nn.Conv3d(in_channels, output_channels, kernel_shape, stride, padding=0, bias=use_bias)
        self.bn = nn.BatchNorm3d(output_channels, eps=0.001, momentum=0.01) if use_batch_norm else None

    def compute_pad(self, dim: int, s: int) -> int:
        if s % self._stride[dim] == 0:
            return max(self._kernel_shape[dim] - self._stride[dim], 0)
        return max(self._kernel_shape[dim] - (s % self._stride[dim]), 0)

    def forward(self, x: Tensor) -> Tensor:
        _, _, t, h, w = x.size()
        np.ceil(float(t) / float(self._stride[0]))
        pad_t, pad_h, pad_w = self.compute_pad(0, t), self.compute_pad(1, h), self.compute_pad(2, w)
        pad = (pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2, pad_t // 2, pad_t - pad_t // 2)
        x = self.conv3d(F.pad(x, pad))
        if self.bn is not None:
            x = self.bn(x)
        if self._activation_fn is not None:
            x = self._activation_fn(x)
        return x


class InceptionModule(nn.Module):
    def __init__(self, in_channels: int, out: list[int]) -> None:
        super().__init__()
        self.b0 = Unit3D(in_channels, out[0])
        self.b1a = Unit3D(in_channels, out[1])
        self.b1b = Unit3D(out[1], out[2], (3, 3, 3))
        self.b2a = Unit3D(in_channels, out[3])
        self.b2b = Unit3D(out[3], out[4], (3, 3, 3))
        self.b3a = MaxPool3dSamePadding(kernel_size=[3, 3, 3], stride=(1, 1, 1), padding=0)
        self.b3b = Unit3D(in_channels, out[5])

    def forward(self, x: Tensor) -> Tensor:
        b0 = self.b0(x)
        b1 = self.b1b(self.b1a(x))
        b2 = self.b2b(self.b2a(x))
        b3 = self.b3b(self.b3a(x))
        return torch.cat([b0, b1, b2, b3], dim=1)


@network((1, 3, 17, 32, 32))
class InceptionI3d(nn.Module):
    """I3D in piergiaj's manner: end points by name, SAME paddings of every layer, logits for each position left."""

    VALID_ENDPOINTS = ("Conv3d_1a", "MaxPool3d_2a", "Conv3d_2c", "Mixed_3b", "MaxPool3d_4a", "Mixed_4b", "MaxPool3d_5a")

    def __init__(self) -> None:
        super().__init__()
        self.end_points: dict[str, nn.Module] = {
            "Conv3d_1a": Unit3D(3, 8, [7, 7, 7], (2, 2, 2)),
            "MaxPool3d_2a": MaxPool3dSamePadding(kernel_size=[1, 3, 3], stride=(1, 2, 2), padding=0),
            "Conv3d_2c": Unit3D(8, 8, [3, 3, 3]),
            "Mixed_3b": InceptionModule(8, [4, 4, 4, 2, 4, 4]),
            "MaxPool3d_4a": MaxPool3dSamePadding(kernel_size=[3, 3, 3], stride=(2, 2, 2), padding=0),
            "Mixed_4b": InceptionModule(16, [4, 4, 4, 2, 4, 4]),
            "MaxPool3d_5a": MaxPool3dSamePadding(kernel_size=[2, 2, 2], stride=(2, 2, 2), padding=0),
        }
        self.avg_pool = nn.AvgPool3d(kernel_size=[2, 2, 2], stride=(1, 1, 1))
        self.dropout = nn.Dropout(0.5)
        self.logits = Unit3D(16, 5, activation_fn=None, use_batch_norm=False, use_bias=True)
        self.build()

    def build(self) -> None:
        for k in self.end_points:
            self.add_module(k, self.end_points[k])

    def forward(self, x: Tensor) -> Tensor:
        for end_point in self.VALID_ENDPOINTS:
            if end_point in self.end_points:
                x = self._modules[end_point](x)
        x = self.logits(self.dropout(self.avg_pool(x)))
        return x.squeeze(3).squeeze(3)


class SepConv3d(nn.Module):
    def __init__(self, inputs: int, out: int, kernel: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.conv_s = nn.Conv3d(
            inputs, out, (1, kernel, kernel), (1, stride, stride), (0, padding, padding), bias=False
        )
        self.bn_s = nn.BatchNorm3d(out, eps=1e-3, momentum=0.001)
        self.conv_t = nn.Conv3d(out, out, (kernel, 1, 1), (stride, 1, 1), (padding, 0, 0), bias=False)
        self.bn_t = nn.BatchNorm3d(out, eps=1e-3, momentum=0.001)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn_t(self.conv_t(self.relu(self.bn_s(self.conv_s(x))))))


class SelfGating(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        averaged = torch.mean(x, dim=[2, 3, 4])
        weights = torch.sigmoid(self.fc(averaged))
        return weights[:, :, None, None, None] * x


@network((1, 3, 16, 32, 32))
class S3DG(nn.Module):
    """S3D with feature gating: the clip's average weighs the channels of every frame."""

    class Mixed(nn.Module):
        def __init__(self, inputs: int) -> None:
            super().__init__()
            self.branch0 = nn.Conv3d(inputs, 4, 1)
            self.branch1 = nn.Sequential(nn.Conv3d(inputs, 4, 1), nn.ReLU(), SepConv3d(4, 6, 3, 1, 1))
            self.branch3 = nn.Sequential(nn.MaxPool3d(3, 1, 1), nn.Conv3d(inputs, 4, 1))
            self.gates = nn.ModuleList([SelfGating(4), SelfGating(6), SelfGating(4)])

        def forward(self, x: Tensor) -> Tensor:
            parts = [self.branch0(x), self.branch1(x), self.branch3(x)]
            return torch.cat([gate(part) for gate, part in zip(self.gates, parts, strict=True)], dim=1)

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Sequential(
            SepConv3d(3, 8, 7, 2, 3),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
            self.Mixed(8),
            nn.MaxPool3d((3, 3, 3), (2, 2, 2), (1, 1, 1)),
            self.Mixed(14),
            nn.MaxPool3d((2, 2, 2), (2, 2, 2), (0, 0, 0)),
        )
        self.fc = nn.Sequential(nn.Conv3d(14, 5, kernel_size=1, stride=1, bias=True))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        y = F.avg_pool3d(y, (2, y.size(3), y.size(4)), stride=1)
        y = self.fc(y)
        y = y.view(y.size(0), y.size(1), y.size(2))
        return torch.mean(y, 2)


@network((1, 3, 16, 32, 32))
class C3D(nn.Module):
    """C3D: eight convolutions in short, the last pool padded in space, three linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(3, 4, kernel_size=(3, 3, 3), padding=(1, 1, 1))
        self.pool1 = nn.MaxPool3d(kernel_size=(1, 2, 2), stride=(1, 2, 2))
        self.conv2 = nn.Conv3d(4, 8, kernel_size=(3, 3, 3), padding=(1, 1, 1))
        self.pool2 = nn.MaxPool3d(kernel_size=(2, 2, 2), stride=(2, 2, 2))
        self.conv3a = nn.Conv3d(8, 8, kernel_size=(3, 3, 3), padding=(1, 1, 1))
        self.conv3b = nn.Conv3d(8, 8, kernel_size=(3, 3, 3), padding=(1, 1, 1))
        self.pool3 = nn.MaxPool3d(kernel_size=(2, 2, 2), stride=(2, 2, 2))
        self.conv4a = nn.Conv3d(8, 8, kernel_size=(3, 3, 3), padding=(1, 1, 1))
        self.pool4 = nn.MaxPool3d(kernel_size=(2, 2, 2), stride=(2, 2, 2))
        self.conv5a = nn.Conv3d(8, 8, kernel_size=(3, 3, 3), padding=(1, 1, 1))
        self.pool5 = nn.MaxPool3d(kernel_size=(2, 2, 2), stride=(2, 2, 2), padding=(0, 1, 1))
        self.fc6 = nn.Linear(32, 16)
        self.fc7 = nn.Linear(16, 16)
        self.fc8 = nn.Linear(16, 5)
        self.dropout = nn.Dropout(p=0.5)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.relu(self.conv1(x)))
        x = self.pool2(self.relu(self.conv2(x)))
        x = self.relu(self.conv3b(self.relu(self.conv3a(x))))
        x = self.pool4(self.relu(self.conv4a(self.pool3(x))))
        x = self.pool5(self.relu(self.conv5a(x)))
        x = x.view(-1, 32)
        x = self.dropout(self.relu(self.fc6(x)))
        x = self.dropout(self.relu(self.fc7(x)))
        return self.fc8(x)


@network((1, 24, 32, 32), layout="b (t=8 c) h w")
class ECO(nn.Module):
    """ECO: segments as channels, a 2D front, views to a volume, 3D residual blocks, a pool of all that is left."""

    segments = 8

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Sequential(
            nn.Conv2d(3, 8, 7, 2, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(True),
            nn.MaxPool2d(3, 2, dilation=1, ceil_mode=True),
        )
        self.res3a_2 = nn.Conv3d(8, 8, 3, padding=1)
        self.res3a_bn = nn.BatchNorm3d(8)
        self.res3b_1 = nn.Conv3d(8, 8, 3, padding=1)
        self.res4a_1 = nn.Conv3d(8, 12, 3, stride=2, padding=1)
        self.res4a_down = nn.Conv3d(8, 12, 3, stride=2, padding=1)
        self.res5a_1 = nn.Conv3d(12, 12, 3, stride=2, padding=1)
        self.global_pool = nn.AvgPool3d((2, 2, 2), stride=1)
        self.fc_final = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.front(x.view((-1, 3) + x.size()[-2:]))
        y = y.view((-1, self.segments) + y.size()[1:])
        y = torch.transpose(y, 1, 2).contiguous()
        a = self.res3a_2(y)
        y = F.relu(self.res3a_bn(a))
        y = self.res3b_1(y) + a
        y = F.relu(y)
        y = F.relu(self.res4a_1(y) + self.res4a_down(y))
        y = self.res5a_1(y)
        y = self.global_pool(y)
        y = y.view(y.size()[0], -1)
        return self.fc_final(F.dropout(y, 0.3, self.training))


@network((1, 3, 16, 32, 32))
class ECOFull(nn.Module):
    """ECO's full version: beside the 3D branch a 2D branch, whose frame features are averaged by a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Sequential(nn.Conv2d(3, 8, 7, 4, 3), nn.BatchNorm2d(8), nn.ReLU(True))
        self.volume = nn.Sequential(
            nn.Conv3d(8, 8, 3, 2, 1), nn.BatchNorm3d(8), nn.ReLU(True), nn.Conv3d(8, 8, 3, 2, 1)
        )
        self.plane = nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU(True), nn.AdaptiveAvgPool2d(1))
        self.fc = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        y = self.front(x.permute(0, 2, 1, 3, 4).reshape(b * t, c, h, w))
        v = self.volume(y.view(b, t, *y.shape[1:]).transpose(1, 2))
        v = F.avg_pool3d(v, v.shape[2:]).view(b, -1)
        p = self.plane(y).view(b, 1, t, -1)
        p = F.avg_pool2d(p, (t, 1)).view(b, -1)
        return self.fc(torch.cat((v, p), 1))
