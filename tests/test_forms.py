"""The two forms: trainable as the original is, of any length and batch, copied, saved and loaded like any module."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from laws import Ranks, close, law, steps
from torch import Tensor, nn

import dissect
from dissect import zoo

PRESETS = ["d3d", "causal", "exact"]


class Net(nn.Module):
    """A residual network in small, with dropout, SE and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv3d(2, 6, (3, 3, 3), stride=(1, 2, 2), padding=1, bias=False), nn.BatchNorm3d(6), nn.ReLU()
        )
        self.branch = nn.Sequential(
            nn.Conv3d(6, 6, (3, 1, 1), padding=(1, 0, 0), groups=6, bias=False), nn.BatchNorm3d(6), nn.Dropout3d(0.3)
        )
        self.gate = nn.Linear(6, 6)
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 4))

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = self.stem(x)
        y = F.relu(x + self.branch(x))
        y = y * torch.sigmoid(self.gate(y.mean((3, 4)).transpose(1, 2))).transpose(1, 2)[..., None, None]
        return {"scores": self.head(y.mean((2, 3, 4))), "maps": [y]}


@pytest.fixture(scope="module", params=PRESETS)
def stream(request: pytest.FixtureRequest) -> dissect.Stream:
    torch.manual_seed(0)
    return dissect.convert(Net().double(), torch.randn(2, 2, 8, 6, 6, dtype=torch.float64), preset=request.param)


def clip(frames: int = 8, batch: int = 2, size: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(batch, 2, frames, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_keys_are_those_of_the_original(stream: dissect.Stream) -> None:
    keys = set(Net().state_dict())
    assert set(stream.clip.state_dict()) == keys
    assert set(stream.step.state_dict()) == keys
    assert dict(stream.clip.named_parameters()).keys() == dict(Net().named_parameters()).keys()
    assert isinstance(stream.clip.get_submodule("head.0"), nn.Dropout)
    assert isinstance(stream.clip.get_submodule("head.1"), nn.Linear)


@pytest.mark.parametrize("frames", [1, 2, 5, 13])
@pytest.mark.parametrize("batch", [1, 3])
def test_any_length_and_any_batch(stream: dissect.Stream, frames: int, batch: int) -> None:
    x = clip(frames, batch)
    law(stream, x, chunks=(2,))
    out = stream.clip(x)
    assert set(out) == {"scores", "maps"}
    assert out["scores"].shape == (batch, 4, frames), "an ended time axis comes back at dimension 2"
    assert out["maps"][0].shape == (batch, 6, frames, 3, 3), "a time axis stays where it was"
    step, *caches = stream.step(x[:, :, 0], *stream.caches(batch))
    assert step["scores"].shape == (batch, 4)
    assert step["maps"][0].shape == (batch, 6, 3, 3)
    assert [cache.shape for cache in caches] == [cache.shape for cache in stream.caches(batch)]


def test_frames_of_another_size(stream: dissect.Stream) -> None:
    out = stream.clip(clip(5, size=10))
    assert out["maps"][0].shape == (2, 6, 5, 5, 5)


def test_it_trains(stream: dissect.Stream) -> None:
    """Gradients reach every parameter, statistics move, dropout drops; afterwards both forms are the trained ones."""
    trained = copy.deepcopy(stream.clip)
    trained.train()
    assert all(module.training for module in trained.modules())
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.05)
    before = {key: value.clone() for key, value in trained.state_dict().items()}
    first, second = trained(clip())["scores"], trained(clip())["scores"]
    assert not torch.equal(first, second), "dropout drops"
    target = torch.randint(4, (2, 8), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = F.cross_entropy(trained(clip())["scores"], target)
        loss.backward()
        losses.append(float(loss.detach()))
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained.parameters())
        optimizer.step()
    after = trained.state_dict()
    assert min(losses[-3:]) < losses[0]
    assert [key for key, value in after.items() if torch.equal(value, before[key])] == []
    assert int(after["stem.1.num_batches_tracked"]) > 0
    trained.eval()
    assert torch.equal(trained(clip())["scores"], trained(clip())["scores"])
    stream.clip.load_state_dict(after)
    try:
        close(stream.clip(clip()), trained(clip()))
        law(stream, clip())
    finally:
        stream.clip.load_state_dict(before)


def test_training_normalises_as_the_original_does() -> None:
    """Where nothing is cut (a causal network), a training step of the clip form is one of the original network's."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.ConstantPad3d((0, 0, 0, 0, 2, 0), 0.0),
        nn.Conv3d(2, 3, (3, 1, 1)),
        nn.BatchNorm3d(3),
        nn.ReLU(),
        nn.Conv3d(3, 2, 1),
    ).double()
    x = clip()
    ours = dissect.convert(net, x, preset="causal").clip.train()
    net.train()
    wanted, got = net(x), ours(x)
    close(got, wanted)
    wanted.square().mean().backward()
    got.square().mean().backward()
    for (name, one), (other, two) in zip(sorted(ours.named_parameters()), sorted(net.named_parameters()), strict=True):
        assert name == other
        close(one.grad, two.grad)
    close(ours.state_dict(), {key: net.state_dict()[key] for key in ours.state_dict()})


def test_forms_share_their_parameters(stream: dissect.Stream) -> None:
    mine, yours = dict(stream.clip.named_parameters()), dict(stream.step.named_parameters())
    assert all(mine[key] is yours[key] for key in mine)


def test_copies_and_files(stream: dissect.Stream) -> None:
    other = copy.deepcopy(stream.clip)
    assert all(one is not two for one, two in zip(other.parameters(), stream.clip.parameters(), strict=True))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    assert not torch.equal(other(clip())["scores"], stream.clip(clip())["scores"])
    file = io.BytesIO()
    torch.save(stream.clip.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    close(other(clip()), stream.clip(clip()))


def test_the_original_weights_load_into_the_clip_form(stream: dissect.Stream) -> None:
    if stream.options.preset == "d3d":
        pytest.skip("folded kernels are smaller")
    fresh = Net().double().eval()
    other = copy.deepcopy(stream.clip)
    other.load_state_dict(fresh.state_dict())
    again = dissect.convert(fresh, clip(), preset=stream.options.preset)
    close(other(clip()), again.clip(clip()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_moves_to_another_type(stream: dissect.Stream, dtype: torch.dtype) -> None:
    moved = copy.deepcopy(stream.clip).to(dtype)
    out = moved(clip().to(dtype))
    assert out["scores"].dtype == dtype
    close(
        out["scores"],
        stream.clip(clip())["scores"],
        tolerance={torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 0.2),
    )


def test_a_form_prints_its_code_and_says_what_it_takes(stream: dissect.Stream) -> None:
    assert "def forward" in stream.clip.code
    assert "stem" in repr(stream.clip)
    with pytest.raises(TypeError, match="takes 1 input"):
        stream.clip()


def test_the_step_is_no_larger_than_its_frame(stream: dissect.Stream) -> None:
    """No tensor of a step has a time axis: nothing above rank 4, caches included."""
    recorder = Ranks(stream.step.__dict__["run"])
    recorder.run(clip()[:, :, 0], *stream.caches(2))
    assert 0 < recorder.highest <= 4


def test_steps_do_not_change_their_caches(stream: dissect.Stream) -> None:
    _, caches = steps(stream, (clip(),))
    before = [cache.clone() for cache in caches]
    stream.step(clip()[:, :, 0], *caches)
    assert all(torch.equal(one, two) for one, two in zip(before, caches, strict=True))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_zoo_network_trains(preset: str) -> None:
    net = zoo.resnet18(num_classes=3, width=2, seed=0)
    form = dissect.convert(net, torch.randn(1, 3, 8, 16, 16), preset=preset).clip.train()
    F.cross_entropy(form(torch.randn(2, 3, 5, 16, 16)), torch.zeros(2, 5, dtype=torch.long)).backward()
    assert all(parameter.grad is not None for parameter in form.parameters())
    assert set(form.state_dict()) == set(net.state_dict())
