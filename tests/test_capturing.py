"""Capture: the user's module and example stay as they are, awkward forwards are taken, hopeless ones are explained."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from laws import law, offline
from torch import Tensor, nn

import dissect
from dissect.errors import CaptureError

CLIP = torch.randn(2, 3, 6, 5, 5, generator=torch.Generator().manual_seed(0))


class Tiny(nn.Module):
    """What networks have: parameters, statistics, dropout, a buffer, a shared layer, a frozen layer, notes of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm3d(4)
        self.drop = nn.Dropout(0.5)
        self.again = self.conv1 = nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0))
        self.register_buffer("scale", torch.tensor(0.5))
        self.notes: dict[str, list[Any]] = {"frozen": ["norm"]}
        self.seen = self.notes["frozen"]
        self.fc = nn.Linear(4, 3)
        for parameter in self.norm.parameters():
            parameter.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.norm(self.conv(x)))
        x = self.again(self.conv1(x)) * self.scale
        self.seen.append(x.shape)
        self.notes["last"] = [x]
        self.newest = x.shape
        return self.fc(self.drop(x.mean((2, 3, 4))))


def everything(module: nn.Module) -> Any:
    """All that a module is: every attribute of every child, tensors by identity and by value."""
    found: dict[str, Any] = {}
    for path, child in module.named_modules(remove_duplicate=False):
        for key, value in child.__dict__.items():
            if key in ("_parameters", "_buffers", "_modules"):
                found[f"{path}.{key}"] = {name: id(entry) for name, entry in value.items()}
            else:
                found[f"{path}.{key}"] = (id(value), repr(value))
    return found


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("preset", ["d3d", "causal", "exact"])
def test_the_module_is_untouched(preset: str, training: bool) -> None:
    model = Tiny().train(training)
    model.norm.eval()
    clip = CLIP.clone()
    before, numbers = everything(model), pickle.dumps(model)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    stream = dissect.convert(model, clip, preset=preset)
    with torch.no_grad():
        for parameter in stream.clip.parameters():
            parameter.add_(1.0)
    for buffer in stream.clip.buffers():
        buffer.add_(1)
    assert everything(model) == before
    assert pickle.dumps(model) == numbers
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert torch.equal(clip, CLIP)
    copy.deepcopy(pickle.loads(numbers))(CLIP)


def test_verify_and_export_leave_it_untouched_too(tmp_path: Any) -> None:
    model = Tiny()
    before, numbers = everything(model), pickle.dumps(model)
    stream = dissect.convert(model, CLIP, preset="exact")
    dissect.verify(stream, model).check()
    dissect.export(stream, tmp_path / "net.onnx")
    assert (everything(model), pickle.dumps(model)) == (before, numbers)


class Silent(nn.Module):
    """As TSN does: ``train`` freezes layers and returns None, so ``eval()`` gives None."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Tiny()

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)
        self.net.norm.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_eval_may_return_none() -> None:
    model = Silent()
    assert model.eval() is None
    model.train()
    stream = dissect.convert(model, CLIP, preset="exact")
    assert (model.training, model.net.training, model.net.norm.training) == (True, True, False)
    dissect.verify(stream, model, runtime=False).check()


class Greedy(nn.Module):
    """Writes into the list that it is given, as SlowFast does."""

    def __init__(self) -> None:
        super().__init__()
        self.slow, self.fast = nn.Conv3d(3, 2, 1), nn.Conv3d(3, 2, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, clips: list[Tensor]) -> Tensor:
        clips[0] = self.slow(clips[0])
        clips[1] = self.fast(clips[1])
        clips.append(clips[0] + clips[1])
        return clips.pop()


@pytest.mark.parametrize("preset", ["d3d", "causal", "exact"])
def test_a_list_of_inputs_stays_as_it_is(preset: str) -> None:
    first, second = CLIP.clone(), CLIP.flip(2)
    given = [first, second]
    stream = dissect.convert(Greedy(), (given,), preset=preset)
    dissect.verify(stream, Greedy(), runtime=False)
    assert len(given) == 2
    assert given[0] is first
    assert given[1] is second


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise NotImplementedError


class OldFashioned(nn.Module):
    """Reads ``.data``, wraps in ``Variable``, has a swish with a backward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        zeros = torch.autograd.Variable(torch.zeros(x.size(0), 2, x.size(2), x.size(3), x.size(4)).to(x))
        return torch.cat([Swish.apply(x.data), zeros], dim=1)


def test_data_and_variable_are_followed_not_frozen() -> None:
    model = OldFashioned().double().eval()
    clip = CLIP.double()
    stream = dissect.convert(model, clip, preset="exact")
    law(stream, clip)
    assert offline(stream, model, clip + torch.randn_like(clip), range(6, 0, -1)) == 6
    assert isinstance(torch.Tensor.data, type(torch.Tensor.grad)) or "data" not in torch.Tensor.__dict__
    assert torch.autograd.Variable(torch.ones(1)).data.item() == 1


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        return x * self.seen


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(7, -1)


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.LazyConv3d(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((3, 4)).transpose(1, 2)
        packed = nn.utils.rnn.pack_padded_sequence(x, [x.shape[1]] * x.shape[0], batch_first=True)
        out, _ = nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], batch_first=True)
        return out[:, -1]


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.jit.script(nn.Conv3d(3, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Scripted(), ["submodule inner is TorchScript", "torch.jit.trace"]),
        (Branching(), ["Branching", "branches on the values", "shapes or options"]),
        (Lazy(), ["Lazy", "no weights yet", "run it once"]),
        (Packed(), ["Packed", "pack_padded_sequence", "leave the packing out"]),
        (Counting(), ["seen", "no hidden state"]),
        (Broken(), ["Broken", "shape", "torch.export.export"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_captured_is_explained(model: nn.Module, words: list[str]) -> None:
    with pytest.raises(CaptureError) as caught:
        dissect.convert(model, CLIP)
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert "\n" not in text


@pytest.mark.parametrize("example", [(), (3,), ("clip",)], ids=str)
def test_an_example_without_a_clip(example: Any) -> None:
    with pytest.raises(dissect.DissectError, match="clip"):
        dissect.convert(Tiny(), example)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_batch_of_the_example_is_not_baked_in(batch: int) -> None:
    model = Tiny().double().eval()
    stream = dissect.convert(model, CLIP[:1].double().expand(batch, -1, -1, -1, -1), preset="exact")
    for rows in (1, 3):
        clip = torch.randn(rows, 3, 6, 5, 5, dtype=torch.float64)
        law(stream, clip)
        assert offline(stream, model, clip, [6, 4]) == 2


def test_names_are_those_of_the_module() -> None:
    stream = dissect.convert(Tiny(), CLIP, preset="exact")
    assert {row.path for row in stream.plan.rows} >= {"conv", "again"} or {row.path for row in stream.plan.rows} >= {
        "conv",
        "conv1",
    }
    assert isinstance(stream.clip.get_submodule("fc"), nn.Linear)


class Normalising(nn.Module):
    """Writes to the clip that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 2, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.5).div_(0.25)
        return self.conv(x)


@pytest.mark.parametrize("preset", ["d3d", "causal", "exact"])
def test_a_clip_that_the_forward_writes_to(preset: str) -> None:
    model = Normalising().double().eval()
    clip = CLIP.double()
    stream = dissect.convert(model, clip, preset=preset)
    dissect.verify(stream, model).check()
    law(stream, clip)
    assert torch.equal(clip, CLIP.double())
    if preset == "exact":
        assert offline(stream, model, clip, [6, 2])


def test_a_capture_that_fails_is_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CaptureError):
        dissect.convert(nn.AvgPool3d(9), CLIP)
    assert capfd.readouterr() == ("", "")


class Masked(nn.Module):
    """Torch's own transformer with a causal mask: what it finds out about the mask depends on its values."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(3, 1, 6, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x.mean((3, 4)).transpose(1, 2), mask=self.mask)


def test_a_mask_that_a_transformer_looks_into() -> None:
    torch.manual_seed(0)
    model = Masked().double().eval()
    stream = dissect.convert(model, CLIP.double(), preset="exact")
    assert stream.plan.exact
    dissect.verify(stream, model).check()


@dataclass
class Scores:
    logits: Tensor
    features: Tensor | None = None
    loss: Tensor | None = None


class ReturnsADataclass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Scores:
        x = self.conv(x)
        return Scores(x.mean((2, 3, 4)), features=x.relu())


@pytest.mark.parametrize("preset", ["exact", "d3d"])
def test_a_dataclass_comes_back_as_one(preset: str, tmp_path: Path) -> None:
    """torch does not know the class before; a runner, which does not know it either, gives a dict of its fields."""
    network = ReturnsADataclass().eval()
    stream = dissect.convert(network, CLIP, preset=preset)
    dissect.verify(stream, network).check()
    run = dissect.Runner(stream.export(tmp_path / "scores.onnx"), batch=2)
    caches = stream.caches(2)
    for frame in CLIP.unbind(2):
        out, *caches = stream.step(frame, *caches)
        given = run.step(frame.numpy())
    assert isinstance(out, Scores)
    assert out.loss is None
    assert set(given) == {"logits", "features"}
    torch.testing.assert_close(torch.from_numpy(given["logits"]), out.logits, atol=1e-5, rtol=1e-5)
