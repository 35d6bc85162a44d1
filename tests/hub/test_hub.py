"""The hub with its real clients, end to end: once, again offline, and what goes wrong."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zstandard
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from permllm.store.cache import tensor_digest
from tests.conftest import FAMILY_SETTINGS, ROOT
from tests.hub.repositories import GLUE, WIKITEXT, model_name, write_repositories
from tests.hub.server import Hub, Repository


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Hub:
    root = tmp_path_factory.mktemp("hub") / "root"
    write_repositories(root)
    return Hub(root)


@pytest.fixture(scope="module")
def play(hub: Hub) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Play a story of `tests.hub.client` and return its outcomes."""
    folder = hub.root.parent
    ours = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    ours |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(folder / "hf")}
    ours |= {"NO_PROXY": "127.0.0.1", "PERMLLM_CACHE": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.hub.client", str(hub.root)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=folder, env=ours, stdin=pipe, stdout=pipe, text=True
    ) as user:
        assert user.stdin
        assert user.stdout

        def played(story: str) -> dict[str, Any]:
            print(story, file=user.stdin, flush=True)
            line = next(line for line in user.stdout if line.startswith("{"))
            return json.loads(line)

        yield played
        user.stdin.close()


@pytest.fixture(scope="module")
def online(play: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return play("online")


def commit(hub: Hub, kind: str, name: str) -> str:
    return Repository(hub.root / kind / name).commit


@pytest.mark.parametrize("family", FAMILY_SETTINGS)
def test_a_model_in_shards_is_loaded_whole(family: str, hub: Hub, online: dict[str, Any]) -> None:
    name, folder = model_name(family), hub.root / "models" / model_name(family)
    weight = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    identity = f"hub:{name}:{commit(hub, 'models', name)}:float32"
    assert online[family][:2] == [identity, tensor_digest(weight.detach().float())]
    assert (online[family][2][0], len(online[family][2])) == (1, 4)


def test_texts_and_tasks_have_commits_and_each_file_comes_once(
    hub: Hub, online: dict[str, Any]
) -> None:
    for step, name, file in (
        ("calibration c4", "allenai/c4", "en/c4-train.00000-of-01024.json.gz"),
        ("perplexity c4", "allenai/c4", "en/c4-validation.00000-of-00008.json.gz"),
        ("calibration pile", "mit-han-lab/pile-val-backup", "val.jsonl.zst"),
        ("perplexity wikitext2", "Salesforce/wikitext", f"{WIKITEXT}/test-00000-of-00001.parquet"),
    ):
        assert online[step][0] == f"{name}@{commit(hub, 'datasets', name)}/{file}"
    assert online["task"] == [f"{GLUE}@{commit(hub, 'datasets', GLUE)}", 2]
    files = [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    assert len(files) == len(set(files))
    assert not [file for file in files if "consolidated" in file or "original" in file]
    assert len([file for file in files if "/c4-" in file]) == 2


def test_windows_of_the_pile_are_those_of_the_released_code(
    hub: Hub, online: dict[str, Any]
) -> None:
    file = hub.root / "datasets" / "mit-han-lab" / "pile-val-backup" / "val.jsonl.zst"
    lines = zstandard.decompress(file.read_bytes()).decode().splitlines()
    rows = Dataset.from_list([json.loads(line) for line in lines]).shuffle(seed=0)
    tokenizer = AutoTokenizer.from_pretrained(hub.root / "models" / model_name("llama"))
    random.seed(0)
    for window in online["calibration pile"][1]:
        tokens: list[int] = []
        while len(tokens) <= 48:
            tokens = tokenizer(rows[random.randint(0, len(rows) - 1)]["text"])["input_ids"]
        start = random.randint(0, len(tokens) - 48 - 1)
        assert window == tokens[start : start + 48]


def test_offline_everything_is_there_again_and_nobody_is_asked(
    hub: Hub, online: dict[str, Any], play: Callable[[str], dict[str, Any]]
) -> None:
    before = len(hub.requests)
    found = play("offline")
    assert len(hub.requests) == before
    refused = found.pop("not cached")
    assert refused.startswith("error: model small/other cannot be read from the hub")
    assert "HF_HUB_OFFLINE" in refused
    assert "protocol=offline" in refused
    assert found == online


def test_each_failure_is_one_line_that_names_the_thing_and_the_reason(
    hub: Hub, online: dict[str, Any], play: Callable[[str], dict[str, Any]]
) -> None:
    found = play("failures")
    hub.shutdown()
    hub.server_close()
    found |= play("down")
    for step, (thing, reason) in {
        "gated": ("model big/gated", "Access to big/gated is restricted"),
        "missing": ("model big/nothing", "Repository Not Found"),
        "wrong revision": ("model big/moves", "Revision Not Found"),
        "refused token": ("model big/moves", "Invalid credentials"),
        "breaks": ("model big/breaks", "peer closed connection"),
        "task missing": ("the data of task rte", "Repository Not Found"),
        "text gated": ("data set nyu-mll/glue", "Access to nyu-mll/glue is restricted"),
        "down, not cached": ("model big/later", "check your internet connection"),
    }.items():
        assert found[step].startswith(f"error: {thing} cannot be read from the hub")
        assert reason in found[step]
        assert ("protocol=offline" in found[step]) == (step == "down, not cached")
        assert "\n" not in found[step]
    assert " began with model hub:big/moves:" in found["moved"]
    assert found["anew"] == "finished"
    for step in ("gated, granted", "continues", "down, cached"):
        assert found[step][0].startswith("hub:big/")
