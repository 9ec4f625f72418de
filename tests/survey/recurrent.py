"""Recurrence and temporal heads: ConvLSTM, ConvGRU, PredRNN, lip reading, temporal convolutional networks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from survey import network


class ConvLSTMCell(nn.Module):
    def __init__(self, input_dim: int, hidden_dim: int, kernel_size: tuple[int, int] = (3, 3)) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim
        padding = kernel_size[0] // 2, kernel_size[1] // 2
        self.conv = nn.Conv2d(input_dim + hidden_dim, 4 * hidden_dim, kernel_size, padding=padding)

    def forward(self, input_tensor: Tensor, cur_state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h_cur, c_cur = cur_state
        combined_conv = self.conv(torch.cat([input_tensor, h_cur], dim=1))
        cc_i, cc_f, cc_o, cc_g = torch.split(combined_conv, self.hidden_dim, dim=1)
        i, f, o, g = torch.sigmoid(cc_i), torch.sigmoid(cc_f), torch.sigmoid(cc_o), torch.tanh(cc_g)
        c_next = f * c_cur + i * g
        return o * torch.tanh(c_next), c_next

    def init_hidden(self, batch_size: int, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        shape = batch_size, self.hidden_dim, *image_size
        where = {"device": self.conv.weight.device, "dtype": self.conv.weight.dtype}
        return torch.zeros(shape, **where), torch.zeros(shape, **where)


@network((1, 6, 3, 8, 8), time_dim=1)
class ConvLSTM(nn.Module):
    """Two layers of ConvLSTM in ndrplz's manner: a loop over layers around a loop over frames, outputs stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.cell_list = nn.ModuleList([ConvLSTMCell(3, 4), ConvLSTMCell(4, 4)])
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, input_tensor: Tensor) -> tuple[Tensor, Tensor]:
        b, seq_len, _, h, w = input_tensor.size()
        hidden_state = [cell.init_hidden(b, (h, w)) for cell in self.cell_list]
        cur_layer_input = input_tensor
        for layer_idx, cell in enumerate(self.cell_list):
            h_t, c_t = hidden_state[layer_idx]
            output_inner = []
            for t in range(seq_len):
                h_t, c_t = cell(input_tensor=cur_layer_input[:, t, :, :, :], cur_state=[h_t, c_t])
                output_inner.append(h_t)
            cur_layer_input = torch.stack(output_inner, dim=1)
        return self.head(h_t), cur_layer_input


@network((1, 3, 6, 8, 8))
class ConvGRU(nn.Module):
    """A 3D stem, a ConvGRU that is asked with None at first, the last hidden map's scores."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 4, 3, padding=1)
        self.gates, self.candidate = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.fc = nn.Linear(4, 5)

    def cell(self, x: Tensor, h: Tensor | None) -> Tensor:
        if h is None:
            h = torch.zeros_like(x)
        update, reset = torch.sigmoid(self.gates(torch.cat((x, h), 1))).chunk(2, 1)
        new = torch.tanh(self.candidate(torch.cat((x, reset * h), 1)))
        return h * (1 - update) + new * update

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        h: Tensor | None = None
        for frame in x.unbind(2):
            h = self.cell(frame, h)
        assert h is not None
        return self.fc(h.mean((2, 3)))


@network((1, 6, 4, 8, 8), time_dim=1)
class PredRNN(nn.Module):
    """PredRNN: a memory that zigzags through the layers of each frame and on to the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_x = nn.ModuleList([nn.Conv2d(4, 28, 3, padding=1) for _ in range(2)])
        self.conv_h = nn.ModuleList([nn.Conv2d(4, 16, 3, padding=1) for _ in range(2)])
        self.conv_m = nn.ModuleList([nn.Conv2d(4, 12, 3, padding=1) for _ in range(2)])
        self.conv_o = nn.ModuleList([nn.Conv2d(8, 4, 3, padding=1) for _ in range(2)])
        self.conv_last = nn.Conv2d(4, 4, 1)

    def cell(self, i: int, x: Tensor, h: Tensor, c: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        i_x, f_x, g_x, i_xp, f_xp, g_xp, o_x = torch.split(self.conv_x[i](x), 4, dim=1)
        i_h, f_h, g_h, o_h = torch.split(self.conv_h[i](h), 4, dim=1)
        i_m, f_m, g_m = torch.split(self.conv_m[i](m), 4, dim=1)
        c_new = torch.sigmoid(f_x + f_h + 1.0) * c + torch.sigmoid(i_x + i_h) * torch.tanh(g_x + g_h)
        m_new = torch.sigmoid(f_xp + f_m + 1.0) * m + torch.sigmoid(i_xp + i_m) * torch.tanh(g_xp + g_m)
        mem = torch.cat((c_new, m_new), 1)
        return torch.sigmoid(o_x + o_h) * torch.tanh(self.conv_o[i](mem)), c_new, m_new

    def forward(self, frames: Tensor) -> Tensor:
        b, length, c, height, width = frames.shape
        zeros = torch.zeros(b, 4, height, width, dtype=frames.dtype, device=frames.device)
        h_t, c_t, memory = [zeros, zeros], [zeros, zeros], zeros
        next_frames = []
        for t in range(length):
            net = frames[:, t]
            h_t[0], c_t[0], memory = self.cell(0, net, h_t[0], c_t[0], memory)
            h_t[1], c_t[1], memory = self.cell(1, h_t[0], h_t[1], c_t[1], memory)
            next_frames.append(self.conv_last(h_t[1]))
        return torch.stack(next_frames, dim=0).permute(1, 0, 2, 3, 4).contiguous()


class FrameNet(nn.Module):
    """A 2D trunk on single frames."""

    def __init__(self, out: int = 8) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, out, 3, 2, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 2, 1, bias=False), nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x))).mean((2, 3))


@network((1, 6, 3, 16, 16), time_dim=1)
class CNNLSTM(nn.Module):
    """A loop over frames collects trunk features, stacked and transposed for an LSTM that is not batch first."""

    def __init__(self) -> None:
        super().__init__()
        self.resnet = FrameNet()
        self.LSTM = nn.LSTM(8, 6, num_layers=3)
        self.fc1, self.fc2 = nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x_3d: Tensor) -> Tensor:
        cnn_embed_seq = []
        for t in range(x_3d.size(1)):
            x = self.resnet(x_3d[:, t, :, :, :])
            cnn_embed_seq.append(x.view(x.size(0), -1))
        embedded = torch.stack(cnn_embed_seq, dim=0)
        self.LSTM.flatten_parameters()
        out, _ = self.LSTM(embedded, None)
        x = F.relu(self.fc1(out[-1, :, :]))
        return self.fc2(F.dropout(x, p=0.3, training=self.training))


@network((1, 6, 3, 16, 16), time_dim=1)
class LoopedLSTM(nn.Module):
    """The classic tutorial: an LSTM called in a loop, frame by frame, its hidden values passed on."""

    def __init__(self) -> None:
        super().__init__()
        self.resnet = FrameNet()
        self.lstm = nn.LSTM(input_size=8, hidden_size=6, num_layers=2)
        self.fc = nn.Linear(6, 5)

    def forward(self, x_3d: Tensor) -> Tensor:
        hidden = None
        for t in range(x_3d.size(1)):
            x = self.resnet(x_3d[:, t])
            out, hidden = self.lstm(x.unsqueeze(0), hidden)
        return self.fc(F.relu(out[-1, :, :]))


@network((1, 6, 3, 16, 16), time_dim=1, refused="both directions")
class BidirectionalLSTM(nn.Module):
    """An LSTM in both directions, attention over its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.cnn = FrameNet()
        self.lstm = nn.LSTM(8, 6, batch_first=True, bidirectional=True)
        self.attn, self.fc = nn.Linear(12, 1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, t = x.shape[:2]
        out, _ = self.lstm(self.cnn(x.flatten(0, 1)).view(b, t, -1))
        return self.fc((out * self.attn(out).softmax(1)).sum(1))


@network((1, 1, 12, 32, 32))
class LipReadingTCN(nn.Module):
    """Lip reading: a 3D stem, a 2D ResNet, a multi-scale TCN that chomps symmetric padding, a mean over the length."""

    class Branch(nn.Module):
        def __init__(self, inputs: int, out: int, kernel: int, dilation: int) -> None:
            super().__init__()
            padding = (kernel - 1) * dilation
            self.conv = nn.Conv1d(inputs, out, kernel, padding=padding, dilation=dilation)
            self.batchnorm, self.chomp, self.non_lin = nn.BatchNorm1d(out), padding // 2, nn.PReLU(out)

        def forward(self, x: Tensor) -> Tensor:
            out = self.batchnorm(self.conv(x))
            if self.chomp:
                out = out[:, :, self.chomp : -self.chomp].contiguous()
            return self.non_lin(out)

    def __init__(self) -> None:
        super().__init__()
        self.frontend3D = nn.Sequential(
            nn.Conv3d(1, 8, (5, 7, 7), (1, 2, 2), (2, 3, 3), bias=False),
            nn.BatchNorm3d(8),
            nn.PReLU(num_parameters=8),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
        )
        self.trunk = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.PReLU(8), nn.AdaptiveAvgPool2d(1))
        self.tcn1 = nn.ModuleList([self.Branch(8, 4, kernel, 1) for kernel in (3, 5, 7)])
        self.tcn2 = nn.ModuleList([self.Branch(12, 4, kernel, 2) for kernel in (3, 5, 7)])
        self.down = nn.Conv1d(8, 12, 1)
        self.output = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        B, C, T, H, W = x.size()
        x = self.frontend3D(x)
        Tnew = x.shape[2]
        n_batch, n_channels, s_time, sx, sy = x.shape
        x = x.transpose(1, 2).reshape(n_batch * s_time, n_channels, sx, sy)
        x = self.trunk(x).view(B, Tnew, -1)
        x = x.transpose(1, 2)
        y = F.relu(torch.cat([branch(x) for branch in self.tcn1], 1) + self.down(x))
        y = F.relu(torch.cat([branch(y) for branch in self.tcn2], 1) + y)
        lengths = [T] * B
        out = torch.cat([torch.mean(y[index][:, 0:i], 1).unsqueeze(0) for index, i in enumerate(lengths)], 0)
        return self.output(out)


@network((1, 3, 12, 16, 16))
class MultiStageTCN(nn.Module):
    """MS-TCN: frame features, stages of dilated residual layers, each refining the softmax of the one before; all stages out."""

    class Stage(nn.Module):
        def __init__(self, inputs: int) -> None:
            super().__init__()
            self.conv_1x1, self.conv_out = nn.Conv1d(inputs, 6, 1), nn.Conv1d(6, 5, 1)
            self.dilated = nn.ModuleList([nn.Conv1d(6, 6, 3, padding=2**i, dilation=2**i) for i in range(3)])
            self.points = nn.ModuleList([nn.Conv1d(6, 6, 1) for _ in range(3)])

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            out = self.conv_1x1(x)
            for conv, point in zip(self.dilated, self.points, strict=True):
                out = (out + F.dropout(point(F.relu(conv(out))), 0.5, self.training)) * mask[:, 0:1, :]
            return self.conv_out(out) * mask[:, 0:1, :]

    def __init__(self) -> None:
        super().__init__()
        self.cnn = FrameNet()
        self.stage1 = self.Stage(8)
        self.stages = nn.ModuleList([self.Stage(5) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        x = self.cnn(x.permute(0, 2, 1, 3, 4).reshape(-1, c, h, w)).view(b, t, -1).permute(0, 2, 1)
        mask = torch.ones(b, 5, t, dtype=x.dtype)
        out = self.stage1(x, mask)
        outputs = out.unsqueeze(0)
        for s in self.stages:
            out = s(F.softmax(out, dim=1) * mask[:, 0:1, :], mask)
            outputs = torch.cat((outputs, out.unsqueeze(0)), dim=0)
        return outputs


@network((1, 3, 12, 16, 16))
class CausalTCN(nn.Module):
    """A causal TCN: padding on both sides, the right one chomped off; the last frame's scores."""

    def __init__(self) -> None:
        super().__init__()
        self.cnn = FrameNet()
        self.convs = nn.ModuleList(
            [nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 2, padding=2**i, dilation=2**i)) for i in range(3)]
        )
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        y = self.cnn(x.transpose(1, 2).reshape(-1, c, h, w)).view(b, t, 8).transpose(1, 2)
        for i, conv in enumerate(self.convs):
            y = F.relu(F.relu(conv(y)[:, :, : -(2**i)].contiguous()) + y)
        return F.log_softmax(self.linear(y[:, :, -1]), dim=1)


@network((1, 6, 3, 16, 16), time_dim=1)
class UNISAL(nn.Module):
    """Saliency of each frame: a shared encoder, a ConvGRU over time at the bottleneck, a decoder, log-probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.cnn = nn.Conv2d(3, 8, 3, 2, 1)
        self.gates, self.new = nn.Conv2d(12, 8, 3, padding=1), nn.Conv2d(12, 4, 3, padding=1)
        self.post, self.adapt = nn.Conv2d(12, 8, 1), nn.Conv2d(8, 1, 3, padding=1)
        self.gaussian = nn.Parameter(torch.randn(1, 1, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        feats = [F.relu6(self.cnn(x[:, t, ...])) for t in range(x.shape[1])]
        h = feats[0].new_zeros(feats[0].shape[0], 4, *feats[0].shape[2:])
        maps: list[Any] = []
        for feat in feats:
            z, r = torch.sigmoid(self.gates(torch.cat((feat, h), 1))).chunk(2, 1)
            h = (1 - z) * h + z * torch.tanh(self.new(torch.cat((feat, r * h), 1)))
            y = F.relu(self.post(torch.cat((h, feat), 1)))
            y = F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)
            y = self.adapt(y) + self.gaussian
            maps.append(F.log_softmax(y.view(y.size(0), -1), dim=1).view(y.size()))
        return torch.stack(maps, dim=1)
