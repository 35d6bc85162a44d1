"""What a person who types gets: help on one screen, completion, and one line where a command line is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from permllm import cli
from permllm.usage import completions, help_text, options_of
from tests.conftest import ROOT, run_command, run_python

CONF = ROOT / "conf"


def test_help_is_one_screen_with_every_option(tmp_path: Path) -> None:
    for words in ((str(ROOT / "run.py"),), ("-m", "permllm", "run")):
        result = run_python(*words, "--help", cwd=tmp_path)
        lines = result.stdout.splitlines()
        assert (result.returncode, result.stderr) == (0, "")
        assert len(lines) <= 40
        assert max(map(len, lines)) <= 100
        for group in (folder for folder in CONF.iterdir() if folder.is_dir() and folder.name != "local"):
            assert f"  {group.name} " in result.stdout
            for option in group.glob("[!_]*.yaml"):
                assert option.stem in result.stdout.replace("*", "").split()
        assert "_base" not in result.stdout
        assert lines[0].startswith("permllm run: " if words[0] == "-m" else "python run.py: ")
        assert sum(line.startswith(f"  {lines[0].partition(':')[0]}") for line in lines) == 5


def test_a_system_that_jobs_do_not_run_on_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert cli.main() == 1
    assert capsys.readouterr().err == "error: a job needs Linux or macOS; on Windows that is WSL\n"


def test_hydras_help_is_the_same(tmp_path: Path) -> None:
    result = run_command("--help", "pruner=ria", cwd=tmp_path)
    assert result.stdout.strip() == help_text("python run.py")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["permutaton=lcp"], "permutaton=lcp: no group or setting; did you mean permutation?"),
        (["pruner=wandaa"], "pruner=wandaa: no such option; did you mean wanda? valid are: magnitude, ria"),
        (["model.nam=x"], "model.nam=x: no setting of model=tiny; did you mean model.name? valid are: name, source"),
        (["permutation.epoch=3"], "permutation.epoch=3: no setting of permutation=lcp; did you mean permutation.epochs?"),
        (["permutation=none", "permutation.epochs=3"], "permutation.epochs=3: no setting of permutation=none"),
        (["pruner=ria", "pruner.exponentt=3"],
         "pruner.exponentt=3: no setting of pruner=ria; did you mean pruner.exponent? valid are: exponent"),
        (["seed=x"], "seed=x: expected a whole number"),
        (["block_size=abc"], "block_size=abc: expected a whole number"),
        (["permutation.margin=wide"], "permutation.margin=wide: expected a number"),
        (["evaluation.zero_shot.limit=x"], "evaluation.zero_shot.limit=x: expected a whole number or null"),
        (["save_weights=perhaps"], "save_weights=perhaps: expected true or false"),
        (["sparsity_of.mlp=4:8"], "sparsity_of.mlp: sparsity_of is given whole, as in 'sparsity_of={mlp: VALUE}'"),
        (["modle.name=x"], "modle: no group or setting; did you mean model?"),
        (["experiment=tabel1"], "experiment=tabel1: no such option; did you mean table1?"),
        (["-m", "pruner=wandaa,ria"], "pruner=wandaa: no such option; did you mean wanda?"),
        (["-m", "seed=x,1"], "seed=x: expected a whole number"),
        (["~model.architecture"], "~model.architecture: a setting cannot be taken away; model.architecture=null"),
        (["seed"], "seed: expected KEY=VALUE or GROUP=OPTION"),
        (["seed=0,1"], "seed=0,1: several values are a sweep, which -m asks for; a list is 'seed=[0,1]'"),
        (["--cfg", "job", "seed=x"], "seed=x: expected a whole number"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)  # fmt: skip
def test_what_hydra_refuses_is_one_line(words: list[str], line: str, tmp_path: Path) -> None:
    result = run_command(*words, "model=tiny", "logger=none", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: {line}")
    assert result.stderr.count("\n") == 1


def test_everything_is_there_for_who_asks_for_it(tmp_path: Path) -> None:
    result = run_command("seed=x", cwd=tmp_path, HYDRA_FULL_ERROR="1")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "ConfigCompositionException" in result.stderr


def test_what_is_added_and_is_no_setting_is_one_line(tmp_path: Path) -> None:
    result = run_command("model=tiny", "logger=none", "+colour=red", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (1, "error: colour is no setting; docs/options.md lists them\n")


def completed(line: str, *words: str) -> list[str]:
    """What a shell is answered."""
    result = run_python(*words, "-sc", "query=bash", environment=os.environ | {"COMP_LINE": line})
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.split()


def test_words_are_completed() -> None:
    script, module = (str(ROOT / "run.py"),), ("-m", "permllm")
    assert completed("permllm re", *module)[0] == "results"
    assert completed("permllm results x", *module) == []
    for words, start in ((script, "python run.py"), (module, "permllm run")):
        assert completed(f"{start} pru", *words) == ["pruner.", "pruner="]
        llamas = [f"model={name}" for name in options_of()["model"][1] if name.startswith("llama")]
        assert completed(f"{start} model=ll", *words) == llamas
        assert completed(f"{start} pruner=ria permutation.epo", *words) == ["permutation.epochs="]
    assert "settings/" not in completed("python run.py ", *script)
    assert completions("python run.py hydra.searchpath=[pkg://mine.conf] pru") is None


def test_a_shell_completes_both_commands(tmp_path: Path) -> None:
    """Through the script that Hydra gives, as bash calls it."""
    (tmp_path / "permllm").write_text(f'#!/bin/sh\nexec {sys.executable} -m permllm "$@"\n')
    (tmp_path / "permllm").chmod(0o755)
    script = """
        eval "$({command} -sc install=bash)"
        COMP_LINE="{line}" COMP_POINT=99 COMP_CWORD={place}
        hydra_bash_completion
        echo "${{COMPREPLY[@]}}"
    """
    for command, line in (("permllm", "permllm run pruner=wa"), ("python run.py", "python run.py pruner=wa")):
        words = script.format(command=command, line=line, place=2)
        environment = os.environ | {"PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
        result = subprocess.run(["bash", "-c", words], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        assert result.stdout == "pruner=wanda\n"
