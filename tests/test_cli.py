"""The command line: help, errors, exit codes, JSON; jobs and sweeps as typed; bad values."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import stat
import sys
from pathlib import Path

import pytest
import torch

from permllm import cli, job
from permllm.cli import COMMANDS, call
from permllm.command import as_json
from permllm.errors import DataError
from permllm.export.write import export_run
from permllm.settings.config import ExportConfig, RunConfig, read_config
from permllm.store.environment import environment
from permllm.store.files import write_text
from tests.conftest import run_command, run_python, tiny_model
from tests.settings.test_config import composed

TINY = ("model=tiny-random", "logger=none")


def test_a_command_does_not_print_the_warnings_of_torchao(tmp_path: Path) -> None:
    """In an interpreter of its own, because transformers imports torchao once."""
    pytest.importorskip("torchao")
    tiny_model("llama").save_pretrained(tmp_path)
    environment = os.environ | {"TQDM_DISABLE": "1"}
    done = run_python("-m", "permllm", "verify", str(tmp_path), environment=environment, fresh=True)
    assert done.stdout.startswith("FAILED")
    assert done.stderr == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_a_help_without_what_takes_long_to_import(
    name: str, tmp_path: Path
) -> None:
    code = (
        f"import atexit, sys; sys.argv = ['permllm', '{name}', '--help']\n"
        "heavy = ('torch', 'transformers', 'lm_eval', 'wandb', 'accelerate', 'matplotlib')\n"
        "atexit.register(lambda: print([name for name in heavy if name in sys.modules]))\n"
        "from permllm.cli import main\n"
        "sys.exit(main())"
    )
    shown = run_python("-c", code, cwd=tmp_path, fresh=True)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.splitlines()[-1] == "[]"
    assert "--json" in shown.stdout or name == "run"


@pytest.mark.parametrize(
    ("name", "words", "code"),
    [("results", [], 1), ("export", ["--to", "new"], 1), ("verify", [], 2)],
)
def test_an_error_is_one_line_and_in_json_too(
    name: str, words: list[str], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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


def test_an_option_that_would_do_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("results", ["x", "--jsonl", "y.jsonl", "--columns", "pruner"]) == 1
    assert capsys.readouterr().err.startswith("error: --columns=pruner: ")


def test_an_error_in_json_reaches_a_pipe(tmp_path: Path) -> None:
    """In an interpreter of its own, because Python writes to a pipe when it ends."""
    words = ("-m", "permllm", "results", str(tmp_path / "nothing"), "--json")
    environment = os.environ | {"PYTHONUNBUFFERED": ""}
    found = run_python(*words, environment=environment, fresh=True)
    assert found.returncode == 1
    assert set(json.loads(found.stdout)) == {"error"}


def test_json_has_no_infinity() -> None:
    assert json.loads(as_json({"a": [math.inf, math.nan, 1.5]})) == {"a": [None, None, 1.5]}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("permutaton=lcp", " permutation?"),
        ("permutation=none permutation.epochs=1", "permutation=none"),
        ("epochs=1", "permutation.epochs"),
        ("permutation=none budget.steps=3", "budget.steps=3"),
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
    assert "append" not in result.stderr  # no setting here takes Hydra's plus
    assert result.stderr.count("\n") == 1


def test_an_amount_that_one_job_of_a_sweep_reads_passes(tmp_path: Path) -> None:
    words = ("-m", "permutation=none,lcp", "budget.steps=3", "plan=true")
    result = run_command(*words, *TINY, cwd=tmp_path)
    assert result.returncode == 0, result


def test_slurm_that_is_not_installed_is_one_line(tmp_path: Path) -> None:
    words = ("-m", "hydra/launcher=submitit_slurm", "seed=0,1", *TINY)
    result = run_command(*words, cwd=tmp_path, PATH=str(tmp_path))
    assert result.returncode == 1
    assert "srun" in result.stderr
    assert "Traceback" not in result.stderr


def test_all_of_an_error_is_there_on_demand(tmp_path: Path) -> None:
    assert "Traceback" in run_command("seed=x", cwd=tmp_path, HYDRA_FULL_ERROR="1").stderr


def only_run(cwd: Path) -> Path:
    (directory,) = [path for path in (cwd / "runs").iterdir() if (path / "metrics.json").is_file()]
    return directory


def test_one_job_leaves_a_record_and_the_second_time_skips(tmp_path: Path) -> None:
    first = run_command("model=tiny-random", cwd=tmp_path, fresh=True, NETRC=os.devnull)
    assert first.returncode == 0, first.stderr
    directory = only_run(tmp_path)
    assert str(directory.relative_to(tmp_path)) in first.stdout
    assert "builtin perplexity" in first.stdout
    names = {path.name for path in directory.glob("[!.]*")}
    expected = {"config.yaml", "metrics.json", "environment.json", "history.jsonl", "run.log"}
    assert names == expected | {"permutations.safetensors", "masks.safetensors", "evaluations"}
    assert list((tmp_path / "runs").glob("[!.]*")) == [directory]  # no key, no logger
    # A checkout with changes has no cache.
    assert {path.name for path in tmp_path.iterdir()} - {"cache"} == {"runs"}
    written = (directory / "metrics.json").read_text()
    assert "is finished already" in run_command("model=tiny-random", cwd=tmp_path).stderr
    assert (directory / "metrics.json").read_text() == written


def test_a_sweep_runs_each_value_ends_with_one_table_and_survives_a_failing_job(
    tmp_path: Path,
) -> None:
    result = run_command(*TINY, "-m", "block_size=16,30,32", cwd=tmp_path)
    assert result.returncode == 1
    (error,) = result.stderr.splitlines()
    assert error.startswith("error: block_size=30 is not a multiple of M = 4")
    assert len(list((tmp_path / "runs").glob("*/metrics.json"))) == 2
    for words in (
        "job 1: model=tiny-random logger=none block_size=16: builtin perplexity (window 64) ",
        "job 2: model=tiny-random logger=none block_size=30: failed\n",
        "│ 16 ",
        "│ 32 ",
        "failed model=tiny-random logger=none block_size=30: ",
        "2 ran, 1 failed",
    ):
        assert words in result.stdout
    again = run_command("-m", *TINY, "block_size=16,30,32", cwd=tmp_path)
    assert "2 skipped, 1 failed" in again.stdout
    assert "job 3: model=tiny-random logger=none block_size=32 (skipped): " in again.stdout
    assert "files " not in again.stdout


def test_a_package_that_is_not_there_is_the_error(tmp_path: Path) -> None:
    result = run_command(*TINY, "hydra.searchpath=[pkg://nowhere.conf]", cwd=tmp_path)
    assert result.returncode == 1
    (error,) = result.stderr.splitlines()
    assert error.startswith("error: hydra.searchpath")
    assert "nowhere.conf" in error


def test_a_sweep_over_an_interval_needs_a_search(tmp_path: Path) -> None:
    result = run_command("-m", *TINY, "permutation.margin=interval(0.1,1)", cwd=tmp_path)
    assert result.returncode == 1
    (error,) = result.stderr.splitlines()
    assert error.startswith("error: BasicSweeper")


def test_directories_are_those_that_are_named(tmp_path: Path) -> None:
    quick = [*TINY, "permutation=none"]
    for name in ("run_dir", "hydra.run.dir"):
        assert run_command(*quick, f"{name}={name}", cwd=tmp_path).returncode == 0
        assert json.loads((tmp_path / name / "metrics.json").read_text())["status"] == "finished"
    several = run_command("-m", *quick, "seed=0,1", "hydra.sweep.dir=many", cwd=tmp_path)
    assert several.returncode == 0, several.stderr
    assert len(list((tmp_path / "many").glob("tiny-random-wanda-none-2x4-*/metrics.json"))) == 2
    by_number = ["hydra.sweep.dir=named", "hydra.sweep.subdir=${hydra:job.num}"]
    named = run_command("-m", *quick, "seed=0,1", *by_number, cwd=tmp_path)
    assert named.returncode == 0, named.stderr
    assert "2 ran" in named.stdout
    assert {path.parent.name for path in tmp_path.glob("named/*/metrics.json")} == {"0", "1"}
    assert not (tmp_path / "runs").exists()


def test_a_table_of_the_paper_compares_its_methods(tmp_path: Path) -> None:
    texts = ["protocol=offline", "calibration=builtin", "evaluation=builtin"]
    result = run_command("experiment=table8", *TINY, *texts, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for name in ("sparsegpt", "wanda", "wanda-cp", "permllm-wanda"):
        assert f": method={name} " in result.stdout
    table = result.stdout[result.stdout.index("jobs") :]
    for words in ("sparsegpt │ +none", "wanda │ +none", "wanda │ +heuristic", "wanda │ +lcp"):
        assert re.search(words.replace(" │", " +│"), table)


def test_a_run_exports_what_it_has_pruned(tmp_path: Path) -> None:
    arguments = [*TINY, "permutation=lcp-paper", "permutation.epochs=2", "pruner=sparsegpt"]
    arguments += ["permutation.constraint=foldable"]
    first = run_command(*arguments, "export=folded", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    directory = only_run(tmp_path)
    assert re.search(r"export +runs/\S+/export\n", first.stdout)
    assert call("verify", [str(directory / "export")]) == 0


# Words of a command, and what the error names.
BAD = """
sparsity=4:2 -> sparsity='4:2'
sparsity=3:7 permutation=none -> 32 input channels of model.layers.0.self_attn
model.device=toaster -> model.device='toaster'
model.dtype=int4 -> model.dtype='int4'
model.dtype=auto -> model.dtype=auto
model=local -> model.path=DIR
calibration.dataset=mars plan=true -> calibration.dataset='mars'
calibration.samples=100000 -> calibration.samples=100000
calibration=text -> calibration.data_files=PATH
calibration.data_files=x.txt -> calibration=text
calibration.statistics=sequential -> permutation=lcp
evaluation.perplexity.dataset=[c4,builtin,c4] -> evaluation.perplexity.dataset
evaluation.perplexity.dataset=sciq-support calibration=sciq-support -> not held out
evaluation.tasks={gsm8k:{shots:1}} -> evaluation.tasks.gsm8k.shots
permutation=heuristic export=folded -> permutation.constraint=foldable
permutation.constraint=foldable keep_dense=[o_proj,down_proj] permutation.last_layers=1 -> no stage
export.shard_gb=1 -> export.shard_gb=1.0
permutation=none +permutation.epochs=2 -> permutation.epochs=2: permutation=none
permutation=from_file permutation.path=nowhere -> permutation.path=nowhere
permutation.margin=nan -> permutation.margin=nan
permutation.layers_per_stage=2 permutation.loss=kl -> layers_per_stage=all
reconstruction=distill model.placement=host -> model.placement=device
temperature.end=0 -> temperature.end=0
"""


@pytest.mark.parametrize(
    ("words", "message"), [line.split(" -> ") for line in BAD.strip().splitlines()]
)
def test_bad_values_get_one_line_that_names_them(
    words: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="1"):
        cli.job(composed(*TINY, *words.split()))
    lines = capsys.readouterr().err.splitlines()
    (error,) = [line for line in lines if line.startswith("error: ")]
    assert message in error
    assert not list(tmp_path.rglob("permutations.safetensors"))


def test_an_error_of_ours_is_seen_whole_and_only_a_sweep_goes_on(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(config: RunConfig) -> None:
        raise ZeroDivisionError("nothing to divide by")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("permllm.job.run", broken)
    with pytest.raises(ZeroDivisionError):
        cli.job(composed(*TINY))
    outcomes: list[tuple[str, str]] = []
    monkeypatch.setattr("permllm.settings.composition.sweeping", lambda: True)
    monkeypatch.setattr("permllm.store.sweep.remove_outcome", lambda: None)
    monkeypatch.setattr("permllm.store.sweep.write_outcome", lambda *words: outcomes.append(words))
    # A search must not take a failed job for a good one.
    assert [cli.job(composed(*TINY)) for _ in range(2)] == [math.inf] * 2
    assert capsys.readouterr().err.count("Traceback") == 2
    assert outcomes == [("failed", "ZeroDivisionError: nothing to divide by")] * 2


def test_the_command_is_kept_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {
        "+hydra.job.env_set.WANDB_API_KEY=abc": "+hydra.job.env_set.WANDB_API_KEY=***",
        "+my_password=x=y": "+my_password=***",
        "+hydra.job.env_set={WANDB_API_KEY: abc, HOME: /h, 'HF_TOKEN':def}": (
            "+hydra.job.env_set={WANDB_API_KEY: ***, HOME: /h, 'HF_TOKEN':***}"
        ),
        "+password=a,b": "+password=***",
        "model.architecture.num_key_value_heads=2": "model.architecture.num_key_value_heads=2",
        "evaluation.lm_eval.add_bos_token=false": "evaluation.lm_eval.add_bos_token=false",
    }
    for program in ("run.py", "permllm run"):
        monkeypatch.setattr(sys, "argv", [program, *said])
        command = environment(0, torch.device("cpu"))["command"]
        assert shlex.split(command) == [*program.split(), *said.values()]


def test_the_umask_is_kept(tmp_path: Path, cache: Path) -> None:
    before = os.umask(0o077)
    try:
        words = (*TINY, "permutation=none", "calibration.samples=2", f"run_dir={tmp_path}/run")
        job.run(read_config(composed(*words)))
        export_run(tmp_path / "run", ExportConfig("gathered"), tmp_path / "model")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o700
    files = [file for file in tmp_path.rglob("[!.]*") if file.is_file()]
    assert len(files) > 5
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


def test_a_device_or_a_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"  # a device of the machine would be lost if this failed
    os.mkfifo(pipe)
    for path in (pipe, tmp_path):
        with pytest.raises(DataError, match=str(path)):
            write_text(path, "x")
    assert stat.S_ISFIFO(pipe.stat().st_mode)
