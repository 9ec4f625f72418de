"""Networks over segments and motion modules: 2D trunks in which frames meet by shifts, differences and 1D convolutions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from survey import network

SEGMENTS = 8


class Segmental(nn.Module):
    """A stem, one module of the subclass on ``(N * T, C, H, W)``, scores of every frame, their mean."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.n_segment = SEGMENTS
        self.conv1 = nn.Conv2d(3, channels, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.new_fc = nn.Linear(channels, 5)

    def module(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        x = input.view((-1, 3) + input.size()[-2:])
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.conv2(self.module(x)))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        out = self.new_fc(F.dropout(x, 0.8, self.training))
        out = out.view((-1, self.n_segment) + out.size()[1:])
        return out.mean(dim=1, keepdim=True).squeeze(1)


segments = network((1, 3 * SEGMENTS, 16, 16), layout="b (t=8 c) h w")


@segments
class TSM(Segmental):
    """Temporal shift, out of place, into zeros."""

    def module(self, x: Tensor) -> Tensor:
        nt, c, h, w = x.size()
        n_batch = nt // self.n_segment
        x = x.view(n_batch, self.n_segment, c, h, w)
        fold = c // 8
        out = torch.zeros_like(x)
        out[:, :-1, :fold] = x[:, 1:, :fold]
        out[:, 1:, fold : 2 * fold] = x[:, :-1, fold : 2 * fold]
        out[:, :, 2 * fold :] = x[:, :, 2 * fold :]
        return out.view(nt, c, h, w)


@segments
class TSMInPlace(Segmental):
    """Temporal shift in place: buffers of new zeros are filled and written back into the input."""

    def module(self, x: Tensor) -> Tensor:
        nt, c, h, w = x.size()
        x = x.view(nt // self.n_segment, self.n_segment, c, h, w).clone()
        fold = c // 8
        left = x[:, :, :fold]
        buffer = left.data.new(left.size()).zero_().to(left)
        buffer[:, :-1] = left.data[:, 1:]
        x.data[:, :, :fold] = buffer
        right = x[:, :, fold : 2 * fold]
        buffer = right.data.new(right.size()).zero_().to(right)
        buffer[:, 1:] = right.data[:, :-1]
        x.data[:, :, fold : 2 * fold] = buffer
        return x.view(nt, c, h, w)


@segments
class TSMConcatenated(Segmental):
    """Temporal shift by padding and concatenation, split by channels."""

    def module(self, x: Tensor) -> Tensor:
        nt, c, h, w = x.size()
        x = x.view(nt // self.n_segment, self.n_segment, c, h, w)
        x1, x2, x3 = x.split([c // 4, c // 4, c - c // 2], dim=2)
        x1 = F.pad(x1[:, 1:], (0, 0, 0, 0, 0, 0, 0, 1))
        x2 = torch.cat((torch.zeros_like(x2[:, :1]), x2[:, :-1]), dim=1)
        return torch.cat((x1, x2, x3), dim=2).view(nt, c, h, w)


@segments
class TSMOnline(Segmental):
    """Uni-directional temporal shift by roll; the first frame's is overwritten."""

    def module(self, x: Tensor) -> Tensor:
        nt, c, h, w = x.size()
        y = x.reshape(-1, self.n_segment, c, h, w)
        shifted = torch.roll(y[:, :, : c // 8], 1, dims=1)
        shifted = torch.cat((torch.zeros_like(shifted[:, 0:1]), shifted[:, 1:]), 1)
        return torch.cat((shifted, y[:, :, c // 8 :]), 2).reshape(nt, c, h, w)


@segments
class TEA(Segmental):
    """Motion excitation: squeezed differences of neighbouring frames, padded by a zero at the end, gate the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.Sequential(nn.Conv2d(16, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.transform = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.expand = nn.Sequential(nn.Conv2d(4, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.pad = (0, 0, 0, 0, 0, 0, 0, 1)
        self.shift = nn.Conv1d(16, 16, 3, padding=1, groups=16, bias=False)
        self.shift.weight.requires_grad = True
        self.shift.weight.data.zero_()
        self.shift.weight.data[:2, 0, 2] = 1
        self.shift.weight.data[2:4, 0, 0] = 1

    def module(self, x: Tensor) -> Tensor:
        nt, c, h, w = x.size()
        bottleneck = self.squeeze(x)
        reshape = bottleneck.view((-1, self.n_segment) + bottleneck.size()[1:])
        t_fea, _ = reshape.split([self.n_segment - 1, 1], dim=1)
        conv = self.transform(bottleneck)
        conv = conv.view((-1, self.n_segment) + conv.size()[1:])
        _, tplus = conv.split([1, self.n_segment - 1], dim=1)
        diff = tplus - t_fea
        diff = F.pad(diff, self.pad, mode="constant", value=0).view((-1,) + diff.size()[2:])
        y = F.adaptive_avg_pool2d(diff, 1)
        y = torch.sigmoid(self.expand(y)) - 0.5
        x = x + x * y.expand_as(x)
        x = x.view(-1, self.n_segment, c, h, w).permute([0, 3, 4, 2, 1])
        x = x.contiguous().view(-1, c, self.n_segment)
        x = self.shift(x)
        x = x.view(-1, h, w, c, self.n_segment).permute([0, 4, 3, 1, 2])
        return x.contiguous().view(nt, c, h, w)


@segments
class ACTION(Segmental):
    """Spatio-temporal, channel and motion excitation in parallel, added."""

    def __init__(self) -> None:
        super().__init__()
        self.p1_conv1 = nn.Conv3d(1, 1, 3, padding=1, bias=False)
        self.p2_squeeze = nn.Conv2d(16, 4, 1, bias=False)
        self.p2_conv1 = nn.Conv1d(4, 4, 3, padding=1, bias=False)
        self.p2_expand = nn.Conv2d(4, 16, 1, bias=False)
        self.p3_squeeze = nn.Conv2d(16, 4, 1, bias=False)
        self.p3_bn1 = nn.BatchNorm2d(4)
        self.p3_conv1 = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.p3_expand = nn.Conv2d(4, 16, 1, bias=False)

    def module(self, x: Tensor) -> Tensor:
        nt, c, h, w = x.size()
        n = nt // self.n_segment
        x_p1 = x.view(n, self.n_segment, c, h, w).transpose(2, 1).contiguous().mean(1, keepdim=True)
        x_p1 = self.p1_conv1(x_p1).transpose(2, 1).contiguous().view(nt, 1, h, w)
        x_p1 = x * torch.sigmoid(x_p1) + x
        x_p2 = self.p2_squeeze(F.adaptive_avg_pool2d(x, 1))
        x_p2 = x_p2.view(n, self.n_segment, 4, 1, 1).squeeze(-1).squeeze(-1).transpose(2, 1).contiguous()
        x_p2 = F.relu(self.p2_conv1(x_p2)).transpose(2, 1).contiguous().view(-1, 4, 1, 1)
        x_p2 = x * torch.sigmoid(self.p2_expand(x_p2)) + x
        x3 = self.p3_bn1(self.p3_squeeze(x))
        _, x3_plus0 = x3.view(n, self.n_segment, 4, h, w).split([1, self.n_segment - 1], dim=1)
        x3_plus1 = self.p3_conv1(x3).view(n, self.n_segment, 4, h, w)
        x3_plus1, _ = x3_plus1.split([self.n_segment - 1, 1], dim=1)
        x_p3 = x3_plus1 - x3_plus0
        x_p3 = F.pad(x_p3, (0, 0, 0, 0, 0, 0, 0, 1), mode="constant", value=0)
        x_p3 = self.p3_expand(F.adaptive_avg_pool2d(x_p3.view(nt, 4, h, w), 1))
        x_p3 = x * torch.sigmoid(x_p3) + x
        return x_p1 + x_p2 + x_p3


@segments
class STM(Segmental):
    """Channel-wise spatio-temporal and channel-wise motion modules: the last frame's motion is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.cstm = nn.Conv1d(16, 16, 3, padding=1, groups=16, bias=False)
        self.reduce = nn.Conv2d(16, 4, 1)
        self.cmm = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.restore = nn.Conv2d(4, 16, 1)

    def module(self, x: Tensor) -> Tensor:
        nt, c, h, w = x.shape
        t = self.n_segment
        y = x.view(-1, t, c, h, w).permute(0, 3, 4, 2, 1).contiguous().view(-1, c, t)
        y = self.cstm(y).view(-1, h, w, c, t).permute(0, 4, 3, 1, 2).contiguous().view(nt, c, h, w)
        m = self.reduce(x)
        moved = self.cmm(m).view(-1, t, 4, h, w)
        m = m.view(-1, t, 4, h, w)
        frames = [moved[:, i + 1] - m[:, i] for i in range(t - 1)]
        frames.append(torch.zeros_like(frames[0]))
        m = torch.stack(frames, 1).view(-1, 4, h, w)
        return y + self.restore(m)


@segments
class TAM(Segmental):
    """Temporal adaptive module: a kernel over time made from the whole clip, and a local gate by 1D convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.G = nn.Sequential(
            nn.Linear(SEGMENTS, SEGMENTS * 2, bias=False),
            nn.BatchNorm1d(SEGMENTS * 2),
            nn.ReLU(inplace=True),
            nn.Linear(SEGMENTS * 2, 3, bias=False),
            nn.Softmax(-1),
        )
        self.L = nn.Sequential(
            nn.Conv1d(16, 4, 3, padding=1, bias=False),
            nn.BatchNorm1d(4),
            nn.ReLU(inplace=True),
            nn.Conv1d(4, 16, 1, bias=False),
            nn.Sigmoid(),
        )

    def module(self, x: Tensor) -> Tensor:
        nt, c, h, w = x.size()
        t = self.n_segment
        n_batch = nt // t
        new_x = x.view(n_batch, t, c, h, w).permute(0, 2, 1, 3, 4).contiguous()
        out = F.adaptive_avg_pool2d(new_x.view(n_batch * c, t, h, w), output_size=(1, 1))
        out = out.view(-1, t)
        conv_kernel = self.G(out.view(-1, t)).view(n_batch * c, 1, -1, 1)
        local_activation = self.L(out.view(n_batch, c, t)).view(n_batch, c, t, 1, 1)
        new_x = new_x * local_activation
        out = F.conv2d(
            new_x.view(1, n_batch * c, t, h * w),
            conv_kernel,
            bias=None,
            stride=(1, 1),
            padding=(1, 0),
            groups=n_batch * c,
        )
        out = out.view(n_batch, c, t, h, w)
        return out.permute(0, 2, 1, 3, 4).contiguous().view(nt, c, h, w)


@segments
class GSM(Segmental):
    """Gate shift: a 3D convolution gates groups of channels, which shift forwards and backwards with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm3d(16)
        self.conv3D = nn.Conv3d(16, 2, (3, 3, 3), stride=1, padding=(1, 1, 1), groups=2)

    def lshift_zeroPad(self, x: Tensor) -> Tensor:
        return torch.cat((x[:, :, 1:], torch.zeros(x.size(0), x.size(1), 1, x.size(3), x.size(4)).to(x)), dim=2)

    def rshift_zeroPad(self, x: Tensor) -> Tensor:
        return torch.cat((torch.zeros(x.size(0), x.size(1), 1, x.size(3), x.size(4)).to(x), x[:, :, :-1]), dim=2)

    def module(self, x: Tensor) -> Tensor:
        batch_size = x.size(0) // self.n_segment
        shape = x.size(1), x.size(2), x.size(3)
        x = x.view(batch_size, self.n_segment, *shape).permute(0, 2, 1, 3, 4).contiguous()
        x_bn_relu = F.relu(self.bn(x))
        gate = torch.tanh(self.conv3D(x_bn_relu))
        gate_group1 = gate[:, 0].unsqueeze(1)
        gate_group2 = gate[:, 1].unsqueeze(1)
        x_group1 = x[:, : 16 // 2]
        x_group2 = x[:, 16 // 2 :]
        y_group1 = gate_group1 * x_group1
        y_group2 = gate_group2 * x_group2
        r_group1 = x_group1 - y_group1
        r_group2 = x_group2 - y_group2
        y_group1 = self.lshift_zeroPad(y_group1) + r_group1
        y_group2 = self.rshift_zeroPad(y_group2) + r_group2
        y_group1 = y_group1.view(batch_size, 2, 4, self.n_segment, *shape[1:]).permute(0, 2, 1, 3, 4, 5)
        y_group2 = y_group2.view(batch_size, 2, 4, self.n_segment, *shape[1:]).permute(0, 2, 1, 3, 4, 5)
        y = torch.cat(
            (
                y_group1.contiguous().view(batch_size, 8, self.n_segment, *shape[1:]),
                y_group2.contiguous().view(batch_size, 8, self.n_segment, *shape[1:]),
            ),
            dim=1,
        )
        return y.permute(0, 2, 1, 3, 4).contiguous().view(batch_size * self.n_segment, *shape)


@segments
class TEINet(Segmental):
    """Motion enhanced: differences pad the end by the last frame; then channel-wise temporal interaction."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Conv2d(16, 16, 1)
        self.interact = nn.Conv3d(16, 16, (3, 1, 1), padding=(1, 0, 0), groups=16, bias=False)

    def module(self, x: Tensor) -> Tensor:
        nt, c, h, w = x.shape
        pooled = F.adaptive_avg_pool2d(x, 1).view(-1, self.n_segment, c)
        ahead = torch.cat([pooled[:, 1:], pooled[:, -1:]], 1)
        gate = torch.sigmoid(self.gate((ahead - pooled).view(nt, c, 1, 1)))
        x = (x * gate).view(-1, self.n_segment, c, h, w).transpose(1, 2)
        return self.interact(x).transpose(1, 2).reshape(nt, c, h, w)


@segments
class GST(Segmental):
    """Grouped spatial and temporal: 3D convolutions of two kinds on parts of the channels, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.spatial = nn.Conv3d(12, 12, (1, 3, 3), padding=(0, 1, 1))
        self.temporal = nn.Conv3d(4, 4, 3, padding=1)

    def module(self, x: Tensor) -> Tensor:
        x = x.view(-1, self.n_segment, *x.shape[1:]).transpose(1, 2).contiguous()
        x = torch.cat((self.spatial(x[:, :12]), self.temporal(x[:, 12:])), 1)
        return x.transpose(1, 2).contiguous().view(-1, *x.shape[1:2], *x.shape[3:])


@network((1, 6, 5, 3, 16, 16), time_dim=1)
class TDN(nn.Module):
    """Temporal difference network: five frames a segment, differences of neighbours added to the middle one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, 2, 3)
        self.conv1_5 = nn.Conv2d(12, 8, 7, 2, 3)
        self.avg_diff = nn.AvgPool2d(2, 2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, n = x.shape[:2]
        x = x.view(b * n, 15, *x.shape[-2:])
        x1, x2, x3, x4, x5 = (x[:, 3 * i : 3 * i + 3] for i in range(5))
        x_c5 = torch.cat([x2 - x1, x3 - x2, x4 - x3, x5 - x4], 1)
        diff = self.conv1_5(self.avg_diff(x_c5.view(-1, 12, *x.shape[-2:])))
        x = self.conv1(x3)
        x = 0.5 * x + 0.5 * F.interpolate(diff, x.size()[2:])
        x = F.relu(x).mean((2, 3))
        return self.fc(x).view(b, n, -1).mean(1)


@network((1, 8, 3, 16, 16), time_dim=1)
class TRN(nn.Module):
    """Temporal relation network: frame features of pairs and triples of all frames, in order, by their own perceptrons."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.scales = [8, 4, 2]
        self.relations = [[tuple(range(8))], [(0, 2, 4, 6), (1, 3, 5, 7), (0, 1, 5, 7)], [(0, 7), (2, 3), (4, 6)]]
        self.fc_fusion_scales = nn.ModuleList(
            [nn.Sequential(nn.ReLU(), nn.Linear(scale * 8, 6), nn.ReLU(), nn.Linear(6, 5)) for scale in self.scales]
        )

    def forward(self, x: Tensor) -> Tensor:
        b, t = x.shape[:2]
        input = self.base(x.flatten(0, 1)).view(b, t, -1)
        act_all = self.fc_fusion_scales[0](input[:, self.relations[0][0], :].view(b, -1))
        for scale in range(1, len(self.scales)):
            for relation in self.relations[scale]:
                act = input[:, relation, :].view(input.size(0), self.scales[scale] * 8)
                act_all += self.fc_fusion_scales[scale](act)
        return act_all


@network((1, 6, 3, 16, 16), time_dim=1)
class TIN(nn.Module):
    """Temporal interlacing: groups of channels shift by offsets learned from the clip, frames interpolated."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.offset = nn.Conv1d(8, 1, 3, padding=1)
        self.fc = nn.Linear(6, 2)
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, t = x.shape[:2]
        x = F.relu(self.conv(x.flatten(0, 1)))
        x = x.view(b, t, *x.shape[1:])
        y = self.offset(x.mean((3, 4)).transpose(1, 2)).squeeze(1)
        shift = torch.sigmoid(self.fc(y)) - 0.5
        ahead = torch.cat((x[:, 1:], torch.zeros_like(x[:, :1])), 1)
        behind = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1)
        parts = []
        for group, part in enumerate((slice(0, 4), slice(4, 8))):
            s = shift[:, group].view(b, 1, 1, 1, 1)
            parts.append(
                x[:, :, part] * (1 - s.abs()) + F.relu(s) * ahead[:, :, part] + F.relu(-s) * behind[:, :, part]
            )
        x = torch.cat(parts, 2)
        return self.out(x.mean((1, 3, 4)))


@network((1, 3, 16, 16, 16))
class Timeception(nn.Module):
    """Timeception: grouped depthwise convolutions over time of kernels 3, 5, 7 and a pool, shuffled, halved in time."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 8, (1, 7, 7), (1, 2, 2), (0, 3, 3))
        self.groups = nn.ModuleList([self.group() for _ in range(2)])
        self.fc = nn.Linear(20, 5)

    def group(self) -> nn.ModuleDict:
        return nn.ModuleDict(
            {
                "conv0": nn.Conv3d(4, 2, 1),
                **{
                    f"conv{k}": nn.Sequential(
                        nn.Conv3d(4, 2, 1),
                        nn.BatchNorm3d(2),
                        nn.Conv3d(2, 2, (k, 1, 1), padding=(k // 2, 0, 0), groups=2),
                        nn.BatchNorm3d(2),
                    )
                    for k in (3, 5, 7)
                },
                "pool": nn.Sequential(nn.MaxPool3d((2, 1, 1), 1, padding=(1, 0, 0)), nn.Conv3d(4, 2, 1)),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        outs: list[Any] = []
        for group, part in zip(self.groups, x.chunk(2, 1), strict=True):
            pooled = group["pool"][0](part)[:, :, :-1]
            branches = [group["conv0"](part), *[group[f"conv{k}"](part) for k in (3, 5, 7)], group["pool"][1](pooled)]
            outs.append(torch.cat(branches, 1))
        x = torch.cat(outs, 1)
        b, c, t, h, w = x.shape
        x = x.view(b, 2, c // 2, t, h, w).transpose(1, 2).reshape(b, c, t, h, w)
        x = F.max_pool3d(F.relu(x), (2, 1, 1))
        return self.fc(x.mean((3, 4)).max(2)[0])
