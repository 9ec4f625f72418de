"""The surface: what is exported is there, and importing it costs nothing."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import dissect
import dissect.converters

PACKAGE = Path(dissect.__file__).parent
MODULES = sorted(file.stem for file in PACKAGE.glob("*.py") if not file.stem.startswith("__"))


@pytest.mark.parametrize("name", dissect.__all__)
def test_exported_names_are_there(name: str) -> None:
    value = getattr(dissect, name)
    assert name in dir(dissect)
    if name != "__version__":
        assert value.__doc__, f"dissect.{name} has no docstring"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'convertt'"):
        _ = dissect.convertt


@pytest.mark.parametrize("name", MODULES)
def test_what_a_module_exports_is_there_and_documented(name: str) -> None:
    module = importlib.import_module(f"dissect.{name}")
    assert module.__doc__
    for exported in getattr(module, "__all__", ()):
        assert hasattr(module, exported), f"dissect.{name}.{exported}"


def test_no_function_is_shadowed_by_a_module() -> None:
    """``from dissect import verify`` must be the function, whatever was imported before."""
    for name in MODULES:
        importlib.import_module(f"dissect.{name}")
    for name in dissect.__all__:
        assert name not in MODULES or name in ("heads", "zoo")  # these two are modules
    assert callable(dissect.verify)


def test_errors_are_one_family() -> None:
    from dissect import errors

    raised = [value for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(raised) > 5
    assert all(issubclass(error, dissect.DissectError) for error in raised)
    assert {error.__name__ for error in raised} <= set(dissect.__all__)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_quick_and_does_not_import_torch() -> None:
    code = (
        "import sys, time\nstart = time.perf_counter()\nimport dissect\ntook = time.perf_counter() - start\n"
        "heavy = [name for name in ('torch', 'onnx', 'onnxruntime', 'numpy', 'rich', 'click', 'av') if name in sys.modules]\n"
        "print(took, *heavy)\nassert dissect.__version__ and dissect.StreamError and 'torch' not in sys.modules"
    )
    runs = [run(code).split() for _ in range(3)]
    assert runs[0][1:] == [], "imported with dissect"
    assert min(float(line[0]) for line in runs) < 1.0


@pytest.mark.parametrize(
    "name", ["runner", "pool", "errors", "contract", "binding", "sessions", "preprocess", "video", "cli", "options"]
)
def test_deployment_does_not_import_torch(name: str) -> None:
    if name == "video":
        pytest.importorskip("av")
    run(f"import sys, dissect.{name}\nassert 'torch' not in sys.modules")


def test_imports_point_one_way() -> None:
    """No circle among the modules' imports at the top (those inside functions are for names that would make one)."""
    reads: dict[str, set[str]] = {}
    for name in MODULES:
        found = set()
        for node in ast.parse((PACKAGE / f"{name}.py").read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "dissect":
                parts = node.module.split(".")
                found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        reads[name] = (found & set(MODULES)) - {name}
    done: set[str] = set()
    while left := [name for name in reads if name not in done]:
        ready = [name for name in left if reads[name] <= done]
        assert ready, f"a circle among {', '.join(left)}"
        done |= set(ready)


def test_no_converter_file_is_long() -> None:
    converters = Path(dissect.converters.__file__).parent
    assert {file.name for file in converters.glob("*.py") if len(file.read_text().splitlines()) > 300} == set()
