"""Says what a file is by its content, never by its name: :func:`sniff`."""

from __future__ import annotations

import zipfile
from enum import Enum, auto
from pathlib import Path

from dissect.errors import LoadError

__all__ = ["Kind", "sniff"]

_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before 1.6: a pickled magic number


class Kind(Enum):
    """What a file's content says that it is."""

    EXPORTED = auto()
    TORCHSCRIPT = auto()
    CHECKPOINT = auto()  # torch.save: a state_dict, a training checkpoint, or a pickled module
    PICKLE = auto()  # pickle.dump, without torch
    SAFETENSORS = auto()


def sniff(path: Path) -> Kind:
    """What the file at ``path`` is, by its content; raises :class:`LoadError` for whatever is no network."""
    if not path.exists():
        raise LoadError(
            f"{path} does not exist. Give the path of a network's file, or the name of a factory, "
            "package.module:factory."
        )
    if path.is_dir():
        raise LoadError(
            f"{path} is a folder. Give the path of one file: a torch.export or TorchScript archive, a state_dict or "
            "a saved module."
        )
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not head:
        raise LoadError(f"{path} is empty. Was its download or its writing cut off?")
    if head.startswith(b"PK"):
        return _sniff_zip(path)
    if head.startswith(_LEGACY):
        return Kind.CHECKPOINT
    if head[:1] == b"\x80" and 2 <= head[1] <= 5:
        return Kind.PICKLE
    if len(head) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return Kind.SAFETENSORS
    if head.startswith(b"version https://git-lfs"):
        raise LoadError(f"{path} is a Git LFS pointer, not the file that it points to. Fetch it with git lfs pull.")
    if head[:1] == b"\x08" and (b"pytorch" in head or b"onnx" in head.lower() or head[2:3] in (b"\x12", b"\x3a")):
        raise LoadError(
            f"{path} looks like an ONNX model. A network is dissected from PyTorch: give the file or the factory "
            "that it was exported from."
        )
    text = head.decode("utf-8", "ignore")
    if len(text.encode()) > len(head) - 4 and all(letter.isprintable() or letter.isspace() for letter in text):
        raise LoadError(
            f"{path} is text ({text[:40]!r} ...), no network. For a Python file, name the factory in it: "
            "module:factory."
        )
    raise LoadError(
        f"{path} is no file that dissect knows: neither a torch.export or TorchScript archive, nor a state_dict, nor "
        "a saved module. Save it with torch.save(model.state_dict(), path) or torch.export.save."
    )


def _sniff_zip(path: Path) -> Kind:
    """Which of torch's zip archives this is."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise LoadError(
            f"{path} starts like a zip archive but is broken or cut off ({error}). Was its download complete?"
        ) from error
    inner = {name.partition("/")[2] for name in names}
    if "archive_format" in inner or "serialized_exported_program.json" in names:
        return Kind.EXPORTED
    if "constants.pkl" in inner:
        return Kind.TORCHSCRIPT
    if "data.pkl" in inner:
        return Kind.CHECKPOINT
    raise LoadError(
        f"{path} is a zip archive, but none that torch writes. Save the network with torch.save or torch.export.save."
    )
