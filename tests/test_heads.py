"""Heads: by definition, over a growing clip, and as networks of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from laws import close, law, steps
from torch import Tensor, nn

import dissect
from dissect import heads, vectors
from dissect.counting import parameters
from dissect.errors import NotStreamable, PlanError

FEATURES, CLASSES = 6, 4
MADE: dict[str, tuple[str, dict[str, Any]]] = {
    "fc": ("fc", {"frames": 5}),
    "fc of one frame": ("fc", {"frames": 1}),
    "fc, 2 layers": ("fc", {"frames": 5, "layers": 2, "hidden": 7}),
    "fc, 3 layers": ("fc", {"frames": 4, "layers": 3, "hidden": 7}),
    "lstm, 1 layer": ("lstm", {"layers": 1, "hidden": 5}),
    "lstm, 2 layers": ("lstm", {"layers": 2, "hidden": 5}),
    "lstm, 3 layers": ("lstm", {"layers": 3, "hidden": 5}),
    "gru, 1 layer": ("gru", {"layers": 1, "hidden": 5}),
    "gru, 2 layers": ("gru", {"layers": 2, "hidden": 5}),
    "gru, 3 layers": ("gru", {"layers": 3, "hidden": 5}),
    "average": ("average", {}),
    "average, 5:end": ("average", {"first": 4}),
    "plain": ("plain", {}),
    "embedding": ("embedding", {}),
    "embedding, 5:end": ("embedding", {"first": 4, "normalise": False}),
}


def made(name: str, classes: int | None = CLASSES) -> nn.Module:
    kind, settings = MADE[name]
    return heads.head(kind, FEATURES, classes, seed=3, **settings).double().eval()


def clip(batch: int = 2, frames: int = 12) -> Tensor:
    return torch.randn(batch, frames, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def cells(rnn: nn.RNNBase, x: Tensor) -> Tensor:
    """The newest output of a recurrence, cell by cell, as torch's documentation writes it."""
    lstm = rnn.mode == "LSTM"
    for level in range(rnn.num_layers):
        w, u, b, c = (
            getattr(rnn, f"{name}_l{level}").detach() for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        size = u.shape[1]
        hidden, cell = (x.new_zeros(x.shape[0], size) for _ in range(2))
        outputs = []
        for now in x.unbind(1):
            a, r = now @ w.T + b, hidden @ u.T + c
            if lstm:
                enter, forget, candidate, leave = (a + r).split(size, 1)
                cell = forget.sigmoid() * cell + enter.sigmoid() * candidate.tanh()
                hidden = leave.sigmoid() * cell.tanh()
            else:
                gate, update = ((a + r)[:, at * size : (at + 1) * size].sigmoid() for at in (0, 1))
                fresh = (a[:, 2 * size :] + gate * r[:, 2 * size :]).tanh()
                hidden = (1 - update) * fresh + update * hidden
            outputs.append(hidden)
        x = torch.stack(outputs, 1)
    return x[:, -1]


def by_definition(head: nn.Module, x: Tensor) -> Tensor:
    """What the docstrings say, without the heads' own forwards."""
    if isinstance(head, heads.FC):
        zeros = x.new_zeros(x.shape[0], head.frames, x.shape[2])
        y = torch.cat([zeros, x], 1)[:, -head.frames :].reshape(x.shape[0], -1)
        for layer in head.layers:
            y = y.clamp(min=0) if isinstance(layer, nn.ReLU) else y @ layer.weight.T + layer.bias
        return y
    if isinstance(head, (heads.LSTM, heads.GRU)):
        return cells(head.rnn, x) @ head.fc.weight.T + head.fc.bias
    if isinstance(head, heads.Plain):
        return x[:, -1] @ head.fc.weight.T + head.fc.bias
    kept = x[:, head.first :]
    mean = kept.mean(1) if kept.shape[1] else torch.zeros_like(x[:, 0])
    if isinstance(head, heads.Average):
        return mean @ head.fc.weight.T + head.fc.bias
    assert isinstance(head, heads.Embedding)
    point = mean @ head.neck.weight.T
    return point / point.norm(dim=1, keepdim=True).clamp(min=1e-12) if head.normalise else point


@pytest.mark.parametrize("name", MADE)
def test_a_head_does_what_it_says_for_clips_of_any_length(name: str) -> None:
    head, x = made(name), clip()
    with torch.no_grad():
        for frames in (1, 3, 4, 5, 12):
            close(head(x[:, :frames]), by_definition(head, x[:, :frames]))


@pytest.mark.parametrize("preset", ["d3d", "causal"])
@pytest.mark.parametrize("name", MADE)
def test_a_streamed_head_gives_at_every_frame_what_it_gives_for_the_clip_so_far(name: str, preset: str) -> None:
    head, x = made(name), clip()
    stream = dissect.convert(head, torch.zeros(1, 5, FEATURES, dtype=torch.float64), preset=preset, time_dim=1)
    with torch.no_grad():
        got, _ = steps(stream, (x,))
        for time, output in enumerate(got):
            close(output, by_definition(head, x[:, : time + 1]), what=f"frame {time}")
    law(stream, x)


@pytest.mark.parametrize("name", MADE)
def test_an_exact_head_is_the_head(name: str) -> None:
    head = made(name)
    stream = dissect.convert(head, clip(1, 5), preset="exact", time_dim=1)
    dissect.verify(stream, head, runtime=False).check()
    assert stream.plan.exact


@pytest.mark.parametrize(
    "name", ["fc, 2 layers", "lstm, 2 layers", "gru, 1 layer", "average, 5:end", "plain", "embedding"]
)
def test_the_file_of_a_head_gives_the_same(name: str, tmp_path: Path) -> None:
    head, x = made(name).float(), clip(3).float()
    stream = dissect.convert(head, torch.zeros(1, 5, FEATURES), time_dim=1)
    run = dissect.Runner(dissect.export(stream, tmp_path / "head.onnx"), batch=3)
    with torch.no_grad():
        for time in range(x.shape[1]):
            close(torch.from_numpy(run.step(x[:, time].numpy())), by_definition(head, x[:, : time + 1]), 1e-5)


@pytest.mark.parametrize("name", MADE)
def test_training_reaches_every_parameter(name: str) -> None:
    stream = dissect.convert(made(name), clip(1, 5), time_dim=1)
    stream.clip.train()
    stream.clip(clip()).square().sum().backward()
    for path, parameter in stream.clip.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.abs().sum() > 0, path


def test_dropout_is_between_the_layers_and_for_training_alone() -> None:
    head = heads.LSTM(FEATURES, CLASSES, layers=2, hidden=32, dropout=0.5)
    stream = dissect.convert(head, torch.zeros(1, 5, FEATURES), time_dim=1)
    x = clip(1).float()
    close(stream.clip(x), stream.clip(x), 0.0)
    stream.clip.train()
    assert not torch.equal(stream.clip(x), stream.clip(x))
    assert heads.LSTM(FEATURES, CLASSES, layers=1, dropout=0.5).rnn.dropout == 0.0


def test_heads_have_the_parameters_of_the_paper() -> None:
    """Single layer fc 4.9M, two layers of LSTM 15.3M; its Table 3 compares up to three layers of hidden size 1024."""
    with torch.device("meta"):
        counts = {
            (name, layers): parameters(heads.head(name, 512, 600, layers=layers))
            for name in ("fc", "lstm", "gru")
            for layers in (1, 2, 3)
        }
    assert counts["fc", 1] == 16 * 512 * 600 + 600
    assert f"{counts['fc', 1] / 1e6:.1f}" == "4.9"
    assert f"{counts['lstm', 2] / 1e6:.1f}" == "15.3"
    assert counts["fc", 3] - counts["fc", 2] == 1024 * 1024 + 1024
    assert counts["lstm", 3] - counts["lstm", 2] == 4 * (2 * 1024 * 1024 + 2 * 1024)
    assert counts["gru", 2] - counts["gru", 1] == 3 * (2 * 1024 * 1024 + 2 * 1024)


def test_a_seed_fixes_the_weights_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first, second, other = (heads.head("gru", 3, 2, hidden=4, seed=seed).state_dict() for seed in (7, 7, 8))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["fc.weight"], other["fc.weight"])
    torch.manual_seed(1)
    drawn = heads.head("gru", 3, 2, hidden=4).state_dict()
    assert not torch.equal(torch.rand(1), expected), "without a seed torch's generator is drawn from"
    assert not torch.equal(drawn["fc.weight"], first["fc.weight"])


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("transformer", {}, ["transformer", "fc, lstm, gru, average, plain, embedding"]),
        ("fc", {"frames": 0}, ["frames", "0"]),
        ("fc", {"layers": 2.0}, ["layers", "2.0"]),
        ("lstm", {"hidden": True}, ["hidden", "True"]),
        ("average", {"first": -1}, ["first", "-1"]),
        ("gru", {"depth": 2}, ["gru", "depth"]),
    ],
)
def test_a_head_that_makes_no_sense_is_refused(name: str, settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(PlanError) as caught:
        heads.head(name, FEATURES, CLASSES, **settings)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("name", heads.HEADS)
def test_some_heads_do_without_classes(name: str) -> None:
    if name in ("plain", "embedding"):
        assert heads.head(name, FEATURES, None)(clip().float()).shape == (2, FEATURES)
    else:
        with pytest.raises(PlanError, match=f"'{name}' needs a number of classes"):
            heads.head(name, FEATURES, None)


def test_vectors_stay_plain_torch_outside_of_a_capture() -> None:
    """Positions are held until the next; a mean has a gradient; an exporter sees no operator of ours."""
    x = torch.arange(6.0).reshape(1, 3, 2).requires_grad_()
    held = vectors.frame_vectors(x, 7)
    assert held[0, :, 0].tolist() == [0, 0, 0, 2, 2, 4, 4]
    vectors.running_mean(held, 2).sum().backward()
    assert x.grad is not None
    assert x.grad[0, :, 0].tolist() == pytest.approx([0.2, 0.4, 0.4])
    program = torch.export.export(made("average").float(), (torch.zeros(1, 5, FEATURES),))
    assert not [node for node in program.graph.nodes if "dissect" in str(node.target)]


@pytest.mark.parametrize("at", [0, 2])
def test_a_running_mean_over_another_axis_is_refused(at: int) -> None:
    class Turned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return vectors.running_mean(x.transpose(1, at))

    with pytest.raises(NotStreamable, match="a running mean of a tensor that is not"):
        dissect.convert(Turned(), clip(3, 5), time_dim=1)
