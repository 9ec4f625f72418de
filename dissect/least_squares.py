"""Least squares for one convolution: the change of its weights that brings its output nearest to what is wanted.

``NormalEquations`` sums up, over any number of inputs, what the solution needs: of a layer with d weights an output, a
matrix of d times d for each group. Law: with a ridge of zero and enough inputs, the layer then gives what is wanted
wherever any weights would, and the mean error is zero where it has a bias (or ``free`` says that its mean does not count,
since a batch norm takes it away).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dissect.convolution import FrameConv, TemporalConv
from dissect.primitives import Known

__all__ = ["NormalEquations"]

_MOST = 1 << 23  # numbers in a matrix of inputs at one time


class NormalEquations:
    """Sums of products of a layer's inputs with each other, and with the error of its output."""

    def __init__(self, layer: FrameConv, free: bool) -> None:
        assert layer.weight is not None
        self.layer, self.free = layer, free
        taps = layer.taps(layer.weight)
        self.shape = taps.shape
        self.groups, self.out = layer.groups, taps.shape[1] // layer.groups
        size = taps.numel() // taps.shape[1]
        zero = torch.zeros((), dtype=torch.float64, device=taps.device)
        self.inputs = zero.new_zeros(self.groups, size, size)
        self.errors = zero.new_zeros(self.groups, self.out, size)
        self.mean_input = zero.new_zeros(self.groups, size)
        self.mean_error = zero.new_zeros(self.groups, self.out)
        self.count = 0

    def add(self, known: Tensor, wanted: Tensor, frames: list[int], chunk: int) -> None:
        """Take in one chunk of ``chunk`` frames: what the layer reads, and what it should give at ``frames``.

        ``known`` is the layer's argument in the clip form; ``wanted`` is ``(len(frames), N, C, ...)``.
        """
        weights = self.shape[1:].numel() // self.shape[1] * self.shape[0]
        size = max(1, _MOST // max(1, weights * wanted.shape[1] * wanted[0, 0, 0].numel()))
        for at in range(0, len(frames), size):
            self._add(known, wanted[at : at + size], frames[at : at + size], chunk)

    def _add(self, known: Tensor, wanted: Tensor, frames: list[int], chunk: int) -> None:
        layer = self.layer
        assert layer.weight is not None
        taken = [self._frames(known, frames, age, chunk) for age in getattr(layer, "ages", (0,))]
        columns = torch.cat([self._columns(x) for x in taken], 2)
        taps = layer.taps(layer.weight).flatten(2)
        weight = taps.reshape(self.shape[0], self.groups, self.out, -1).permute(1, 2, 0, 3).flatten(2)
        got = torch.einsum("god,rgdl->rgol", weight, columns)
        if layer.bias is not None:
            got = got + layer.bias.reshape(1, self.groups, self.out, 1)
        error = wanted.flatten(0, 1).reshape(got.shape) - got
        columns, error = (part.permute(1, 2, 0, 3).flatten(2) for part in (columns, error))
        self.inputs += columns @ columns.transpose(1, 2)
        self.errors += error @ columns.transpose(1, 2)
        self.mean_input += columns.sum(2)
        self.mean_error += error.sum(2)
        self.count += columns.shape[2]

    def _frames(self, known: Tensor, frames: list[int], age: int, chunk: int) -> Tensor:
        """The layer's inputs of an age at some frames, ``(frames * N, C, ...)``."""
        if isinstance(self.layer, TemporalConv):
            rows = (
                known.tap(age).unflatten(0, (-1, chunk))[:, frames]
                if isinstance(known, Known)
                else known[:, [known.shape[1] - chunk + frame - age for frame in frames]]
            )
        else:
            rows = known.reshape(-1, chunk, *known.shape[1:])[:, frames]
        return rows.transpose(0, 1).flatten(0, 1)

    def _columns(self, x: Tensor) -> Tensor:
        """What each output of a frame reads, ``(rows, groups, weights of a tap, outputs)``."""
        layer = self.layer
        kernel = list(self.shape[3:])
        padding, dilation, stride = list(layer.padding), list(layer.dilation), list(layer.stride)
        while x.dim() < 4:  # none or one spatial dimension: of size 1 in front
            x = x.unsqueeze(2)
            kernel, padding = [1, *kernel], [(0, 0), *padding]
            dilation, stride = [1, *dilation], [1, *stride]
        x = F.pad(x, [width for pair in reversed(padding) for width in pair])
        columns = F.unfold(x, tuple(kernel), tuple(dilation), 0, tuple(stride))
        return columns.reshape(x.shape[0], self.groups, -1, columns.shape[-1])

    @torch.no_grad()
    def solve(self, ridge: float) -> None:
        """Change the layer's weights, and its bias if it has one.

        ``ridge``, in units of the mean square of the inputs, draws them towards what they were.
        """
        layer = self.layer
        assert layer.weight is not None
        matrix, errors = self.inputs / self.count, self.errors / self.count
        mean_input, mean_error = self.mean_input / self.count, self.mean_error / self.count
        centred = self.free or layer.bias is not None
        if centred:
            matrix = matrix - mean_input[:, :, None] * mean_input[:, None, :]
            errors = errors - mean_error[:, :, None] * mean_input[:, None, :]
        scale = matrix.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
        eye = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
        least = max(ridge, 1e-12)  # inputs that are always zero leave the matrix without an inverse
        change = torch.linalg.solve(matrix + (least * scale)[:, None, None] * eye, errors, left=False)
        if layer.bias is not None:
            shift = mean_error - (change @ mean_input[:, :, None]).squeeze(2)
            layer.bias.add_(shift.flatten().to(layer.bias))
        taps = layer.taps(layer.weight)
        parts = change.reshape(self.groups, self.out, self.shape[0], *self.shape[2:])
        taps.add_(parts.movedim(2, 0).flatten(1, 2).to(taps))
