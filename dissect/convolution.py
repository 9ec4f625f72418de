"""Convolutions of a dissected network: over one frame, and over several frames of a history.

Weights keep the layout of the original layer, ``(out, in / groups, *kernel)`` with time at its own
place, so that ``state_dict()`` of the clip form has the original's keys. The law of
:mod:`dissect.primitives` holds. A step's temporal convolution of k taps is one convolution without time over ``k * C``
stacked channels; a depthwise or grouped one is a convolution a tap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dissect.primitives import Known, Primitive, stacked, tap

__all__ = ["FrameConv", "TemporalConv"]

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class FrameConv(Primitive):
    """A convolution inside one frame, of 0 to 3 spatial dimensions.

    ``time`` says which kernel dimension is temporal (it has one tap), or None. ``padding`` is a pair a dimension.
    Without a ``weight`` of its own it takes weight and bias as arguments (shared or computed weights).
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        weight: Tensor | None,
        bias: Tensor | None,
        *,
        time: int | None,
        stride: Sequence[int],
        padding: Sequence[tuple[int, int]],
        dilation: Sequence[int],
        groups: int = 1,
        transposed: bool = False,
        output_padding: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.register_parameter("weight", None if weight is None else nn.Parameter(weight))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        self.time = time
        self.stride = tuple(stride)
        self.padding = tuple(padding)
        self.dilation = tuple(dilation)
        self.groups = groups
        self.transposed = transposed
        self.output_padding = tuple(output_padding)

    @property
    def dims(self) -> int:
        return len(self.stride)

    def held(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight and bias that were passed, or else the layer's own."""
        if weight is not None:
            return weight, bias
        assert self.weight is not None
        return self.weight, self.bias

    def taps(self, weight: Tensor) -> Tensor:
        """The weight with its taps first: ``(taps, out, in / groups, *spatial)``."""
        return weight.unsqueeze(0) if self.time is None else weight.movedim(2 + self.time, 0)

    def space(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        """The convolution of frames without a time axis."""
        if self.dims == 0:
            if groups == 1:
                return F.linear(x, weight.t() if self.transposed else weight, bias)
            points = F.conv_transpose1d if self.transposed else F.conv1d
            return points(x.unsqueeze(-1), weight.unsqueeze(-1), bias, groups=groups).squeeze(-1)
        even = all(left == right for left, right in self.padding)
        if not even:
            x = F.pad(x, [width for pair in reversed(self.padding) for width in pair])
        padding = [left if even else 0 for left, _ in self.padding]
        if self.transposed:
            return _TRANSPOSED[self.dims](
                x, weight, bias, self.stride, padding, self.output_padding, groups, self.dilation
            )
        return _CONV[self.dims](x, weight, bias, self.stride, padding, self.dilation, groups)

    def forward(
        self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, frames: int | None = None
    ) -> Tensor:
        weight, bias = self.held(weight, bias)
        return self.space(x, self.taps(weight)[0], bias, self.groups)

    def extra_repr(self) -> str:
        shape = "" if self.weight is None else f"{tuple(self.weight.shape)}, "
        return f"{shape}stride={self.stride}, padding={self.padding}, dilation={self.dilation}, groups={self.groups}"


class TemporalConv(FrameConv):
    """A convolution over the values of the given ages (falling, evenly spaced) of a history, and over space.

    A transposed one reads its kernel backwards: its first tap meets the newest value.
    """

    def __init__(self, weight: Tensor | None, bias: Tensor | None, *, ages: Sequence[int], **space: Any) -> None:
        super().__init__(weight, bias, **space)
        self.ages = tuple(ages)
        self.spacing = self.ages[0] - self.ages[1]

    def taps(self, weight: Tensor) -> Tensor:
        taps = super().taps(weight)
        return taps.flip(0) if self.transposed else taps

    def stacked(self, taps: Tensor) -> Tensor:
        """The weight over stacked channels: all taps in one, along the input's channels."""
        return torch.cat(tuple(taps), 0 if self.transposed else 1)

    def forward(
        self, known: Any, weight: Tensor | None = None, bias: Tensor | None = None, frames: int | None = None
    ) -> Tensor:
        weight, bias = self.held(weight, bias)
        taps = self.taps(weight)
        if frames is None:
            return self.step(known, taps, bias)
        if self.dims > 2 or self.transposed or isinstance(known, Known):
            return self.step(known, taps, bias, frames)
        start = known.shape[1] - frames - self.ages[0]
        x = known[:, start : start + frames + self.ages[0] - self.ages[-1]].movedim(1, 2)
        even = all(left == right for left, right in self.padding)
        if not even:
            x = F.pad(x, [width for pair in reversed(self.padding) for width in pair])
        y = _CONV[self.dims + 1](
            x,
            taps.movedim(0, 2),
            bias,
            (1, *self.stride),
            (0, *[left if even else 0 for left, _ in self.padding]),
            (self.spacing, *self.dilation),
            self.groups,
        )
        return y.movedim(2, 1).flatten(0, 1)

    def step(self, known: Any, taps: Tensor, bias: Tensor | None, frames: int | None = None) -> Tensor:
        if self.groups == 1 and frames is None:
            return self.space(stacked(known, self.ages), self.stacked(taps), bias, 1)
        total = None
        for age, weight in zip(self.ages, taps, strict=True):
            part = self.space(tap(known, age, frames), weight, bias if age == self.ages[-1] else None, self.groups)
            total = part if total is None else total + part
        assert total is not None
        return total

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ages={self.ages}"
