"""Checkpoints: whole or as before, and never those of another run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import cut, tiny

from dissect.checkpoints import Checkpoint, fingerprint
from dissect.errors import LoadError

STREAM = cut(tiny())


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    saver = Checkpoint.of(tmp_path / "run", STREAM, "distil", lr=0.1)
    assert saver.load() is None
    saver.save({"step": 3, "weights": {"w": torch.ones(2)}})
    found = Checkpoint.of(tmp_path / "run", STREAM, "distil", lr=0.1).load()
    assert found is not None
    assert found["step"] == 3
    assert torch.equal(found["weights"]["w"], torch.ones(2))
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_without_a_path_nothing_is_kept() -> None:
    saver = Checkpoint.of(None, STREAM, "distil")
    saver.save({"step": 1})
    assert saver.load() is None


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Checkpoint.of(tmp_path / "run", STREAM, "distil")
    saver.save({"step": 1})

    def broken(whole: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="no space left"):
        saver.save({"step": 2})
    monkeypatch.undo()
    assert saver.load() == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("task", "lr", "seed", "options", "words"),
    [
        ("distil", 0.2, 0, {}, "of a run with lr=0.1, not 0.2"),
        ("fine_tune", 0.1, 0, {}, "of a run with task='distil', not 'fine_tune'"),
        ("distil", 0.1, 1, {}, "of another network"),
        ("distil", 0.1, 0, {"preset": "causal"}, "of another network"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(
    tmp_path: Path, task: str, lr: float, seed: int, options: dict[str, str], words: str
) -> None:
    Checkpoint.of(tmp_path / "run", STREAM, "distil", lr=0.1).save({})
    other = Checkpoint.of(tmp_path / "run", cut(tiny(seed), **options), task, lr=lr)
    with pytest.raises(LoadError, match=f"run is {words}.*give the checkpoint another name, or delete it"):
        other.load()


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("this is no checkpoint")
    with pytest.raises(LoadError, match="run is no checkpoint that can be read; delete it"):
        Checkpoint.of(tmp_path / "run", STREAM, "distil").load()
    torch.save({"weights": 1}, tmp_path / "run")
    with pytest.raises(LoadError, match="no checkpoint of this version"):
        Checkpoint.of(tmp_path / "run", STREAM, "distil").load()
    with pytest.raises(LoadError, match="lies in no folder"):
        Checkpoint.of(tmp_path / "away" / "run", STREAM, "distil")
    with pytest.raises(LoadError, match="is a folder"):
        Checkpoint.of(tmp_path, STREAM, "distil")


def test_a_fingerprint_is_the_networks_and_not_that_of_what_was_learnt() -> None:
    stream = cut(tiny())
    before = fingerprint(stream)
    with torch.no_grad():
        for parameter in stream.clip.parameters():
            parameter.add_(1.0)
    assert fingerprint(stream) == before == fingerprint(STREAM)
    assert fingerprint(cut(tiny(1))) != before
