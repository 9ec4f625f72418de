"""Inflation: an image network in a video network, dissected, is the image network again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from laws import close
from public_networks import _library, disturb
from torch import Tensor, nn

import dissect
from dissect import zoo
from dissect.errors import DissectError
from dissect.inflation import HOW

PICTURE = torch.randn(2, 3, 40, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def image_network() -> nn.Module:
    """Torchvision's own ResNet-18 for pictures, nothing in it left constant."""
    torch.manual_seed(0)
    network: nn.Module = _library("torchvision.models").resnet18(num_classes=7)
    return disturb(network, PICTURE.float()).double().eval()


def video_network() -> zoo.ResNet:
    return zoo.resnet18(num_classes=7, shortcut="B", seed=3).double().eval()


def still(picture: Tensor, frames: int) -> Tensor:
    return picture.unsqueeze(2).expand(-1, -1, frames, -1, -1)


@pytest.mark.parametrize(
    ("how", "skip"), [*((how, "concat") for how in HOW), ("mean", "sum"), ("mean", "none"), ("newest", "sum")]
)
def test_a_still_scene_gives_the_scores_of_the_picture(how: str, skip: str) -> None:
    image, video = image_network(), video_network()
    video.load_state_dict(dissect.inflate(image, video, how))
    stream = dissect.convert(video, still(PICTURE[:1], 4), skip=skip, fill="replicate")
    with torch.no_grad():
        scores, wanted = stream.clip(still(PICTURE, 6)), image(PICTURE)
    for time in (0, 5):  # the first frame repeated: steady from the first on
        close(scores[:, :, time], wanted)


def test_in_the_centre_every_frame_is_a_picture_of_its_own() -> None:
    image, video = image_network(), video_network()
    video.load_state_dict(dissect.inflate(image, video, "centre"))
    stream = dissect.convert(video, still(PICTURE[:1], 4), pool="none")
    clip = torch.randn(1, 3, 5, 40, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        close(stream.clip(clip)[0].T, image(clip[0].transpose(0, 1)))


def test_any_video_network_deflated_gives_for_a_picture_what_it_gives_for_a_still_scene() -> None:
    image, video = image_network(), video_network()
    disturb(video.float(), torch.randn(2, 3, 8, 40, 48)).double()
    image.load_state_dict(dissect.deflate(video, image))
    with torch.no_grad():
        conventional = dissect.convert(video, still(PICTURE[:1], 4), fill="replicate").clip(still(PICTURE, 2))[:, :, -1]
        close(image(PICTURE), conventional)


@pytest.mark.parametrize("how", HOW)
def test_deflation_is_the_inverse(how: str) -> None:
    image, video = image_network(), video_network()
    inflated = dissect.inflate(image, video, how)
    assert {name: tensor.shape for name, tensor in inflated.items()} == {
        name: tensor.shape for name, tensor in video.state_dict().items()
    }
    back = dissect.deflate(inflated, image)
    assert list(back) == list(image.state_dict())
    for name, tensor in image.state_dict().items():
        close(back[name].double(), tensor.double(), 1e-12, name)


@pytest.mark.parametrize(("how", "shares"), [("mean", [1 / 3] * 3), ("centre", [0, 1, 0]), ("newest", [0, 0, 1])])
def test_taps_get_their_share(how: str, shares: list[float]) -> None:
    weight = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    found = dissect.inflate({"weight": weight}, {"weight": torch.empty(4, 2, 3, 3, 3)}, how)["weight"]
    for tap, share in enumerate(shares):
        close(found[:, :, tap], weight * share)


def test_neither_network_is_changed() -> None:
    image, video = image_network(), video_network()
    before = [tensor.clone() for network in (image, video) for tensor in network.state_dict().values()]
    made = dissect.inflate(image, video)
    for tensor in made.values():
        tensor.zero_()
    for tensor, wanted in zip([*image.state_dict().values(), *video.state_dict().values()], before, strict=True):
        assert torch.equal(tensor, wanted)


def test_other_names_go_by_order() -> None:
    image = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    video = nn.ModuleDict({"a": nn.Conv3d(2, 3, (2, 3, 3)), "b": nn.BatchNorm3d(3)})
    with pytest.raises(DissectError, match=r"a\.weight has no counterpart.*by='order'"):
        dissect.inflate(image, video)
    found = dissect.inflate(image, video, by="order")
    assert list(found) == list(video.state_dict())
    close(found["a.weight"].sum(2), image[0].weight)
    close(dissect.deflate(found, image, by="order")["0.weight"], image[0].weight)


@pytest.mark.parametrize(
    ("image", "video", "settings", "words"),
    [
        ({"w": (4, 2, 3, 3)}, {"w": (4, 2, 3, 5, 3)}, {}, ["w", "(4, 2, 3, 3)", "(4, 2, 3, 5, 3)", "strict=False"]),
        ({"w": (4, 2)}, {"w": (4, 2, 1)}, {}, ["w", "(4, 2)"]),
        ({"w": (4,), "v": (3,)}, {"w": (4,)}, {}, ["v is left over"]),
        ({}, dict.fromkeys("abcde", (1,)), {}, ["a has", "b has", "c has", "and 2 more"]),
        ({"w": (4,)}, {"w": (4,), "v": (4,)}, {"by": "order"}, ["1 and 2 tensors"]),
        ({"w": (4,)}, {"w": (4,)}, {"by": "shape"}, ["by='shape'", "name, order"]),
        ({"w": (4,)}, {"w": (4,)}, {"how": "first"}, ["how='first'", "mean, centre, newest"]),
    ],
    ids=str,
)
def test_networks_that_do_not_fit_are_refused(
    image: dict[str, Any], video: dict[str, Any], settings: dict[str, Any], words: list[str]
) -> None:
    def state(shapes: dict[str, Any]) -> dict[str, Tensor]:
        return {name: torch.zeros(shape) for name, shape in shapes.items()}

    with pytest.raises(DissectError) as caught:
        dissect.inflate(state(image), state(video), **settings)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_new_head_stays_its_own() -> None:
    """A trunk from pictures, a head for other classes: what does not fit is left out."""
    image, video = image_network(), zoo.headed_resnet(18, head="plain", num_classes=5, seed=1).double()
    trunk = zoo.resnet18(num_classes=5, shortcut="B").double()
    found = dissect.inflate(image, trunk, strict=False)
    assert set(trunk.state_dict()) - set(found) == {"fc.weight", "fc.bias"}
    kept = trunk.fc.weight.detach().clone()
    trunk.load_state_dict(found, strict=False)
    assert torch.equal(trunk.fc.weight, kept)
    assert not {name for name in dissect.inflate(image, video, strict=False) if name.startswith("head.")}
