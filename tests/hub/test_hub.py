"""The user's command with models, texts and a task of the hub: online, offline, and failures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from permllm.store.files import read_json
from permllm.store.sweep import Outcome, read_outcomes
from tests.conftest import run_command
from tests.hub.repositories import write_data, write_model
from tests.hub.server import GRANTED, Hub, commit

FEW = ("calibration.samples=4", "calibration.seqlen=48", "evaluation.perplexity.seqlen=48")
FEW += ("evaluation.tasks=[rte]", "evaluation.lm_eval.limit=2", "permutation=none", "logger=none")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Hub:
    root = tmp_path_factory.mktemp("hub") / "root"
    write_data(root / "datasets")
    for name in ("small", "gated", "breaks", "lacks"):
        write_model(root / "models" / "some" / name, "qwen2")
    return Hub(root)


def run(hub: Hub, *words: str, **variables: str) -> list[Outcome]:
    """Run a sweep over what is on the hub, and return the outcomes of its jobs."""
    folder = hub.root.parent
    variables = {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "HF_HOME": str(folder)} | variables
    variables["HF_ENDPOINT"] = f"http://127.0.0.1:{hub.server_port}"
    done = run_command("-m", "model=hub", *FEW, *words, cwd=folder, fresh=True, **variables)
    assert "Traceback" not in done.stderr, done.stderr
    sweeps = sorted((folder / "runs" / "sweeps").iterdir(), key=lambda one: one.stat().st_mtime)
    return read_outcomes(sweeps[-1])


def metrics(outcome: Outcome) -> dict[str, Any]:
    assert outcome.directory, outcome
    return read_json(Path(outcome.directory) / "metrics.json")


def test_models_texts_and_tasks_have_commits_come_once_and_are_there_offline(hub: Hub) -> None:
    words = ("model.hub_name=some/small", "calibration=c4,pile")
    online = [metrics(outcome) for outcome in run(hub, *words)]
    model = f"hub:some/small:{commit(hub.root / 'models' / 'some' / 'small')}:bfloat16"
    files = ("allenai/c4/en/c4-train.00000-of-01024.json.gz", "mit-han-lab/pile-val-backup/val")
    for found, file in zip(online, files, strict=True):
        assert found["model"] == model
        owner, name, path = file.split("/", 2)
        of_data = commit(hub.root / "datasets" / owner / name)
        assert found["texts"]["calibration"].startswith(f"{owner}/{name}@{of_data}/{path}")
        glue = commit(hub.root / "datasets" / "nyu-mll" / "glue")
        assert found["tasks"]["sparse"]["rte"]["data"] == f"nyu-mll/glue@{glue}"
    read = [one for one in hub.requests if one.startswith("GET") and "/resolve/" in one]
    assert len(read) == len(set(read))
    assert not [one for one in read if "consolidated" in one or "00001-of-01024" in one]
    before = len(hub.requests)
    words = ("model.hub_name=some/small,some/other", "calibration=c4,pile", "force=true")
    *again, other, _ = run(hub, *words, HF_HUB_OFFLINE="1")
    assert len(hub.requests) == before
    for found, outcome in zip(online, again, strict=True):
        for key in ("model", "texts", "perplexity", "tasks"):
            assert found[key] == metrics(outcome)[key]
    for part in ("model some/other", "HF_HUB_OFFLINE is set", "protocol=offline"):
        assert part in other.reason


def test_each_failure_is_one_line_that_names_the_thing_and_the_reason(hub: Hub) -> None:
    models = hub.root / "models" / "some"
    (models / "gated" / ".gated").touch()
    (models / "breaks" / ".limit").write_text("4000")
    shard = max(models.glob("lacks/model-*"))
    shard.rename(models / "shard")
    names = ("some/gated", "some/breaks", "some/lacks", "some/nothing")
    words = f"model.hub_name={','.join(names)}"
    found = dict(zip(names, run(hub, words), strict=True))
    for name, reason in {
        "some/gated": "Access to some/gated is restricted",
        "some/breaks": "peer closed connection",
        "some/lacks": "has no weights on the hub",
        "some/nothing": "Repository Not Found",
    }.items():
        assert name in found[name].reason
        assert reason in found[name].reason
        assert "\n" not in found[name].reason

    # Mended, and with a token.
    (models / "breaks" / ".limit").unlink()
    (models / "shard").rename(shard)
    outcomes = run(hub, words, HF_TOKEN=GRANTED)
    assert [one.outcome for one in outcomes] == ["ran", "ran", "ran", "failed"]
