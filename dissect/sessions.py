"""How a step model becomes an ONNX Runtime session: provider, threads, and errors that say what to do.

Threads spin while a step runs and sleep between steps (``session.force_spinning_stop``). On two cores, a network whose
step takes 2.2 ms on one thread, 25 frames a second: ONNX Runtime's own default takes 1.2 ms and 20 ms of processor time
a step, since its threads spin on after it; without any spinning 1.5 ms and 3.1 ms, since they must be woken for every
operator; so, 1.2 ms and 4.0 ms. Where other programs keep all cores busy, spinning harms (10 ms, one thread 2.3 ms):
take ``threads=1`` there, or ``options={"session.intra_op.allow_spinning": "0"}``.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any

import onnxruntime as ort

from dissect.errors import StreamError

__all__ = ["Home", "Provider", "fingerprint", "home_of", "loaded", "open_session"]

Provider = str | tuple[str, dict[str, Any]]

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
_ON_CUDA = (CUDA, "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")
_IN_HOST_MEMORY = (
    CPU,
    "AzureExecutionProvider",
    "CoreMLExecutionProvider",
    "DnnlExecutionProvider",
    "OpenVINOExecutionProvider",
    "XnnpackExecutionProvider",
)
_WARNING, _SILENT = 2, 4
#: what becomes of threads without work: see the module's docstring for what each costs
_SPIN: dict[bool | None, dict[str, str]] = {
    None: {"session.force_spinning_stop": "1"},
    True: {},
    False: {"session.intra_op.allow_spinning": "0"},
}


@dataclass(frozen=True)
class Home:
    """Where a session's frames and caches live, and whether inputs must be bound anew before each run.

    ``graphs``: the provider records CUDA graphs, one for each set of buffers that it is run with.
    ONNX Runtime copies an input that its graph reads elsewhere (an age that is read on the CPU beside a GPU) when it
    is *bound*, not when it is run: bound once, such a cache would stay what it was. Binding anew costs under a
    microsecond an input, and nothing is copied that is in its place.
    """

    device: str = "cpu"
    index: int = 0
    resident: bool = False
    rebind: bool = False
    graphs: bool = False


def home_of(session: Any) -> Home:
    """The home of ``session``'s frames and caches, by its first provider."""
    first = session.get_providers()[0]
    if first in _ON_CUDA:
        options = session.get_provider_options().get(first, {})
        graphs = str(options.get("enable_cuda_graph", options.get("trt_cuda_graph_enable", "0"))).lower() in (
            "1",
            "true",
        )
        return Home("cuda", int(options.get("device_id", 0)), resident=True, rebind=True, graphs=graphs)
    return Home(rebind=first not in _IN_HOST_MEMORY)


def open_session(
    model: str | os.PathLike[str] | bytes,
    providers: str | Sequence[Provider] | None = None,
    threads: int | None = None,
    options: Any = None,
    spin: bool | None = None,
    folder: str | None = None,
) -> Any:
    """An ``onnxruntime.InferenceSession`` of ``model``, a path or the bytes of an ONNX file.

    ``providers``: names as ONNX Runtime knows them or short (``"cuda"``), or pairs of a name and its options, best
    first; the CPU is always the last. None takes CUDA where it works, else the CPU. A provider that does not load
    costs one warning, or nothing where it was not asked for and the machine has no NVIDIA device.
    ``threads``: threads of one operator; None leaves it to ONNX Runtime, a thread for each core.
    ``options``: an ``onnxruntime.SessionOptions`` taken as it is, or a mapping of session configuration entries.
    ``spin``: whether threads that wait for work spin: None during a step alone, True always, False never.
    ``folder``: where the weights of bytes lie that keep them in a file of their own.

    Raises :class:`StreamError` for a file that is missing or no ONNX, for an unknown provider, and for ``threads`` or
    ``spin`` beside a ``SessionOptions``.
    """
    name = "The given bytes" if isinstance(model, bytes) else f"{os.fspath(model)!r}"
    if not isinstance(model, bytes) and not os.path.isfile(model):
        raise StreamError(f"There is no file {name}. Make a step model with `dissect convert MODEL -o net.onnx`.")
    asked = providers is not None
    wanted = _named([providers] if isinstance(providers, str) else list(providers or ()))
    if not asked and CUDA in ort.get_available_providers() and _cuda_devices() > 0:
        wanted = [(CUDA, {})]
    wanted = [entry for entry in wanted if entry[0] != CPU]
    settings = _settings(threads, options, spin)
    if folder is not None:
        settings.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    session, reason = _open(model, name, settings, wanted)
    missing = [provider for provider, _ in wanted if provider not in session.get_providers()]
    if missing:
        loaded = session.get_providers()[0]
        if CUDA in missing and _cuda_devices() == 0:
            reason = "no NVIDIA device or driver was found"
        reason = reason or "it or one of its libraries does not load; `onnxruntime.preload_dlls()` prints which"
        warnings.warn(
            f"{', '.join(missing)} cannot be used ({reason}); running with {loaded}.", RuntimeWarning, stacklevel=3
        )
    return session


def loaded(session: Any, providers: str | Sequence[Provider] | None) -> Sequence[Provider]:
    """Those of the ``providers`` that were asked for with which ``session`` runs, for another session beside it."""
    running = session.get_providers()
    if providers is None:
        return list(running)
    named = _named([providers] if isinstance(providers, str) else list(providers))
    return [entry for entry in named if entry[0] in running] or [CPU]


def fingerprint(model: str | os.PathLike[str] | bytes) -> str:
    """The model's SHA-256: a snapshot fits the weights that made it, not only their shapes."""
    digest = hashlib.sha256()
    if isinstance(model, bytes):
        digest.update(model)
    else:
        with open(model, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _open(model: Any, name: str, settings: Any, wanted: Sequence[tuple[str, dict[str, Any]]]) -> tuple[Any, str]:
    """The session with as many of the ``wanted`` providers as load, and the reason why one of them does not."""
    available = ort.get_available_providers()
    reason = ""
    usable = [entry for entry in wanted if entry[0] in available]
    if len(usable) < len(wanted):
        reason = "this build of ONNX Runtime lacks it"
    while True:
        try:
            with _quiet(bool(usable)):
                # Without ONNX Runtime's own fallback, which prints a page; ours is below.
                chosen = [*usable, (CPU, {})]
                return ort.InferenceSession(model, settings, providers=chosen, enable_fallback=0), reason
        except (RuntimeError, ValueError) as error:
            if not usable:
                raise _unreadable(name, error) from error
            reason = first_line(error)
            usable = usable[1:]
        except Exception as error:  # ONNX Runtime's errors share no base below Exception
            raise _unreadable(name, error) from error


def first_line(error: Exception) -> str:
    """What ONNX Runtime says of a failure, without its codes and what follows the first line."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line.split(" : ", 3)[-1] if line.startswith("[ONNXRuntimeError]") else line


def _unreadable(name: str, error: Exception) -> StreamError:
    text = first_line(error)
    if "protobuf" in text.lower():
        return StreamError(
            f"{name} is not an ONNX file, or a truncated one. "
            "Make a step model with `dissect convert MODEL -o net.onnx`."
        )
    return StreamError(f"ONNX Runtime {ort.__version__} cannot load {name}: {text}")


def _named(providers: Sequence[Provider]) -> list[tuple[str, dict[str, Any]]]:
    """Providers by their full names, with options; ``"cuda"`` is short for ``"CUDAExecutionProvider"``."""
    known = {full.lower(): full for full in ort.get_all_providers()}
    short = {full.removesuffix("executionprovider"): given for full, given in known.items()}
    named = []
    for provider in providers:
        given, options = (provider, {}) if isinstance(provider, str) else provider
        full = known.get(given.lower()) or short.get(given.lower())
        if full is None:
            raise StreamError(
                f"There is no provider {given!r}. The ONNX Runtime that is installed here has "
                f"{', '.join(ort.get_available_providers())}."
            )
        named.append((full, dict(options)))
    return named


def _settings(threads: int | None, options: Any, spin: bool | None) -> Any:
    if isinstance(options, ort.SessionOptions):
        if threads is not None:
            raise StreamError("threads beside a SessionOptions: set options.intra_op_num_threads instead.")
        if spin is not None:
            raise StreamError("spin beside a SessionOptions: set its entry session.intra_op.allow_spinning instead.")
        return options
    settings = ort.SessionOptions()
    settings.log_severity_level = 3  # errors; a step model's warnings concern nobody who runs it
    entries = dict(_SPIN[spin])
    if isinstance(options, Mapping):
        entries |= {str(key): str(value) for key, value in options.items()}
    elif options is not None:
        raise StreamError(
            f"options is a {type(options).__name__}; give an onnxruntime.SessionOptions, or a mapping of session "
            "configuration entries such as {'session.intra_op.allow_spinning': '1'}."
        )
    for key, value in entries.items():
        settings.add_session_config_entry(key, value)
    if threads is not None:
        if threads < 1:
            raise StreamError(f"threads={threads}: a session needs at least one thread, or None for one a core.")
        settings.intra_op_num_threads = threads
    return settings


@contextmanager
def _quiet(needed: bool) -> Iterator[None]:
    """While a provider is tried: finds its libraries among pip's packages, and keeps ONNX Runtime from shouting.

    ONNX Runtime tells nobody its logger's level, so its default, warnings, is set when all is done.
    """
    if not needed:
        yield
        return
    ort.set_default_logger_severity(_SILENT)
    try:
        with redirect_stdout(io.StringIO()):
            with suppress(RuntimeError, AttributeError):  # older ones cannot; the provider then tells its own reason
                ort.preload_dlls()
            yield
    finally:
        ort.set_default_logger_severity(_WARNING)


def _cuda_devices() -> int:
    """The number of CUDA devices that the driver shows; 0 without a driver."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL(library)
        if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
            return 0
    except (OSError, AttributeError):
        return 0
    return count.value
