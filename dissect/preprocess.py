"""What becomes of a picture before a network sees it: :class:`Preprocess`, stored in every step model.

numpy alone: a deployment that runs step models needs neither torch nor an image library.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dissect.errors import PlanError, StreamError

__all__ = ["Preprocess"]

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as video codecs have it


@dataclass(frozen=True)
class Preprocess:
    """From a picture (H, W, 3) uint8 in RGB to a frame of a network, float32.

    The picture is scaled, bilinear and anti-aliased (as Pillow and ``torch.nn.functional.interpolate(antialias=True)``
    do it), until it just covers ``size``; its centre is cut out; 0 ... 255 becomes ``range``; ``mean`` is taken off and
    ``std`` divides. ``frame_stride`` 2 means that every second picture of the video is a frame.

    The defaults are those of torchvision's video networks, trained on Kinetics. ``size`` is (height, width); ``mean``
    and ``std`` have one number for each channel, in the order of ``color`` ("rgb", "bgr" or "gray"); ``layout``
    "nchw" gives (C, H, W), "nhwc" gives (H, W, C). Raises :class:`~dissect.errors.PlanError` for what fits nothing.
    """

    size: tuple[int, int] = (112, 112)
    mean: tuple[float, ...] = (0.43216, 0.394666, 0.37645)
    std: tuple[float, ...] = (0.22803, 0.22145, 0.216989)
    range: tuple[float, float] = (0.0, 1.0)
    color: str = "rgb"
    layout: str = "nchw"
    frame_stride: int = 1

    def __post_init__(self) -> None:
        """Refuse values that fit nothing, all of them at once."""
        channels = {"rgb": 3, "bgr": 3, "gray": 1}.get(self.color)
        faults = [
            fault
            for broken, fault in (
                (channels is None, f"color is rgb, bgr or gray, not {self.color!r}"),
                (self.layout not in ("nchw", "nhwc"), f"layout is nchw or nhwc, not {self.layout!r}"),
                (len(self.size) != 2 or min(self.size, default=0) < 1, f"size is (height, width), not {self.size}"),
                (len(self.range) != 2, f"range is (lowest, highest), not {self.range}"),
                (not len(self.mean) == len(self.std) == (channels or 3), f"mean and std need {channels or 3} numbers"),
                (not all(self.std), "std must not hold a zero"),
                (self.frame_stride < 1, f"frame_stride is 1 or more, not {self.frame_stride}"),
            )
            if broken
        ]
        if faults:
            raise PlanError(f"The preprocessing does not fit: {'; '.join(faults)}.")

    def to_json(self) -> str:
        """The fields as one JSON object, as the metadata of a step model holds it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | Mapping[str, Any]) -> Preprocess:
        """Read what :meth:`to_json` wrote; missing fields take their defaults, unknown ones are for later versions.

        Raises :class:`~dissect.errors.StreamError` for anything else.
        """
        try:
            fields = dict(json.loads(text) if isinstance(text, str) else text)
            known = [(key, fields[key]) for key in cls.__dataclass_fields__ if key in fields]
            values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in known}
            return cls(**values)
        except (ValueError, TypeError, KeyError, PlanError) as error:
            raise StreamError(f"This is no preprocessing of a step model: {str(text)[:80]!r} ({error}).") from error

    def __call__(self, picture: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The frame of a picture (H, W, 3), uint8, RGB; float32 and contiguous.

        Raises :class:`~dissect.errors.StreamError` for a picture of another shape or type.
        """
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8 or picture.size == 0:
            raise StreamError(f"A picture is uint8 (H, W, 3) in RGB, not {picture.dtype} {picture.shape}.")
        frame = _resized(picture, self.size)
        if self.color == "bgr":
            frame = frame[..., ::-1]
        elif self.color == "gray":
            frame = (frame @ _LUMA)[..., None]
        low, high = self.range
        std = np.asarray(self.std, np.float64)
        scale = (high - low) / 255.0 / std
        shift = (low - np.asarray(self.mean, np.float64)) / std
        frame = frame * scale.astype(np.float32) + shift.astype(np.float32)
        return np.ascontiguousarray(frame if self.layout == "nhwc" else frame.transpose(2, 0, 1))


def _resized(picture: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.float32]:
    """The centre of the picture at ``size``, as float32 (H, W, 3) in 0 ... 255."""
    height, width = picture.shape[:2]
    scale = max(size[0] / height, size[1] / width)
    rows, top, down = _weights(height, max(size[0], round(height * scale)), size[0])
    columns, left, across = _weights(width, max(size[1], round(width * scale)), size[1])
    centre = picture[top : top + rows, left : left + columns].astype(np.float32)
    # One matrix product along each axis, each over all that lies beside it in memory.
    lines = (down @ centre.reshape(rows, columns * 3)).reshape(size[0], columns, 3).transpose(1, 0, 2)
    cut: NDArray[np.float32] = across @ lines.reshape(columns, size[0] * 3)
    return cut.reshape(size[1], size[0], 3).transpose(1, 0, 2)


@lru_cache(maxsize=16)
def _weights(length: int, resized: int, kept: int) -> tuple[int, int, NDArray[np.float32]]:
    """The bilinear filter from ``length`` pixels to the middle ``kept`` of ``resized``.

    Gives how many pixels it reads, the first of them, and the weights (kept, pixels read).
    """
    scale = length / resized
    support = max(scale, 1.0)  # wider than the distance of two pixels where the picture shrinks: no aliasing
    skipped = (resized - kept) // 2
    centres = (np.arange(skipped, skipped + kept) + 0.5) * scale
    pixels = np.arange(length) + 0.5
    weights = np.clip(1.0 - np.abs(pixels - centres[:, None]) / support, 0.0, None)
    weights /= weights.sum(axis=1, keepdims=True)
    first = max(0, math.floor(centres[0] - support))
    last = min(length, math.ceil(centres[-1] + support) + 1)
    return last - first, first, np.ascontiguousarray(weights[:, first:last], np.float32)
