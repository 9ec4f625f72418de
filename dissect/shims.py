"""What torch's export cannot follow, put in terms that it can, for the time of a capture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import torch
from torch._subclasses import fake_tensor
from torch.fx.experimental import proxy_tensor
from torch.utils import _pytree as pytree

__all__ = ["dataclasses_known", "full_precision", "legacy", "masks_as_given"]


def dataclasses_known(result: Any) -> bool:
    """Tell torch of the dataclasses in what a network returns, for good; whether there were any that it did not know."""
    found = False
    while unknown := {type(leaf) for leaf in pytree.tree_leaves(result) if is_dataclass(leaf)}:
        for kind in unknown:
            torch.export.register_dataclass(kind)
        found = True
    return found


@contextmanager
def masks_as_given() -> Iterator[None]:
    """Torch's own transformers read the values of a mask to see whether it is causal, which no export can follow.

    What they gain is a faster kernel; the mask itself says the same. There is no public switch for it.
    """
    module, name = torch.nn.modules.transformer, "_detect_is_causal_mask"
    detect = getattr(module, name, None)
    setattr(module, name, lambda mask, is_causal=None, size=None: bool(is_causal))
    try:
        yield
    finally:
        delattr(module, name) if detect is None else setattr(module, name, detect)


@contextmanager
def full_precision() -> Iterator[set[torch.dtype]]:
    """``torch.autocast`` does nothing: what it covers would be a graph of its own, whose layers have no names.

    Yields the types that it was to compute in.
    """
    kind: Any = torch.autocast
    enter, leave = kind.__enter__, kind.__exit__
    asked: set[torch.dtype] = set()

    def entered(region: Any) -> Any:
        if region._enabled:
            asked.add(region.fast_dtype)
        return region

    kind.__enter__, kind.__exit__ = entered, lambda region, *_: None
    try:
        yield asked
    finally:
        kind.__enter__, kind.__exit__ = enter, leave


@contextmanager
def legacy() -> Iterator[None]:
    """``.data`` reads as ``detach()``, ``Variable(x)`` as ``x``, and sizes in a tensor (``torch.tensor(x.shape)``) as sizes.

    torch's export computes with constants as it meets them, but with those of one entry only.
    """
    meta = type(torch.autograd.Variable)
    data = property(lambda tensor: tensor.detach(), torch._C.TensorBase.data.__set__)  # type: ignore[attr-defined]
    torch.Tensor.data = data  # type: ignore[assignment]
    meta.__call__ = lambda cls, data=None, *args, **kwargs: data  # type: ignore[method-assign]
    modules: tuple[Any, ...] = (fake_tensor, proxy_tensor)
    limits = [(module, module.CONSTANT_NUMEL_LIMIT) for module in modules if hasattr(module, "CONSTANT_NUMEL_LIMIT")]
    for module, _ in limits:
        module.CONSTANT_NUMEL_LIMIT = 64
    try:
        yield
    finally:
        for module, limit in limits:
            module.CONSTANT_NUMEL_LIMIT = limit
        del torch.Tensor.data
        del meta.__call__
