"""`Preprocess` against torch's own resizing, and through JSON and back."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from dissect.errors import DissectError, PlanError, StreamError
from dissect.preprocess import Preprocess


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)


def oracle(image: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """Resize with torch until ``size`` is covered, cut the centre out: (3, H, W) in 0 ... 255."""
    height, width = image.shape[:2]
    scale = max(size[0] / height, size[1] / width)
    resized = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    tensor = interpolate(tensor, resized, mode="bilinear", antialias=True)[0]
    top, left = (resized[0] - size[0]) // 2, (resized[1] - size[1]) // 2
    return tensor[:, top : top + size[0], left : left + size[1]]


@pytest.mark.parametrize("size", [(112, 112), (64, 96), (7, 5), (1, 1)])
@pytest.mark.parametrize("shape", [(112, 112), (240, 320), (480, 270), (37, 1000), (50, 60), (3, 3), (1, 1)])
def test_resize_is_what_torch_does(shape: tuple[int, int], size: tuple[int, int]) -> None:
    image = picture(*shape)
    got = Preprocess(size, mean=(0, 0, 0), std=(1, 1, 1), range=(0, 255))(image)
    assert got.shape == (3, *size)
    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    np.testing.assert_allclose(got, oracle(image, size).numpy(), atol=2e-3)


@pytest.mark.parametrize("range_", [(0, 1), (-1, 1), (0, 255)])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("color", ["rgb", "bgr"])
def test_normalisation(color: str, layout: str, range_: tuple[float, float]) -> None:
    image, mean, std = picture(20, 30), np.array([0.1, 0.2, 0.3]), np.array([0.5, 0.6, 0.7])
    got = Preprocess((20, 30), tuple(mean), tuple(std), range_, color, layout)(image)
    ordered = image[..., ::-1] if color == "bgr" else image
    wanted = (ordered / 255 * (range_[1] - range_[0]) + range_[0] - mean) / std
    np.testing.assert_allclose(got, wanted.transpose(2, 0, 1) if layout == "nchw" else wanted, atol=1e-4)


def test_gray_is_one_channel() -> None:
    image = np.full((8, 8, 3), 77, np.uint8)
    got = Preprocess((4, 4), (0.0,), (1.0,), color="gray")(image)
    assert got.shape == (1, 4, 4)
    np.testing.assert_allclose(got, 77 / 255, atol=1e-6)


def test_a_flat_picture_stays_flat() -> None:
    got = Preprocess((30, 50), (0, 0, 0), (1, 1, 1))(np.full((101, 77, 3), 200, np.uint8))
    np.testing.assert_allclose(got, 200 / 255, atol=1e-6)


@pytest.mark.parametrize(
    "preprocess",
    [Preprocess(), Preprocess((8, 9), (0.5,), (0.25,), (-1.0, 1.0), "gray", "nhwc", 2)],
)
def test_json_and_back(preprocess: Preprocess) -> None:
    fields = json.loads(preprocess.to_json())
    assert set(fields) == {"size", "mean", "std", "range", "color", "layout", "frame_stride"}
    assert Preprocess.from_json(preprocess.to_json()) == preprocess
    assert Preprocess.from_json({**fields, "of a later version": 1}) == preprocess
    assert Preprocess.from_json("{}") == Preprocess()


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": (0, 3)},
        {"size": (3,)},
        {"mean": (0.5,)},
        {"std": (1.0, 0.0, 1.0)},
        {"color": "yuv"},
        {"layout": "hwc"},
        {"frame_stride": 0},
        {"range": (1,)},
    ],
)
def test_wrong_values_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=next(iter(wrong))):
        Preprocess(**wrong)
    with pytest.raises(StreamError, match="no preprocessing"):
        Preprocess.from_json(json.dumps(wrong))


@pytest.mark.parametrize("text", ["", "nonsense", "3", '{"size": 3}', "[1]"])
def test_wrong_json(text: str) -> None:
    with pytest.raises(DissectError):
        Preprocess.from_json(text)


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4)), np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)]
)
def test_wrong_pictures(image: Any) -> None:
    with pytest.raises(StreamError, match="uint8"):
        Preprocess()(image)


def test_needs_no_torch() -> None:
    code = "import sys, dissect; dissect.Preprocess(); assert not {'torch', 'onnxruntime'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
