"""A user of the hub, in a process of its own: clients read their variables at import.

`python -m tests.hub.client ROOT` imports them, and then plays each story whose name it reads: in a
fork, with the outcome of each step as JSON, an error as its line. The folder ROOT is the hub's.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import lm_eval as installed
from huggingface_hub import constants
from lm_eval.tasks import TaskManager

from permllm import job
from permllm.data.texts import TEXTS, HubText
from permllm.data.windows import calibration_windows
from permllm.errors import PermLLMError
from permllm.evaluation import lm_eval
from permllm.evaluation.perplexity import perplexity_windows
from permllm.models.load import load_model
from permllm.settings import config as settings
from permllm.settings.composition import register_resolvers
from permllm.settings.config import CalibrationConfig, ModelConfig, PerplexityConfig
from permllm.store.cache import tensor_digest
from tests.conftest import FAMILY_SETTINGS
from tests.hub.repositories import model_name, write_model
from tests.hub.server import GRANTED
from tests.settings.test_config import composed

SAMPLING = {"c4": "documents", "pile": "documents", "wikitext2": "overlapping"}
OUTCOMES: dict[str, Any] = {}


def note(step: str, function: Callable[..., Any], *arguments: Any) -> None:
    try:
        OUTCOMES[step] = function(*arguments)
    except PermLLMError as error:
        OUTCOMES[step] = f"error: {error}"


def model(name: str, token: str = "", revision: str | None = None) -> list[Any]:
    """Return identity, weights and tokens of a model."""
    os.environ["HF_TOKEN"] = token
    config = ModelConfig(name, "hub", hub_name=name, revision=revision, device="cpu")
    loaded = load_model(config, 0)
    weights = loaded.model.get_input_embeddings().weight
    return [loaded.identity, tensor_digest(weights), loaded.tokenizer("a b")["input_ids"]]


def run(name: str, *words: str) -> str:
    """Return the status of a job on WikiText-2."""
    few = ["calibration.samples=4", "calibration.seqlen=48", "evaluation.perplexity.seqlen=48"]
    few += ["logger=none", "model=hub", "permutation=none", "calibration=wikitext2"]
    few += [f"model.hub_name={name}", "evaluation.tasks=[rte]", "evaluation.lm_eval.limit=2"]
    found = job.run(settings.read_config(composed(*few, *words)))
    assert found is not None
    return str(found.metrics["status"])


def online(root: Path) -> None:
    """Models, texts and a task, which are there again offline."""
    for family in FAMILY_SETTINGS:
        note(family, model, model_name(family))
    llama = load_model(ModelConfig("llama", "hub", model_name("llama"), device="cpu"), 0)

    def calibration(name: str) -> list[Any]:
        config = CalibrationConfig(name, samples=4, seqlen=48, sampling=SAMPLING[name])
        windows = calibration_windows(llama.tokenizer, TEXTS[name], config, seed=0)
        return [TEXTS[name].digest(calibration=True), windows.tolist()]

    def perplexity(name: str) -> list[Any]:
        windows = perplexity_windows(llama, TEXTS[name], PerplexityConfig(name, seqlen=48), name)
        return [TEXTS[name].digest(calibration=False), windows.tolist()]

    def task(name: str) -> list[Any]:
        limit = settings.TaskConfig(limit=2)
        found = lm_eval.run_task(llama.model, llama.tokenizer, name, limit, settings.LMEvalConfig())
        return [found[name]["data"], found[name]["n"]]

    for name in SAMPLING:
        note(f"calibration {name}", calibration, name)
    for name in ("c4", "wikitext2"):
        note(f"perplexity {name}", perplexity, name)
    note("task", task, "rte")


def offline(root: Path) -> None:
    """All of that without network or kept tokens, and a model that was never asked for."""
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    os.environ["PERMLLM_CACHE"] = str(root.with_name("offline"))
    online(root)
    note("not cached", model, "small/other")


def failures(root: Path) -> None:
    """Mistakes, and how it goes on when they are mended."""
    datasets.config.HF_DATASETS_CACHE = root.with_name("failures")
    big, glue = root / "models" / "big", root / "datasets" / "nyu-mll" / "glue"
    for name in ("gated", "breaks", "moves", "later"):
        write_model(big / name, "qwen2")
    (big / "gated" / ".gated").touch()
    note("gated", model, "big/gated")
    note("gated, granted", model, "big/gated", GRANTED)
    note("missing", model, "big/nothing")
    note("wrong revision", model, "big/moves", "", "nowhere")
    note("refused token", model, "big/moves", "hf_expired")
    (big / "breaks" / ".limit").write_text("4000")
    note("breaks", model, "big/breaks")
    (big / "breaks" / ".limit").unlink()
    note("continues", model, "big/breaks")
    away = glue.rename(glue.with_name("away"))
    note("task missing", run, "big/moves")
    away.rename(glue)
    note("stopped", run, "big/moves", "evaluation.lm_eval.add_bos_token=true")  # by the task
    write_model(big / "moves", "qwen2", seed=1)
    note("moved", run, "big/moves")
    note("anew", run, "big/moves", "force=true")
    (glue / ".gated").touch()
    note("text gated", HubText("nyu-mll/glue", "gated.jsonl").download, True)


def down(root: Path) -> None:
    """Models when the hub is out of reach."""
    note("down, cached", model, "big/moves")
    note("down, not cached", model, "big/later")


def main() -> None:
    register_resolvers()
    time.sleep = lambda seconds: None  # the clients wait between attempts
    # All definitions take seconds to read.
    tasks = Path(installed.__file__).parent / "tasks" / "glue" / "rte"
    manager = TaskManager(include_defaults=False, include_path=str(tasks))
    lm_eval.task_manager = lambda few: manager
    for line in sys.stdin:
        if os.fork() == 0:
            globals()[line.strip()](Path(sys.argv[1]))
            print(json.dumps(OUTCOMES), flush=True)
            os._exit(0)
        os.wait()
    os._exit(0)


if __name__ == "__main__":
    main()
