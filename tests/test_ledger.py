"""The axis ledger: a reshape of the clip is a reshape of the frame tensor, wherever batch and time stand."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dissect import ledger
from dissect.ledger import Axes, Axis, Factor, LedgerError, join, reshape, split, split_frames

N, T = Factor("N", 13), Factor("T", 6)


def space(*sizes: int) -> tuple[Factor, ...]:
    return tuple(Factor("S", size) for size in sizes)


def axes(*dims: tuple[Factor, ...]) -> Axes:
    return Axes(tuple(Axis(dim) for dim in dims))


CLIP = axes((N,), space(4), (T,), space(3), space(5))


def test_what_an_axis_says() -> None:
    assert CLIP.shape == (13, 4, 6, 3, 5)
    assert (CLIP.kinds, CLIP.time, CLIP.frame) == ("NSTSS", 2, (4, 3, 5))
    assert [CLIP.kept(dim) for dim in range(5)] == [None, 0, None, 1, 2]
    merged = Axis((T, *space(3, 5)))
    assert (merged.size, merged.space, merged.plain, merged.dropped, merged.is_time) == (90, 15, False, False, False)
    assert Axis().plain
    assert not Axis().dropped
    assert Axis().size == 1
    assert Axis((N, T)).dropped
    assert Axis((T,)).is_time


@pytest.mark.parametrize(
    ("shape", "kinds"),
    [
        ((13, 4, 6, 15), ["N", "S", "T", "SS"]),
        ((13, 4, 6 * 15), ["N", "S", "TSS"]),
        ((13, 4 * 6 * 15), ["N", "STSS"]),
        ((13, 2, 2, 6, 3, 5), ["N", "S", "S", "T", "S", "S"]),
        ((13, 4, 6, 3, 5, 1), ["N", "S", "T", "S", "S", ""]),
        ((13, 4, 6, 5, 3), ["N", "S", "T", "S", "S"]),
        ((1, 13, 4, 1, 6, 15), ["", "N", "S", "", "T", "SS"]),
    ],
    ids=str,
)
def test_reshape_deals_the_factors_out(shape: tuple[int, ...], kinds: list[str]) -> None:
    after = reshape(CLIP, shape)
    assert after.shape == shape
    assert [axis.kinds for axis in after.dims] == kinds
    assert reshape(after, CLIP.shape).shape == CLIP.shape


@pytest.mark.parametrize(
    ("before", "shape", "word"),
    [
        (CLIP, (13, 4, 2, 3, 15), "time"),
        (CLIP, (13, 4, 3, 2, 15), "time"),
        (CLIP, (13, 8, 3, 15), "time"),
        (axes((Factor("N", 8),), space(3)), (4, 2, 3), "batch"),
        (CLIP, (13, 4, 6, 3, 4), "an axis"),
        (CLIP, (13, 4, 6, 15, 2), "does not reshape"),
    ],
    ids=str,
)
def test_a_cut_through_batch_or_time_is_refused(before: Axes, shape: tuple[int, ...], word: str) -> None:
    with pytest.raises(LedgerError, match=word):
        reshape(before, shape)


def test_time_of_one_position_keeps_a_place_of_its_own_or_ends() -> None:
    short = axes((N,), space(4), (Factor("T", 1),), space(3))
    assert reshape(short, (13, 4, 1, 3)).time == 2
    assert reshape(short, (13, 12)).time is None


def test_sized_follows_an_operator_that_changes_sizes_in_place() -> None:
    after = CLIP.sized((13, 4, 3, 7, 1))
    assert (after.shape, after.kinds) == ((13, 4, 3, 7, 1), "NSTS")
    with pytest.raises(LedgerError, match="resizes"):
        axes((N, T), space(3)).sized((10, 3))


def test_broadcast_refuses_time_against_batch() -> None:
    out = ledger.broadcast([CLIP, axes(space(4), (), (), ())])
    assert out == CLIP
    with pytest.raises(LedgerError, match="meets"):
        ledger.broadcast([axes((N,), (Factor("T", 13),)), axes((), (N,))])


def layouts() -> st.SearchStrategy[tuple[Axes, list[int]]]:
    """Ledgers with batch and time somewhere, each alone or merged with space, and the order of the factors in (N, T, S...)."""

    @st.composite
    def draw_layout(draw: st.DrawFn) -> tuple[Axes, list[int]]:
        sizes = draw(st.lists(st.integers(2, 4), min_size=0, max_size=3))
        order = draw(st.permutations(range(2 + len(sizes))))
        factors = [Factor("N", 5), Factor("T", 3), *space(*sizes)]
        rest = iter(index for index in range(2, len(factors)))  # space stays in its own order in a frame tensor
        placed = [factors[at] if at < 2 else factors[next(rest)] for at in order]
        cuts = sorted({0, len(placed), *draw(st.lists(st.integers(0, len(placed)), max_size=3))})
        return Axes(tuple(Axis(tuple(placed[low:high])) for low, high in pairwise(cuts))), sizes

    return draw_layout()


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(layout=layouts(), batch=st.integers(1, 3), frames=st.integers(1, 4))
def test_join_puts_every_element_where_it_was(layout: tuple[Axes, list[int]], batch: int, frames: int) -> None:
    """A frame tensor ``(N*T, ...)`` in any layout, for any batch and length, against the permutation written out."""
    ledger_, sizes = layout
    x = torch.arange(batch * frames * prod(sizes)).reshape(batch, frames, *sizes)
    letters = [factor.kind for axis in ledger_.dims for factor in axis.factors]
    rest = iter(range(2, 2 + len(sizes)))
    wanted = x.permute([0 if kind == "N" else 1 if kind == "T" else next(rest) for kind in letters])
    shape = []
    for axis in ledger_.dims:
        shape.append(prod(batch if f.kind == "N" else frames if f.kind == "T" else f.size for f in axis.factors))
    got = join(x.flatten(0, 1).reshape(batch * frames, *ledger_.frame), ledger_, frames)
    assert torch.equal(got, wanted.reshape(shape))
    if not any("N" in axis.kinds and "T" in axis.kinds for axis in ledger_.dims):
        back = split_frames(got, ledger_)
        assert len(back) == frames
        assert all(torch.equal(part, x[:, time].reshape(batch, *ledger_.frame)) for time, part in enumerate(back))


@pytest.mark.parametrize("time_dim", [1, 2, 4])
def test_split_and_join_are_each_others_inverse(time_dim: int) -> None:
    x = torch.randn(2, 3, 4, 5, 6)
    dims = [(N,), space(3), space(4), space(5), space(6)]
    dims[time_dim] = (Factor("T", x.shape[time_dim]),)
    assert torch.equal(join(split(x, time_dim, x.shape[time_dim]), axes(*dims), x.shape[time_dim]), x)


def test_an_ended_time_axis_comes_back_at_dimension_two_or_last() -> None:
    rows = torch.arange(2 * 3 * 4.0).reshape(6, 4)
    scores = join(rows, axes((N,), space(4)), 3)
    assert scores.shape == (2, 4, 3)
    assert torch.equal(scores, rows.reshape(2, 3, 4).transpose(1, 2))
    assert join(rows[:, 0], axes((N,)), 3).shape == (2, 3)
    assert join(rows.reshape(6, 2, 2), axes((N,), space(2), space(2)), 3).shape == (2, 2, 3, 2)


def test_join_takes_frames_of_another_size_than_the_example() -> None:
    assert join(torch.zeros(6, 4, 9, 11), CLIP, 3).shape == (2, 4, 3, 9, 11)
    with pytest.raises(ValueError, match="merged axis"):
        join(torch.zeros(6, 4 * 9), axes((N,), (T, *space(4, 3))), 3)


def test_a_batch_that_is_gone_is_named() -> None:
    with pytest.raises(ValueError, match="batch"):
        join(torch.zeros(6, 4), axes((T,), space(4)), 3)
