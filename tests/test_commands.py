"""The command `permllm`: its parts have one place for errors, exit codes and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from permllm.cli import COMMANDS, call, main
from permllm.runtime.version import __version__
from tests.conftest import ROOT, run_module, run_python

WITH_ANSWERS = [name for name in COMMANDS if name != "run"]


def test_its_help_lists_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(f"    {name}" in shown for name in COMMANDS)
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert capsys.readouterr().out == f"permllm {__version__}\n"


@pytest.mark.parametrize("name", WITH_ANSWERS)
def test_each_has_a_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        call(name, ["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert shown.startswith(f"usage: permllm {name}")
    assert "--json" in shown


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
    from permllm.runtime.terminal import Answer

    monkeypatch.setattr(results, "work", lambda _: Answer({"a": [float("inf"), float("nan"), 1.5]}, lambda: None))
    assert call("results", ["x", "--json"]) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"a": [None, None, 1.5]}


def test_run_is_run_py(tmp_path: Path) -> None:
    words = ("model=tiny", "plan=true", f"runs_dir={tmp_path}")
    through, script = run_module("permllm", "run", *words), run_python(str(ROOT / "run.py"), *words)
    assert (through.returncode, script.returncode) == (0, 0)
    # Times that the plan ends with are measured anew.
    (plan, placements, _), other = (done.stdout.partition("where the layers' weights wait") for done in (through, script))
    assert "channel groups" in plan
    assert placements
    assert other[0] == plan


def test_a_question_imports_little(tmp_path: Path) -> None:
    """`--help` must come at once."""
    heavy = ("transformers", "lm_eval", "pandas", "wandb")
    code = (
        "import atexit, sys; sys.argv = ['run.py', '--help']\n"
        f"atexit.register(lambda: print([name for name in {heavy} if name in sys.modules]))\n"
        "from permllm.cli import run\n"
        "sys.exit(run())"
    )
    shown = run_python("-c", code, cwd=tmp_path, fresh=True).stdout
    assert shown.splitlines()[-1] == "[]"
