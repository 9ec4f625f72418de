"""Skeletons and poses: graphs of joints over time, persons beside the batch, heatmap volumes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from survey import network

JOINTS = 5


def graph(parts: int = 3) -> Tensor:
    return torch.rand(parts, JOINTS, JOINTS)


class GraphConv(nn.Module):
    def __init__(self, inputs: int, out: int, parts: int = 3) -> None:
        super().__init__()
        self.kernel_size = parts
        self.conv = nn.Conv2d(inputs, out * parts, kernel_size=(1, 1))

    def forward(self, x: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv(x)
        n, kc, t, v = x.size()
        x = x.view(n, self.kernel_size, kc // self.kernel_size, t, v)
        x = torch.einsum("nkctv,kvw->nctw", (x, A))
        return x.contiguous(), A


class GraphBlock(nn.Module):
    def __init__(self, inputs: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.gcn = GraphConv(inputs, out)
        self.tcn = nn.Sequential(
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
            nn.Conv2d(out, out, (9, 1), (stride, 1), (4, 0)),
            nn.BatchNorm2d(out),
            nn.Dropout(0, inplace=True),
        )
        self.residual = nn.Sequential(nn.Conv2d(inputs, out, kernel_size=1, stride=(stride, 1)), nn.BatchNorm2d(out))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        res = self.residual(x)
        x, A = self.gcn(x, A)
        x = self.tcn(x) + res
        return self.relu(x), A


@network((1, 3, 16, JOINTS, 2))
class STGCN(nn.Module):
    """ST-GCN: a batch norm over persons, joints and channels, graph convolutions weighed by learned edges, a pool over all."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("A", graph())
        self.data_bn = nn.BatchNorm1d(3 * JOINTS)
        self.st_gcn_networks = nn.ModuleList([GraphBlock(3, 8), GraphBlock(8, 8, 2)])
        self.edge_importance = nn.ParameterList([nn.Parameter(torch.ones(3, JOINTS, JOINTS)) for _ in range(2)])
        self.fcn = nn.Conv2d(8, 6, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        N, C, T, V, M = x.size()
        x = x.permute(0, 4, 3, 1, 2).contiguous()
        x = x.view(N * M, V * C, T)
        x = self.data_bn(x)
        x = x.view(N, M, V, C, T)
        x = x.permute(0, 1, 3, 4, 2).contiguous()
        x = x.view(N * M, C, T, V)
        for gcn, importance in zip(self.st_gcn_networks, self.edge_importance, strict=True):
            x, _ = gcn(x, self.A * importance)
        x = F.avg_pool2d(x, x.size()[2:])
        x = x.view(N, M, -1, 1, 1).mean(dim=1)
        x = self.fcn(x)
        return x.view(x.size(0), -1)


@network((1, 3, 16, JOINTS, 2))
class AdaptiveGraph(nn.Module):
    """2s-AGCN: the graph itself from the whole clip, a softmax over joints of products summed over time."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("A", graph(1)[0])
        self.PA = nn.Parameter(torch.rand(JOINTS, JOINTS))
        self.stem = nn.Conv2d(3, 8, (3, 1), padding=(1, 0))
        self.conv_a, self.conv_b, self.conv_d = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 8, 1)
        self.tcn = nn.Conv2d(8, 8, (9, 1), (2, 1), (4, 0))
        self.fc = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        N, C, T, V, M = x.size()
        x = x.permute(0, 4, 1, 2, 3).contiguous().view(N * M, C, T, V)
        x = self.stem(x)
        A1 = self.conv_a(x).permute(0, 3, 1, 2).contiguous().view(N * M, V, 4 * T)
        A2 = self.conv_b(x).view(N * M, 4 * T, V)
        A1 = torch.softmax(torch.matmul(A1, A2) / A1.size(-1), -2) + self.A + self.PA
        y = self.conv_d(torch.matmul(x.view(N * M, 8 * T, V), A1).view(N * M, 8, T, V))
        x = F.relu(self.tcn(F.relu(y + x)))
        x = x.view(N, M, x.size(1), -1)
        return self.fc(x.mean(3).mean(1))


@network((1, 3, 16, JOINTS, 2))
class CTRGCN(nn.Module):
    """CTR-GCN: a topology for each channel from features averaged over time, einsum over joints; a temporal pyramid."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("A", graph(1)[0])
        self.conv1, self.conv2, self.conv3, self.conv4 = (
            nn.Conv2d(i, o, 1) for i, o in ((3, 4), (3, 4), (3, 8), (4, 8))
        )
        self.branches = nn.ModuleList(
            [nn.Conv2d(8, 4, (5, 1), (2, 1), (2 * d, 0), (d, 1)) for d in (1, 2)]
            + [nn.Sequential(nn.Conv2d(8, 4, 1), nn.MaxPool2d((3, 1), (2, 1), (1, 0)))]
        )
        self.fc = nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        N, C, T, V, M = x.size()
        x = x.permute(0, 4, 1, 2, 3).contiguous().view(N * M, C, T, V)
        x1, x2, x3 = self.conv1(x).mean(-2), self.conv2(x).mean(-2), self.conv3(x)
        x1 = torch.tanh(x1.unsqueeze(-1) - x2.unsqueeze(-2))
        x1 = self.conv4(x1) + self.A.unsqueeze(0).unsqueeze(0)
        x = torch.einsum("ncuv,nctv->nctu", x1, x3)
        x = torch.cat([branch(F.relu(x)) for branch in self.branches], dim=1)
        x = x.view(N, M, 12, -1)
        return self.fc(x.mean(3).mean(1))


@network((1, JOINTS, 16, 16, 16))
class PoseC3D(nn.Module):
    """PoseConv3D: heatmaps of joints as channels, a slow-only trunk whose later kernels see time."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(JOINTS, 8, (1, 7, 7), 1, (0, 3, 3)), nn.BatchNorm3d(8), nn.ReLU())
        self.stage1 = nn.Sequential(nn.Conv3d(8, 8, (1, 3, 3), (1, 2, 2), (0, 1, 1)), nn.BatchNorm3d(8), nn.ReLU())
        self.stage2 = nn.Sequential(
            nn.Conv3d(8, 12, (3, 1, 1), padding=(1, 0, 0)),
            nn.Conv3d(12, 12, (1, 3, 3), (1, 2, 2), (0, 1, 1)),
            nn.ReLU(),
        )
        self.head = nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool3d(self.stage2(self.stage1(self.stem(x))), 1)
        return self.head(x.view(x.shape[0], -1))


@network((1, 16, JOINTS, 3), time_dim=1)
class SGN(nn.Module):
    """SGN: positions and velocities of joints, a graph a frame, the index of the frame as a constant, maxima."""

    def __init__(self) -> None:
        super().__init__()
        self.joint, self.dif = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
        self.register_buffer("tem", torch.eye(16))
        self.tem_embed = nn.Conv2d(16, 8, 1)
        self.g1, self.g2 = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.gcn = nn.Conv2d(8, 8, 1)
        self.cnn = nn.Sequential(nn.Conv2d(8, 8, (1, 3), padding=(0, 1)), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        b, step, joints, dim = x.shape
        x = x.permute(0, 3, 2, 1).contiguous()
        dif = x[:, :, :, 1:] - x[:, :, :, 0:-1]
        dif = torch.cat([dif.new(b, dif.size(1), joints, 1).zero_(), dif], dim=-1)
        y = F.relu(self.joint(x)) + F.relu(self.dif(dif))
        g1 = self.g1(y).permute(0, 3, 2, 1).contiguous()
        g2 = self.g2(y).permute(0, 3, 1, 2).contiguous()
        g = torch.softmax(g1.matmul(g2), dim=-1)
        y = self.gcn(g.matmul(y.permute(0, 3, 2, 1)).permute(0, 3, 2, 1))
        tem = self.tem_embed(self.tem.unsqueeze(0).unsqueeze(2).expand(b, -1, joints, -1).to(y.dtype))
        y = F.adaptive_max_pool2d(F.relu(y + tem), (1, step))
        y = F.adaptive_max_pool2d(self.cnn(y), (1, 1))
        return self.fc(torch.flatten(y, 1))


@network((1, 3, 16, JOINTS), refused="no whole factor")
class HCN(nn.Module):
    """HCN: joints as channels after a transposition, motion resampled to the clip's length, a flattened head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, (3, 1), padding=(1, 0))
        self.conv3 = nn.Sequential(nn.Conv2d(JOINTS, 8, 3, 1, 1), nn.MaxPool2d(2, 2))
        self.conv1m, self.conv2m = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, (3, 1), padding=(1, 0))
        self.conv3m = nn.Sequential(nn.Conv2d(JOINTS, 8, 3, 1, 1), nn.MaxPool2d(2, 2))
        self.fc7 = nn.Linear(16 * 8 * 2, 6)

    def forward(self, x: Tensor) -> Tensor:
        N, C, T, V = x.size()
        motion = x[:, :, 1::, :] - x[:, :, 0:-1, :]
        motion = F.interpolate(motion, size=(T, V), mode="bilinear", align_corners=False).contiguous()
        out = self.conv2(F.relu(self.conv1(x))).permute(0, 3, 2, 1).contiguous()
        out = self.conv3(out)
        m = self.conv2m(F.relu(self.conv1m(motion))).permute(0, 3, 2, 1).contiguous()
        m = self.conv3m(m)
        out = F.relu(torch.cat((out, m), dim=1))
        return self.fc7(out.view(out.size(0), -1))
