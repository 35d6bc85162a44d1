"""The command `permllm`: help, errors, exit codes and JSON have one place."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from permllm import cli
from permllm.cli import COMMANDS, call, main
from permllm.runtime.terminal import Answer
from permllm.runtime.version import __version__
from tests.conftest import COMMAND, ROOT, run_command, run_module, run_python


def test_its_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(f"    {name}" in shown for name in COMMANDS)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"permllm {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_a_help_without_what_takes_long_to_import(name: str, tmp_path: Path) -> None:
    code = (
        f"import atexit, sys; sys.argv = ['permllm', '{name}', '--help']\n"
        "heavy = ('torch', 'transformers', 'lm_eval', 'wandb', 'accelerate', 'plotly')\n"
        "atexit.register(lambda: print([name for name in heavy if name in sys.modules]))\n"
        "from permllm.cli import main\n"
        "sys.exit(main())"
    )
    shown = run_python("-c", code, cwd=tmp_path, fresh=True)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.splitlines()[-1] == "[]"
    assert "--json" in shown.stdout or name == "run"


def test_a_help_comes_within_a_second(tmp_path: Path) -> None:
    def seconds(*words: str) -> float:
        start = time.perf_counter()
        run_python(*words, cwd=tmp_path, fresh=True)
        return time.perf_counter() - start

    bare = min(seconds("-c", "pass") for _ in range(2))
    assert min(seconds(str(COMMAND), "verify", "--help") for _ in range(2)) < bare + 1


@pytest.mark.parametrize(
    ("name", "words", "code"),
    [
        ("results", ["{}/nothing"], 1),
        ("export", ["{}/nothing", "--to", "{}/new"], 1),
        ("verify", ["{}/nothing"], 2),
        ("bench", ["{}/nothing"], 1),
    ],
)
def test_an_error_is_one_line_and_in_json_too(
    name: str, words: list[str], code: int, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = [word.format(tmp_path) for word in words]
    assert call(name, typed) == code
    plain = capsys.readouterr()
    assert plain.out == ""
    assert plain.err.startswith("error: ")
    assert plain.err.count("\n") == 1
    assert call(name, [*typed, "--json"]) == code
    answer = capsys.readouterr()
    assert json.loads(answer.out) == {"error": plain.err.removeprefix("error: ").rstrip("\n")}
    assert answer.err == plain.err


def test_json_has_no_infinity(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from permllm.runs import results_command as results

    monkeypatch.setattr(results, "work", lambda _: Answer({"a": [float("inf"), float("nan"), 1.5]}, lambda: None))
    assert call("results", ["x", "--json"]) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"a": [None, None, 1.5]}


def test_run_is_run_py(tmp_path: Path) -> None:
    words = ("model=tiny", "plan=true", f"runs_dir={tmp_path}")
    through, script = run_module("permllm", "run", *words), run_python(str(ROOT / "run.py"), *words)
    assert (through.returncode, script.returncode) == (0, 0)
    # Times that the plan ends with are measured anew.
    plan, other = (done.stdout.partition("GB by stage")[0] for done in (through, script))
    assert "channel groups" in plan
    assert other == plan


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
        (["pruner=wandaa"], "pruner/wandaa"),
        (["seed=x"], "seed='x'"),
        (["seed=[0"], "seed=[0"),
        (["pruner=null"], "pruner=null"),
        (["-m", "pruner=wanda,null"], "pruner=wanda,null"),
        (["-m", "hydra/launcher=jobib"], "hydra/launcher/jobib"),
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


def test_a_launcher_that_is_not_installed_names_its_extra() -> None:
    said = cli._with_extra("In 'hydra/config': Could not find 'hydra/launcher/joblib' Available options")
    assert said == "hydra/launcher=joblib is not installed: pip install -e '.[sweep]'"


def test_all_of_an_error_is_there_on_demand(tmp_path: Path) -> None:
    result = run_command("seed=x", cwd=tmp_path, HYDRA_FULL_ERROR="1")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
