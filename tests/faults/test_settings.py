"""What a person types or their machine is set to: values that look right, secrets, file modes, devices."""

from __future__ import annotations

import json
import os
import shlex
import stat
import sys
from pathlib import Path

import pytest
import torch

from permllm import runner
from permllm.config import read_config
from permllm.errors import ConfigError, DataError
from permllm.export.checkpoint import Request, export_run
from permllm.record.files import write_text
from permllm.results.environment import environment
from tests.conftest import run_command
from tests.test_config import composed

TINY = ("model=tiny", "logger=none", "permutation=none", "calibration.samples=2")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sparsity='२:४'", "expected N:M"),
        ("seed=4294967296", "at most 4294967295"),
        ("model.device=meta", r"model\.device='meta' cannot be used here"),
    ],
)
def test_values_that_cannot_work_are_one_line(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        runner.run(read_config(composed(*TINY, override, f"runs_dir={tmp_path}")))


@pytest.mark.parametrize("words", [("pruner=null",), ("-m", "permutation=none", "pruner=wanda,null")])
def test_a_group_without_an_option_is_one_line(words: tuple[str, ...], tmp_path: Path) -> None:
    result = run_command(*words, "model=tiny", "logger=none", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr == "error: pruner=null: every job needs one of its options, which --help lists\n"


def test_secrets_of_the_command_line_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["run.py", "+hydra.job.env_set.WANDB_API_KEY=abc", "++env.HF_TOKEN=def", "+my_password=x=y", "permutation=lcp"]
    words += ["+hydra.job.env_set={WANDB_API_KEY: abc, HOME: /h, 'HF_TOKEN':def}", "+password=a,b"]
    kept = ["model.architecture.num_key_value_heads=2", "evaluation.zero_shot.add_bos_token=false", "sparsity=2:4"]
    monkeypatch.setattr(sys, "argv", [*words, *kept])
    command = environment(0, torch.device("cpu"))["command"]
    assert shlex.split(command) == [
        "run.py",
        "+hydra.job.env_set.WANDB_API_KEY=***",
        "++env.HF_TOKEN=***",
        "+my_password=***",
        "permutation=lcp",
        "+hydra.job.env_set={WANDB_API_KEY: ***, HOME: /h, 'HF_TOKEN':***}",
        "+password=***",
        *kept,
    ]


@pytest.mark.parametrize(("umask", "file_mode", "folder_mode"), [(0o077, 0o600, 0o700), (0o022, 0o644, 0o755)])
def test_the_umask_is_kept(tmp_path: Path, cache: Path, umask: int, file_mode: int, folder_mode: int) -> None:
    before = os.umask(umask)
    try:
        runner.run(read_config(composed(*TINY, f"run_dir={tmp_path}/run")))
        export_run(tmp_path / "run", Request("gathered"), tmp_path / "model")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == folder_mode
    for file in (*(tmp_path / "run").iterdir(), *(tmp_path / "model").iterdir()):
        assert file.name == ".lock" or stat.S_IMODE(file.stat().st_mode) == file_mode, file


def test_what_is_no_file_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no space left to write /dev/full"):
        write_text(Path("/dev/full"), "x")
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, json.dumps(1))
    assert os.read(reader, 9) == b"1"
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    with pytest.raises(DataError, match="cannot write"):
        write_text(tmp_path, "x")
