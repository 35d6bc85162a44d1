"""Help, completion, and one line where a command line is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from permllm import cli
from permllm.pruning.composition import options_of
from tests.conftest import COMMAND, ROOT, run_command, run_python


def test_help_has_a_line_for_each_group(tmp_path: Path) -> None:
    result = run_python("-m", "permllm", "run", "--help", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert {line.partition(":")[0] for line in result.stdout.splitlines()} >= set(options_of())


def test_a_system_that_jobs_do_not_run_on_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert cli.run() == 1
    assert capsys.readouterr().err == "error: a job needs Linux or macOS; on Windows that is WSL\n"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["permutaton=lcp"], "permutaton"),
        (["+colour=red"], "colour"),
        (["pruner=wandaa"], "pruner/wandaa"),
        (["seed=x"], "seed='x'"),
        (["seed=[0"], "seed=[0"),
        (["pruner=null"], "pruner=null"),
        (["-m", "pruner=wanda,null"], "pruner=wanda,null"),
        (["--cfg", "job", "sead=1"], "sead"),
    ],
    ids=" ".join,
)
def test_a_command_line_that_is_refused_is_one_line(words: list[str], named: str, tmp_path: Path) -> None:
    result = run_command(*words, "model=tiny", "logger=none", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert named in result.stderr
    assert result.stderr.count("\n") == 1


def test_everything_is_there_for_who_asks_for_it(tmp_path: Path) -> None:
    result = run_command("seed=x", cwd=tmp_path, HYDRA_FULL_ERROR="1")
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_a_shell_completes_the_command(tmp_path: Path) -> None:
    """Through the script that Hydra gives, as bash calls it."""
    (tmp_path / "permllm").write_text(f'#!/bin/sh\nexec {sys.executable} {COMMAND} "$@"\n')
    (tmp_path / "permllm").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for line, place, found in (
        ("permllm ru", 1, "run"),
        ("permllm results x", 2, ""),
        ("permllm run pruner=wa", 2, "pruner=wanda"),
    ):
        script = f"""
            eval "$(permllm -sc install=bash)"
            COMP_LINE="{line}" COMP_POINT=99 COMP_CWORD={place}
            hydra_bash_completion
            echo "${{COMPREPLY[@]}}"
        """
        result = subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        assert result.stdout == f"{found}\n"
