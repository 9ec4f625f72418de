"""A value for every pixel: segmentation, saliency, autoencoders, memories, interpolation, super-resolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from survey import network


def double_conv(inputs: int, out: int, norm: type[nn.Module] = nn.BatchNorm3d) -> nn.Sequential:
    middle = max(out // 2, inputs)
    return nn.Sequential(
        nn.Conv3d(inputs, middle, 3, padding=1),
        norm(middle),
        nn.ReLU(inplace=True),
        nn.Conv3d(middle, out, 3, padding=1),
        norm(out),
        nn.ReLU(inplace=True),
    )


@network((1, 1, 16, 16, 16))
class UNet3D(nn.Module):
    """3D U-Net: max pools, transposed convolutions with output padding, concatenated skips, a sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1, self.enc2, self.enc3 = double_conv(1, 8), double_conv(8, 16), double_conv(16, 16)
        self.pool = nn.MaxPool3d(2)
        self.up2 = nn.ConvTranspose3d(16, 16, 3, stride=2, padding=1, output_padding=1)
        self.up1 = nn.ConvTranspose3d(16, 16, 3, stride=2, padding=1, output_padding=1)
        self.dec2, self.dec1 = double_conv(32, 16), double_conv(24, 8)
        self.final_conv = nn.Conv3d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        e1 = self.enc1(x)
        e2 = self.enc2(self.pool(e1))
        e3 = self.enc3(self.pool(e2))
        d2 = self.dec2(torch.cat((e2, self.up2(e3)), dim=1))
        d1 = self.dec1(torch.cat((e1, self.up1(d2)), dim=1))
        return torch.sigmoid(self.final_conv(d1))


@network((1, 1, 16, 16, 16))
class UNetNearest(nn.Module):
    """3D U-Net of pytorch-3dunet's kind: group norm first, interpolation to the encoder's size, summed."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1 = nn.Sequential(nn.GroupNorm(1, 1), nn.Conv3d(1, 8, 3, padding=1, bias=False), nn.ReLU())
        self.enc2 = nn.Sequential(nn.GroupNorm(4, 8), nn.Conv3d(8, 8, 3, padding=1, bias=False), nn.ELU())
        self.dec1 = nn.Sequential(nn.GroupNorm(4, 8), nn.Conv3d(8, 4, 3, padding=1, bias=False), nn.LeakyReLU())
        self.final_conv = nn.Conv3d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        e1 = self.enc1(x)
        e2 = self.enc2(F.max_pool3d(e1, 2))
        x = F.interpolate(e2, size=e1.size()[2:], mode="nearest")
        return self.final_conv(self.dec1(x + e1))


@network((1, 1, 16, 16, 16))
class VNet(nn.Module):
    """V-Net: kernels of five, the input repeated over channels, strided convolutions down, PReLU, softmax over classes."""

    class Down(nn.Module):
        def __init__(self, inputs: int) -> None:
            super().__init__()
            self.down_conv = nn.Conv3d(inputs, 2 * inputs, kernel_size=2, stride=2)
            self.bn1 = nn.BatchNorm3d(2 * inputs)
            self.relu1, self.relu2 = nn.PReLU(2 * inputs), nn.PReLU(2 * inputs)
            self.ops = nn.Sequential(nn.Conv3d(2 * inputs, 2 * inputs, 5, padding=2), nn.BatchNorm3d(2 * inputs))

        def forward(self, x: Tensor) -> Tensor:
            down = self.relu1(self.bn1(self.down_conv(x)))
            return self.relu2(torch.add(self.ops(down), down))

    class Up(nn.Module):
        def __init__(self, inputs: int, out: int) -> None:
            super().__init__()
            self.up_conv = nn.ConvTranspose3d(inputs, out // 2, kernel_size=2, stride=2)
            self.relu1, self.relu2 = nn.PReLU(out // 2), nn.PReLU(out)
            self.do1 = nn.Dropout3d()
            self.ops = nn.Conv3d(out, out, 5, padding=2)

        def forward(self, x: Tensor, skipx: Tensor) -> Tensor:
            out = self.relu1(self.up_conv(x))
            xcat = torch.cat((out, self.do1(skipx)), 1)
            return self.relu2(torch.add(self.ops(xcat), xcat))

    def __init__(self) -> None:
        super().__init__()
        self.in_tr, self.in_relu = nn.Conv3d(1, 4, 5, padding=2), nn.PReLU(4)
        self.down1, self.down2 = self.Down(4), self.Down(8)
        self.up2, self.up1 = self.Up(16, 16), self.Up(16, 8)
        self.out_conv1, self.out_conv2 = nn.Conv3d(8, 2, 5, padding=2), nn.Conv3d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x16 = torch.cat((x,) * 4, 1)
        out16 = self.in_relu(torch.add(self.in_tr(x), x16))
        out32 = self.down1(out16)
        out = self.up2(self.down2(out32), torch.cat((out32, out32[:, :0]), 1))
        out = self.out_conv2(F.relu(self.out_conv1(self.up1(out, out16))))
        out = out.permute(0, 2, 3, 4, 1).contiguous()
        return F.softmax(out, dim=4)


@network((1, 1, 16, 16, 16))
class NNUNet(nn.Module):
    """nnU-Net: instance norm, leaky ReLU, strided convolutions, deep supervision as a tuple of scales."""

    def block(self, inputs: int, out: int, stride: int = 1) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv3d(inputs, out, 3, stride, 1), nn.InstanceNorm3d(out, affine=True), nn.LeakyReLU(1e-2, inplace=True)
        )

    def __init__(self) -> None:
        super().__init__()
        self.stage1, self.stage2 = self.block(1, 4), self.block(4, 8, 2)
        self.up = nn.ConvTranspose3d(8, 4, 2, 2, bias=False)
        self.decode = self.block(8, 4)
        self.seg1, self.seg2 = nn.Conv3d(4, 2, 1), nn.Conv3d(8, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        skip = self.stage1(x)
        deep = self.stage2(skip)
        return self.seg1(self.decode(torch.cat((self.up(deep), skip), 1))), self.seg2(deep)


@network((1, 1, 16, 16, 16))
class AttentionUNet(nn.Module):
    """Attention gates: the decoder's features, resampled, weigh the encoder's skip."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1, self.enc2 = double_conv(1, 8), double_conv(8, 8)
        self.theta, self.phi = nn.Conv3d(8, 4, 2, 2, bias=False), nn.Conv3d(8, 4, 1)
        self.psi = nn.Conv3d(4, 1, 1)
        self.up = nn.Upsample(scale_factor=2, mode="trilinear", align_corners=False)
        self.dec = double_conv(16, 8)
        self.out = nn.Conv3d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        e1 = self.enc1(x)
        g = self.enc2(F.max_pool3d(e1, 2))
        theta = self.theta(e1)
        phi = F.interpolate(self.phi(g), size=theta.size()[2:], mode="trilinear", align_corners=False)
        gate = torch.sigmoid(self.psi(F.relu(theta + phi, inplace=True)))
        gate = F.interpolate(gate, size=e1.size()[2:], mode="trilinear", align_corners=False)
        return self.out(self.dec(torch.cat([self.up(g), gate.expand_as(e1) * e1], 1)))


@network((1, 1, 16, 16, 16))
class HighResNet(nn.Module):
    """Dilated residual blocks at full resolution, channels of the skip padded with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU())
        self.blocks = nn.ModuleList(
            [
                nn.Sequential(nn.BatchNorm3d(i), nn.ReLU(), nn.ReplicationPad3d(d), nn.Conv3d(i, o, 3, dilation=d))
                for i, o, d in ((4, 8, 1), (8, 8, 2), (8, 12, 4))
            ]
        )
        self.classifier = nn.Sequential(nn.Conv3d(12, 3, 1), nn.Softmax(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            y = block(x)
            pad = y.shape[1] - x.shape[1]
            x = y + F.pad(x, (0, 0, 0, 0, 0, 0, pad // 2, pad - pad // 2))
        return self.classifier(x)


@network((1, 1, 8, 16, 16))
class ASPP3D(nn.Module):
    """Dilated branches over time and space, and the clip's mean, resampled to the size of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, 8, 3, (1, 2, 2), 1)
        self.branches = nn.ModuleList([nn.Conv3d(8, 4, 3, padding=d, dilation=d) for d in (1, 2, 3)])
        self.pool = nn.Sequential(nn.AdaptiveAvgPool3d((1, 1, 1)), nn.Conv3d(8, 4, 1, bias=False), nn.ReLU())
        self.project = nn.Conv3d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        x = F.relu(self.stem(x))
        pooled = F.interpolate(self.pool(x), size=x.shape[2:], mode="trilinear", align_corners=True)
        y = self.project(torch.cat([*[branch(x) for branch in self.branches], pooled], 1))
        return F.interpolate(y, size=size, mode="trilinear", align_corners=True)


@network((1, 3, 16, 32, 32))
class TASED(nn.Module):
    """TASED-Net: an S3D encoder, time collapsed by strided convolutions in the decoder, one map for the clip."""

    def __init__(self) -> None:
        super().__init__()
        self.base1 = nn.Sequential(nn.Conv3d(3, 8, (7, 7, 7), 2, 3), nn.BatchNorm3d(8), nn.ReLU())
        self.maxp2 = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))
        self.base2 = nn.Sequential(nn.Conv3d(8, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU())
        self.maxp3 = nn.MaxPool3d((4, 1, 1), (4, 1, 1))
        self.convtsp1 = nn.Sequential(
            nn.Conv3d(8, 8, 1, bias=False),
            nn.BatchNorm3d(8),
            nn.ReLU(),
            nn.ConvTranspose3d(8, 8, (1, 3, 3), stride=1, padding=(0, 1, 1), bias=False),
            nn.ReLU(),
            nn.Upsample(scale_factor=(1, 2, 2), mode="trilinear", align_corners=True),
        )
        self.convtsp2 = nn.Sequential(
            nn.Conv3d(8, 4, (2, 1, 1), (2, 1, 1), bias=False),
            nn.ReLU(),
            nn.ConvTranspose3d(4, 2, (1, 4, 4), (1, 2, 2), (0, 1, 1)),
            nn.Conv3d(2, 1, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.maxp3(self.base2(self.maxp2(self.base1(x))))
        z = self.convtsp2(self.convtsp1(y))
        return z.view(z.size(0), z.size(3), z.size(4))


@network((1, 3, 16, 32, 32))
class ViNet(nn.Module):
    """ViNet: skips of an encoder concatenated along *time* in the decoder, a kernel as long as what is left."""

    def __init__(self) -> None:
        super().__init__()
        self.base1 = nn.Sequential(nn.Conv3d(3, 8, 3, 2, 1), nn.ReLU())
        self.base2 = nn.Sequential(nn.Conv3d(8, 8, 3, 2, 1), nn.ReLU())
        self.base3 = nn.Sequential(nn.Conv3d(8, 8, 3, 2, 1), nn.ReLU())
        self.convtsp1 = nn.Sequential(nn.Conv3d(8, 8, 3, padding=1), nn.ReLU(), nn.Upsample(scale_factor=(1, 2, 2)))
        self.convtsp2 = nn.Sequential(
            nn.Conv3d(8, 8, (3, 3, 3), (3, 1, 1), (0, 1, 1)), nn.ReLU(), nn.Upsample(scale_factor=(1, 2, 2))
        )
        self.convtsp3 = nn.Sequential(nn.Conv3d(8, 4, (10, 3, 3), (10, 1, 1), (0, 1, 1)), nn.ReLU(), nn.Conv3d(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y2 = self.base1(x)
        y1 = self.base2(y2)
        y0 = self.base3(y1)
        z = self.convtsp1(y0)
        z = torch.cat((z, y1), 2)
        z = self.convtsp2(z)
        z = torch.cat((z, y2), 2)
        z = torch.sigmoid(self.convtsp3(z))
        return z.view(z.size(0), z.size(3), z.size(4))


@network((1, 1, 16, 16, 16))
class Autoencoder3D(nn.Module):
    """A 3D autoencoder for anomaly scores: the clip again, its squared error a frame."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv3d(1, 8, 3, (1, 2, 2), 1),
            nn.BatchNorm3d(8),
            nn.LeakyReLU(0.2, True),
            nn.Conv3d(8, 8, 3, 2, 1),
            nn.BatchNorm3d(8),
            nn.LeakyReLU(0.2, True),
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose3d(8, 8, 3, 2, 1, 1),
            nn.BatchNorm3d(8),
            nn.LeakyReLU(0.2, True),
            nn.ConvTranspose3d(8, 1, 3, (1, 2, 2), 1, (0, 1, 1)),
            nn.Tanh(),
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.decoder(self.encoder(x))
        return {"output": y, "error": ((y - x) ** 2).mean(dim=(1, 3, 4))}


@network((1, 1, 16, 16, 16))
class MemAE(nn.Module):
    """Memory-augmented autoencoder: each position addresses a memory by softmax, hard shrinkage, normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv3d(1, 8, 3, (1, 2, 2), 1), nn.ReLU(), nn.Conv3d(8, 8, 3, 2, 1))
        self.memory = nn.Parameter(torch.randn(10, 8))
        self.decoder = nn.Sequential(
            nn.ConvTranspose3d(8, 8, 3, 2, 1, 1), nn.ReLU(), nn.ConvTranspose3d(8, 1, 3, (1, 2, 2), 1, (0, 1, 1))
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        f = self.encoder(x)
        s = f.data.shape
        y = f.permute(0, 2, 3, 4, 1).contiguous().view(-1, s[1])
        att = F.softmax(F.linear(y, self.memory), dim=1)
        lambd, epsilon = 0.05, 1e-12
        att = (F.relu(att - lambd) * att) / (torch.abs(att - lambd) + epsilon)
        att = F.normalize(att, p=1, dim=1)
        y = F.linear(att, self.memory.permute(1, 0))
        y = y.view(s[0], s[2], s[3], s[4], s[1]).permute(0, 4, 1, 2, 3).contiguous()
        att = att.view(s[0], s[2], s[3], s[4], 10).permute(0, 4, 1, 2, 3).contiguous()
        return self.decoder(y), att


@network((1, 3, 5, 16, 16))
class MNAD(nn.Module):
    """Future frame prediction: the first frames stacked on channels, a memory read by cosine similarity, a 2D decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(12, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1))
        self.keys = nn.Parameter(F.normalize(torch.rand(10, 8), dim=1))
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1), nn.Tanh()
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        b, c, t, h, w = x.shape
        fea = self.encoder(x[:, :, : t - 1].transpose(1, 2).reshape(b, (t - 1) * c, h, w))
        query = F.normalize(fea, dim=1).permute(0, 2, 3, 1)
        score = torch.softmax(torch.matmul(query, torch.t(self.keys)), dim=-1)
        read = torch.matmul(score, self.keys).permute(0, 3, 1, 2)
        out = self.decoder(torch.cat((fea, read), 1))
        return out, (out - x[:, :, -1]).pow(2).mean((1, 2, 3))


@network((1, 3, 4, 16, 16))
class FLAVR(nn.Module):
    """Interpolation: the mean of the clip taken off, a 3D U-Net, its time folded into channels, one frame."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 8, (3, 7, 7), (1, 2, 2), (1, 3, 3))
        self.layer = nn.Sequential(nn.Conv3d(8, 8, 3, padding=1), nn.LeakyReLU(0.2))
        self.gate = nn.Conv3d(8, 8, 1)
        self.up = nn.ConvTranspose3d(8, 8, (3, 4, 4), (1, 2, 2), (1, 1, 1))
        self.feature_fuse = nn.Conv2d(32, 8, 1, bias=False)
        self.outconv = nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(8, 3, 7))

    def forward(self, images: Tensor) -> Tensor:
        mean = images.mean(2, keepdim=True).mean(3, keepdim=True).mean(4, keepdim=True)
        images = images - mean
        x = self.layer(self.stem(images))
        x = x * torch.sigmoid(self.gate(torch.mean(x, [2, 3, 4], keepdim=True)))
        x = F.leaky_relu(self.up(x), 0.2)
        x = torch.cat(torch.unbind(x, 2), 1)
        out = self.outconv(F.leaky_relu(self.feature_fuse(x), 0.2))
        return out + mean.squeeze(2)


@network((1, 7, 3, 16, 16), time_dim=1)
class SlidingSuperResolution(nn.Module):
    """Video super-resolution: features of five neighbouring frames, edges replicated, fused for each frame, pixels shuffled."""

    def __init__(self) -> None:
        super().__init__()
        self.feat = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.LeakyReLU(0.1))
        self.fuse = nn.Conv2d(5 * 8, 8, 1)
        self.up = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c, h, w = x.size()
        feats = self.feat(x.view(-1, c, h, w)).view(b, t, -1, h, w)
        padded = torch.cat([feats[:, :1], feats[:, :1], feats, feats[:, -1:], feats[:, -1:]], 1)
        outs = []
        for i in range(t):
            window = padded[:, i : i + 5].reshape(b, -1, h, w)
            base = F.interpolate(x[:, i], scale_factor=2, mode="bilinear", align_corners=False)
            outs.append(self.up(F.leaky_relu(self.fuse(window), 0.1)) + base)
        return torch.stack(outs, dim=1)


@network((1, 6, 3, 16, 16), time_dim=1)
class Correlation(nn.Module):
    """Optical flow's correlation: each frame's features against the next one's, shifted by every displacement."""

    def __init__(self) -> None:
        super().__init__()
        self.feat = nn.Conv2d(3, 8, 3, 2, 1)
        self.flow = nn.Conv2d(9, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        b, t = x.shape[:2]
        f = F.relu(self.feat(x.flatten(0, 1)))
        f = f.view(b, t, *f.shape[1:])
        one, two = f[:, :-1].flatten(0, 1), f[:, 1:].flatten(0, 1)
        padded = F.pad(two, (1, 1, 1, 1))
        h, w = one.shape[2:]
        cost = [
            (one * padded[:, :, dy : dy + h, dx : dx + w]).mean(1, keepdim=True) for dy in range(3) for dx in range(3)
        ]
        flow = self.flow(torch.cat(cost, 1))
        return flow.view(b, t - 1, *flow.shape[1:])


@network((1, 3, 8, 32, 32))
class FeaturePyramid(nn.Module):
    """A pyramid over time and space: top-down by nearest interpolation, laterals, scores of every level."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = (
            nn.Sequential(nn.Conv3d(i, o, 3, 2, 1), nn.ReLU()) for i, o in ((3, 4), (4, 8), (8, 8))
        )
        self.lateral = nn.ModuleList([nn.Conv3d(i, 4, 1) for i in (4, 8, 8)])
        self.smooth = nn.Conv3d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        c1 = self.c1(x)
        c2 = self.c2(c1)
        c3 = self.c3(c2)
        p3 = self.lateral[2](c3)
        p2 = F.interpolate(p3, size=c2.shape[2:]) + self.lateral[1](c2)
        p1 = F.interpolate(p2, size=c1.shape[2:]) + self.lateral[0](c1)
        return [self.head(self.smooth(p).mean((2, 3, 4))) for p in (p1, p2, p3)]
