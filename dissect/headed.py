"""A network with another head: its own end is left out, and a module on frame vectors stands there.

The result is a module like any other, which is captured, dissected and verified as a user's network is. The law: up to
the place where it ends it computes what the original computes, with the original's parameters, under their own names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree  # the specs that torch.export itself hands out

from dissect.errors import DissectError
from dissect.vectors import frame_vectors

__all__ = ["Headed", "with_head"]


class _Reached(Exception):
    """The features are there: nothing behind them is needed."""


@dataclass(frozen=True)
class Place:
    """Where the original ends, and how its features become vectors; see :func:`with_head`."""

    path: str
    after: bool
    head: str
    time_dim: int
    feature_time: int
    every_frame: bool


class Headed(nn.Module):
    """What :func:`with_head` makes. It shares the original's modules and parameters; the head is one child more.

    Names of its own begin with an underscore: the original's children stand beside them, whatever they are called.
    """

    def __init__(self, model: nn.Module, head: nn.Module, place: Place) -> None:
        super().__init__()
        # The original's own forward, on an object of its own: its tables of parameters and buffers are this module's,
        # its children are the original's, without the head.
        body = type(model).__new__(type(model))
        body.__dict__.update(model.__dict__)
        body.__dict__["_modules"] = dict(model._modules)
        for table in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[table] = body.__dict__[table] = model.__dict__[table].copy()
        self.__dict__["_body"] = body
        self._modules.update(model._modules)
        self._modules[place.head] = head
        self._place = place
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        clips = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        vectors = self._vectors(self._features(*args, **kwargs), clips[0].shape[0])
        time = self._place.time_dim
        frames = max(clip.shape[time] for clip in clips if clip.dim() > time)
        head = self._modules[self._place.head]
        assert head is not None
        return head(frame_vectors(vectors, frames if self._place.every_frame else vectors.shape[1]))

    def _features(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the head's place gets from the network for a clip: the features of all positions, in their own shape."""
        path, after = self._place.path, self._place.after
        body: nn.Module = self.__dict__["_body"]
        body.__dict__["training"] = self.training
        found: list[Any] = []
        # An exporter keeps account of the modules that it is in: there the rest runs as well, and is left out as unused.
        stops = not torch.compiler.is_compiling()

        def note(value: Any) -> None:
            found.append(value)
            if stops:
                raise _Reached

        def before(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            tensors = [leaf for leaf in pytree.tree_leaves((given, named)) if isinstance(leaf, Tensor)]
            note(tensors[0] if len(tensors) == 1 else tensors)

        def behind(_: nn.Module, __: tuple[Any, ...], result: Any) -> None:
            note(result)

        module = body.get_submodule(path)
        handle = (
            module.register_forward_hook(behind)
            if after
            else module.register_forward_pre_hook(before, with_kwargs=True)
        )
        try:
            body.forward(*args, **kwargs)
        except _Reached:
            pass
        finally:
            handle.remove()
        if len(found) != 1 or not isinstance(found[0], Tensor):
            side = "gives" if after else "takes"
            reason = f"is called {len(found)} times" if len(found) != 1 else f"{side} none or several tensors"
            raise DissectError(
                f"{path}: this module {reason}, so no head can stand there; name one that is called once and {side} the "
                "features of the clip"
            )
        return found[0]

    def _vectors(self, x: Tensor, batch: int) -> Tensor:
        """Features as one vector a position, ``(N, positions, F)``: the mean over space."""
        if x.shape[0] != batch:  # time is merged with the batch
            x = x.unflatten(0, (batch, -1))
        elif x.dim() > self._place.feature_time:
            x = x.movedim(self._place.feature_time, 1)
        if x.dim() < 3:
            raise DissectError(
                f"{self._place.path}: the features here are {tuple(x.shape)}, with no time left; attach the head before the "
                "network pools or flattens time"
            )
        return x if x.dim() == 3 else x.flatten(3).mean(3)

    def extra_repr(self) -> str:
        return f"{self._place.head} {'after' if self._place.after else 'at'} {self._place.path}"


def with_head(
    model: nn.Module,
    head: nn.Module,
    at: str | None = None,
    *,
    after: str | None = None,
    name: str = "head",
    time_dim: int = 2,
    feature_time: int = 2,
    every_frame: bool = True,
) -> Headed:
    """The network ``model`` up to ``at``, and from there on ``head``: a module to convert, to train, to verify against.

    ``at`` is the path of the first module that the head replaces, most often the global pool; or ``after`` is that of the
    last one that stays. What comes in there are the features of the clip, ``(N, F, positions, ...)`` (or, in a 2D trunk,
    ``(N * positions, F, ...)``), averaged over space; ``feature_time`` says where time is if not at dimension 2, and
    ``time_dim`` where it is in the clip. The head, any module, takes ``(N, T, F)`` and gives the result of the last frame; see
    :mod:`dissect.heads`.

    A network with temporal strides has fewer positions than frames. Its head still gets a vector for every frame of the clip,
    each position held until the next; dissected by ``d3d`` or ``causal``, every frame has one of its own. With
    ``every_frame=False`` the head gets the positions as they are.

    The original is not changed; parameters are shared and keep their names, those of the head begin with ``head.``
    (``name``). Raises :class:`~dissect.DissectError` where there is no such module, or the network has a child of that name.
    """
    if (at is None) == (after is None):
        raise DissectError("with_head takes the place of the head: at='avgpool' or after='layer4', one of the two")
    path = at if at is not None else after
    assert path is not None
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise DissectError(
            f"with_head takes a network as a module of Python, not a {type(model).__name__}: there are no modules in it to "
            "stop at"
        )
    try:
        model.get_submodule(path)
    except AttributeError as error:
        children = ", ".join(child for child, _ in model.named_children())
        raise DissectError(f"{path}: the network has no such module; it has {children}") from error
    if name in model._modules and path.split(".")[0] != name:
        raise DissectError(f"{name}: the network has a module of that name already; give the head another, name='...'")
    return Headed(model, head, Place(path, after is not None, name, time_dim, feature_time, every_frame))
