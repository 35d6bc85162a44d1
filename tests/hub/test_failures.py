"""What goes wrong with the hub is one line that says what to do, and the same command continues."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hub.jobs import Job, Outcome, run_jobs
from tests.hub.repositories import write_model
from tests.hub.server import GRANTED, KNOWN, Hub, Request
from tests.hub.test_from_the_hub import SMALL

GATED = "meta-llama/Llama-2-7b-hf"
BROKEN, CUT, MOVING, PLANNED, BARE = (
    "small/broken",
    "small/cut",
    "small/moving",
    "small/planned",
    "small/bare",
)


def job(model: str, *more: str, token: str = "", **steps: object) -> Job:
    """A run on WikiText-2 alone."""
    chosen = [
        "model=hub",
        f"model.hub_name={model}",
        "calibration=wikitext2",
        *SMALL,
        "permutation=none",
    ]
    tasks = "evaluation.tasks=[]"
    return Job([*chosen, tasks, *more], {"HF_TOKEN": token}, **steps)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Story:
    """What one process met.

    Attributes:
        folder: its working directory.
        outcomes: by name, in the order of what happened.
        requests: what the hub answered it.
    """

    folder: Path
    outcomes: dict[str, Outcome]
    requests: list[Request]


@pytest.fixture(scope="module")
def story(
    hub: Hub, environment: Callable[[str], dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> Story:
    """One process, one failure after the other."""
    folder, before = tmp_path_factory.mktemp("failures"), len(hub.requests)
    models = hub.root / "models"
    for name, family in (
        (GATED, "llama"),
        (BROKEN, "qwen2"),
        (CUT, "mistral"),
        (MOVING, "qwen2"),
        (PLANNED, "qwen3"),
        (BARE, "opt"),
    ):
        write_model(models / name, family)
    (models / GATED / ".gated").touch()
    (models / BARE / "model.safetensors").unlink()
    (models / CUT / ".cut").write_text("30000")
    write_model(folder / "moved", "qwen2", seed=1)
    for name, text in (("far", "50000"), ("near", "100"), ("mark", "")):
        (folder / name).write_text(text)

    def copied(name: str, target: str) -> dict[str, dict[str, str]]:
        return {"copies": {str(folder / name): str(hub.root / target)}}

    def without(target: str) -> dict[str, list[str]]:
        return {"removed": [str(hub.root / target)]}

    rte, boolq, sciq = (f"evaluation.tasks=[{task}]" for task in ("rte", "boolq", "sciq"))
    model_limit, c4_limit, glue_limit = (
        f"models/{BROKEN}/.limit",
        "datasets/allenai/c4/.limit",
        "datasets/nyu-mll/glue/.limit",
    )
    gates = ("datasets/mit-han-lab/pile-val-backup/.gated", "datasets/aps/super_glue/.gated")
    moved = copied("moved/model.safetensors", f"models/{MOVING}/model.safetensors")
    steps = {
        "gated": job(GATED),
        "gated, known": job(GATED, token=KNOWN),
        "gated, granted": job(GATED, token=GRANTED),
        "missing": job("small/nothing"),
        "missing, known": job("small/nothing", token=KNOWN),
        "wrong revision": job(MOVING, "model.revision=nowhere"),
        "refused token": job(MOVING, token="hf_expired"),
        "no weights": job(BARE),
        "wrong architecture": job(MOVING, "model=qwen2.5-0.5b"),
        "own architecture": job(MOVING, "model=qwen2.5-0.5b", "model.architecture=null"),
        "plan": job(PLANNED, "plan=true"),
        "model breaks": job(BROKEN, **copied("far", model_limit)),
        "model continues": job(BROKEN, **without(model_limit)),
        # Clients of today put the pieces together within one command, older ones within several.
        **{f"model in pieces, command {number}": job(CUT) for number in range(1, 5)},
        "text breaks": job(BROKEN, "calibration=c4", **copied("near", c4_limit)),
        "text continues": job(BROKEN, "calibration=c4", **without(c4_limit)),
        "text gated": job(BROKEN, "calibration=pile", **copied("mark", gates[0])),
        "task gated": job(BROKEN, boolq, **copied("mark", gates[1])),
        "task missing": job(BROKEN, sciq),
        "task breaks": job(MOVING, rte, **copied("near", glue_limit)),
        "task breaks, model moved": job(MOVING, rte, **moved),
        "task continues": job(MOVING, rte, "seed=1", **without(glue_limit)),
    }
    outcomes = run_jobs(list(steps.values()), folder, **environment("failures"))
    for gate in gates:
        (hub.root / gate).unlink()
    shutil.rmtree(models / "small")
    shutil.rmtree(models / GATED)
    return Story(folder, dict(zip(steps, outcomes, strict=True)), hub.requests[before:])


@pytest.mark.parametrize(
    ("step", "line"),
    [
        ("gated", f"model {GATED} is gated: accept its licence on its hub page, then log in"),
        (
            "gated, known",
            f"model {GATED} is gated: accept its licence on its hub page, then log in",
        ),
        ("missing", "model small/nothing is not on the hub under this name"),
        ("missing, known", "model small/nothing is not on the hub under this name"),
        ("wrong revision", f"model {MOVING} has no branch, tag or commit 'nowhere' on the hub"),
        ("refused token", f"model {MOVING}: the hub refuses the token as invalid or expired"),
        ("no weights", f"model {BARE} at "),
        (
            "wrong architecture",
            "model.architecture.hidden_size=896, but the loaded model has 32; model.architecture=null on the",
        ),
        (
            "model breaks",
            f"model {BROKEN} is not whole in the local hub cache and the hub cannot be reached (",
        ),
        (
            "text breaks",
            "data set allenai/c4 is not whole in the local hub cache and the hub cannot be reached (",
        ),
        (
            "text gated",
            "data set mit-han-lab/pile-val-backup is gated: accept its licence on its hub page",
        ),
        ("task gated", "the data of task boolq is gated: accept its licence on its hub page"),
        ("task missing", "the data of task sciq is not on the hub under this name"),
        (
            "task breaks",
            "the data of task rte is not whole in the local hub cache and the hub cannot be reached (",
        ),
    ],
)
def test_each_failure_is_one_line_of_its_own(story: Story, step: str, line: str) -> None:
    outcome = story.outcomes[step]
    assert outcome.code == 1
    assert outcome.errors.startswith(f"error: {line}")
    assert outcome.errors.count("\n") == 1
    assert ("the same command continues" in outcome.errors) == ("breaks" in step)
    assert ("has no weights on the hub or in the local cache" in outcome.errors) == (
        step == "no weights"
    )


@pytest.mark.parametrize(
    "step",
    [
        "gated, granted",
        "own architecture",
        "model continues",
        "model in pieces, command 4",
        "text continues",
        "task continues",
    ],
)
def test_what_was_mended_runs(story: Story, step: str) -> None:
    assert (story.outcomes[step].code, story.outcomes[step].errors) == (0, "")


def test_the_plan_of_a_model_by_its_name_reads_its_config_alone(story: Story) -> None:
    outcome = story.outcomes["plan"]
    assert outcome.errors == ""
    assert "planned: channel groups of the 2 decoder layers" in outcome.output
    read = [
        request.path
        for request in story.requests
        if request.method == "GET" and f"/{PLANNED}/resolve" in request.path
    ]
    assert [path.rsplit("/", 1)[-1] for path in read] == ["config.json"]


def test_downloads_are_resumed_not_begun_again(story: Story) -> None:
    ranges = {
        name: [
            request.range
            for request in story.requests
            if request.method == "GET" and f"/cdn/models/{name}/" in request.path
        ]
        for name in (BROKEN, CUT)
    }
    # What broke is asked for from where it broke; what comes in pieces is put together.
    assert ranges[BROKEN][:2] == [None, "bytes=50000-"]
    assert ranges[CUT] == [None, "bytes=30000-", "bytes=60000-", "bytes=90000-"]


def test_a_model_that_moved_is_another_one(story: Story) -> None:
    outcome = story.outcomes["task breaks, model moved"]
    assert outcome.code == 1
    assert re.match(
        rf"error: .* began with (hub:{MOVING}:\w+:bfloat16), and the model is now (hub:{MOVING}:\w+:bfloat16)\n",
        outcome.errors,
    )
    found = [
        json.loads(file.read_text(encoding="utf-8"))
        for file in (story.folder / "runs").glob("moving-*/metrics.json")
    ]
    began = next(
        metrics for metrics in found if metrics["status"] == "running" and "model" in metrics
    )
    ended = next(
        metrics for metrics in found if metrics["status"] == "finished" and "tasks" in metrics
    )
    assert began["model"] != ended["model"]
    # Nothing that was kept of the first was taken for the second.
    assert (
        began["perplexity"]["dense"]["wikitext2"]["value"]
        != ended["perplexity"]["dense"]["wikitext2"]["value"]
    )


def test_a_hub_that_is_down_is_said_and_what_is_cached_is_used(
    story: Story, environment: Callable[[str], dict[str, str]], tmp_path: Path
) -> None:
    down = environment("failures") | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    cached, half = run_jobs([job(CUT, "seed=1"), job(PLANNED)], tmp_path, **down)
    assert (cached.code, cached.errors) == (0, "")
    assert half.code == 1
    line = f"error: model {PLANNED} is not whole in the local hub cache and the hub cannot be reached (ConnectError: "
    assert half.errors.startswith(line)
    assert half.errors.count("\n") == 1
