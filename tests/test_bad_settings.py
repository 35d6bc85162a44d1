"""What a person types or their machine is set to: values that look right, secrets, file modes, devices."""

from __future__ import annotations

import json
import os
import shlex
import stat
import sys
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet

from permllm import job
from permllm.config import instantiate_permutation, read_config
from permllm.data.text_file import read_text_file
from permllm.errors import ConfigError, DataError
from permllm.export.checkpoint import Request, export_run
from permllm.permutation.heuristic import Heuristic
from permllm.runs.environment import environment
from permllm.runs.files import write_text
from tests.test_config import composed

TINY = ("model=tiny", "logger=none", "permutation=none", "calibration.samples=2")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=4294967296", "at most 4294967295"),
        ("model.device=meta", r"model\.device='meta' cannot be used here"),
    ],
)
def test_values_that_cannot_work_are_one_line(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        job.run(read_config(composed(*TINY, override, f"runs_dir={tmp_path}")))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+permutation.block_size=16"], r"permutation\.block_size=16 is not block_size, .* set block_size=16$"),
        (["+permutation.temperature={start: 2}", "plan=true"], "set temperature=OPTION or temperature.KEY=VALUE$"),
        (["+permutation.uses=[seed]", "permutation=none"], "permutation.uses='seed' is not valid"),
        (["logger=wandb", "logger.project=a/b"], r"logger\.project='a/b': W&B allows none of / \\ # \? % :"),
        (["logger=wandb", f"logger.project={'a' * 129}"], "W&B allows 128 characters, and it has 129"),
    ],
)
def test_values_that_another_setting_or_a_service_does_not_allow_are_refused_first(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(composed(*overrides))


def test_a_method_is_given_the_settings_at_the_top_that_it_uses() -> None:
    method = instantiate_permutation(read_config(composed("block_size=16", "temperature=cosine", "logger.project=a-b")))
    assert (method.block_size, type(method.temperature).__name__) == (16, "Cosine")
    assert instantiate_permutation(read_config(composed("block_size=16", "permutation=heuristic"))) == Heuristic("free")


BROKEN_TEXTS: dict[str, tuple[bytes, str]] = {
    "latin.txt": ("é".encode("latin-1"), "cannot be read: 'utf-8' codec can't decode byte 0xe9"),
    "empty.jsonl": (b"", "holds no text"),
    "cut.jsonl": (b'{"text": "a"}\n{"te', "cannot be read: line 2, column 2: Unterminated string"),
    "number.jsonl": (b'{"text": "a"}\n\n{"text": 5}\n', "row 2: its `text` is no string but int"),
    "deep.json": (b"[" * 100_000, "cannot be read: maximum recursion depth"),
    "garbage.parquet": (b"PAR1garbagePAR1", "cannot be read: "),
    "x.pdf": (b"x", "the ending '.pdf' is not known"),
}


@pytest.mark.parametrize("name", sorted(BROKEN_TEXTS))
def test_a_text_that_cannot_be_used_is_one_line(name: str, tmp_path: Path) -> None:
    content, message = BROKEN_TEXTS[name]
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError) as raised:
        read_text_file(str(file))
    assert str(raised.value).startswith(f"text file {file}")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_texts_that_are_no_strings_are_refused_in_parquet_too(tmp_path: Path) -> None:
    for values, message in ([[1, 2], "row 1: its `text` is no string but int"], [[b"x"], "no string but bytes"]):
        parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet")
        with pytest.raises(DataError, match=message):
            read_text_file(str(tmp_path / "a.parquet"))
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", None, "two"], "n": [1, 2, 3]}), file)
    assert read_text_file(str(file)) == ["one", "two"]
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 0xFF
    file.write_bytes(content[:-20])
    with pytest.raises(DataError, match="cannot be read"):
        read_text_file(str(file))


def test_what_is_no_file_is_not_read_as_a_text(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "device.txt").symlink_to("/dev/zero")
    for name in ("folder.txt", "pipe.txt", "device.txt"):
        with pytest.raises(DataError, match="is no file"):
            read_text_file(str(tmp_path / name))
    with pytest.raises(DataError, match="does not exist"):
        read_text_file("a\0b.txt")


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


def test_the_umask_is_kept(tmp_path: Path, cache: Path) -> None:
    before = os.umask(0o077)
    try:
        job.run(read_config(composed(*TINY, f"run_dir={tmp_path}/run")))
        export_run(tmp_path / "run", Request("gathered"), tmp_path / "model")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o700
    for file in (*(tmp_path / "run").iterdir(), *(tmp_path / "model").iterdir()):
        assert file.name.startswith(".lock") or stat.S_IMODE(file.stat().st_mode) == 0o600, file


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
