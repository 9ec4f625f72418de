"""Reconstruct: every layer is as near to the original's as its weights allow, by the gradient of the error itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Breaking, Tiny, clips, cut, same, tiny, weights
from torch import Tensor, nn

import dissect
from dissect.errors import ClipError, PlanError

CLIPS = clips(6, 8)


def outputs(module: nn.Module, paths: tuple[str, ...], run: Any) -> dict[str, Tensor]:
    """What some submodules give while ``run`` runs, differentiable."""
    found: dict[str, Tensor] = {}
    hooks = [
        module.get_submodule(path).register_forward_hook(lambda _, __, out, path=path: found.__setitem__(path, out))
        for path in paths
    ]
    run()
    for hook in hooks:
        hook.remove()
    return found


def errors(stream: dissect.Stream, model: Tiny, removed: dict[str, int]) -> dict[str, Tensor]:
    """The squared error of each layer against the original's: each position held until the next."""
    paths = tuple(removed)
    new = outputs(stream.clip, paths, lambda: stream.clip(CLIPS))
    old = outputs(model, paths, lambda: model(CLIPS))
    found = {}
    for path in paths:
        held = old[path].detach().repeat_interleave(removed[path], 2)[:, :, : CLIPS.shape[2]]
        mine = new[path].unflatten(0, (len(CLIPS), -1)).transpose(1, 2)
        error = held - mine
        if path in ("conv1", "conv3"):  # a batch norm takes the mean away
            error = error - error.mean((0, 2, 3, 4), keepdim=True)
        found[path] = error.square().mean()
    return found


LAYERS = {"conv1": 1, "conv2": 1, "conv3": 1, "conv4": 2}


@pytest.mark.parametrize("preset", ["d3d", "causal"])
def test_no_other_weights_of_a_layer_are_nearer_to_the_originals(preset: str) -> None:
    model = tiny()
    stream = cut(model, preset=preset)
    before = errors(stream, model, LAYERS)
    dissect.reconstruct(stream, model, CLIPS, ridge=0.0)
    after = errors(stream, model, LAYERS)
    for path, error in after.items():
        assert float(error.detach()) < 0.9 * float(before[path].detach())
        layer = stream.clip.get_submodule(path)
        gradients = torch.autograd.grad(error, list(layer.parameters()), retain_graph=True)
        assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-9 * max(1.0, float(error.detach()))


def test_batch_norms_take_the_statistics_of_what_they_now_get() -> None:
    model = tiny()
    stream = dissect.reconstruct(cut(model), model, CLIPS)
    seen = outputs(stream.clip, ("conv1", "conv3"), lambda: stream.clip(CLIPS))
    for path, norm in (("conv1", stream.clip.bn1), ("conv3", stream.clip.bn3)):
        columns = seen[path].detach().transpose(0, 1).flatten(1)
        torch.testing.assert_close(norm.running_mean, columns.mean(1), rtol=0, atol=1e-10)
        torch.testing.assert_close(norm.running_var, columns.var(1), rtol=0, atol=1e-10)


def test_the_forms_still_agree_and_the_original_is_as_it_was() -> None:
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stream = dissect.reconstruct(cut(model), model, CLIPS)
    dissect.verify(stream, runtime=False).check()
    assert same(before, dict(model.state_dict()))
    assert not any(module.training for module in stream.clip.modules())


@pytest.mark.parametrize("skip", ["sum", "none"])
def test_other_skips(skip: str) -> None:
    model = tiny()
    stream = cut(model, skip=skip)
    before = errors(stream, model, LAYERS)
    after = errors(dissect.reconstruct(stream, model, CLIPS, ridge=0.0), model, LAYERS)
    for path, error in after.items():
        assert float(error.detach()) < float(before[path].detach())


@pytest.mark.slow
def test_batches_and_single_clips_are_the_same() -> None:
    model = tiny()
    single = dissect.reconstruct(cut(model), model, CLIPS)
    batches = dissect.reconstruct(cut(model), model, [CLIPS[:3], CLIPS[3:]])
    for name, tensor in weights(single).items():
        torch.testing.assert_close(weights(batches)[name], tensor, rtol=0, atol=1e-9)


def test_cut_off_and_gone_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dissect import reconstructing

    model = tiny()
    whole = dissect.reconstruct(cut(model), model, CLIPS)
    real, calls = reconstructing._rebuilt, []

    def breaking(*given: Any) -> bool:
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(reconstructing, "_rebuilt", breaking)
    with pytest.raises(KeyboardInterrupt):
        dissect.reconstruct(cut(model), model, CLIPS, checkpoint=tmp_path / "run", every=0)
    again = dissect.reconstruct(cut(model), model, CLIPS, checkpoint=tmp_path / "run", every=0)
    assert len(calls) == 3 + 2
    assert same(weights(again), weights(whole))


def test_what_cannot_be_reconstructed() -> None:
    model = tiny()
    with pytest.raises(PlanError, match="nothing to reconstruct"):
        dissect.reconstruct(cut(model, preset="exact"), model, CLIPS)
    with pytest.raises(ClipError, match=r"clips for reconstruct are of one shape.*cut them to one length"):
        dissect.reconstruct(cut(model), model, [CLIPS[0], CLIPS[1][:, :6]])
    with pytest.raises(ClipError, match="clip 1 has 3 channels"):
        dissect.reconstruct(cut(model), model, [CLIPS[0], CLIPS[1].repeat(3, 1, 1, 1)])
    with pytest.raises(KeyboardInterrupt):
        dissect.reconstruct(cut(model), model, Breaking(CLIPS, 3))
