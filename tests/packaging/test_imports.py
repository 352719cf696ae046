"""What `import deixis` brings in, and that its public names are what it says."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import deixis

HEAVY = ("numpy", "cv2", "tokenizers", "onnxruntime", "onnx", "torch", "deixis_train", "deixis_export")


@pytest.mark.parametrize("module", ["deixis", "deixis.bundle", "deixis.errors", "deixis.cli"])
def test_import_is_light(module: str) -> None:
    code = f"import sys, {module}; print(sorted(set(sys.modules) & {set(HEAVY)!r}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_using_the_runtime_imports_no_training_framework() -> None:
    used = "; ".join(f"deixis.{name}" for name in deixis.__all__)
    code = f"import sys, deixis; {used}; print(sorted(set(sys.modules) & {{'torch', 'onnx', 'deixis_train'}}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_every_public_name_exists_where_it_is_said_to_be() -> None:
    assert len(set(deixis.__all__)) == len(deixis.__all__)
    for name in deixis.__all__:
        value = getattr(deixis, name)
        home = deixis._MODULE_OF.get(name)
        assert home is None or value is getattr(sys.modules[f"deixis.{home}"], name)
    assert set(deixis.__all__) == {*deixis._MODULE_OF, "__version__"}
    assert set(deixis.__all__) <= set(dir(deixis))


def test_type_checkers_see_the_same_names() -> None:
    assert deixis.__file__ is not None
    tree = ast.parse(Path(deixis.__file__).read_text(encoding="utf-8"))
    [block] = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == {name: f"deixis.{module}" for name, module in deixis._MODULE_OF.items()}
