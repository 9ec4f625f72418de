"""Inflation: the weights of an image network in a video network of the same shape, and back.

A 2D kernel becomes a 3D one whose taps add up to it, so that a still scene, away from the clip's edges, gives what the
image gave. Dissecting keeps that promise (dropped taps are folded): inflate the conventional network, then dissect it. The
law: ``deflate`` takes back what ``inflate`` did, whichever way it did it, for it adds the taps up.

Source: Carreira and Zisserman, *Quo Vadis, Action Recognition?* (2017), for ``mean``; the D3D paper starts from inflated
networks for re-identification and faces.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from dissect.errors import DissectError

__all__ = ["HOW", "deflate", "inflate"]

State = Mapping[str, Tensor]

#: ways to spread a kernel ``(out, in, H, W)`` over ``taps``
HOW: dict[str, Callable[[Tensor, int], Tensor]] = {
    "mean": lambda weight, taps: (weight / taps).unsqueeze(2).repeat_interleave(taps, 2),
    "centre": lambda weight, taps: _only(weight, taps, taps // 2),
    "newest": lambda weight, taps: _only(weight, taps, taps - 1),
}


def inflate(
    image: nn.Module | State, video: nn.Module | State, how: str = "mean", *, by: str = "name", strict: bool = True
) -> dict[str, Tensor]:
    """The state of ``image`` in the shapes of ``video``: what its ``load_state_dict`` takes. Neither is changed.

    ``how`` spreads a kernel over its taps: ``mean``, the same share to each; ``centre``, all to the middle one; ``newest``, all to
    the last. With ``centre``, the preset ``d3d`` gives a network that treats every frame as the image network does. ``by``
    says what goes where: tensors of one ``name``, or of one place in the ``order`` of both. Everything else is copied.

    Raises :class:`~dissect.DissectError` for a tensor that has no counterpart, or one of another shape; with ``strict=False``
    these are left out, and ``load_state_dict(..., strict=False)`` leaves the video network its own (a new head, a neck).
    """
    if how not in HOW:
        raise DissectError(f"how={how!r} is no way to inflate; there are {', '.join(HOW)}")

    def fitted(source: Tensor, target: Tensor) -> Tensor | None:
        if source.shape == target.shape:
            return source.clone()
        if target.dim() == source.dim() + 1 == 5 and target.shape[:2] + target.shape[3:] == source.shape:
            return HOW[how](source, target.shape[2])
        return None

    return _matched(_state(image), _state(video), fitted, by, strict)


def deflate(
    video: nn.Module | State, image: nn.Module | State, *, by: str = "name", strict: bool = True
) -> dict[str, Tensor]:
    """The state of ``video`` in the shapes of ``image``: the taps of each kernel added up. The inverse of :func:`inflate`.

    The image network gives for a picture what the video network gives for a still scene, away from the clip's edges.
    """

    def fitted(source: Tensor, target: Tensor) -> Tensor | None:
        if source.shape == target.shape:
            return source.clone()
        if source.dim() == target.dim() + 1 == 5 and source.shape[:2] + source.shape[3:] == target.shape:
            return source.sum(2)
        return None

    return _matched(_state(video), _state(image), fitted, by, strict)


def _only(weight: Tensor, taps: int, at: int) -> Tensor:
    kernel = weight.new_zeros((*weight.shape[:2], taps, *weight.shape[2:]))
    kernel[:, :, at] = weight
    return kernel


def _state(network: nn.Module | State) -> State:
    return network.state_dict() if isinstance(network, nn.Module) else network


def _matched(
    source: State, target: State, fitted: Callable[[Tensor, Tensor], Tensor | None], by: str, strict: bool
) -> dict[str, Tensor]:
    if by == "order":
        if strict and len(source) != len(target):
            raise DissectError(
                f"the networks have {len(source)} and {len(target)} tensors, so their orders do not meet"
            )
        names = dict(zip(target, source, strict=False))
    elif by == "name":
        names = {name: name for name in target if name in source}
    else:
        raise DissectError(f"by={by!r} is no way to match tensors; there are name, order")
    found: dict[str, Tensor] = {}
    problems: list[str] = []
    with torch.no_grad():
        for name, tensor in target.items():
            if name not in names:
                problems.append(f"{name} has no counterpart")
                continue
            made = fitted(source[names[name]].detach(), tensor)
            if made is None:
                shapes = f"{tuple(source[names[name]].shape)} for {tuple(tensor.shape)}"
                problems.append(f"{name}: {shapes}")
            else:
                found[name] = made
    problems += [f"{name} is left over" for name in source if name not in names.values()]
    if problems and strict:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise DissectError(
            f"the networks do not fit: {'; '.join(problems[:3])}{more}; leave out what does not with strict=False, or match "
            "tensors by='order'"
        )
    return found
