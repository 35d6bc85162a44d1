"""The command line: help, errors, exit codes and JSON of every command; jobs, sweeps and exports as they are typed."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from permllm import cli
from permllm.cli import COMMANDS, call, main
from permllm.runtime.terminal import Answer
from permllm.runtime.version import __version__
from tests.conftest import COMMAND, ROOT, run_command, run_module, run_python

TINY = ("model=tiny", "logger=none")


def test_its_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for words, lines in {"--help": [f"    {name}" for name in COMMANDS], "--version": [f"permllm {__version__}\n"]}.items():
        with pytest.raises(SystemExit) as stop:
            main([words])
        assert stop.value.code == 0
        shown = capsys.readouterr().out
        assert all(line in shown for line in lines)


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
    [("results", [], 1), ("export", ["--to", "new"], 1), ("verify", [], 2), ("bench", [], 1)],
)
def test_an_error_is_one_line_and_in_json_too(
    name: str, words: list[str], code: int, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = [f"{tmp_path}/nothing", *words]
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
    answer = Answer({"a": [float("inf"), float("nan"), 1.5]}, lambda: None)
    monkeypatch.setattr("permllm.runs.results_command.work", lambda _: answer)
    assert call("results", ["x", "--json"]) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"a": [None, None, 1.5]}


def test_run_is_run_py(tmp_path: Path) -> None:
    words = ("model=tiny", "plan=true", f"runs_dir={tmp_path}")
    through, script = run_module("permllm", "run", *words), run_python(str(ROOT / "run.py"), *words)
    plan, other = (done.stdout.partition("GB by stage")[0] for done in (through, script))  # times are measured anew
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
        ("permutaton=lcp", "permutaton"),
        ("permutation.nonsense=1", "nonsense"),
        ("pruner=wandaa", "pruner/wandaa"),
        ("seed=x", "seed='x'"),
        ("seed=[0", "seed=[0"),
        ("-m pruner=wanda,null", "pruner=wanda,null"),
        ("-m hydra/launcher=jobib", "hydra/launcher/jobib"),
    ],
)
def test_a_command_line_that_is_refused_is_one_line(words: str, named: str, tmp_path: Path) -> None:
    result = run_command(*words.split(), *TINY, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert named in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_launcher_that_is_not_installed_names_its_extra() -> None:
    said = cli._with_extra("In 'hydra/config': Could not find 'hydra/launcher/joblib' Available options")
    assert said == "hydra/launcher=joblib is not installed: pip install -e '.[sweep]'"


def test_all_of_an_error_is_there_on_demand(tmp_path: Path) -> None:
    assert "Traceback" in run_command("seed=x", cwd=tmp_path, HYDRA_FULL_ERROR="1").stderr


def only_run(cwd: Path) -> Path:
    (directory,) = [path for path in (cwd / "runs").iterdir() if (path / "metrics.json").is_file()]
    return directory


def test_one_job_leaves_a_record_and_the_second_time_skips(tmp_path: Path) -> None:
    first = run_command("model=tiny", cwd=tmp_path, fresh=True, NETRC=os.devnull)
    assert first.returncode == 0, first.stderr
    directory = only_run(tmp_path)
    assert str(directory.relative_to(tmp_path)) in first.stdout
    assert "builtin perplexity" in first.stdout
    names = {path.name for path in directory.iterdir() if not path.name.startswith(".")}
    expected = {"config.yaml", "metrics.json", "history.jsonl", "permutations.safetensors", "masks.safetensors"}
    assert names == expected | {"environment.json", "evaluations", "run.log"}
    assert list((tmp_path / "runs").iterdir()) == [directory]  # the default logger, without a key
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "cache"}  # nothing else lies about
    written = (directory / "metrics.json").read_text()
    assert "is finished already" in run_command("model=tiny", cwd=tmp_path).stderr
    assert (directory / "metrics.json").read_text() == written


def test_a_sweep_runs_each_value_ends_with_one_table_and_survives_a_failing_job(tmp_path: Path) -> None:
    result = run_command("-m", *TINY, "block_size=16,30,32", cwd=tmp_path)
    assert result.returncode == 1
    (error,) = result.stderr.splitlines()
    assert error.startswith("error: block_size=30 is not a multiple of M = 4")
    assert len(list((tmp_path / "runs").glob("*/metrics.json"))) == 2
    for words in ("sparse models", "block_size=16", "block_size=32", "2 ran, 1 failed"):
        assert words in result.stdout
    again = run_command("-m", *TINY, "block_size=16,30,32", cwd=tmp_path)
    assert "2 skipped, 1 failed" in again.stdout
    assert "is not a multiple of M" in again.stdout[again.stdout.index("jobs") :]


def test_directories_are_those_that_are_named(tmp_path: Path) -> None:
    quick = [*TINY, "permutation=none"]
    for name in ("run_dir", "hydra.run.dir"):
        assert run_command(*quick, f"{name}={name}", cwd=tmp_path).returncode == 0
        assert json.loads((tmp_path / name / "metrics.json").read_text())["status"] == "finished"
    several = run_command("-m", *quick, "seed=0,1", "hydra.sweep.dir=many", cwd=tmp_path)
    assert several.returncode == 0, several.stderr
    assert len(list((tmp_path / "many").glob("tiny-wanda-none-2x4-*/metrics.json"))) == 2
    named = run_command("-m", *quick, "seed=0,1", "hydra.sweep.dir=named", "hydra.sweep.subdir=${hydra:job.num}", cwd=tmp_path)
    assert named.returncode == 0, named.stderr
    assert "2 ran" in named.stdout
    assert sorted(path.parent.name for path in (tmp_path / "named").glob("*/metrics.json")) == ["0", "1"]
    assert not (tmp_path / "runs").exists()


def test_what_a_method_does_not_use_makes_no_second_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = [*TINY, "permutation=heuristic"]
    result = run_command("-m", *quick, "block_size=16,32", "temperature=linear,cosine", cwd=tmp_path)
    assert "1 ran, 3 skipped" in result.stdout
    again = run_command(*quick, "evaluation.perplexity.seqlen=32", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "(window 32)" in again.stdout
    assert "is finished already" not in again.stderr
    only_run(tmp_path)
    assert call("results", [str(tmp_path / "runs")]) == 0
    table = capsys.readouterr().out
    assert all(f"builtin perplexity (window {window})" in table for window in (32, 64))


def test_quickstart_compares_five_ways_in_one_table(tmp_path: Path) -> None:
    result = run_command("experiment=quickstart", *TINY, "budget.steps=12", "budget.text=12", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    table = result.stdout[result.stdout.index("sparse models") :]
    for name in ("wanda", "wanda-cp", "order-paper", "permllm-wanda", "masks"):
        assert f"method={name} " in table


def test_a_run_exports_and_a_finished_one_exports_again_in_another_form(tmp_path: Path) -> None:
    arguments = [*TINY, "permutation=lcp-paper", "permutation.epochs=2", "pruner=sparsegpt", "permutation.constraint=foldable"]
    first = run_command(*arguments, "export=folded", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    directory = only_run(tmp_path)
    assert call("verify", [str(directory / "export")]) == 0
    written = (directory / "export" / "model.safetensors").stat().st_mtime_ns
    again = run_command(*arguments, "export=folded", cwd=tmp_path)
    assert "export is there already" in again.stderr
    assert (directory / "export" / "model.safetensors").stat().st_mtime_ns == written
    gathered = run_command(*arguments, "export=gathered", cwd=tmp_path)
    assert gathered.returncode == 0, gathered.stderr
    assert only_run(tmp_path) == directory  # the export is no part of what makes a result
    assert json.loads((directory / "metrics.json").read_text())["export"]["form"] == "gathered"


def test_a_free_order_from_a_file_is_gathered_and_not_folded(tmp_path: Path) -> None:
    assert run_command(*TINY, "permutation=heuristic", cwd=tmp_path).returncode == 0
    words = (*TINY, "permutation=from_file", f"permutation.path={only_run(tmp_path)}")
    assert "does not fold" in run_command(*words, "export=folded", cwd=tmp_path).stderr
    gathered = run_command(*words, "export=gathered", cwd=tmp_path)
    assert gathered.returncode == 0, gathered.stderr
