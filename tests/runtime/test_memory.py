"""Memory that is freed is kept while a phase runs, and goes back before the next."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from permllm.runtime import memory
from tests.conftest import ROOT, run_python

STAGES = f"""
import sys, torch
sys.path.insert(0, {str(ROOT)!r})
from permllm.store.directory import Record
from permllm.runtime.memory import host_memory, keep_freed_memory
keep_freed_memory()
progress, cpu = Record(), torch.device("cpu")
torch.ones(64, 64) @ torch.ones(64, 64)
before = host_memory()
with progress.phase("one", cpu):
    taken = [torch.ones(1 << 18) for _ in range(400)]  # of 1 MiB each
    above = taken[-1]  # stays on top of the heap, so that nothing below goes back by itself
    del taken
    with progress.phase("inner", cpu):
        kept = host_memory() - before
with progress.phase("two", cpu):
    print(kept, host_memory() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the GNU C library's")
def test_what_a_stage_has_freed_is_given_back_before_the_next(tmp_path: Path) -> None:
    script = tmp_path / "stages.py"
    script.write_text(STAGES)
    done = run_python(str(script))
    assert done.returncode == 0, done.stderr
    kept, left = map(int, done.stdout.split())
    assert kept > 350 << 20
    assert left < 50 << 20


@pytest.mark.parametrize(
    ("line", "group", "limit", "use"),
    [
        ("0::/", ".", "memory.max", "memory.current"),
        ("0::/slurm/job_7/step_0", "slurm/job_7", "memory.max", "memory.current"),
        ("0::/on/another/host", ".", "memory.max", "memory.current"),
        ("4:blkio,memory:/slurm", "memory/slurm", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ],
    ids=["container", "slurm", "hidden", "version-1"],
)
def test_a_control_group_bounds_what_the_host_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str, group: str, limit: str, use: str
) -> None:
    whole = memory.available_host_memory()
    monkeypatch.setattr(memory, "ALL_GROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "mine")
    (tmp_path / "mine").write_text(f"1:cpu:/\n{line}\n")
    folder = tmp_path / group
    folder.mkdir(parents=True, exist_ok=True)
    (folder / use).write_text("41000\n")
    # Pages of files that were read count as taken, and go as soon as something else is asked for.
    (folder / "memory.stat").write_text(
        "anon 900\ninactive_file 30000\nactive_file 10000\nfile 5\n"
    )
    for value, expected in (("max", pytest.approx(whole, rel=0.5)), ("51000", 50_000)):
        (folder / limit).write_text(f"{value}\n")
        assert memory.available_host_memory() == expected
