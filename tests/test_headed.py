"""A network with another head: it is the original up to there, whatever the original is, and the head from there on."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import close, law, steps
from public_networks import example, network
from torch import Tensor, nn

import dissect
from dissect import benchmarking, heads, zoo
from dissect.convolution import TemporalConv
from dissect.errors import DissectError, NotStreamable

CLIP = torch.zeros(1, 2, 8, 6, 6, dtype=torch.float64)


class Strided(nn.Module):
    """A strided stem, a residual block, a pool over everything, a linear layer, and a parameter of its own."""

    def __init__(self, stride: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("shift", torch.tensor(0.25))
        self.stem = nn.Conv3d(2, 4, 3, stride=(stride, 1, 1), padding=1)
        self.layer = nn.Sequential(nn.Conv3d(4, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU())
        self.avgpool = nn.AdaptiveAvgPool3d(1)
        self.fc = nn.Linear(4, 3)

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x) * self.scale + self.shift
        y: Tensor = self.layer(x) + x
        return y

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.avgpool(self.features(x)).flatten(1))
        return y


def made(**settings: Any) -> tuple[Strided, nn.Module, dissect.headed.Headed]:
    model = Strided(**settings).double().eval()
    head = heads.head("lstm", 4, 5, layers=1, hidden=6, seed=1).double().eval()
    return model, head, dissect.with_head(model, head, at="avgpool")


def noise(frames: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 2, frames, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def held(features: Tensor, frames: int) -> Tensor:
    """One vector a frame by definition: ``(N, F, positions, H, W)`` to ``(N, frames, F)``."""
    vectors = features.mean((3, 4)).movedim(1, 2)
    return torch.stack([vectors[:, frame * vectors.shape[1] // frames] for frame in range(frames)], 1)


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("frames", [8, 9, 1])
def test_it_is_the_original_up_to_there_and_the_head_from_there_on(frames: int, stride: int) -> None:
    model, head, headed = made(stride=stride)
    x = noise(frames)
    with torch.no_grad():
        close(headed(x), head(held(model.features(x), frames)))
        positions = model.features(x).mean((3, 4)).movedim(1, 2)
        close(dissect.with_head(model, head, at="avgpool", every_frame=False)(x), head(positions))


def test_the_place_may_be_named_from_either_side() -> None:
    model, head, headed = made()
    x = noise(8)
    within = nn.Sequential(model, nn.Identity())
    with torch.no_grad():
        close(dissect.with_head(within, head, at="0.avgpool")(x), headed(x))
    body = nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(1)).double()
    with torch.no_grad():
        close(dissect.with_head(body, head, after="1")(x), dissect.with_head(body, head, at="2")(x))


def test_the_original_is_as_it_was() -> None:
    model, _, headed = made()
    before, keys, x = pickle.dumps(model), list(model.state_dict()), noise(8)
    with torch.no_grad():
        wanted = model(x)
        headed(x)
        headed.train()
        headed.eval()
        stream = dissect.convert(headed, CLIP)
        stream.clip(x)
        close(model(x), wanted, 0.0)
    assert list(model.state_dict()) == keys
    assert pickle.dumps(model) == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_names_are_the_originals_and_those_of_the_head_begin_with_head() -> None:
    model, head, headed = made()
    own = {f"head.{name}" for name in head.state_dict()}
    assert set(headed.state_dict()) == set(model.state_dict()) | own
    assert headed.get_parameter("layer.0.weight") is model.layer[0].weight
    stream = dissect.convert(headed, CLIP)
    assert set(stream.clip.state_dict()) == set(headed.state_dict()) - {"fc.weight", "fc.bias"}
    assert {row.path.split(".")[0] for row in stream.plan} >= {"stem", "layer", "head"}


def test_it_moves_trains_copies_and_pickles_like_any_module() -> None:
    _, _, headed = made()
    x = noise(8)
    with torch.no_grad():
        wanted = headed(x)
        close(pickle.loads(pickle.dumps(headed))(x), wanted, 0.0)
        twin = copy.deepcopy(headed)
        twin.scale.mul_(2)
        assert not torch.equal(twin(x), wanted), "a copy computes with its own parameters"
        close(headed(x), wanted, 0.0)
        headed.scale.mul_(2)
        close(headed(x), twin(x), 0.0)
        single = copy.deepcopy(headed).float()
        assert single(x.float()).dtype == torch.float32
        close(single(x.float()), headed(x), 1e-5)
    headed.train()
    headed(x).sum().backward()
    reached = {name for name, parameter in headed.named_parameters() if parameter.grad is not None}
    assert reached == {name for name, _ in headed.named_parameters()} - {"fc.weight", "fc.bias"}
    headed.load_state_dict(twin.state_dict())
    close(headed.eval()(x), twin.eval()(x), 0.0)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("preset", ["d3d", "causal", "exact"])
@pytest.mark.parametrize("kind", ["fc", "gru", "average", "plain"])
def test_every_preset_keeps_its_promises_with_a_head(kind: str, preset: str, stride: int) -> None:
    model = Strided(stride).double().eval()
    settings: dict[str, Any] = {"fc": {"frames": 8}, "gru": {"layers": 1, "hidden": 4}}.get(kind, {})
    headed = dissect.with_head(model, heads.head(kind, 4, 3, seed=1, **settings).double().eval(), at="avgpool")
    stream = dissect.convert(headed, CLIP, preset=preset)
    law(stream, noise(13))
    report = dissect.verify(stream, headed, runtime=False).check()
    row = next(row for row in report.rows if row.pair.startswith("original"))
    promised = {"exact": True, "d3d": kind in ("fc", "plain"), "causal": stride == 1}[preset]
    assert (row.error is not None and row.tolerance is not None and row.tolerance < 1e-3) == promised, row


def test_a_dissected_network_has_a_vector_of_its_own_for_every_frame() -> None:
    """The head reads the frames' features one by one, as the dissected trunk gives them."""
    model, head, headed = made()
    trunk = dissect.convert(dissect.with_head(model, heads.Plain(4), at="avgpool"), CLIP)
    x = noise(11)
    with torch.no_grad():
        vectors = trunk.clip(x).movedim(1, 2)
        assert (vectors[:, 1:] - vectors[:, :-1]).abs().amax((0, 2)).min() > 1e-3
        got, _ = steps(dissect.convert(headed, CLIP), (x,))
        for time, output in enumerate(got):
            close(output, head(vectors[:, : time + 1]))


def test_one_head_is_exchanged_for_another_and_the_trunk_keeps_its_training() -> None:
    model, _, _ = made()
    first = dissect.convert(dissect.with_head(model, heads.FC(4, 3, frames=8).double(), at="avgpool"), CLIP)
    with torch.no_grad():
        for parameter in first.clip.parameters():
            parameter.add_(0.01)
    second = dissect.convert(dissect.with_head(model, heads.Plain(4).double(), at="avgpool"), CLIP)
    trained = {name: value for name, value in first.clip.state_dict().items() if not name.startswith("head.")}
    second.clip.load_state_dict(trained)
    x = noise(9)
    with torch.no_grad():
        vectors = second.clip(x).movedim(1, 2)
        close(first.clip(x)[:, :, -1], heads_of(first)(vectors[:, -8:].flatten(1)))


def heads_of(stream: dissect.Stream) -> nn.Linear:
    found = nn.Linear(32, 3).double()
    prefix = "head.layers.0."
    state = stream.clip.state_dict()
    found.load_state_dict({name: state[prefix + name] for name in ("weight", "bias")})
    return found


class Convolved(nn.Module):
    """A head of one's own: convolutions and pools over time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first = nn.Conv1d(4, 6, 5)
        self.second = nn.Conv1d(6, 6, 2)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x.transpose(1, 2)).relu())
        x = nn.functional.max_pool1d(x, 3, 1)
        y: Tensor = self.fc(x[:, :, -1])
        return y


@pytest.mark.parametrize(("preset", "skip"), [("d3d", "concat"), ("d3d", "sum"), ("d3d", "none"), ("causal", "concat")])
def test_a_head_of_ones_own_keeps_all_of_its_taps(preset: str, skip: str) -> None:
    model, head = Strided().double().eval(), Convolved().double().eval()
    stream = dissect.convert(dissect.with_head(model, head, at="avgpool"), CLIP, preset=preset, skip=skip)
    taps = {name: len(layer.ages) for name, layer in stream.clip.named_modules() if isinstance(layer, TemporalConv)}
    assert (taps["head.first"], taps["head.second"]) == (5, 2)
    trunk = dissect.convert(dissect.with_head(model, heads.Plain(4), at="avgpool"), CLIP, preset=preset, skip=skip)
    x = noise(20)
    with torch.no_grad():
        vectors = trunk.clip(x).movedim(1, 2)
        close(stream.clip(x)[:, :, -1], head(vectors))
    law(stream, x)


class Rows(nn.Module):
    """A 2D trunk: batch and time are one axis."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.pool, self.fc = nn.Conv2d(2, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, _, t, *_ = x.shape
        y = self.pool(self.conv(x.transpose(1, 2).flatten(0, 1)).relu()).flatten(1)
        z: Tensor = self.fc(y.unflatten(0, (n, t)).mean(1))
        return z


class Tokens(nn.Module):
    """Features last, as a transformer has them: ``(N, T, tokens, F)``, then ``(N, T, F)``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.fc = nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.embed(x.permute(0, 2, 3, 4, 1).flatten(2, 3)).mean(2))
        z: Tensor = self.fc(y.mean(1))
        return z


@pytest.mark.parametrize(
    ("model", "given", "features"),
    [
        (Rows(), {"at": "pool"}, lambda m, x: m.conv(x.transpose(1, 2).flatten(0, 1)).relu().mean((2, 3))),
        (Rows(), {"after": "pool"}, lambda m, x: m.conv(x.transpose(1, 2).flatten(0, 1)).relu().mean((2, 3))),
        (Tokens(), {"after": "norm", "feature_time": 1}, lambda m, x: m.norm(m.embed(x.movedim(1, 4)).mean((2, 3)))),
    ],
    ids=["batch and time merged", "and pooled", "features last"],
)
@pytest.mark.parametrize("preset", ["d3d", "exact"])
def test_features_come_in_other_shapes(model: nn.Module, given: dict[str, Any], features: Any, preset: str) -> None:
    model = model.double().eval()
    head = heads.head("gru", 4, 3, layers=1, hidden=5, seed=1).double().eval()
    headed = dissect.with_head(model, head, **given)
    x = noise(9)
    with torch.no_grad():
        vectors = features(model, x).reshape(2, 9, 4)
        close(headed(x), head(vectors))
        got, _ = steps(dissect.convert(headed, CLIP, preset=preset), (x,))
        close(got[-1], head(vectors))


def test_exact_needs_clips_of_whole_positions_or_the_positions_themselves() -> None:
    model, head, headed = made(stride=2)
    clip = noise(7, 1)
    with pytest.raises(
        NotStreamable, match=r"4 positions, one every 2 frames, for a clip of 7 frames.*every_frame=False"
    ):
        dissect.convert(headed, clip, preset="exact")
    positions = dissect.with_head(model, head, at="avgpool", every_frame=False)
    stream = dissect.convert(positions, clip, preset="exact")
    dissect.verify(stream, positions, runtime=False).check()
    for preset in ("d3d", "causal"):
        law(dissect.convert(headed, clip, preset=preset), noise(13))


class Several(nn.Module):
    """A pool over two pathways, as SlowFast has one."""

    def __init__(self) -> None:
        super().__init__()
        self.join = Join()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.join([x, x])
        return y


class Join(nn.Module):
    def forward(self, pathways: list[Tensor]) -> Tensor:
        return torch.cat([x.mean((2, 3, 4)) for x in pathways], 1)


def test_a_place_that_takes_several_tensors_is_refused() -> None:
    headed = dissect.with_head(Several(), nn.Identity(), at="join")
    with pytest.raises(DissectError, match="join: this module takes none or several tensors"):
        headed(noise(8))


def test_modes_stay_as_they_are() -> None:
    """A batch norm that its owner froze stays frozen."""
    model = Strided().train()
    model.layer[1].eval()
    headed = dissect.with_head(model, heads.Plain(4).eval(), at="avgpool")
    assert headed.training
    assert model.training
    assert not model.layer[1].training
    assert not headed.head.training


def test_the_window_of_such_a_network_goes_into_a_file() -> None:
    """Nothing of ours is in it for an exporter to stumble over."""
    headed = made()[2].float()
    assert callable(benchmarking.onnx_window(headed, (CLIP.float(),), 1))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.spare = nn.Conv3d(2, 2, 3, padding=1), nn.Linear(2, 2)
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(self.head(x.movedim(1, 4)).movedim(4, 1)))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"at": "pool"}, ["pool", "no such module", "stem, layer, avgpool, fc"]),
        ({}, ["at='avgpool'", "after="]),
        ({"at": "avgpool", "after": "layer"}, ["one of the two"]),
        ({"at": "fc"}, ["fc", "(2, 4)", "no time left"]),
        ({"at": "avgpool", "name": "layer"}, ["layer", "already", "name="]),
    ],
    ids=str,
)
def test_a_place_that_makes_no_sense_is_refused(given: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(DissectError) as caught:
        dissect.with_head(Strided().double(), nn.Identity(), **given)(noise(8))
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(("at", "words"), [("conv", "called 2 times"), ("spare", "called 0 times")])
def test_a_module_that_is_not_called_once_is_refused(at: str, words: str) -> None:
    headed = dissect.with_head(Twice().double(), nn.Identity(), after=at, name="tail")
    with pytest.raises(DissectError, match=words), torch.no_grad():
        # As in an export, where the rest of the network runs as well.
        torch.export.export(headed, (noise(8),), strict=False)


def test_an_exported_network_has_no_modules_to_stop_at() -> None:
    program = torch.export.export(Strided().double().eval(), (CLIP,))
    with pytest.raises(DissectError, match="ExportedProgram"):
        dissect.with_head(program, nn.Identity(), at="avgpool")  # type: ignore[arg-type]


def test_features_without_time_are_refused_when_they_are_dissected() -> None:
    model = Strided().double().eval()
    headed = dissect.with_head(model, heads.Plain(4, 3).double(), after="avgpool")
    with pytest.raises(NotStreamable, match="features that have no time axis left"):
        dissect.convert(headed, CLIP)


def test_a_head_that_the_network_called_head_is_replaced() -> None:
    class Own(Strided):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 9))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.features(x))
            return y

    model, head = Own().double().eval(), heads.head("plain", 4, 2, seed=1).double()
    headed = dissect.with_head(model, head, at="head.0")
    x = noise(8)
    with torch.no_grad():
        close(headed(x), head(held(model.features(x), 8)))
    assert headed.get_parameter("head.fc.weight") is head.fc.weight
    assert model.head[2].out_features == 9
    law(dissect.convert(headed, CLIP), noise(9))


@pytest.mark.parametrize(
    "name",
    [
        "r3d_18",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("r2plus1d_18", "s3d", "x3d_xs", "slow_r50")),
    ],
)
def test_public_networks_take_a_head(name: str, tmp_path: Path) -> None:
    model, clip = network(name), example(name)
    place = {"s3d": "avgpool"}.get(name, "avgpool" if "18" in name else "blocks.5")
    features = {"s3d": 1024, "x3d_xs": 192, "slow_r50": 2048}.get(name, 512)
    headed = dissect.with_head(model, heads.head("lstm", features, 7, layers=1, hidden=16, seed=1).eval(), at=place)
    stream = dissect.convert(headed, clip)
    run = dissect.Runner(dissect.export(stream, tmp_path / "net.onnx"))
    frames = torch.rand(1, 3, 3, *clip.shape[3:])
    with torch.no_grad():
        got, _ = steps(stream, (frames,))
    for time, wanted in enumerate(got):
        close(torch.from_numpy(run.step(frames[:, :, time].numpy())), wanted, 1e-4)


def test_a_zoo_network_takes_a_head_of_another_kind() -> None:
    network = zoo.c3d(num_classes=4, width=2, hidden=6, average=True, seed=0).eval()
    headed = dissect.with_head(network, heads.head("average", 16, 3, seed=1), at="pool5")
    law(dissect.convert(headed, torch.zeros(1, 3, 16, 32, 32)), torch.rand(2, 3, 9, 32, 32), tolerance=1e-4)
