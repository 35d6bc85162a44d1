"""Values that cannot work, of settings, texts and the machine: one line that names them; errors of ours are seen whole."""

from __future__ import annotations

import math
import os
import shlex
import stat
import sys
from pathlib import Path

import pytest
import torch

from permllm import job
from permllm.cli import Session
from permllm.config import RunConfig, read_config
from permllm.errors import DataError
from permllm.export.checkpoint import Request, export_run
from permllm.runs.environment import environment
from permllm.runs.files import write_text
from permllm.runs.sweep import Outcome
from tests.test_config import composed

TINY = ("model=tiny", "logger=none", "permutation=none", "calibration.samples=2")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sparsity=4:2"], "sparsity=4:2"),
        (["sparsity=24"], "expected N:M"),
        (["sparsity=3:7", "permutation=none"], "does not divide the 32 input channels of model.layers.0.self_attn.qkv_proj"),
        (["block_size=0"], "block_size=0: must be at least 1"),
        (["model.device=toaster"], "model.device='toaster'"),
        (["model.dtype=int4"], "model.dtype='int4': must be 'float32', 'bfloat16'"),
        (["calibration.dataset=mars", "plan=true"], "calibration.dataset='mars' is not valid; valid are: boolq-passages, "),
        (["calibration.dataset=base"], "calibration.dataset='base' is not valid"),
        (["calibration.sampling=often"], "calibration.sampling='often': must be 'disjoint', 'documents' or 'overlapping'"),
        (["calibration.samples=0"], "calibration.samples=0"),
        (["calibration.samples=100000"], "but calibration.samples=100000 of calibration.seqlen=64 need 6400000"),
        (["calibration=text"], "calibration=text needs calibration.data_files=PATH"),
        (["calibration=text", "calibration.data_files=nowhere.txt"], "text file nowhere.txt does not exist"),
        (["evaluation.perplexity.dataset=[builtin,pile]", "plan=true"], "evaluation.perplexity.dataset='pile' is not valid"),
        (["evaluation.perplexity.dataset=[c4,builtin,c4]"], "dataset=['c4', 'builtin', 'c4'] has c4 twice"),
        (["evaluation.perplexity.dataset=[]"], "dataset=[]: expected the name of a text, a list of names"),
        (["evaluation.perplexity.dataset=[builtin,sciq-support]", "calibration.dataset=sciq-support"], "is not held out from"),
        (["evaluation.perplexity.seqlen=1000000"], "fewer than one evaluation.perplexity.seqlen"),
        (["evaluation.tasks=[marsqa]"], "lm-eval does not know marsqa"),
        (["evaluation.tasks={gsm8k: {limit: 0}}"], "evaluation.tasks.gsm8k.limit=0: must be at least 1"),
        (["evaluation.tasks={gsm8k: {shots: 1}}"], "evaluation.tasks.gsm8k.shots is no setting"),
        (["permutation=heuristic", "export=folded"], "set permutation.constraint=foldable"),
        (
            ["block_size=16", "+model.architecture.head_dim=12", "sparsity=4:8", "permutation.constraint=foldable"],
            "which M = 8 does not divide",
        ),
        (
            ["permutation.constraint=foldable", "keep_dense=[o_proj,down_proj]", "permutation.last_layers=1"],
            "no order would learn: residual_stream",
        ),
        (["model=local"], "model=local needs model.path=DIR"),
        (["export.shard_gb=1"], "export.shard_gb=1.0 needs export=folded, gathered or simulate"),
        (["+permutation.nonsense=1"], "nonsense"),
        (["permutation.init=zeros"], "permutation.init='zeros': must be 'heuristic' or 'random'"),
        (["permutation=from_file", "permutation.path=nowhere"], "permutation.path=nowhere: no such file"),
        (["permutation=from_file"], "permutation.path: Missing mandatory value"),
        (["permutation.batch_size=1.5"], "permutation.batch_size=1.5: must be a valid integer"),
        (["permutation.margin=nan"], "permutation.margin=nan: must be a finite number"),
        (["permutation.layers_per_stage=block"], "layers_per_stage='block': must be 'all' or must be a valid integer"),
        (["permutation.layers_per_stage=2", "permutation.loss=kl"], "permutation: loss=kl needs layers_per_stage=all"),
        (["permutation.last_layers=1", "keep_dense=[-1]"], "permutation.last_layers=1: keep_dense leaves nothing to learn"),
        (["permutation=none", "mask=lowrank", "mask.rank=-1"], "mask.rank=-1: must be at least 0"),
        (["reconstruction=distill", "model.placement=host"], "together, which needs model.placement=device"),
        (["mask=score", "permutation=none", "calibration.statistics=sequential"], "is not valid with mask=score"),
        (["model.placement=disk"], "model.placement=disk needs a model with files"),
        (["keep_dense=[true]"], "keep_dense=[True]: expected indices of layers and names of modules"),
        (["sparsity_of={mlp: 1}"], "sparsity_of.mlp=1: expected N:M"),
        (["name=a/b"], "name='a/b' must not contain a slash"),
        (["calibration.statistics=sequential"], "calibration.statistics=sequential is not valid with permutation=lcp"),
        (["temperature.end=0"], "temperature.end=0"),
        (["seed=-1"], "seed=-1: must be at least 0"),
        (["model.device=meta"], "model.device='meta' cannot be used here"),
        (["calibration.data_files=x.txt"], "needs calibration=text"),
        (["model=local", "model.path=nowhere"], "model.path='nowhere' is not a folder"),
        (["model=local", "model.path=."], "config.json cannot be read"),
        (["model.architecture.model_type=gpt2"], "'gpt2' cannot be told: GPT2LMHeadModel has no list of layers"),
        (["pruner._target_=permllm.pruning.wanda.Wonder"], "permllm.pruning.wanda.Wonder cannot be imported"),
        (["pruner._target_=permllm.mask.base.Mask"], "pruner=wanda: expected a subclass of"),
    ],
)
def test_bad_values_get_one_line_that_names_them(
    overrides: list[str], message: str, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    session = Session()
    session.job(composed("model=tiny", "logger=none", *overrides))
    assert session.close() == 1
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("error: ")
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
        Session().job(composed("model=tiny", "logger=none"))
    jobs: list[Outcome] = []
    monkeypatch.setattr("permllm.runs.sweep.sweeping", lambda: True)
    monkeypatch.setattr("permllm.runs.sweep.outcome_file", lambda: tmp_path / "outcome.json")
    monkeypatch.setattr("permllm.cli.share_machine", lambda: None)
    monkeypatch.setattr("permllm.runs.sweep.keep", jobs.append)
    session = Session()
    # A search must not take a failed job for a good one.
    assert [session.job(composed("model=tiny", "logger=none")) for _ in range(2)] == [math.inf, math.inf]
    assert session.close() == 1
    assert capsys.readouterr().err.count("Traceback") == 2
    assert [(job.outcome, job.reason) for job in jobs] == [("failed", "ZeroDivisionError: nothing to divide by")] * 2


def test_secrets_of_the_command_line_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["run.py", "+hydra.job.env_set.WANDB_API_KEY=abc", "++env.HF_TOKEN=def", "+my_password=x=y", "permutation=lcp"]
    words += ["+hydra.job.env_set={WANDB_API_KEY: abc, HOME: /h, 'HF_TOKEN':def}", "+password=a,b"]
    kept = ["model.architecture.num_key_value_heads=2", "evaluation.lm_eval.add_bos_token=false", "sparsity=2:4"]
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
    for file in (file for file in tmp_path.rglob("*") if file.is_file() and not file.name.startswith(".")):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


def test_a_device_or_a_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    for path in (Path("/dev/full"), tmp_path):
        with pytest.raises(DataError, match=str(path)):
            write_text(path, "x")
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)
