"""What `dissect.load` recognises, by content, and what it refuses in one paragraph."""

from __future__ import annotations

import io
import json
import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dissect
from dissect.errors import LoadError


class Net(nn.Module):
    """A small network with a batch norm, a dropout and a functional call."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm3d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, classes)

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        """Clip (N, 3, T, H, W) to scores (N, classes)."""
        volume = torch.relu(self.norm(self.conv(clip)))
        return self.head(self.drop(volume.mean(dim=(2, 3, 4))))


class Bomb:
    """Unpickling one creates the file that it names."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


ARCH = f"{__name__}:Net"


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    network = Net()
    nn.init.uniform_(network.norm.running_mean)
    return network.eval()


@pytest.fixture
def clip() -> torch.Tensor:
    return torch.rand(1, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def refused(source: Any, **options: Any) -> str:
    """The message of the LoadError; one paragraph, as always."""
    with pytest.raises(LoadError) as caught:
        dissect.load(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith((".", "?"))
    return message


def same(loaded: nn.Module, net: nn.Module, clip: torch.Tensor) -> None:
    assert not loaded.training
    with torch.no_grad():
        torch.testing.assert_close(loaded(clip), net(clip))


@pytest.mark.parametrize("legacy", [False, True])
def test_state_dict(net: Net, clip: torch.Tensor, tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "weights.onnx"  # the name says nothing
    torch.save(net.state_dict(), path, _use_new_zipfile_serialization=not legacy)
    same(dissect.load(path, arch=ARCH), net, clip)
    same(dissect.load(str(path), arch=ARCH, arch_args={"classes": 5}), net, clip)
    message = refused(path)
    assert "--arch" in message
    assert "conv.weight" in message


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_training_checkpoint(net: Net, clip: torch.Tensor, tmp_path: Path, key: str) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save({"epoch": 3, key: net.state_dict(), "optimizer": {"lr": 0.1}}, path)
    same(dissect.load(path, arch=ARCH), net, clip)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrapper_prefixes_are_stripped(net: Net, clip: torch.Tensor, tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "weights.pt"
    torch.save({prefix + key: value for key, value in net.state_dict().items()}, path)
    same(dissect.load(path, arch=ARCH), net, clip)


def test_weights_that_do_not_fit_are_named(net: Net, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    weights = net.state_dict()
    weights["extra.weight"] = weights.pop("conv.bias")
    torch.save(weights, path)
    message = refused(path, arch=ARCH, arch_args={"classes": 7})
    assert "missing in the file: conv.bias" in message
    assert "unknown to the network: extra.weight" in message
    assert "head.weight [5, 4] for [7, 4]" in message


def test_factory_alone_and_module_of_the_current_folder(
    clip: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_own_net.py").write_text(
        "import torch\ndef make(width=2):\n    return torch.nn.Conv3d(3, width, 1)\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(os.sys.path)
    built = dissect.load("my_own_net:make", arch_args={"width": 6})
    assert isinstance(built, nn.Conv3d)
    assert built.out_channels == 6
    assert os.sys.path == before


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        ("nosuchpackage:Net", "cannot import nosuchpackage"),
        ("torch.nn:NoSuchNet", "NoSuchNet"),
        ("torch.nn", "package.module:factory"),
        ("torch.nn:Conv3d", "failed with arguments"),
        ("builtins:dict", "not a torch.nn.Module"),
    ],
)
def test_wrong_factories(net: Net, tmp_path: Path, arch: str, words: str) -> None:
    path = tmp_path / "weights.pt"
    torch.save(net.state_dict(), path)
    assert words in refused(path, arch=arch)


@pytest.mark.parametrize("how", ["torch.save", "legacy", "pickle", "in a dict", "DataParallel"])
def test_pickled_module_needs_trust(net: Net, clip: torch.Tensor, tmp_path: Path, how: str) -> None:
    path = tmp_path / "model.pt"
    if how == "pickle":
        path.write_bytes(pickle.dumps(net))
    else:
        saved: Any = {"in a dict": {"model": net}, "DataParallel": nn.DataParallel(net)}.get(how, net)
        torch.save(saved, path, _use_new_zipfile_serialization=how != "legacy")
    message = refused(path)
    assert "--trust" in message
    assert "runs code" in message
    loaded = dissect.load(path, trust=True)
    assert isinstance(loaded, Net)
    same(loaded, net, clip)


@pytest.mark.parametrize("how", ["torch.save", "legacy", "pickle", "exported constant", "exported weights"])
def test_nothing_runs_without_trust(tmp_path: Path, how: str) -> None:
    mark, path = tmp_path / "mark", tmp_path / "model.pt"
    bomb = Bomb(str(mark))
    if how == "pickle":
        path.write_bytes(pickle.dumps(bomb))
    elif how.startswith("exported"):
        exported(path, bomb if how == "exported constant" else None, bomb if how == "exported weights" else None)
    else:
        torch.save(bomb, path, _use_new_zipfile_serialization=how == "torch.save")
    refused(path)
    assert not mark.exists()


def exported(path: Path, constant: Any = None, weights: Any = None, expression: str = "") -> None:
    """Write a torch.export archive of a network with something put into it that does not belong there."""
    plain = io.BytesIO()
    torch.export.save(torch.export.export(Net().eval(), (torch.rand(2, 3, 4, 8, 8),), strict=False), plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if constant is not None and name.endswith("model_constants_config.json"):
                entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
                content = json.dumps({"config": {"thing": entry}}).encode()
                new.writestr(name.split("/")[0] + "/data/constants/opaque_obj_0", pickle.dumps(constant))
            if weights is not None and name.endswith("model_weights_config.json"):
                config = json.loads(content)
                next(iter(config["config"].values()))["use_pickle"] = True
                content = json.dumps(config).encode()
            if weights is not None and name.endswith("weights/weight_0"):
                buffer = io.BytesIO()
                torch.save(weights, buffer)
                content = buffer.getvalue()
            if expression and name.endswith("models/model.json"):
                program = json.loads(content)
                program["guards_code"] = [expression]
                content = json.dumps(program).encode()
            new.writestr(name, content)


@pytest.mark.parametrize(
    "expression", ["__import__('os').getcwd()", "exec(chr(65))", "().__class__", "L['x'].data_ptr() > 1"]
)
def test_expressions_that_run_code_need_trust(tmp_path: Path, expression: str) -> None:
    path = tmp_path / "model.pt2"
    exported(path, expression=expression)
    message = refused(path)
    assert "no arithmetic" in message
    assert "--trust" in message


def test_export_archive(net: Net, clip: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    torch.export.save(
        torch.export.export(net, (clip.expand(2, -1, -1, -1, -1),), strict=False), path.with_suffix(".pt2")
    )
    path.with_suffix(".pt2").rename(path)
    loaded = dissect.load(path)
    assert isinstance(loaded, torch.export.ExportedProgram)
    both = clip.repeat(2, 1, 1, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(loaded.module()(both), net(both))


def test_export_archive_with_dynamic_sizes(net: Net, clip: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    free = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}
    torch.export.save(
        torch.export.export(net, (clip.repeat(2, 1, 1, 1, 1),), dynamic_shapes=(free,), strict=False), path
    )
    loaded = dissect.load(path)
    assert isinstance(loaded, torch.export.ExportedProgram)
    three = clip.repeat(3, 1, 2, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(loaded.module()(three), net(three))


def torchscript(net: nn.Module, clip: torch.Tensor, path: Path, how: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.script(net) if how in ("script", "frozen") else torch.jit.trace(net, clip, check_trace=False)
        torch.jit.save(torch.jit.freeze(script) if how == "frozen" else script, path)


@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript(net: Net, clip: torch.Tensor, tmp_path: Path, how: str) -> None:
    path = tmp_path / "model"
    torchscript(net, clip, path, how)
    loaded = dissect.load(path, example=clip)
    assert {key for key, _ in loaded.named_parameters()} == {key for key, _ in net.named_parameters()}
    with torch.no_grad():
        for batch, frames in ((1, 4), (3, 4), (2, 6)):  # neither the batch nor the length is baked in
            other = torch.rand(batch, 3, frames, 8, 8)
            torch.testing.assert_close(loaded(other), net(other))
    assert "example" in refused(path)


def test_frozen_torchscript(net: Net, clip: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "model"
    torchscript(net, clip, path, "frozen")
    with torch.no_grad():
        torch.testing.assert_close(dissect.load(path, example=clip)(clip), net(clip))


def test_a_script_module_is_converted_and_left_alone(net: Net, clip: torch.Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.trace(net, clip, check_trace=False)
    before = {key: value.clone() for key, value in script.state_dict().items()}
    loaded = dissect.load(script, example=(clip,))
    with torch.no_grad():
        for tensor in loaded.parameters():
            tensor.zero_()
    for key, value in script.state_dict().items():
        torch.testing.assert_close(value, before[key])
    targets = {node.target for node in loaded.graph.nodes}  # type: ignore[union-attr]
    assert torch.ops.aten.conv3d.default in targets
    assert torch.ops.aten.convolution.default not in targets


def test_torchscript_traced_in_training_mode(net: Net, clip: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "model"
    torchscript(net.train(), clip, path, "trace")
    assert "training mode" in refused(path, example=clip)


def test_torchscript_with_a_wrong_example(net: Net, clip: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "model"
    torchscript(net, clip, path, "script")
    assert "--input" in refused(path, example=clip[:, :2])


def test_modules_pass_through(net: Net) -> None:
    assert dissect.load(net) is net


def truncated_zip(net: Net) -> bytes:
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    return buffer.getvalue()[:-200]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (bytes(range(200, 256)) * 20, "no file that dissect knows"),
        (b"import torch\n\nclass Net:\n    pass\n", "is text"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\x08\x08\x12\x07pytorch\x1a\x052.0.0", "ONNX"),
        (b"\x80\x02garbage", "--trust"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M", "damaged"),
    ],
)
def test_what_is_no_network(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    assert words in refused(path, arch=ARCH)
    assert words in refused(path, arch=ARCH, trust=words != "--trust")


def test_truncated_archives(net: Net, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(truncated_zip(net))
    assert "cut off" in refused(path, arch=ARCH)


def test_damaged_archive(net: Net, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", b"\x80\x02nonsense")
        archive.writestr("model/version", b"3\n")
    assert "damaged" in refused(path, arch=ARCH)


def test_other_zip(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")
    assert "none that torch writes" in refused(path)


def test_missing_file_folder_and_other_content(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nothing.pt")
    assert "is a folder" in refused(tmp_path)
    torch.save({"epoch": 3, "notes": "none"}, tmp_path / "other.pt")
    assert "a dict with the keys epoch, notes" in refused(tmp_path / "other.pt", arch=ARCH)
    assert "not int" in refused(3)


def test_code_that_is_not_here(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"\x80\x02cnosuchpackage\nNet\n.")
    assert "nosuchpackage" in refused(path, trust=True)
