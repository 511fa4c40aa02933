"""Imports point one way: the house's rule, checked on the source."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "x2l"
FORBIDDEN = {  # folder or file -> prefixes that it must not import
    "data": ["x2l.model", "x2l.modalities", "x2l.modality", "x2l.interfaces", "x2l.encoders", "x2l.build", "x2l.config", "x2l.llm"],
    "interfaces": ["x2l.data", "x2l.model", "x2l.encoders", "x2l.build", "x2l.config", "x2l.llm"],
    "encoders": ["x2l.data", "x2l.model", "x2l.build", "x2l.config"],
    "modalities": ["x2l.data", "x2l.build", "x2l.config", "x2l.llm"],
    "model.py": ["x2l.data", "x2l.build", "x2l.config", "x2l.llm", "x2l.encoders"],
    "splice.py": ["x2l.data", "x2l.model", "x2l.modality"],
    "types.py": ["x2l."],
    "train.py": ["x2l.model", "x2l.modalities", "x2l.interfaces", "x2l.encoders"],
}
HUGGING_FACE = {"llm.py", "encoders/hf.py", "encoders/moonshine_torch.py", "encoders/resnet.py", "data/transforms/hf.py"}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("where", FORBIDDEN)
def test_imports_point_one_way(where: str) -> None:
    place = ROOT / where
    for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
        bad = {name for name in imported(path) for prefix in FORBIDDEN[where] if f"{name}.".startswith(f"{prefix.rstrip('.')}.")}
        assert not bad, f"{path.relative_to(ROOT)} imports {bad}"


def test_transformers_stays_in_its_rooms() -> None:
    for path in sorted(ROOT.rglob("*.py")):
        if any(name.split(".")[0] == "transformers" for name in imported(path)):
            assert str(path.relative_to(ROOT)) in HUGGING_FACE


def test_onnxruntime_reports_nothing(tmp_path: Path) -> None:
    """It would keep a device's id at home, even when it is merely imported."""
    env = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"} | {"HOME": str(tmp_path)}
    code = "import os, x2l, onnxruntime; assert os.environ['ORT_DISABLE_TELEMETRY'] == '1'"
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=120)
    assert not list(tmp_path.rglob("*onnxruntime*"))
