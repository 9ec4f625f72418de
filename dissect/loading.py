"""Turns a file or a factory into a network: :func:`load`.

Law: what a file is follows from its content, never from its name; and without ``trust`` nothing in a file is executed.
"""

from __future__ import annotations

import importlib
import io
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.export import ExportedProgram

from dissect.errors import LoadError
from dissect.quiet import quiet
from dissect.screening import findings
from dissect.sniffing import Kind, sniff

__all__ = ["load"]

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_WEIGHTS = ("state_dict", "model_state_dict", "model_state", "model", "network", "net")
_PREFIXES = ("module.", "_orig_mod.")  # DataParallel, torch.compile


def load(
    source: str | os.PathLike[str] | nn.Module | ExportedProgram,
    arch: str | None = None,
    arch_args: Mapping[str, Any] | None = None,
    trust: bool = False,
    example: Any = None,
) -> nn.Module | ExportedProgram:
    """Load a network, in eval mode, on the CPU, from a file recognised by its content or from a factory.

    ``source`` is a ``torch.export`` archive, a TorchScript archive, a ``state_dict`` or a training checkpoint that
    holds one (both need ``arch``), a pickled module (needs ``trust``, for unpickling runs code), or the name of a
    factory, ``package.module:factory``. A module or an exported program is given back as it is.

    ``arch`` names the factory, ``package.module:factory``, that builds the module for a ``state_dict``; modules of the
    current folder are found. ``arch_args`` are its keyword arguments. ``example`` is the clip, or the tuple of
    inputs, along which a TorchScript archive is converted; nothing else needs it.

    Raises :class:`~dissect.errors.LoadError`, in one paragraph, for whatever is no such file.
    """
    if isinstance(source, torch.jit.ScriptModule):
        return _from_torchscript(source, example, "the TorchScript module")
    if isinstance(source, nn.Module | ExportedProgram):
        return source
    if not isinstance(source, str | os.PathLike):
        raise LoadError(f"A network is a module, an exported program or a path, not {type(source).__name__}.")
    if not os.path.exists(source) and isinstance(source, str) and _FACTORY.fullmatch(source):
        return _build(source, arch_args or {}).eval()
    path = Path(source)
    kind = sniff(path)
    if kind is Kind.EXPORTED:
        return _load_exported(path, trust)
    if kind is Kind.TORCHSCRIPT:
        return _load_torchscript(path, example)
    content = _load_safetensors(path) if kind is Kind.SAFETENSORS else _unpickle(path, kind, trust)
    if isinstance(content, Mapping):
        inner = next((content[key] for key in _WEIGHTS if isinstance(content.get(key), nn.Module | Mapping)), content)
    else:
        inner = content
    if isinstance(inner, nn.Module):
        return _unwrapped(inner).eval()
    if not _is_state_dict(inner):
        raise LoadError(f"{path} holds {_described(content)}, which is neither a network nor the weights of one.")
    return _with_weights(path, dict(inner), arch, arch_args or {})


def _load_exported(path: Path, trust: bool) -> ExportedProgram:
    """Read a ``torch.export`` archive; without ``trust``, only one that runs no code when it is loaded."""
    try:
        with zipfile.ZipFile(path) as archive:
            dangers = findings(archive)
        if dangers and not trust:
            raise LoadError(
                f"{path} is a torch.export archive with {'; '.join(dangers[:3])}, and loading that can run code. "
                "If you trust where the file comes from, allow it with --trust (in Python, trust=True)."
            )
        with quiet(), _tensors_only(not trust), path.open("rb") as file:
            program: ExportedProgram = torch.export.load(io.BytesIO(file.read()))
        return program
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(
            f"{path} is a torch.export archive that torch {torch.__version__} cannot load: {_first_line(error)}. "
            "Such archives belong to the torch version that wrote them; export the network again with this one."
        ) from error


def _load_torchscript(path: Path, example: Any) -> nn.Module:
    """Read a TorchScript archive and convert it along ``example``."""
    try:
        with quiet():
            script = torch.jit.load(str(path), map_location="cpu")
    except Exception as error:
        raise LoadError(
            f"{path} is a TorchScript archive that torch {torch.__version__} cannot load: {_first_line(error)}."
        ) from error
    return _from_torchscript(script, example, str(path))


def _from_torchscript(script: torch.jit.ScriptModule, example: Any, name: str) -> nn.Module:
    """Convert TorchScript along an example (see :mod:`dissect.torchscript`)."""
    from dissect.torchscript import module_of

    if example is None:
        raise LoadError(
            f"{name} is TorchScript, which is converted along an example clip: pass example= (--input on the command "
            "line)."
        )
    inputs = tuple(example) if isinstance(example, tuple | list) else (example,)
    with quiet():
        return module_of(script, inputs, name)


def _load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file, which needs the package of that name."""
    try:
        read = importlib.import_module("safetensors.torch").load_file
    except ImportError as error:
        raise LoadError(f"{path} is a safetensors file; to read it, install the package safetensors.") from error
    try:
        tensors: dict[str, torch.Tensor] = read(str(path))
    except Exception as error:
        raise LoadError(f"{path} looks like a safetensors file but cannot be read: {_first_line(error)}.") from error
    return tensors


def _unpickle(path: Path, kind: Kind, trust: bool) -> Any:
    """Read what ``torch.save`` or ``pickle`` wrote: tensors and plain containers only, anything with ``trust``."""
    try:
        with quiet(), _current_folder():
            if not trust and kind is Kind.CHECKPOINT:
                return torch.load(path, map_location="cpu", weights_only=True)
            if trust and kind is Kind.CHECKPOINT:
                return torch.load(path, map_location="cpu", weights_only=False)
            if trust:
                with path.open("rb") as file:
                    return pickle.load(file)  # the caller trusts it
    except (ImportError, AttributeError) as error:
        raise LoadError(
            f"{path} was pickled by code that is not here: {_first_line(error)}. Run dissect in the folder of that "
            "code, put it on "
            "PYTHONPATH, or save the weights alone with torch.save(model.state_dict(), path) and give --arch."
        ) from error
    except Exception as error:
        what = re.search(r"GLOBAL ([\w.]+)", str(error))
        if not isinstance(error, pickle.UnpicklingError) or trust or not (what or "nsupported" in str(error)):
            raise LoadError(f"{path} is a damaged or incomplete checkpoint: {_first_line(error)}.") from error
        objects = f"objects of {what[1]}" if what else "objects"
    else:
        objects = "a plain pickle"
    raise LoadError(
        f"{path} holds {objects}, not only tensors, and unpickling them runs code from the file. If you trust where "
        "it comes from, "
        "allow it with --trust (in Python, trust=True); or save the weights alone with "
        "torch.save(model.state_dict(), path) and give --arch."
    )


def _with_weights(
    path: Path, weights: dict[str, torch.Tensor], arch: str | None, arch_args: Mapping[str, Any]
) -> nn.Module:
    """Build the network by ``arch`` and load the weights into it, every one of them."""
    for prefix in _PREFIXES:
        if any(key.startswith(prefix) for key in weights) and all(
            key.startswith(prefix) or key == "n_averaged" for key in weights
        ):
            weights = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    if arch is None:
        raise LoadError(
            f"{path} holds weights ({len(weights)} tensors: {_few(weights)}), not the network. Name what builds it: "
            "--arch package.module:factory, with --arch-args '{\"num_classes\": 27}' where it takes arguments (in "
            "Python, arch= and arch_args=)."
        )
    module = _build(arch, arch_args)
    try:
        module.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        own = module.state_dict()
        faults = [
            f"{text} {_few(keys)}"
            for text, keys in (
                ("missing in the file:", [key for key in own if key not in weights]),
                ("unknown to the network:", [key for key in weights if key not in own]),
                (
                    "of another shape:",
                    [
                        f"{k} {list(weights[k].shape)} for {list(own[k].shape)}"
                        for k in own
                        if k in weights and own[k].shape != weights[k].shape
                    ],
                ),
            )
            if keys
        ]
        raise LoadError(
            f"The weights in {path} do not fit {arch}: {'; '.join(faults) or _first_line(error)}. Check --arch and "
            "--arch-args."
        ) from error
    return module.eval()


def _build(arch: str, arch_args: Mapping[str, Any]) -> nn.Module:
    """Call the factory ``package.module:factory``; modules of the current folder are found."""
    place, _, name = arch.partition(":")
    if not _FACTORY.fullmatch(arch):
        raise LoadError(
            f"{arch!r} names no factory; write package.module:factory, for instance torchvision.models.video:r3d_18."
        )
    try:
        with _current_folder():
            factory: Any = importlib.import_module(place)
            for part in name.split("."):
                factory = getattr(factory, part)
            module = factory(**arch_args)
    except ModuleNotFoundError as error:
        raise LoadError(
            f"--arch {arch}: cannot import {error.name or place}. Run dissect in the folder that holds it, or "
            "install it."
        ) from error
    except AttributeError as error:
        raise LoadError(f"--arch {arch}: {_first_line(error)}.") from error
    except Exception as error:
        raise LoadError(
            f"--arch {arch} failed with arguments {dict(arch_args)}: {type(error).__name__}: {_first_line(error)}."
        ) from error
    if not isinstance(module, nn.Module):
        raise LoadError(f"--arch {arch} gave {_described(module)}, not a torch.nn.Module.")
    return module


def _is_state_dict(value: object) -> TypeGuard[Mapping[str, torch.Tensor]]:
    """True for a mapping from names to tensors (other entries beside them do not count as one)."""
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in value.items())
    )


def _unwrapped(module: nn.Module) -> nn.Module:
    """The network inside a DataParallel or torch.compile wrapper."""
    inner = getattr(module, "_orig_mod", None) or (module.module if isinstance(module, nn.DataParallel) else module)
    return inner if isinstance(inner, nn.Module) else module


def _described(value: object) -> str:
    """The kind of a value, for a message."""
    if isinstance(value, Mapping):
        return f"a dict with the keys {_few(value)}" if value else "an empty dict"
    return f"an object of {type(value).__module__}.{type(value).__qualname__}"


def _few(names: Any, most: int = 5) -> str:
    """The first names and how many follow."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def _first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none; without a full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


@contextmanager
def _current_folder() -> Iterator[None]:
    """Modules of the current folder can be imported, as ``python -m`` would have it."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


@contextmanager
def _tensors_only(active: bool) -> Iterator[None]:
    """``torch.load`` unpickles tensors only, also where torch's own code asks it for more."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    if active:
        os.environ[name] = "1"
    try:
        yield
    finally:
        if active and before is None:
            del os.environ[name]
        elif before is not None:
            os.environ[name] = before
