"""Parameters and multiply-adds, counted by torch's own counter on fake tensors: nothing is computed or allocated.

A multiply-add is half of what `torch.utils.flop_counter` counts: convolutions (grouped, depthwise and transposed ones
too, by the shape of their weight) and matrix products. On a CPU it misses what runs as one fused kernel. Of these,
attention and transformer layers run unfused while we count, and LSTMs (oneDNN) have a formula here. A position of the
padding that is multiplied by zero counts in full, as is usual.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

# torch's documentation gives this path for fake tensors, and these two have no other.
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from dissect.errors import DissectError

__all__ = ["multiply_adds", "parameters"]


def parameters(module: nn.Module) -> int:
    """Return how many parameters a module has; one that is used twice counts once, and buffers do not count."""
    return sum(parameter.numel() for parameter in module.parameters())


def multiply_adds(module: nn.Module, inputs: Any, *, elementwise: bool = False) -> int:
    """Return the multiply-adds of one call of `module`, which stays as it is.

    `inputs` are a tensor, or a tuple of the module's inputs, which may hold lists and dicts of tensors; only their
    shapes matter. The batch counts: pass a batch of one for the cost of one clip or of one step.

    With ``elementwise=True``, a batch norm adds 2 for every value, a ReLU 1, and a max pool the size of its kernel for
    every value that it gives. The D3D paper must have counted so, since this gives its figures to the last digit.

    Raises `DissectError` where the forward reads the value of a tensor, since a fake tensor has none.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    arguments = tree_map_only(Tensor, fake.from_tensor, arguments)
    # The module's own tensors are replaced too: batch norms in training mode count the batches that they see.
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    tensors = {name: fake.from_tensor(tensor) for name, tensor in tensors.items()}
    counter = FlopCounterMode(display=False, custom_mapping=_FUSED | (_ELEMENTWISE if elementwise else {}))
    try:
        with torch.no_grad(), _unfused_attention(), fake, counter:
            torch.func.functional_call(module, tensors, arguments)
    except DataDependentOutputException as error:
        raise DissectError(
            f"{type(module).__name__}: multiply-adds cannot be counted, because the forward reads the value of a "
            f"tensor ({error}); count a part of it that does not"
        ) from error
    total: int = counter.get_total_flops()
    return total // 2


@contextmanager
def _unfused_attention() -> Iterator[None]:
    """Make attention and transformer layers run as the matrix products that they are made of."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


# The counter hands a formula the shapes of an operator's arguments and result, and expects FLOPs: 2 a multiply-add.


def _lstm(values: Sequence[int], from_input: Sequence[int], from_hidden: Sequence[int], *_: Any, **__: Any) -> int:
    steps, batch, _features = values
    return 2 * steps * batch * (prod(from_input) + prod(from_hidden))


def _batch_norm(values: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * 2 * prod(values)


def _relu(values: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * prod(values)


def _max_pool(values: Sequence[int], kernel: Sequence[int], *_: Any, out_shape: Any, **__: Any) -> int:
    results: Sequence[int] = out_shape[0]  # the second output are the indices
    sides = kernel if len(kernel) > 1 else [*kernel] * (len(values) - 2)
    return 2 * prod(sides) * prod(results)


_FUSED = {torch.ops.aten.mkldnn_rnn_layer: _lstm}
_ELEMENTWISE = {
    torch.ops.aten.native_batch_norm: _batch_norm,
    torch.ops.aten._native_batch_norm_legit: _batch_norm,
    torch.ops.aten._native_batch_norm_legit_no_training: _batch_norm,
    torch.ops.aten.cudnn_batch_norm: _batch_norm,
    torch.ops.aten.relu: _relu,
    torch.ops.aten.relu_: _relu,
    torch.ops.aten.max_pool2d_with_indices: _max_pool,
    torch.ops.aten.max_pool3d_with_indices: _max_pool,
}
