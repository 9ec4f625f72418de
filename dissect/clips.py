"""Clips to learn from: whatever the user has, as batches of the network's own inputs.

``clips`` may be a list, a :class:`torch.utils.data.Dataset` with a length, a tensor of clips, or anything that can be
iterated again and again (a ``DataLoader``). An item is a clip as the network takes it, without the batch or with it, or a
pair of that and a label. Law: with a seed, the order of an epoch follows from the seed and its number alone, so that a
run that was cut off can go on in the middle of it.

Every clip is looked at before the network sees it; what does not fit raises :class:`~dissect.ClipError` with the name of
the clip (that of its file, where ``clips.name(index)`` gives one), what is wrong, and the fix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree  # the specs that torch.export itself hands out

from dissect.errors import ClipError

if TYPE_CHECKING:
    from dissect.stream import Stream

__all__ = ["Batch", "Clips"]


@dataclass(frozen=True)
class Batch:
    """Clips side by side, as the network takes them: its inputs, their labels ``(N,)`` if there are any, their frames."""

    inputs: tuple[Any, ...]
    labels: Tensor | None
    frames: int

    def to(self, device: torch.device | None) -> Batch:
        """The same batch on a device."""
        if device is None:
            return self
        inputs = pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, self.inputs)
        return Batch(inputs, None if self.labels is None else self.labels.to(device), self.frames)


class Clips:
    """The user's clips for one stream, ``batch`` of them side by side (batches of his own stay as they are).

    ``least`` is the number of frames that each must have, and ``why`` says what for; ``labelled`` asks for labels.
    """

    def __init__(
        self, stream: Stream, clips: Any, *, batch: int = 8, labelled: bool = False, least: int = 1, why: str = ""
    ) -> None:
        if batch < 1:
            raise ClipError(f"batch must be a number of clips of at least 1, not {batch!r}")
        self.stream, self.batch, self.labelled, self.least, self.why = stream, batch, labelled, least, why
        self.source = clips
        self.indexed = hasattr(clips, "__getitem__") and hasattr(clips, "__len__")
        if not self.indexed and not isinstance(clips, Iterable):
            raise ClipError(
                f"clips are a list, a Dataset, a DataLoader or a tensor of clips, not {type(clips).__name__}"
            )
        if self.indexed and not len(clips):
            raise ClipError("there are no clips: the list is empty")

    def epoch(self, number: int = 0, seed: int | None = None, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from ``start`` on: in order, or, with a seed, shuffled by it where they have numbers.

        Clips without numbers come in their own order; torch's generator is set by the seed before they begin.
        """
        if not self.indexed:
            if seed is not None:
                torch.manual_seed(seed * 1_000_003 + number)
            batches = self._foreign()
            for _ in range(start):  # now, not when the first batch is asked for: to come there may draw random numbers
                next(batches, None)
            return batches
        order: Sequence[int] = range(len(self.source))
        if seed is not None:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            order = torch.randperm(len(self.source), generator=generator).tolist()
        if self._whole(self._item(order[0])):
            return (self._joined([(index, self.source[index])]) for index in order[start:])
        return self._batches(order[start * self.batch :])

    def __len__(self) -> int:
        """Batches of an epoch, where the clips have numbers; else 0, which says that nobody knows."""
        if not self.indexed:
            return 0
        count = len(self.source)
        return count if self._whole(self._item(0)) else -(-count // self.batch)

    # -- from the user's items to batches

    def _item(self, index: int) -> Any:
        return self._parts(self.source[index], self.name(index))[0]

    def _batches(self, order: Sequence[int]) -> Iterator[Batch]:
        for at in range(0, len(order), self.batch):
            yield self._joined([(index, self.source[index]) for index in order[at : at + self.batch]])

    def _foreign(self) -> Iterator[Batch]:
        """Batches of clips without numbers."""
        group: list[tuple[int, Any]] = []
        index = -1
        for index, item in enumerate(self.source):
            group.append((index, item))
            if len(group) == self.batch or self._whole(self._parts(item, self.name(index))[0]):
                yield self._joined(group)
                group = []
        if group:
            yield self._joined(group)
        if index < 0:
            raise ClipError(
                "there are no clips: nothing came out of them (a generator can be used up only once; a list, a Dataset "
                "or a DataLoader can be read again)"
            )

    def name(self, index: int) -> str:
        """What an error calls a clip: its file, where the source knows, or its number."""
        named = getattr(self.source, "name", None)
        return str(named(index)) if callable(named) else f"clip {index}"

    def _parts(self, item: Any, name: str) -> tuple[tuple[Any, ...], Any]:
        """The network's inputs, and the label or None, of one item."""
        example = self.stream.example
        count = len(example)
        if hasattr(item, "__array__") and not isinstance(item, Tensor):
            item = torch.as_tensor(item)
        listed = count == 1 and isinstance(example[0], (list, tuple))
        if (count == 1 and isinstance(item, Tensor)) or (listed and item and isinstance(item[0], Tensor)):
            found, label = (item,), None
        elif isinstance(item, (tuple, list)) and len(item) in (count, count + 1):
            found, label = tuple(item[:count]), item[count] if len(item) > count else None
        else:
            wanted = "a clip" if count == 1 else f"the network's {count} inputs"
            raise ClipError(f"{name} is {_told(item)}; give {wanted}, or that and a label behind it, for each")
        if self.labelled and label is None:
            raise ClipError(f"{name} has no label; give pairs (clip, label)")
        found = pytree.tree_map(
            lambda leaf: torch.as_tensor(leaf) if hasattr(leaf, "__array__") and not isinstance(leaf, Tensor) else leaf,
            found,
        )
        return found, label

    def _whole(self, inputs: tuple[Any, ...]) -> bool:
        """These inputs have the batch, as the example has it."""
        pairs = zip(pytree.tree_leaves(inputs), pytree.tree_leaves(self.stream.example), strict=False)
        return all(leaf.dim() == example.dim() for leaf, example in pairs if isinstance(example, Tensor))

    def _joined(self, items: Sequence[tuple[int, Any]]) -> Batch:
        rows = [(self.name(index), *self._parts(item, self.name(index))) for index, item in items]
        for name, inputs, _ in rows:
            self._check(name, inputs)
        lengths = {self._frames(inputs): name for name, inputs, _ in rows}
        if len(lengths) > 1:
            (one, first), (two, second) = list(lengths.items())[:2]
            raise ClipError(
                f"{second} has {two} frames and {first} has {one}: cut clips of one batch to one length, or take batch=1"
            )
        leaves = [pytree.tree_flatten(inputs)[0] for _, inputs, _ in rows]
        if not self._whole(rows[0][1]):
            leaves = [
                [
                    torch.stack(column) if isinstance(column[0], Tensor) else column[0]
                    for column in zip(*leaves, strict=True)
                ]
            ]
        example = pytree.tree_leaves(self.stream.example)
        ready = [
            leaf.to(kind.dtype) if isinstance(kind, Tensor) and kind.is_floating_point() else leaf
            for leaf, kind in zip(leaves[0], example, strict=True)
        ]
        inputs = pytree.tree_unflatten(ready, pytree.tree_structure(self.stream.example))
        labels = None
        if self.labelled:
            given = [torch.as_tensor(label) for _, _, label in rows]
            labels = given[0] if given[0].dim() and len(given) == 1 else torch.stack(given)
        return Batch(inputs, labels, next(iter(lengths)))

    def _frames(self, inputs: tuple[Any, ...]) -> int:
        """The frames of a clip; as the stream counts them, whatever the inputs' own rates."""
        if not self.stream.dissected.inputs.plain:
            return int(self.stream.dissected.inputs.frames)
        units = self.stream.dissected.inputs.tensors
        late = not self._whole(inputs)
        leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
        return next(
            leaf.shape[unit.time - late]
            for leaf, unit in zip(leaves, units, strict=True)
            if unit.time is not None and unit.rate == 1
        )

    def _check(self, name: str, inputs: tuple[Any, ...]) -> None:
        """Raise ClipError where a clip does not fit the network or what is to be done with it."""
        example = pytree.tree_leaves(self.stream.example)
        leaves = pytree.tree_leaves(inputs)
        if len(leaves) != len(example):
            raise ClipError(f"{name} has {len(leaves)} tensors where the network takes {len(example)}")
        plain = self.stream.dissected.inputs.plain
        for leaf, wanted, unit in zip(leaves, example, self.stream.dissected.inputs.tensors, strict=False):
            if not isinstance(wanted, Tensor):
                continue
            late = wanted.dim() - leaf.dim()
            if late not in ((0, 1) if plain else (0,)):
                raise ClipError(f"{name} is {_told(leaf)}, where the network takes {_shape(wanted, unit, plain)}")
            if wanted.is_floating_point() and not leaf.is_floating_point():
                raise ClipError(
                    f"{name} holds {str(leaf.dtype).removeprefix('torch.')}, where the network takes floating-point "
                    "numbers: preprocess the pictures as the network was trained (dissect.Preprocess)"
                )
            for dim in range(1, wanted.dim()) if plain else ():
                size, right = leaf.shape[dim - late], wanted.shape[dim]
                if dim == unit.time or size == right:
                    continue
                if dim == 1:
                    raise ClipError(
                        f"{name} has {size} channel{'s' * (size > 1)}, where the network takes {right}; its shape is "
                        f"{tuple(leaf.shape)}, where {_shape(wanted, unit, plain)} is wanted: "
                        + ("turn it gray" if right == 1 else "turn it to colour" if size == 1 else "move its axes")
                    )
                raise ClipError(
                    f"{name} has the shape {tuple(leaf.shape)}, where {_shape(wanted, unit, plain)} is wanted: resize "
                    "its frames, or convert the network with an example of that size"
                )
        if (frames := self._frames(inputs)) < self.least:
            raise ClipError(
                f"{name} has {frames} frame{'s' * (frames != 1)}, and {self.least} are needed"
                + (f" ({self.why})" if self.why else "")
                + ": cut longer clips, or leave it out"
            )


def _told(item: Any) -> str:
    if isinstance(item, Tensor):
        return f"a tensor of shape {tuple(item.shape)}"
    if isinstance(item, (list, tuple)):
        return f"a {type(item).__name__} of {len(item)}"
    return f"a {type(item).__name__}"


def _shape(wanted: Tensor, unit: Any, plain: bool) -> str:
    sizes = ["T" if plain and dim == unit.time else str(size) for dim, size in enumerate(wanted.shape)]
    sizes[0] = "N" if plain else sizes[0]
    both = f", or ({', '.join(sizes[1:])}) for one" if plain else ""
    return f"({', '.join(sizes)}){both}"
