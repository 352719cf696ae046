"""The wheel: what is in it, and that the runtime's suite passes with it where PyTorch is not installed."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import venv
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path

import pytest
from checkout import DEMO, PICTURES, ROOT

SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE", "runtime", "export", "train", "benchmarks")
SUITE_REQUIREMENTS = ("pytest", "hypothesis", "psutil")
LEAST_TESTS = 200  # of the runtime's suite; it has more


def run(*command: str | Path, cwd: Path, fails: bool = False) -> str:
    """Run outside of the checkout; returns its output."""
    hidden = ("PYTHONPATH", "DEIXIS_MODELS", "PYTEST_ADDOPTS")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    result = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, text=True, capture_output=True, timeout=900
    )
    output = result.stdout + result.stderr
    assert (result.returncode != 0) is fails, f"{' '.join(map(str, command))}: exit {result.returncode}\n{output}"
    return output


def pip(*arguments: str | Path, python: str | Path = sys.executable, cwd: Path) -> None:
    """Needs the package index, or pip's cache: without them these tests cannot say anything, and fail."""
    run(sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", *arguments, cwd=cwd)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what the build needs, so that neither leftovers nor the checkout matter."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(path, source / name)
    for folder in (DEMO, PICTURES):
        shutil.copytree(folder, source / "models" / folder.name)
    (source / "models" / "tabletop-checkpoint").mkdir()
    (source / "models" / "tabletop-checkpoint" / "model.safetensors").write_bytes(b"not for users")
    pip("wheel", "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", out, source, cwd=source)
    [built] = out.glob("deixis-*.whl")
    return built


@pytest.fixture(scope="session")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel, its engine and what the suite needs: no PyTorch, no onnx."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False)
    interpreter = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    constraints = ROOT / "constraints.txt"
    pip("install", "-q", "-c", constraints, f"{wheel}[cpu]", *SUITE_REQUIREMENTS, python=interpreter, cwd=home)
    return interpreter


def test_wheel_holds_the_packages_and_the_demo(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    packages = ("deixis", "deixis_export", "deixis_train", "deixis_bench")
    assert {f"{package}/__init__.py" for package in packages} <= names
    assert "deixis/py.typed" in names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == set(packages)
    shipped = {
        f"deixis/models/{path.relative_to(DEMO.parent).as_posix()}"
        for folder in (DEMO, PICTURES)
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert {name for name in names if name.startswith("deixis/models/")} == shipped
    assert not any(name.endswith((".safetensors", ".pt", ".pyc")) for name in names)
    assert {Path(name).name for name in names if "/licenses/" in name} == {"LICENSE", "NOTICE"}


def test_plain_install_needs_three_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    base = {r.split(">")[0] for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r}
    assert base == {"numpy", "opencv-python-headless", "tokenizers"}
    assert metadata["License-Expression"] == "Apache-2.0"


def test_runtime_suite_passes_without_pytorch(python: Path, tmp_path: Path) -> None:
    absent = ("torch", "onnx", "transformers", "safetensors")
    code = f"import importlib.util as u; assert not [n for n in {absent} if u.find_spec(n)]; import deixis as d; "
    found = run(python, "-I", "-c", code + "print(d.__file__)", cwd=tmp_path).strip()
    assert Path(found).is_relative_to(python.parents[1])

    shutil.copytree(ROOT / "tests" / "runtime", tmp_path / "tests" / "runtime")
    shutil.copytree(ROOT / "tests" / "golden", tmp_path / "tests" / "golden")
    report = tmp_path / "report.xml"
    options = ("-q", "-p", "no:cacheprovider", "-m", "not slow", f"--junitxml={report}")
    run(python, "-I", "-m", "pytest", *options, "tests/runtime", cwd=tmp_path)
    [counts] = ElementTree.parse(report).getroot().iter("testsuite")
    skipped = int(counts.attrib["skipped"])
    assert int(counts.attrib["tests"]) - skipped >= LEAST_TESTS
    assert skipped <= 5


def test_commands_of_the_installed_wheel(python: Path, tmp_path: Path) -> None:
    deixis = python.with_name("deixis")
    assert "tabletop" in run(deixis, "inspect", cwd=tmp_path)
    made = run(deixis, "demo", "--out", "pictures", "--threads", "1", cwd=tmp_path)
    assert "results.json" in made
    assert len(list((tmp_path / "pictures").glob("*.png"))) >= 8
    advice = run(deixis, "export", "checkpoint", "--out", "bundle", cwd=tmp_path, fails=True)
    assert advice.count("\n") == 1
    assert 'pip install "deixis[export]"' in advice
    assert not (tmp_path / "bundle").exists()
