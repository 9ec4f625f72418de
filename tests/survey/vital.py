"""Pulse from faces: PhysNet, DeepPhys, TS-CAN, EfficientPhys, RhythmNet, temporal difference convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from survey import network


@network((1, 3, 16, 32, 32))
class PhysNet(nn.Module):
    """PhysNet: time pooled away twice and brought back by transposed convolutions, one value a frame, and features."""

    def __init__(self) -> None:
        super().__init__()

        def block(inputs: int, out: int, kernel: tuple[int, int, int], padding: tuple[int, int, int]) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv3d(inputs, out, kernel, stride=1, padding=padding), nn.BatchNorm3d(out), nn.ReLU(inplace=True)
            )

        self.ConvBlock1 = block(3, 4, (1, 5, 5), (0, 2, 2))
        self.ConvBlock2 = block(4, 8, (3, 3, 3), (1, 1, 1))
        self.ConvBlock3 = block(8, 8, (3, 3, 3), (1, 1, 1))
        self.ConvBlock4 = block(8, 8, (3, 3, 3), (1, 1, 1))
        self.upsample = nn.Sequential(
            nn.ConvTranspose3d(8, 8, kernel_size=(4, 1, 1), stride=(2, 1, 1), padding=(1, 0, 0)),
            nn.BatchNorm3d(8),
            nn.ELU(),
        )
        self.upsample2 = nn.Sequential(
            nn.ConvTranspose3d(8, 8, kernel_size=(4, 1, 1), stride=(2, 1, 1), padding=(1, 0, 0)),
            nn.BatchNorm3d(8),
            nn.ELU(),
        )
        self.ConvBlock10 = nn.Conv3d(8, 1, (1, 1, 1), stride=1, padding=0)
        self.MaxpoolSpa = nn.MaxPool3d((1, 2, 2), stride=(1, 2, 2))
        self.MaxpoolSpaTem = nn.MaxPool3d((2, 2, 2), stride=2)
        self.poolspa = nn.AdaptiveAvgPool3d((16, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _, _, length, _, _ = x.shape
        x = self.MaxpoolSpa(self.ConvBlock1(x))
        x_visual = self.ConvBlock2(x)
        x = self.MaxpoolSpaTem(x_visual)
        x = self.MaxpoolSpaTem(self.ConvBlock3(x))
        x = self.ConvBlock4(x)
        x = self.upsample2(self.upsample(x))
        x = self.poolspa(x)
        x = self.ConvBlock10(x)
        return x.view(-1, length), x_visual


class AttentionMask(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        xsum = torch.sum(x, dim=2, keepdim=True)
        xsum = torch.sum(xsum, dim=3, keepdim=True)
        xshape = tuple(x.size())
        return x / xsum * xshape[2] * xshape[3] * 0.5


@network((1, 8, 6, 16, 16), time_dim=1)
class DeepPhys(nn.Module):
    """DeepPhys: normalised differences and the frame itself as six channels, appearance gates motion, frame by frame."""

    def __init__(self) -> None:
        super().__init__()
        self.motion_conv1, self.motion_conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3)
        self.apperance_conv1, self.apperance_conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3)
        self.apperance_att_conv1 = nn.Conv2d(8, 1, 1)
        self.attn_mask_1 = AttentionMask()
        self.final_dense_1, self.final_dense_2 = nn.Linear(8 * 7 * 7, 16), nn.Linear(16, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        b, t = inputs.shape[:2]
        inputs = inputs.view(b * t, *inputs.shape[2:])
        diff_input, raw_input = inputs[:, :3, :, :], inputs[:, 3:, :, :]
        d = torch.tanh(self.motion_conv2(torch.tanh(self.motion_conv1(diff_input))))
        r = torch.tanh(self.apperance_conv2(torch.tanh(self.apperance_conv1(raw_input))))
        mask = self.attn_mask_1(torch.sigmoid(self.apperance_att_conv1(r)))
        d = F.avg_pool2d(d * mask, 2)
        d = torch.tanh(self.final_dense_1(d.view(d.size(0), -1)))
        return self.final_dense_2(d).view(b, t)


@network((1, 3, 9, 16, 16))
class DifferenceDeepPhys(nn.Module):
    """Differences made inside: the next frame minus this one over their sum, appearance of the first of the two."""

    def __init__(self) -> None:
        super().__init__()
        self.motion, self.appearance = (
            nn.Conv3d(3, 8, (1, 3, 3), padding=(0, 1, 1)),
            nn.Conv3d(3, 8, (1, 3, 3), padding=(0, 1, 1)),
        )
        self.fc = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        motion = (x[:, :, 1:] - x[:, :, :-1]) / (x[:, :, 1:] + x[:, :, :-1] + 1e-7)
        y = torch.tanh(self.motion(motion)) * torch.sigmoid(self.appearance(x[:, :, :-1]))
        return self.fc(y.mean((3, 4)).transpose(1, 2)).squeeze(-1)


class TSM(nn.Module):
    def __init__(self, n_segment: int = 10, fold_div: int = 3) -> None:
        super().__init__()
        self.n_segment, self.fold_div = n_segment, fold_div

    def forward(self, x: Tensor) -> Tensor:
        nt, c, h, w = x.size()
        n_batch = nt // self.n_segment
        x = x.view(n_batch, self.n_segment, c, h, w)
        fold = c // self.fold_div
        out = torch.zeros_like(x)
        out[:, :-1, :fold] = x[:, 1:, :fold]
        out[:, 1:, fold : 2 * fold] = x[:, :-1, fold : 2 * fold]
        out[:, :, 2 * fold :] = x[:, :, 2 * fold :]
        return out.view(nt, c, h, w)


@network((8, 6, 16, 16), layout="(b=1 t=8) c h w")
class TSCAN(nn.Module):
    """TS-CAN: frames merged with the batch from the start, shifts in the motion branch, masks from the appearance."""

    def __init__(self) -> None:
        super().__init__()
        self.TSM_1, self.TSM_2 = TSM(8), TSM(8)
        self.motion_conv1, self.motion_conv2 = nn.Conv2d(3, 9, 3, padding=1), nn.Conv2d(9, 9, 3)
        self.apperance_conv1, self.apperance_conv2 = nn.Conv2d(3, 9, 3, padding=1), nn.Conv2d(9, 9, 3)
        self.att = nn.Conv2d(9, 1, 1)
        self.attn_mask = AttentionMask()
        self.fc = nn.Linear(9 * 7 * 7, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        diff_input, raw_input = inputs[:, :3], inputs[:, 3:]
        d = torch.tanh(self.motion_conv1(self.TSM_1(diff_input)))
        d = torch.tanh(self.motion_conv2(self.TSM_2(d)))
        r = torch.tanh(self.apperance_conv2(torch.tanh(self.apperance_conv1(raw_input))))
        d = F.avg_pool2d(d * self.attn_mask(torch.sigmoid(self.att(r))), 2)
        return self.fc(d.view(d.size(0), -1))


@network((1, 3, 9, 16, 16))
class EfficientPhys(nn.Module):
    """EfficientPhys: torch.diff along time, a batch norm of the differences, shifts, self-attention masks."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm2d(3)
        self.TSM = TSM(8)
        self.motion_conv1, self.motion_conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3)
        self.att, self.attn_mask = nn.Conv2d(8, 1, 1), AttentionMask()
        self.fc = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        b = x.shape[0]
        x = torch.diff(x, dim=1)
        x = self.batch_norm(x.flatten(0, 1))
        d = torch.tanh(self.motion_conv2(torch.tanh(self.motion_conv1(self.TSM(x)))))
        d = d * self.attn_mask(torch.sigmoid(self.att(d)))
        return self.fc(d.mean((2, 3))).view(b, 8)


@network((1, 3, 12, 16, 16))
class RhythmNet(nn.Module):
    """RhythmNet: a 2D trunk a frame, a GRU, a value a frame and their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.rnn = nn.GRU(8, 6, num_layers=1, batch_first=True)
        self.fc = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        b, c, t, h, w = x.shape
        y = self.trunk(x.transpose(1, 2).reshape(b * t, c, h, w)).view(b, t, -1)
        out, _ = self.rnn(y)
        hr = self.fc(out.flatten(0, 1)).view(b, t)
        return hr, hr.mean(1)


class DifferenceConv(nn.Module):
    """A convolution minus a share of its temporal neighbours' weights at the centre."""

    def __init__(self, inputs: int, out: int, theta: float = 0.6) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, out, 3, padding=1, bias=False)
        self.theta = theta

    def forward(self, x: Tensor) -> Tensor:
        out_normal = self.conv(x)
        kernel_diff = self.conv.weight[:, :, 0, :, :].sum(2).sum(2) + self.conv.weight[:, :, 2, :, :].sum(2).sum(2)
        kernel_diff = kernel_diff[:, :, None, None, None]
        out_diff = F.conv3d(input=x, weight=kernel_diff, bias=self.conv.bias, stride=self.conv.stride, padding=0)
        return out_normal - self.theta * out_diff


@network((1, 3, 8, 16, 16))
class PhysFormer(nn.Module):
    """PhysFormer: temporal difference convolutions make queries and keys of all tokens, attention with gra_sharp, then time up."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv3d(3, 8, (1, 5, 5), padding=(0, 2, 2)), nn.BatchNorm3d(8), nn.ReLU(), nn.MaxPool3d((1, 2, 2))
        )
        self.patch_embedding = nn.Conv3d(8, 8, (4, 4, 4), (4, 4, 4))
        self.proj_q = nn.Sequential(DifferenceConv(8, 8), nn.BatchNorm3d(8))
        self.proj_k = nn.Sequential(DifferenceConv(8, 8), nn.BatchNorm3d(8))
        self.proj_v, self.proj, self.norm1 = nn.Conv3d(8, 8, 1, bias=False), nn.Linear(8, 8), nn.LayerNorm(8)
        self.upsample = nn.Sequential(
            nn.Upsample(scale_factor=(2, 1, 1)),
            nn.Conv3d(8, 8, (3, 1, 1), padding=(1, 0, 0)),
            nn.BatchNorm3d(8),
            nn.ELU(),
        )
        self.upsample2 = nn.Sequential(
            nn.Upsample(scale_factor=(2, 1, 1)),
            nn.Conv3d(8, 4, (3, 1, 1), padding=(1, 0, 0)),
            nn.BatchNorm3d(4),
            nn.ELU(),
        )
        self.last = nn.Conv1d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embedding(self.stem(x))
        x = x.flatten(2).transpose(1, 2)
        B, P, C = x.shape
        y = self.norm1(x).transpose(1, 2).view(B, C, P // 4, 2, 2)
        q, k, v = (part.flatten(2).transpose(1, 2) for part in (self.proj_q(y), self.proj_k(y), self.proj_v(y)))
        q, k, v = (part.view(B, -1, 2, C // 2).transpose(1, 2) for part in (q, k, v))
        scores = F.softmax(q @ k.transpose(-2, -1) / 2.0, dim=-1)
        h = (scores @ v).transpose(1, 2).contiguous().view(B, P, C)
        x = x + self.proj(h)
        features = x.transpose(1, 2).view(B, C, P // 4, 2, 2)
        features = self.upsample2(self.upsample(features))
        features = torch.mean(torch.mean(features, 3), 3)
        return self.last(features).squeeze(1)
