"""An operator of one's own that looks back in time, with a converter and a cache, in a few lines.

``mylib::motion`` is the difference between each frame and the one before it (zeros before the first).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dissect
from dissect.primitives import Primitive, tap


@torch.library.custom_op("mylib::motion", mutates_args=())
def motion(x: Tensor) -> Tensor:
    """``(N, C, T, H, W)``: each frame minus the one before."""
    return x - torch.cat([torch.zeros_like(x[:, :, :1]), x[:, :, :-1]], 2)


motion.register_fake(torch.empty_like)


class Difference(Primitive):
    """The converter's primitive: the newest value minus the one before, in both forms."""

    def forward(self, known: object, frames: int | None = None) -> Tensor:
        return tap(known, 0, frames) - tap(known, 1, frames)


@dissect.converter(torch.ops.mylib.motion.default)
def convert_motion(ctx, x):  # type: ignore[no-untyped-def]
    x = ctx.gate(x)  # zeros where the clip has not begun
    stride = x.clock.stride
    if stride != 1:
        raise dissect.DissectError("motion behind a temporal stride is left as an exercise")
    ctx.row("difference to the frame before", exact=True)
    timing = x.clock.plain().but(old=x.clock.old + 1)
    return ctx.primitive("motion", Difference(), (ctx.history(x, 1),), x.axes, timing, x.dtype)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, clip: Tensor) -> Tensor:
        return self.head(torch.relu(torch.ops.mylib.motion(self.stem(clip))).mean((2, 3, 4)))


def main() -> None:
    torch.manual_seed(0)
    model = Network().eval()
    stream = dissect.convert(model, torch.rand(1, 3, 8, 16, 16), preset="exact")
    print(stream.plan)
    print(dissect.verify(stream, model).check())


if __name__ == "__main__":
    main()
