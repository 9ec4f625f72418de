"""Opening a step model: providers that do not load, threads, and files that are none."""

from __future__ import annotations

import warnings
from pathlib import Path

import onnxruntime as ort
import pytest
from step_models import difference

from dissect import sessions
from dissect.errors import StreamError
from dissect.sessions import Home, home_of, open_session

without_cuda = pytest.mark.skipif(sessions._cuda_devices() > 0, reason="this machine has a CUDA device")


def test_cpu_by_default_and_not_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session = open_session(difference())
    if sessions._cuda_devices() == 0:
        assert session.get_providers() == ["CPUExecutionProvider"]
    assert capfd.readouterr() == ("", "")


@without_cuda
@pytest.mark.parametrize("providers", ["cuda", ["CUDAExecutionProvider"], [("cuda", {"device_id": 0}), "cpu"]])
def test_cuda_that_was_asked_for_falls_back_with_one_line(providers: object, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(RuntimeWarning, match=r"CUDAExecutionProvider cannot be used .*; running with CPU") as caught:
        session = open_session(difference(), providers)  # type: ignore[arg-type]
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert session.get_providers() == ["CPUExecutionProvider"]
    assert capfd.readouterr() == ("", "")


@without_cuda
@pytest.mark.parametrize("providers", [["tensorrt"], ["tensorrt", "cuda"]])
def test_tensorrt_falls_back_with_one_line(providers: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(RuntimeWarning, match=r"TensorrtExecutionProvider.*cannot be used") as caught:
        open_session(difference(), providers)  # type: ignore[arg-type]
    assert len(caught) == 1
    assert capfd.readouterr() == ("", "")


@without_cuda
@pytest.mark.skipif("CUDAExecutionProvider" not in ort.get_available_providers(), reason="a build without CUDA")
def test_a_device_whose_libraries_do_not_load_costs_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sessions, "_cuda_devices", lambda: 1)
    with pytest.warns(RuntimeWarning, match=r"preload_dlls.*running with CPUExecutionProvider") as caught:
        open_session(difference())
    assert len(caught) == 1
    assert capfd.readouterr() == ("", "")


def test_an_unknown_provider_is_refused() -> None:
    with pytest.raises(StreamError, match=r"no provider 'gpu9'.*CPUExecutionProvider"):
        open_session(difference(), ["gpu9"])


def test_threads_and_options() -> None:
    def settings(**given: object) -> ort.SessionOptions:
        return open_session(difference(), "cpu", **given).get_session_options()  # type: ignore[arg-type]

    spinning = "session.intra_op.allow_spinning"
    assert settings(threads=1).intra_op_num_threads == 1
    assert settings().get_session_config_entry("session.force_spinning_stop") == "1"
    assert settings(options={spinning: 0}).get_session_config_entry(spinning) == "0"
    mine = ort.SessionOptions()
    mine.intra_op_num_threads = 2
    assert settings(options=mine).intra_op_num_threads == 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"threads": 0}, "threads=0"),
        ({"threads": 1, "options": ort.SessionOptions()}, "intra_op_num_threads"),
        ({"options": 3}, "options is a int"),
    ],
)
def test_wrong_settings(given: dict[str, object], words: str) -> None:
    with pytest.raises(StreamError, match=words):
        open_session(difference(), "cpu", **given)  # type: ignore[arg-type]


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(StreamError, match=r"There is no file .*missing.onnx.*dissect convert"):
        open_session(tmp_path / "missing.onnx")
    with pytest.raises(StreamError, match="There is no file"):
        open_session(tmp_path)
    for name, content in (("text.onnx", b"hello, I am no model"), ("cut.onnx", difference()[:80])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(StreamError, match=f"{name}' is not an ONNX file") as caught:
            open_session(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    with pytest.raises(StreamError, match="The given bytes"):
        open_session(b"")


def test_home_follows_the_first_provider() -> None:
    class Fake:
        def __init__(self, first: str, **options: str) -> None:
            self.get_providers = lambda: [first, "CPUExecutionProvider"]
            self.get_provider_options = lambda: {first: options}

    assert home_of(Fake("CPUExecutionProvider")) == Home()
    assert home_of(Fake("CUDAExecutionProvider", device_id="1")) == Home("cuda", 1, resident=True, rebind=True)
    assert home_of(Fake("CUDAExecutionProvider", enable_cuda_graph="1")).graphs
    assert home_of(Fake("TensorrtExecutionProvider")) == Home("cuda", 0, resident=True, rebind=True)
    assert home_of(Fake("DmlExecutionProvider")) == Home(rebind=True)
