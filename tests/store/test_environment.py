"""Commit of the package in records: that of the project's own checkout, with its changes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from permllm.store.environment import git_commit
from tests.conftest import ROOT


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a checkout of a project `permllm` with one commit."""
    git_commit.cache_clear()
    for variable in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(variable)
    folder = tmp_path / "checkout"
    (folder / "permllm").mkdir(parents=True)
    (folder / "permllm" / "job.py").write_text("a = 1\n")
    (folder / ".gitignore").write_text("__pycache__\n")
    git(tmp_path, "init", "--quiet", str(folder))
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "Begin")
    return folder


def state(checkout: Path) -> tuple[str, bool] | None:
    git_commit.cache_clear()
    found = git_commit(checkout / "permllm")
    return None if found is None else (found["commit"], found["dirty"])


def test_changes_of_the_package_are_seen_and_others_are_not(checkout: Path) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    assert state(checkout) == (commit, False)
    (checkout / "notes.md").write_text("mine\n")
    (checkout / "permllm" / "__pycache__").mkdir()
    (checkout / "permllm" / "__pycache__" / "job.pyc").write_text("")
    assert state(checkout) == (commit, False)
    (checkout / "permllm" / "new").mkdir()
    (checkout / "permllm" / "new" / "pruner.py").write_text("")  # git does not track it
    assert state(checkout) == (commit, True)
    (checkout / "permllm" / "new" / "pruner.py").unlink()
    (checkout / "permllm" / "job.py").write_text("a = 2\n")
    assert state(checkout) == (commit, True)
    git(checkout, "add", "--all")
    assert state(checkout) == (commit, True)
    git(checkout, "commit", "--quiet", "--message", "Change")
    assert state(checkout) == (git(checkout, "rev-parse", "HEAD"), False)


def test_a_worktree_is_a_checkout_and_a_repository_around_an_installation_is_none(
    checkout: Path, tmp_path: Path
) -> None:
    git(checkout, "worktree", "add", "--quiet", str(tmp_path / "worktree"))
    assert state(tmp_path / "worktree") == (git(checkout, "rev-parse", "HEAD"), False)
    installed = checkout / ".venv" / "site-packages"
    (installed / "permllm").mkdir(parents=True)
    assert state(installed) is None


def test_a_checkout_that_git_does_not_read_counts_as_changed(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / ".git" / "HEAD").unlink()
    assert state(checkout) == ("unknown", True)
    monkeypatch.setenv("PATH", "")
    assert state(checkout) == ("unknown", True)


def test_the_constraints_have_the_versions_of_the_quickstart() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()[1:]
    constraints = dict(line.split("==") for line in lines)
    records = (ROOT / "experiments" / "quickstart" / "records.jsonl").read_text().splitlines()
    versions = json.loads(records[0])["environment"]["versions"]
    shared = versions.keys() & constraints.keys()
    assert shared == versions.keys() - {"python", "permllm"}
    assert all(versions[name].split("+")[0] == constraints[name] for name in shared)
