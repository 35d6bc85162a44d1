"""Models, texts and tasks from the hub, end to end, with the real clients: once, again, and without network."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from datasets import Dataset
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from permllm.config import NMPattern
from permllm.errors import DataError
from permllm.export.checkpoint import Request, export_run
from permllm.export.verify import verify
from permllm.runs.files import write_json
from tests.conftest import run_command
from tests.hub.jobs import Job, Outcome, run_jobs
from tests.hub.repositories import MODELS
from tests.hub.server import Hub, Repository

SMALL = [
    "logger=none",
    "model.device=cpu",
    "block_size=16",
    "permutation=heuristic",
    "calibration.samples=4",
    "calibration.seqlen=48",
    "evaluation.perplexity.seqlen=48",
    "evaluation.lm_eval.limit=2",
]
TASKS = {
    "hellaswag": "Rowan/hellaswag",
    "arc_easy": "allenai/ai2_arc",
    "arc_challenge": "allenai/ai2_arc",
    "openbookqa": "allenai/openbookqa",
    "rte": "nyu-mll/glue",
    "piqa": "baber/piqa",
    "winogrande": "allenai/winogrande",
    "boolq": "aps/super_glue",
}
CALIBRATION = {
    "c4": ("allenai/c4", "en/c4-train.00000-of-01024.json.gz"),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1/train-00000-of-00001.parquet"),
    "pile": ("mit-han-lab/pile-val-backup", "val.jsonl.zst"),
}
PERPLEXITY = {
    "c4": ("allenai/c4", "en/c4-validation.00000-of-00008.json.gz"),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet"),
}


@dataclass(frozen=True)
class Case:
    """One family: what it is calibrated and evaluated on, and its other settings."""

    family: str
    calibration: str
    perplexity: str
    more: tuple[str, ...] = ("evaluation.tasks=[]",)

    def job(self, *more: str) -> Job:
        """As it is typed."""
        chosen = [
            "model=hub",
            f"model.hub_name={MODELS[self.family]}",
            f"calibration={self.calibration}",
        ]
        return Job(
            [*chosen, f"evaluation.perplexity.dataset={self.perplexity}", *SMALL, *self.more, *more]
        )


CASES = (
    Case(
        "llama",
        "c4",
        "wikitext2",
        (
            f"evaluation.tasks=[{','.join(TASKS)}]",
            "permutation=lcp",
            "permutation.epochs=1",
            "permutation.constraint=foldable",
            "export=folded",
        ),
    ),
    Case("mistral", "wikitext2", "c4"),
    Case("qwen2", "pile", "c4"),
    Case("qwen3", "pile", "wikitext2"),
    Case("opt", "c4", "wikitext2", ("evaluation.tasks=[]", "export=simulate")),
)


@dataclass(frozen=True)
class Runs:
    """What one process did with all cases.

    Attributes:
        folder: its working directory.
        outcomes: of the cases in order, then of what else was asked for.
        asked: how many requests the hub had answered when the process began and when it ended.
    """

    folder: Path
    outcomes: list[Outcome]
    asked: tuple[int, int]

    def directory(self, case: Case) -> Path:
        """The run directory of a case."""
        (directory,) = (self.folder / "runs").glob(f"{MODELS[case.family].rsplit('/', 1)[-1]}-*")
        return directory

    def metrics(self, case: Case) -> dict[str, Any]:
        """The metrics of a case."""
        return json.loads((self.directory(case) / "metrics.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def first(
    hub: Hub, environment: Callable[[str], dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> Runs:
    """Every case, then each once more."""
    folder, before = tmp_path_factory.mktemp("first"), len(hub.requests)
    jobs = [case.job() for case in CASES]
    outcomes = run_jobs(jobs + jobs, folder, **environment("first"))
    return Runs(folder, outcomes, (before, len(hub.requests)))


@pytest.fixture(scope="session")
def offline(
    hub: Hub,
    first: Runs,
    environment: Callable[[str], dict[str, str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Runs:
    """Every case with another seed, without network or anything kept but the clients' caches; then what these lack."""
    folder, before = tmp_path_factory.mktemp("offline"), len(hub.requests)
    jobs = [case.job("seed=1") for case in CASES]
    jobs.append(Job(["model=hub", "model.hub_name=some/other", *SMALL]))
    missing = replace(CASES[1], calibration="c4", more=("evaluation.tasks=[sciq]",))
    jobs.append(missing.job("name=missing"))
    nowhere = {"HF_HUB_OFFLINE": "1", "PERMLLM_CACHE": str(folder / "results")}
    outcomes = run_jobs(jobs, folder, **environment("first") | nowhere)
    return Runs(folder, outcomes, (before, len(hub.requests)))


def source(hub: Hub, place: tuple[str, str]) -> str:
    """A file of a data set, as the record names it."""
    name, file = place
    return f"{name}@{Repository(hub.root, 'datasets', name, None).revision('main').commit}/{file}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.family)
@pytest.mark.parametrize("which", ["first", "offline"])
def test_each_family_runs_and_records_commits(
    case: Case, which: str, hub: Hub, request: pytest.FixtureRequest
) -> None:
    runs: Runs = request.getfixturevalue(which)
    outcome = runs.outcomes[CASES.index(case)]
    assert (outcome.code, outcome.errors) == (0, "")
    metrics = runs.metrics(case)
    name = MODELS[case.family]
    commit = Repository(hub.root, "models", name, None).revision("main").commit
    assert metrics["status"] == "finished"
    assert metrics["model"] == f"hub:{name}:{commit}:bfloat16"
    assert metrics["sparsity"]["violations"] == 0
    assert metrics["texts"] == {"calibration": source(hub, CALIBRATION[case.calibration])}
    assert metrics["evaluated_texts"] == {case.perplexity: source(hub, PERPLEXITY[case.perplexity])}


@pytest.mark.parametrize("which", ["first", "offline"])
def test_tasks_come_under_the_names_that_lm_eval_uses(
    which: str, hub: Hub, request: pytest.FixtureRequest
) -> None:
    metrics = request.getfixturevalue(which).metrics(CASES[0])
    for of_model in ("dense", "sparse"):
        results = metrics["tasks"][of_model]
        assert list(results) == list(TASKS)
        for task, name in TASKS.items():
            commit = Repository(hub.root, "datasets", name, None).revision("main").commit
            assert results[task]["data"] == f"{name}@{commit}"
            assert (results[task]["n"], results[task]["limited"]) == (2, True)
    # The papers' protocol.
    assert {how["add_bos_token"] for how in metrics["evaluation"]["tasks"].values()} == {False}


def test_the_same_command_again_is_finished(first: Runs) -> None:
    once, again = first.outcomes[: len(CASES)], first.outcomes[len(CASES) :]
    # The times in the table are those of the first time.
    assert [outcome.output for outcome in again] == [outcome.output for outcome in once]
    assert not any(outcome.code or outcome.errors for outcome in again)


def test_offline_nobody_is_asked_and_what_is_not_there_is_one_line(offline: Runs) -> None:
    assert offline.asked[0] == offline.asked[1]
    model, task = offline.outcomes[len(CASES) :]
    assert (model.code, task.code) == (1, 1)
    reason = "is not whole in the local hub cache, and HF_HUB_OFFLINE=1 says not to ask the hub\n"
    assert model.errors == f"error: model some/other {reason}"
    assert task.errors == f"error: the data of task sciq {reason}"


def test_only_the_files_that_are_read_are_fetched_and_each_once(hub: Hub, first: Runs) -> None:
    paths = [
        request.path for request in hub.requests[slice(*first.asked)] if request.method == "GET"
    ]
    assert not [path for path in paths if "consolidated" in path or "original" in path]
    # No second copy of weights that a bot has converted.
    assert not [path for path in paths if "refs" in path or "discussions" in path]
    weights = [path for path in paths if path.endswith((".safetensors", ".bin"))]
    assert len(weights) == len(set(weights)) == 3 + 1 + 1 + 1 + 1
    texts = [
        path
        for path in paths
        if "c4-" in path or "wikitext-2-raw-v1/" in path or "val.jsonl" in path
    ]
    assert len(texts) == len(set(texts)) == 2 + 2 + 1


def test_the_export_of_a_hub_model_verifies_and_loads(first: Runs, offline: Runs) -> None:
    for runs in (first, offline):
        folder = runs.directory(CASES[0]) / "export"
        assert verify(folder, NMPattern(2, 4), None).passed
        assert "base_model: huggyllama/llama-7b\n" in (folder / "README.md").read_text(
            encoding="utf-8"
        )
        assert (folder / "tokenizer.json").is_file()
        assert (
            folder / "additional_chat_templates" / "tool_use.jinja"
        ).read_text() == "{{ tools }}"
        simulated = AutoModelForCausalLM.from_pretrained(runs.directory(CASES[4]) / "export")
        weight = simulated.model.decoder.layers[0].fc1.weight
        assert float((weight == 0).float().mean()) == 0.5


def test_windows_of_the_pile_are_drawn_as_in_the_released_code(hub: Hub, first: Runs) -> None:
    """From the rows themselves: shuffled by `datasets`, drawn by the module's own generator."""
    name, file = CALIBRATION["pile"]
    with pyarrow.input_stream(
        str(hub.root / "datasets" / name / file), compression="zstd"
    ) as stream:
        rows = [json.loads(line) for line in stream.read().decode().splitlines()]
    shuffled = Dataset.from_list(rows).shuffle(seed=0)
    tokenizer = AutoTokenizer.from_pretrained(hub.root / "models" / MODELS["qwen2"])
    random.seed(0)
    expected = []
    for _ in range(4):
        while True:
            tokens = tokenizer(shuffled[random.randint(0, len(shuffled) - 1)]["text"])["input_ids"]
            if len(tokens) > 48:
                break
        start = random.randint(0, len(tokens) - 48 - 1)
        expected.append(tokens[start : start + 48])
    kept = [load_file(file) for file in (hub.root.parent).rglob("results/tokens-*.safetensors")]
    windows = [tokens["tokens"] for tokens in kept]
    assert any(
        torch.equal(drawn, torch.tensor(expected)) for drawn in windows if drawn.shape == (4, 48)
    )


def test_a_record_of_a_commit_that_the_hub_does_not_have_says_so(
    hub: Hub, first: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    run = tmp_path / "run"
    shutil.copytree(first.directory(CASES[1]), run)
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    metrics["model"] = f"hub:{MODELS['mistral']}:{'0' * 40}:bfloat16"
    write_json(run / "metrics.json", metrics)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        DataError,
        match=f"^model {MODELS['mistral']} has no branch, tag or commit '{'0' * 40}' on the hub$",
    ):
        export_run(run, Request("simulate"), tmp_path / "out")


def test_as_it_is_typed_no_request_is_told_of(
    hub: Hub, environment: Callable[[str], dict[str, str]], tmp_path: Path
) -> None:
    case = Case("qwen3", "wikitext2", "wikitext2", ("evaluation.tasks=[]", "permutation=none"))
    before = len(hub.requests)
    variables = environment("typed") | {"PERMLLM_CACHE": str(tmp_path)}
    result = run_command(*case.job().overrides, cwd=tmp_path, fresh=True, **variables)
    assert result.returncode == 0, result.stderr
    assert len(hub.requests) > before + 10
    assert "HTTP" not in result.stderr
    assert "Qwen3-8B-wanda-none-2x4" in result.stdout
