"""Attention over time and space: non-local blocks, gates, transformers and their hybrids."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from survey import network


class NonLocalBlock(nn.Module):
    """Positions of the whole clip against one another; keys may be pooled first."""

    def __init__(self, in_channels: int, mode: str, sub_sample: bool = True) -> None:
        super().__init__()
        self.mode = mode
        self.inter_channels = max(in_channels // 2, 1)
        self.g: nn.Module = nn.Conv3d(in_channels, self.inter_channels, 1)
        self.W = nn.Sequential(nn.Conv3d(self.inter_channels, in_channels, 1), nn.BatchNorm3d(in_channels))
        self.theta: nn.Module = nn.Conv3d(in_channels, self.inter_channels, 1)
        self.phi: nn.Module = nn.Conv3d(in_channels, self.inter_channels, 1)
        if mode == "concatenation":
            self.concat_project = nn.Sequential(nn.Conv2d(self.inter_channels * 2, 1, 1, bias=False), nn.ReLU())
        if sub_sample:
            pool = nn.MaxPool3d(kernel_size=(1, 2, 2))
            self.g = nn.Sequential(self.g, pool)
            self.phi = pool if mode == "gaussian" else nn.Sequential(self.phi, pool)

    def forward(self, x: Tensor) -> Tensor:
        batch_size = x.size(0)
        g_x = self.g(x).view(batch_size, self.inter_channels, -1)
        g_x = g_x.permute(0, 2, 1)
        if self.mode == "gaussian":
            theta_x = x.view(batch_size, x.size(1), -1).permute(0, 2, 1)
            phi_x = self.phi(x).view(batch_size, x.size(1), -1)
            f_div_C = F.softmax(torch.matmul(theta_x, phi_x), dim=-1)
        elif self.mode == "concatenation":
            theta_x = self.theta(x).view(batch_size, self.inter_channels, -1, 1)
            phi_x = self.phi(x).view(batch_size, self.inter_channels, 1, -1)
            h, w = theta_x.size(2), phi_x.size(3)
            theta_x = theta_x.repeat(1, 1, 1, w)
            phi_x = phi_x.repeat(1, 1, h, 1)
            f = self.concat_project(torch.cat([theta_x, phi_x], dim=1))
            b, _, h, w = f.size()
            f = f.view(b, h, w)
            f_div_C = f / f.size(-1)
        else:
            theta_x = self.theta(x).view(batch_size, self.inter_channels, -1).permute(0, 2, 1)
            phi_x = self.phi(x).view(batch_size, self.inter_channels, -1)
            f = torch.matmul(theta_x, phi_x)
            f_div_C = f / f.size(-1) if self.mode == "dot" else F.softmax(f, dim=-1)
        y = torch.matmul(f_div_C, g_x)
        y = y.permute(0, 2, 1).contiguous()
        y = y.view(batch_size, self.inter_channels, *x.size()[2:])
        return self.W(y) + x


class NonLocal(nn.Module):
    mode = "embedded"

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(3, 8, 3, (1, 2, 2), 1), nn.BatchNorm3d(8), nn.ReLU(), nn.MaxPool3d(2))
        self.block = NonLocalBlock(8, self.mode, self.mode != "dot")
        self.conv = nn.Conv3d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(self.block(self.stem(x))))
        return self.fc(F.adaptive_avg_pool3d(x, 1).flatten(1))


@network((1, 3, 8, 16, 16))
class NonLocalEmbedded(NonLocal):
    """Non-local block, embedded Gaussian, pooled keys."""


@network((1, 3, 8, 16, 16))
class NonLocalGaussian(NonLocal):
    """Non-local block, Gaussian, pooled keys."""

    mode = "gaussian"


@network((1, 3, 8, 16, 16))
class NonLocalDot(NonLocal):
    """Non-local block, dot product over the number of positions."""

    mode = "dot"


@network((1, 3, 8, 16, 16))
class NonLocalConcatenated(NonLocal):
    """Non-local block by concatenation: both operands repeated to a matrix of positions."""

    mode = "concatenation"


@network((1, 3, 8, 16, 16))
class GCNet(nn.Module):
    """Global context: one softmax over all positions of the clip, a bottleneck with layer norm, added to every position."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 8, (1, 3, 3), (1, 2, 2), (0, 1, 1))
        self.conv_mask = nn.Conv3d(8, 1, 1)
        self.softmax = nn.Softmax(dim=2)
        self.add = nn.Sequential(nn.Conv3d(8, 4, 1), nn.LayerNorm([4, 1, 1, 1]), nn.ReLU(True), nn.Conv3d(4, 8, 1))
        self.conv = nn.Conv3d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        b, c = x.shape[:2]
        input_x = x.view(b, c, -1).unsqueeze(1)
        mask = self.softmax(self.conv_mask(x).view(b, 1, -1)).unsqueeze(3)
        context = torch.matmul(input_x, mask).view(b, c, 1, 1, 1)
        x = x + self.add(context)
        return self.fc(F.relu(self.conv(x)).mean([-3, -2, -1]))


@network((1, 3, 8, 16, 16))
class CBAM3D(nn.Module):
    """Channel attention by mean and maximum of the clip, then spatial attention by mean and maximum over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(3, 8, 3, (1, 2, 2), 1), nn.BatchNorm3d(8), nn.ReLU())
        self.mlp = nn.Sequential(nn.Conv3d(8, 2, 1, bias=False), nn.ReLU(), nn.Conv3d(2, 8, 1, bias=False))
        self.spatial = nn.Conv3d(2, 1, 7, padding=3, bias=False)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        avg, top = self.mlp(F.adaptive_avg_pool3d(x, 1)), self.mlp(F.adaptive_max_pool3d(x, 1))
        x = torch.sigmoid(avg + top) * x
        pooled = torch.cat([torch.mean(x, dim=1, keepdim=True), torch.max(x, dim=1, keepdim=True)[0]], dim=1)
        x = torch.sigmoid(self.spatial(pooled)) * x
        return self.fc(x.mean(dim=(2, 3, 4)))


@network((1, 3, 8, 16, 16))
class TemporalSqueeze(nn.Module):
    """Squeeze-and-excitation over time: each of the clip's frames gets a weight from all of them, by linear layers over T."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 8, 3, (1, 2, 2), 1)
        self.excite = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8), nn.Sigmoid())
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        b, c, t, _, _ = x.size()
        y = x.mean(dim=(1, 3, 4)).view(b, t)
        x = x * self.excite(y).view(b, 1, t, 1, 1)
        return self.fc(x.mean(dim=(2, 3, 4)))


@network((1, 3, 8, 16, 16))
class TemporalAttentionPool(nn.Module):
    """Frame features weighed by a softmax over time, summed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 8, 3, (1, 2, 2), 1)
        self.score = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x)).mean((3, 4)).permute(0, 2, 1)
        weight = torch.softmax(self.score(x), dim=1)
        return self.fc((weight * x).sum(1))


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q @ k.transpose(-2, -1)) * self.scale
        attn = attn.softmax(dim=-1)
        x = (attn @ v).transpose(1, 2).reshape(B, N, C)
        return self.proj(x)


class Mlp(nn.Sequential):
    def __init__(self, dim: int) -> None:
        super().__init__(nn.Linear(dim, dim * 2), nn.GELU(), nn.Linear(dim * 2, dim))


@network((1, 3, 4, 16, 16))
class TimeSformer(nn.Module):
    """Divided attention: over time for each patch, then over space for each frame, with a class token for both."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 8, 8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 8))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, 8))
        self.time_embed = nn.Parameter(torch.randn(1, 4, 8))
        self.temporal_norm1, self.norm1, self.norm2, self.norm = (nn.LayerNorm(8) for _ in range(4))
        self.temporal_attn, self.attn = SelfAttention(8), SelfAttention(8)
        self.temporal_fc = nn.Linear(8, 8)
        self.mlp = Mlp(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        B, C, T, H, W = x.shape
        x = x.permute(0, 2, 1, 3, 4).reshape(B * T, C, H, W)
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.size(0), -1, -1), x), dim=1) + self.pos_embed
        cls_tokens = x[:B, 0, :].unsqueeze(1)
        x = x[:, 1:]
        n, m = x.shape[1], x.shape[2]
        x = x.reshape(B, T, n, m).transpose(1, 2).reshape(B * n, T, m) + self.time_embed
        x = x.reshape(B, n * T, m)
        xt = x.reshape(B * n, T, m)
        res_temporal = self.temporal_attn(self.temporal_norm1(xt))
        res_temporal = self.temporal_fc(res_temporal.reshape(B, n * T, m))
        xt = x + res_temporal
        cls_token = cls_tokens.repeat(1, T, 1).reshape(B * T, m).unsqueeze(1)
        xs = xt.reshape(B, n, T, m).transpose(1, 2).reshape(B * T, n, m)
        xs = torch.cat((cls_token, xs), 1)
        res_spatial = self.attn(self.norm1(xs))
        cls_token = res_spatial[:, 0, :].reshape(B, T, m)
        cls_token = torch.mean(cls_token, 1, True)
        res_spatial = res_spatial[:, 1:, :].reshape(B, T, n, m).transpose(1, 2).reshape(B, n * T, m)
        x = torch.cat((cls_tokens, xt), 1) + torch.cat((cls_token, res_spatial), 1)
        x = x + self.mlp(self.norm2(x))
        return self.head(self.norm(x)[:, 0])


@network((1, 4, 3, 16, 16), time_dim=1)
class ViViTFactorised(nn.Module):
    """Factorised encoder: a spatial transformer a frame, then one over the frames' tokens with a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Flatten(2))
        self.pos_embedding = nn.Parameter(torch.randn(1, 4, 5, 8))
        self.space_token = nn.Parameter(torch.randn(1, 1, 8))
        self.temporal_token = nn.Parameter(torch.randn(1, 1, 8))
        layer = {"d_model": 8, "nhead": 2, "dim_feedforward": 16, "batch_first": True}
        self.space = nn.TransformerEncoder(nn.TransformerEncoderLayer(**layer), 1)
        self.temporal = nn.TransformerEncoder(nn.TransformerEncoderLayer(**layer), 1)
        self.mlp_head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        b, t = x.shape[:2]
        x = self.embed(x.flatten(0, 1)).transpose(1, 2).view(b, t, 4, 8)
        x = torch.cat((self.space_token.expand(b, t, 1, 8), x), dim=2)
        x = x + self.pos_embedding[:, :, :5]
        x = self.space(x.flatten(0, 1))
        x = x[:, 0].view(b, t, 8)
        x = torch.cat((self.temporal_token.expand(b, 1, 8), x), dim=1)
        x = self.temporal(x)
        return self.mlp_head(x[:, 0])


@network((1, 3, 8, 16, 16))
class TubeletViT(nn.Module):
    """Joint attention over tubelets of two frames, a mean of all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv3d(3, 8, (2, 8, 8), (2, 8, 8))
        self.pos = nn.Parameter(torch.randn(1, 16, 8))
        self.norm1, self.norm2, self.norm = nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.attn, self.mlp = SelfAttention(8), Mlp(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.pos
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(self.norm(x.mean(1)))


@network((1, 3, 8, 16, 16), refused="cuts through the time axis")
class SwinBlock(nn.Module):
    """Video Swin's windows: attention inside pieces of two frames, then pieces shifted by one (rolled over the clip's end)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv3d(3, 8, (1, 4, 4), (1, 4, 4))
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attn, self.mlp = SelfAttention(8), Mlp(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).permute(0, 2, 3, 4, 1)
        B, D, H, W, C = x.shape
        shortcut = x
        x = self.norm1(x)
        x = x.view(B, D // 2, 2, H // 2, 2, W // 2, 2, C).permute(0, 1, 3, 5, 2, 4, 6, 7).contiguous().view(-1, 8, C)
        x = self.attn(x)
        x = (
            x.view(B, D // 2, H // 2, W // 2, 2, 2, 2, C)
            .permute(0, 1, 4, 2, 5, 3, 6, 7)
            .contiguous()
            .view(B, D, H, W, C)
        )
        x = shortcut + x
        x = x + self.mlp(self.norm2(x))
        return self.head(x.mean((1, 2, 3)))


@network((1, 3, 8, 16, 16))
class PoolingAttention(nn.Module):
    """MViT: queries, keys and values pooled by strided depthwise 3D convolutions before they meet; the skip is max-pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv3d(3, 8, (3, 7, 7), (2, 4, 4), (1, 3, 3))
        self.norm1, self.norm2, self.norm = nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.pool_q = nn.Conv3d(4, 4, 3, (1, 2, 2), 1, groups=4, bias=False)
        self.pool_k = nn.Conv3d(4, 4, 3, (1, 2, 2), 1, groups=4, bias=False)
        self.pool_v = nn.Conv3d(4, 4, 3, (1, 2, 2), 1, groups=4, bias=False)
        self.norm_q, self.norm_k, self.norm_v = nn.LayerNorm(4), nn.LayerNorm(4), nn.LayerNorm(4)
        self.pool_skip = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))
        self.mlp = Mlp(8)
        self.head = nn.Linear(8, 5)

    def pooled(self, x: Tensor, pool: nn.Module, thw: tuple[int, ...], norm: nn.Module) -> Tensor:
        B, N, _, C = x.shape
        x = x.reshape(B * N, *thw, C).permute(0, 4, 1, 2, 3).contiguous()
        x = pool(x)
        return norm(x.reshape(B, N, C, -1).transpose(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        thw = tuple(x.shape[2:])
        x = x.flatten(2).transpose(1, 2)
        B, N, C = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(B, N, 3, 2, C // 2).permute(2, 0, 3, 1, 4).unbind(0)
        q = self.pooled(q, self.pool_q, thw, self.norm_q)
        k = self.pooled(k, self.pool_k, thw, self.norm_k)
        v = self.pooled(v, self.pool_v, thw, self.norm_v)
        attn = ((q * 0.5) @ k.transpose(-2, -1)).softmax(-1)
        y = attn @ v + q
        y = self.proj(y.transpose(1, 2).reshape(B, -1, C))
        skip = self.pool_skip(x.transpose(1, 2).view(B, C, *thw)).flatten(2).transpose(1, 2)
        x = skip + y
        x = x + self.mlp(self.norm2(x))
        return self.head(self.norm(x).mean(1))


@network((1, 3, 8, 16, 16))
class UniFormer(nn.Module):
    """Local relation by depthwise 3D convolutions first, global attention over all tokens later, batch norms in front."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed1 = nn.Conv3d(3, 8, (3, 4, 4), (2, 4, 4), (1, 0, 0))
        self.pos_embed = nn.Conv3d(8, 8, 3, padding=1, groups=8)
        self.norm1, self.norm2 = nn.BatchNorm3d(8), nn.BatchNorm3d(8)
        self.conv1, self.attn = nn.Conv3d(8, 8, 1), nn.Conv3d(8, 8, 5, padding=2, groups=8)
        self.conv2, self.fc1, self.fc2 = nn.Conv3d(8, 8, 1), nn.Conv3d(8, 16, 1), nn.Conv3d(16, 8, 1)
        self.pos_embed2 = nn.Conv3d(8, 8, 3, padding=1, groups=8)
        self.norm3, self.norm4 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attn2, self.mlp = SelfAttention(8), Mlp(8)
        self.norm, self.head = nn.BatchNorm3d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed1(x)
        x = x + self.pos_embed(x)
        x = x + self.conv2(self.attn(self.conv1(self.norm1(x))))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        x = x + self.pos_embed2(x)
        B, C, T, H, W = x.shape
        x = x.flatten(2).transpose(1, 2)
        x = x + self.attn2(self.norm3(x))
        x = x + self.mlp(self.norm4(x))
        x = x.transpose(1, 2).reshape(B, C, T, H, W)
        return self.head(self.norm(x).flatten(2).mean(-1))


@network((1, 8, 3, 16, 16), time_dim=1)
class MessageToken(nn.Module):
    """X-CLIP: frames exchange a message token each by attention over time; a mean over time, normalised against a text."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 8, 8, bias=False)
        self.message_fc, self.message_ln = nn.Linear(8, 8), nn.LayerNorm(8)
        self.message_attn = nn.MultiheadAttention(8, 2)
        self.attn, self.ln = nn.MultiheadAttention(8, 2), nn.LayerNorm(8)
        self.text = nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        b, t = x.shape[:2]
        x = self.conv1(x.flatten(0, 1)).flatten(2).permute(2, 0, 1)
        l, bt, d = x.size()
        y = x.view(l, b, t, d)
        msg = self.message_fc(y[0])
        msg = msg.permute(1, 0, 2)
        normed = self.message_ln(msg)
        msg = msg + self.message_attn(normed, normed, normed, need_weights=False)[0]
        msg = msg.permute(1, 0, 2).reshape(1, bt, d)
        x = torch.cat([x, msg], dim=0)
        normed = self.ln(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        x = x[0].view(b, t, d).mean(dim=1)
        x = x / x.norm(dim=-1, keepdim=True)
        text = self.text / self.text.norm(dim=-1, keepdim=True)
        return 3.0 * x @ text.t()


@network((1, 8, 3, 16, 16), time_dim=1)
class CausalTransformer(nn.Module):
    """Frame features, a position each, an encoder with a causal mask; scores for every frame."""

    def __init__(self) -> None:
        super().__init__()
        self.cnn = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.register_buffer("mask", torch.triu(torch.full((8, 8), float("-inf"), dtype=torch.float64), 1))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, t = x.shape[:2]
        x = self.cnn(x.view(b * t, *x.shape[2:])).view(b, t, -1)
        mask: Any = self.mask[:t, :t]
        return self.head(self.encoder(x, mask=mask))


@network((1, 3, 8, 16, 16))
class AxialAttention(nn.Module):
    """Attention along each axis of the volume in turn, the others merged with the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 8, 3, (1, 4, 4), 1)
        self.attns = nn.ModuleList([SelfAttention(8) for _ in range(3)])
        self.fc = nn.Linear(8, 5)

    def along(self, x: Tensor, dim: int, attn: nn.Module) -> Tensor:
        x = x.movedim(1, -1).movedim(dim - 1, -2)
        shape = x.shape
        x = attn(x.reshape(-1, *shape[-2:])).reshape(shape)
        return x.movedim(-2, dim - 1).movedim(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for dim, attn in zip((2, 3, 4), self.attns, strict=True):
            x = x + self.along(x, dim, attn)
        return self.fc(x.mean((2, 3, 4)))


@network((1, 3, 6, 10, 8))
class CoordinateAttention(nn.Module):
    """Coordinate attention in 3D: pools along each axis, joined, through one layer, split at the seams, three gates."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 8, 3, padding=1)
        self.conv1 = nn.Conv3d(8, 4, 1)
        self.bn1 = nn.BatchNorm3d(4)
        self.gates = nn.ModuleList([nn.Conv3d(4, 8, 1) for _ in range(3)])
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        identity = x = F.relu(self.stem(x))
        _, _, t, h, w = x.size()
        x_t = F.adaptive_avg_pool3d(x, (None, 1, 1))
        x_h = F.adaptive_avg_pool3d(x, (1, None, 1)).permute(0, 1, 3, 2, 4)
        x_w = F.adaptive_avg_pool3d(x, (1, 1, None)).permute(0, 1, 4, 2, 3)
        y = self.bn1(self.conv1(torch.cat([x_t, x_h, x_w], dim=2)))
        y = y * F.relu6(y + 3, inplace=True) / 6
        x_t, x_h, x_w = torch.split(y, [t, h, w], dim=2)
        x_h, x_w = x_h.permute(0, 1, 3, 2, 4), x_w.permute(0, 1, 3, 4, 2)
        gates = [gate(part).sigmoid() for gate, part in zip(self.gates, (x_t, x_h, x_w), strict=True)]
        return self.fc((identity * gates[0] * gates[1] * gates[2]).mean((2, 3, 4)))
