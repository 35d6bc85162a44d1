"""The wheel holds all that a job needs: built, put into an empty folder, run from another one."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from permllm.store.files import read_json
from tests.conftest import ROOT, run_python


def _pip(command: str, *words: str) -> None:
    words = (sys.executable, "-m", "pip", command, "--quiet", "--no-deps", *words)
    subprocess.run(words, check=True, timeout=300)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    _pip("wheel", str(ROOT), "--wheel-dir", str(folder))
    (built,) = folder.glob("permllm-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    _pip("install", "--target", str(folder), str(wheel))
    return folder


def _run(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"PYTHONPATH": str(installed), "WANDB_MODE": "offline"}
    return run_python("-m", "permllm", *words, cwd=folder, environment=variables, fresh=True)


def test_it_holds_the_settings_and_what_the_package_reads(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    settings = {
        f"permllm/{file.relative_to(ROOT)}"
        for file in ROOT.glob("conf/**/*.yaml")
        if "local" not in file.parts
    }
    assert settings <= inside
    data = [
        file
        for file in (ROOT / "permllm").rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc")
    ]
    assert {str(file.relative_to(ROOT)) for file in data} <= inside
    assert {name.split("/")[0] for name in inside if ".dist-info/" not in name} == {"permllm"}
    (points,) = [name for name in inside if name.endswith("entry_points.txt")]
    assert "permllm = permllm.cli:main" in zipfile.ZipFile(wheel).read(points).decode()


def test_a_job_runs_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    result = _run(
        installed, tmp_path, "run", "model=tiny-random", "permutation=heuristic", "run_dir=run"
    )
    assert result.returncode == 0, result.stderr
    assert read_json(tmp_path / "run" / "metrics.json")["status"] == "finished"
    table = _run(installed, tmp_path, "results", "run")
    assert "heuristic" in table.stdout
