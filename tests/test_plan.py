"""The plan: what a preset decides for each layer, where a branch begins, how overrides edit it, what they refuse."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from laws import law
from torch import Tensor, nn

import dissect
from dissect import zoo
from dissect.errors import PlanError
from dissect.plan import Branches, Options, Plan, Row

CLIP = torch.randn(1, 2, 8, 8, 8, generator=torch.Generator().manual_seed(0))


def temporal(channels: int = 4, kernel: int = 3, inputs: int | None = None, stride: int = 1) -> nn.Conv3d:
    return nn.Conv3d(
        inputs or channels, channels, (kernel, 1, 1), stride=(1, stride, stride), padding=(kernel // 2, 0, 0)
    )


def taps(stream: dissect.Stream) -> dict[str, int]:
    """The temporal taps that each convolution has in the clip form."""
    found = {}
    for path, module in stream.clip.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.dim() == 5:
            found[path] = weight.shape[2]
    return found


class Residual(nn.Module):
    """A fork and its addition, in the three ways that people write one; all names are unhelpful on purpose."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style = style
        self.a, self.b, self.c, self.d = temporal(4, 5, 2), temporal(), temporal(), temporal()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        if self.style == "in place":
            y = self.c(F.relu(self.b(x)))
            y += x
        elif self.style == "cat":
            y = torch.cat([x, self.c(F.relu(self.b(x)))], 1)[:, :4]
        else:
            y = x + self.c(F.relu(self.b(x)))
        return self.d(F.relu(y))


@pytest.mark.parametrize("style", ["plain", "in place", "cat"])
def test_d3d_keeps_three_taps_in_the_stem_and_two_first_in_a_branch(style: str) -> None:
    stream = dissect.convert(Residual(style), CLIP)
    assert taps(stream) == {"a": 3, "b": 2, "c": 1, "d": 2}
    assert stream.timing.delay == 0
    assert not stream.plan.exact


def test_d3d_in_a_residual_network_of_the_zoo() -> None:
    found = taps(dissect.convert(zoo.resnet18(num_classes=3, width=4, seed=0), torch.randn(1, 3, 16, 32, 32)))
    stem = [path for path in found if path.startswith(("conv1", "stem"))]
    assert [found[path] for path in stem] == [3]
    inside = [count for path, count in found.items() if path not in stem]
    assert inside.count(2) == 8, "the first convolution of each of the eight branches"
    assert set(inside) == {1, 2}


def test_d3d_in_a_plain_stack_keeps_two_taps_a_stage() -> None:
    layers = [
        temporal(4, 3, 2),
        temporal(),
        nn.MaxPool3d((1, 2, 2)),
        temporal(),
        temporal(),
        nn.MaxPool3d((1, 2, 2)),
        temporal(),
        temporal(),
    ]
    assert list(taps(dissect.convert(nn.Sequential(*layers), CLIP)).values()) == [3, 1, 2, 1, 2, 1]


def test_a_stride_in_space_begins_a_stage_too() -> None:
    layers = [temporal(4, 3, 2), temporal(stride=2), temporal(), temporal(stride=2)]
    assert list(taps(dissect.convert(nn.Sequential(*layers), CLIP)).values()) == [3, 2, 1, 2]


@pytest.mark.parametrize("preset", ["causal", "exact"])
def test_the_other_presets_keep_every_tap(preset: str) -> None:
    assert taps(dissect.convert(Residual("plain"), CLIP, preset=preset)) == {"a": 5, "b": 3, "c": 3, "d": 3}


def test_what_is_exact() -> None:
    assert dissect.convert(Residual("plain"), CLIP, preset="exact").plan.exact
    assert not dissect.convert(Residual("plain"), CLIP, preset="causal").plan.exact
    past = nn.Sequential(nn.ConstantPad3d((0, 0, 0, 0, 2, 0), 0.0), nn.Conv3d(2, 3, (3, 1, 1)))
    assert dissect.convert(past, CLIP, preset="causal").plan.exact, "a network that looks back alone is causal as it is"
    assert dissect.convert(nn.Sequential(nn.Conv3d(2, 3, (1, 3, 3))), CLIP, preset="causal").plan.exact


# Branches, on graphs alone.


def branches(edges: Mapping[str, Sequence[str]], strided: Sequence[str] = ()) -> Branches:
    merges = [node for node, reads in edges.items() if len(reads) > 1]
    return Branches(edges, merges, strided)


def test_a_branch_lies_between_a_fork_and_its_merge() -> None:
    graph = branches({"x": [], "stem": ["x"], "a": ["stem"], "b": ["a"], "sum": ["b", "stem"], "head": ["sum"]})
    assert [node for node in graph.inputs if graph.in_branch(node)] == ["a", "b"]
    assert graph.first("a", {"b", "stem"})
    assert not graph.first("b", {"a", "stem"})
    assert graph.first("head", {"a", "b", "stem"}), "a merge ends what stands before it"
    assert graph.any_above("head", {"stem"})
    assert not graph.any_above("stem", {"a", "b"})


def test_a_projected_skip_is_a_branch_of_its_own() -> None:
    graph = branches(
        {"x": [], "a": ["x"], "b": ["a"], "skip": ["x"], "sum": ["b", "skip"], "c": ["sum"], "out": ["c", "sum"]},
        ["skip"],
    )
    assert [node for node in graph.inputs if graph.in_branch(node)] == ["a", "b", "skip", "c"]
    assert graph.first("skip", {"a", "b"})
    assert graph.strided == set(), "a stride inside a branch begins no stage"


def test_nested_branches() -> None:
    edges = {"x": [], "a": ["x"], "b": ["a"], "inner": ["b", "a"], "c": ["inner"], "outer": ["c", "x"]}
    graph = branches(edges)
    assert [node for node in graph.inputs if graph.in_branch(node)] == ["a", "b", "inner", "c"]
    assert graph.first("b", {"a"}), "a fork inside a branch begins another"
    assert graph.first("c", {"a", "b"})


# Options and overrides.


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"preset": "best"}, ["best", "d3d, causal, exact"]),
        ({"pool": "mean"}, ["mean", "window, cumulative, none"]),
        ({"window": 0}, ["window", "0"]),
        ({"window": True}, ["window", "True"]),
        ({"window": 2.5}, ["window", "2.5"]),
        ({"overrides": {"b": {"taps": 2}}}, ["'b'", "taps", "depth"]),
        ({"overrides": {"b": {"depth": 0}}}, ["'b'", "depth=0"]),
        ({"overrides": {"b": {"depth": "2"}}}, ["'b'", "depth='2'"]),
        ({"overrides": {"b": {"pool": "all"}}}, ["'b'", "pool='all'"]),
        ({"overrides": {"nothing.*": {"depth": 2}}}, ["nothing.*", "fits no layer", "a, b, c, d"]),
        ({"overrides": {"[ab]": {"wait": True}}}, ["'[ab]'", "wait changes nothing at a, b", "d3d", "a pool that"]),
        ({"overrides": {"*": {"window": 3}}}, ["'*'", "window changes nothing at a, b, c, d", "a global pool"]),
    ],
    ids=str,
)
def test_an_option_that_makes_no_sense_is_refused_with_what_there_is(given: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(PlanError) as caught:
        dissect.convert(Residual("plain"), CLIP, **given)
    assert all(word in str(caught.value) for word in words), caught.value


def test_an_override_that_one_of_its_layers_hears_is_taken() -> None:
    model = nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.AdaptiveAvgPool3d(1))
    stream = dissect.convert(model, CLIP, overrides={"*": {"window": 3, "depth": 2}})
    assert [row.decision for row in stream.plan][1] == "window of 3, mean"
    with pytest.raises(PlanError, match="wait changes nothing at 1 in the preset causal"):
        dissect.convert(model, CLIP, preset="causal", overrides={"1": {"wait": True}})


def test_later_patterns_win() -> None:
    options = Options.checked("d3d", "window", None, {"layer*": {"depth": 3, "pool": "none"}, "layer2.*": {"depth": 1}})
    assert options.of("layer1.0") == {"depth": 3, "pool": "none"}
    assert options.of("layer2.0") == {"depth": 1, "pool": "none"}
    assert options.of("stem") == {}


@pytest.mark.parametrize("preset", ["d3d", "causal", "exact"])
@pytest.mark.parametrize("depth", [1, 2, 3, 9])
def test_depth_sets_the_taps_and_the_law_holds(preset: str, depth: int) -> None:
    model = Residual("plain").double().eval()
    stream = dissect.convert(model, CLIP.double(), preset=preset, overrides={"[ab]": {"depth": depth}})
    found = taps(stream)
    assert (found["a"], found["b"]) == (min(depth, 5), min(depth, 3))
    law(stream, CLIP.double())
    row = next(row for row in stream.plan if row.path == "a")
    if preset == "exact":
        assert (row.verdict == "exact") == (depth >= 5)


def test_dropped_taps_are_folded() -> None:
    """A still scene gives what it gave before, whatever the depth."""
    model = temporal(3, 7, 2).double()
    still = torch.randn(1, 2, 1, 4, 4, dtype=torch.float64).expand(-1, -1, 30, -1, -1)
    wanted = model(still)[:, :, 15]
    for preset in ("d3d", "causal", "exact"):
        for depth in range(1, 8):
            stream = dissect.convert(
                nn.Sequential(model), still[:, :, :8], preset=preset, overrides={"0": {"depth": depth}}
            )
            torch.testing.assert_close(stream.clip(still)[:, :, 20], wanted)


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.fc = temporal(3, 3, 2), nn.AdaptiveAvgPool3d(1), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.conv(x)).flatten(1))


@pytest.mark.parametrize("preset", ["d3d", "causal", "exact"])
@pytest.mark.parametrize(("pool", "window"), [("window", None), ("window", 3), ("cumulative", None), ("none", None)])
def test_what_a_global_pool_becomes(preset: str, pool: str, window: int | None) -> None:
    torch.manual_seed(0)
    model = Pooled().double().eval()
    stream = dissect.convert(model, CLIP.double(), preset=preset, pool=pool, window=window)
    law(stream, torch.randn(2, 2, 13, 8, 8, dtype=torch.float64))
    row = next(row for row in stream.plan if row.path == "pool")
    x = torch.randn(1, 2, 20, 8, 8, dtype=torch.float64)
    frames = stream.clip(x)[0].T  # scores, frame by frame
    features = dissect.convert(nn.Sequential(model.conv), CLIP.double(), preset=preset).clip(x)[0].mean((2, 3)).T
    delay = stream.timing.delay
    at = 15
    seen = {"none": features[at], "cumulative": features[delay : at + 1].mean(0)}.get(
        pool, features[at + 1 - (window or 8) : at + 1].mean(0)
    )
    torch.testing.assert_close(frames[at], model.fc(seen))
    assert (row.verdict == "exact") == (preset == "exact" and window is None and pool != "none")
    by_layer = dissect.convert(
        model, CLIP.double(), preset=preset, overrides={"pool": {"pool": pool} | ({"window": window} if window else {})}
    )
    torch.testing.assert_close(by_layer.clip(x), stream.clip(x))


# Printing.


def test_a_plan_prints_as_text_json_and_markdown() -> None:
    stream = dissect.convert(Residual("plain"), CLIP)
    plan = stream.plan
    assert len(plan) == len(list(plan)) == len(plan.rows) == 4
    text = str(plan)
    assert all(row.path in text and row.decision in text for row in plan)
    assert "preset d3d: 4 of 4 rows approximate" in text
    found = json.loads(plan.to_json())
    assert (found["preset"], found["exact"], len(found["rows"])) == ("d3d", False, 4)
    assert found["rows"][0]["path"] == "a"
    assert found["rows"][0]["kernel"] == 5
    markdown = plan.to_markdown().splitlines()
    assert len(markdown) == 6
    assert all(line.count("|") == markdown[0].count("|") for line in markdown)
    assert Plan("exact", (Row("a|b", "op", "kept", "exact"),)).to_markdown().splitlines()[2].startswith("| a\\|b |")


@pytest.mark.parametrize("preset", ["d3d", "causal", "exact"])
def test_rows_account_for_every_cache(preset: str) -> None:
    stream = dissect.convert(Pooled(), CLIP, preset=preset)
    small = sum(
        cache.numel() * cache.element_size()
        for cache, spec in zip(stream.caches(), stream.cache_list, strict=True)
        if spec.spec.role != "cache"
    )
    assert stream.plan.cache_bytes == stream.cache_bytes - small
    assert f"{stream.cache_bytes:,} bytes" in repr(stream)


def test_a_row_names_the_layer_the_operator_and_the_users_own_line() -> None:
    row = dissect.convert(Residual("plain"), CLIP).plan.rows[0]
    assert (row.path, row.op, row.kernel, row.stride, row.padding) == ("a", "aten.conv3d", 5, 1, (2, 2))
    assert row.source.startswith("test_plan.py:")
    assert row.reason


def test_the_plan_alone_is_the_plan_of_the_conversion() -> None:
    from dissect.stream import plan

    found, refusals = plan(Residual("plain"), CLIP, preset="causal")[:2]
    assert not refusals or isinstance(refusals, tuple)
    assert found.rows == dissect.convert(Residual("plain"), CLIP, preset="causal").plan.rows
