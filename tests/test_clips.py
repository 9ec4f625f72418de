"""Clips of every shape that people have, in a settled order; and what is said of those that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import CLIP, clips, cut, labelled, tiny
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dissect
from dissect.clips import Clips
from dissect.errors import ClipError

STREAM = cut(tiny())
FEW = clips(5)


class Iterated:
    """Clips without numbers."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __iter__(self) -> Any:
        return iter(self.items)


@pytest.mark.parametrize(
    "given",
    [
        FEW,
        list(FEW),
        TensorDataset(FEW),
        [clip.numpy() for clip in FEW],
        Iterated(FEW),
        labelled(5),
        [FEW[:2], FEW[2:4], FEW[4:]],
        DataLoader(TensorDataset(FEW), batch_size=2),
        DataLoader(labelled(5), batch_size=2),  # type: ignore[arg-type]
    ],
    ids=["tensor", "list", "dataset", "numpy", "iterable", "labelled", "batches", "loader", "labelled loader"],
)
def test_whatever_the_user_has_comes_as_batches(given: Any) -> None:
    batches = list(Clips(STREAM, given, batch=2).epoch())
    assert [taken.inputs[0].shape[0] for taken in batches] == [2, 2, 1]
    assert torch.equal(torch.cat([taken.inputs[0] for taken in batches]), FEW)
    assert {taken.frames for taken in batches} == {6}


def test_labels_come_with_their_clips() -> None:
    (taken,) = Clips(STREAM, labelled(5), batch=8, labelled=True).epoch(3, seed=5)
    order = [next(at for at, clip in enumerate(FEW) if torch.equal(clip, row)) for row in taken.inputs[0]]
    assert sorted(order) == [0, 1, 2, 3, 4]
    assert taken.labels is not None
    assert taken.labels.tolist() == [at % 3 for at in order]


@pytest.mark.parametrize("given", [FEW, Iterated(FEW), DataLoader(TensorDataset(FEW), batch_size=2, shuffle=True)])
def test_an_epoch_is_settled_by_seed_and_number_and_can_be_entered_anywhere(given: Any) -> None:
    source = Clips(STREAM, given, batch=2)
    before = torch.get_rng_state()
    whole = [taken.inputs[0] for taken in source.epoch(4, seed=7)]
    late = [taken.inputs[0] for taken in source.epoch(4, seed=7, start=2)]
    torch.set_rng_state(before)
    assert len(late) == 1
    assert torch.equal(late[0], whole[2])


def test_epochs_and_seeds_differ() -> None:
    source = Clips(STREAM, clips(20), batch=20)
    first, second, third = (next(source.epoch(*given)).inputs[0] for given in ((0, 1), (1, 1), (0, 2)))
    assert not torch.equal(first, second)
    assert not torch.equal(first, third)


class Two(nn.Module):
    """Two inputs, the second without time."""

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x.mean((2, 3, 4)) + bias


def test_networks_of_several_inputs() -> None:
    stream = dissect.convert(Two(), (torch.zeros(1, 1, 6, 8, 8), torch.zeros(1, 1)), time_dim=[2, None])
    items = [((FEW[index].float(), torch.ones(1)), index) for index in range(3)]
    (taken,) = Clips(stream, [(*inputs, label) for inputs, label in items], batch=3, labelled=True).epoch()
    assert [leaf.shape for leaf in taken.inputs] == [(3, 1, 6, 8, 8), (3, 1)]
    assert taken.labels is not None
    assert taken.labels.tolist() == [0, 1, 2]
    with pytest.raises(ClipError, match=r"clip 0 is a tensor .* give the network's 2 inputs"):
        list(Clips(stream, FEW).epoch())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([FEW[0][:, :4]], r"clip 0 has 4 frames, and 6 are needed \(the window\): cut longer clips"),
        ([FEW[0], FEW[1].repeat(3, 1, 1, 1)], r"clip 1 has 3 channels, where the network takes 1.*turn it gray"),
        ([FEW[0].repeat(1, 1, 2, 2)], r"clip 0 has the shape \(1, 6, 16, 16\).*resize its frames"),
        ([FEW[0], clips(1, 7)[0]], "clip 1 has 7 frames and clip 0 has 6: cut clips of one batch to one length"),
        ([FEW[0, 0]], r"clip 0 is a tensor of shape \(6, 8, 8\), where the network takes \(N, 1, T, 8, 8\)"),
        ([(FEW[0] * 50).to(torch.uint8)], "clip 0 holds uint8.*preprocess the pictures"),
        (["a.mp4"], "clip 0 is a str; give a clip"),
        ([], "there are no clips"),
        (Iterated([]), "there are no clips"),
        (7, "clips are a list, a Dataset, a DataLoader or a tensor of clips, not int"),
    ],
)
def test_what_does_not_fit_is_named_with_the_fix(given: Any, words: str) -> None:
    with pytest.raises(ClipError, match=words):
        list(Clips(STREAM, given, least=6, why="the window").epoch())


def test_labels_that_are_missing_are_missed() -> None:
    with pytest.raises(ClipError, match=r"clip 0 has no label; give pairs \(clip, label\)"):
        list(Clips(STREAM, FEW, labelled=True).epoch())


def test_an_error_names_the_file_where_the_source_knows_it() -> None:
    class Named(list):  # type: ignore[type-arg]
        def name(self, index: int) -> str:
            return f"street.mp4, frames {6 * index} to {6 * index + 5}"

    with pytest.raises(ClipError, match=r"street.mp4, frames 6 to 11 has 3 channels"):
        list(Clips(STREAM, Named([FEW[0], FEW[1].repeat(3, 1, 1, 1)])).epoch())


def test_channels_of_a_colour_network() -> None:
    stream = dissect.convert(nn.Conv3d(3, 2, 3, padding=1), CLIP.float().repeat(1, 3, 1, 1, 1))
    with pytest.raises(ClipError, match=r"clip 0 has 1 channel, where the network takes 3.*turn it to colour"):
        list(Clips(stream, FEW.float()).epoch())
