"""Planned memory beside the memory of tensors and of runs, and the placement that follows."""

from __future__ import annotations

import json
import logging
import sys
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from permllm.models.load import meta_model
from permllm.planning import placement as places
from permllm.planning.footprint import Footprint
from permllm.planning.placement import placement_for
from permllm.pruning.methods import checked_groups, methods_of
from permllm.runtime import parallel
from permllm.training.losses import chunk_of
from tests.conftest import ROOT, run_command, run_python
from tests.settings.test_config import config


def planned(*words: str, device: str = "cuda") -> Footprint:
    """Return the plan of a job, whose first word names the model."""
    asked = config(*words, "logger=none")
    model = shape(words[0])
    methods = methods_of(asked)
    groups = checked_groups(asked, methods, model)
    return Footprint(asked, model, methods, groups, torch.device(device))


@cache
def shape(model: str) -> PreTrainedModel:
    return meta_model(config(model).model)


@pytest.mark.parametrize(
    ("there", "chosen"),
    [((40, 64), "device"), ((14, 64), "host"), ((14, 12), "disk"), ((2, 2), "disk")],
)
def test_auto_takes_the_first_placement_that_fits_and_says_so(
    there: tuple[int, int],
    chosen: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(places, "free_memory", lambda _: there[0] * 1e9)
    monkeypatch.setattr(places, "available_host_memory", lambda: there[1] * 1e9)
    assert placement_for(planned("model=qwen2.5-7b")) == chosen
    assert ("model.placement" in caplog.text) == (chosen != "device")


def test_auto_leaves_what_needs_the_device_there_and_a_random_model_out_of_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(places, "available_host_memory", lambda: 0)
    distilled = planned("model=tiny-random", "reconstruction=distill", device="cpu")
    assert placement_for(distilled) == "device"
    assert placement_for(planned("model=tiny-random", device="cpu")) == "host"


def test_processes_share_the_activations_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def learns(size: int) -> int:
        job = planned("model=llama-2-7b", f"permutation.batch_size={size}")
        return job.needs("device").phases["permute"]

    alone, one = learns(8), learns(1)
    monkeypatch.setattr(parallel, "world_size", lambda: 8)
    assert learns(8) == one < alone


def test_processes_share_the_windows_of_calibration_pruning_and_evaluation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # So slow that the time of a start does not count.
    speed = {torch.bfloat16: 1e9, torch.float32: 1e9}

    def minutes() -> dict[str, float]:
        words = ("model=llama-2-7b", "permutation=none", "evaluation.tasks=[rte]")
        return planned(*words).minutes("device", speed)

    alone = minutes()
    monkeypatch.setattr(parallel, "world_size", lambda: 4)
    together = minutes()
    for phase in ("calibrate", "prune", "evaluate sparse"):
        assert together[phase] == pytest.approx(alone[phase] / 4, rel=1e-2)


def test_layers_on_the_host_have_the_states_of_a_text_wait_there() -> None:
    words = ("model=tiny-random", "permutation=none", "evaluation.perplexity.limit=1000")
    made = planned(*words, device="cpu")
    states = 1000 * made.config.evaluation.perplexity.seqlen * made.model.config.hidden_size * 4
    assert made.needs("host").host >= states > made.needs("device").host


def test_a_teacher_takes_the_place_of_more_than_four_gigabytes_of_states() -> None:
    few, many = (
        planned("model=qwen2.5-7b", "method=deploy", f"budget.tokens={tokens}")
        for tokens in (5 * 10**5, 10**8)
    )
    states = 3584 * 2 * 5 * 10**5
    more = many.needs("device").phases["prune"] - few.needs("device").phases["prune"]
    assert more == few.all_layers * 2
    assert few.needs("device").host > states
    assert many.needs("device").host < few.needs("device").host


def beside_weights(phase: str, *words: str) -> int:
    phases = planned(*words).needs("device").phases
    return phases[phase] - phases["load"]


def test_the_memory_of_a_step_is_that_of_its_tensors() -> None:
    model, hidden, inner, layers = "model=qwen2.5-7b", 3584, 18944, 28
    a_layer = hidden * (hidden + 2 * 512) + hidden * hidden + 3 * hidden * inner
    a_group = 3 * 2 * hidden * 2 * inner  # the widest: its masked weight, and gradients of it
    # Scores, gradients and two moments in float32, and a masked weight that waits; what two layers
    # keep of a batch, with a copy of what they read for two of q, k and v and for one of gate and
    # up.
    activations = 4 * 1024 * ((11 + 3) * hidden + 4 * inner) * 2 * 2
    held = beside_weights("mask", model, "mask=score", "mask.layers_per_stage=2")
    learned = (4 * 4 + 2) * 2 * a_layer
    assert held == pytest.approx(learned + activations + a_group, abs=2e7)
    # The Gram matrix of the widest input and its copies; weights, masks and what they take away of
    # the widest group.
    words = (model, "permutation=none", "mask=refined")
    refined = beside_weights("mask", *words) - beside_weights("calibrate", *words)
    assert refined == pytest.approx(5 * 4 * inner**2 + 6 * 4 * hidden * 2 * inner, abs=2e7)
    # Values, gradients and two moments in float32, and places; of all layers the states alone, as
    # they are recomputed.
    states = 4 * 1024 * (hidden * layers + 8 * hidden + 4 * 2 * inner) * 2
    head = 4 * 4 * chunk_of(torch.device("cuda"), 152064) * 152064  # four numbers a logit
    held = beside_weights("prune", model, "reconstruction=distill", "permutation=none")
    assert held == pytest.approx(5 * 4 * layers * a_layer // 2 + states + a_group + head, abs=2e7)
    # Logits of eight sequences of a task, and their logarithms.
    words = (model, "permutation=none", "evaluation.perplexity.seqlen=256")
    words += ("evaluation.tasks=[rte]", "evaluation.perplexity.batch_tokens=256")
    assert beside_weights("evaluate sparse", *words) == 8 * 512 * 152064 * 2 * 2
    # Logits of a batch, and those of a window in float32 with their logarithms.
    words = ("model=tiny-random", "permutation=none", "model.dtype=bfloat16")
    words += ("evaluation.perplexity.batch_tokens=2048", "evaluation.perplexity.seqlen=1024")
    assert beside_weights("evaluate sparse", *words) == (2048 * 2 + 1024 * 8) * 259


slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide") / "model"
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 8}
    words = [f"model.architecture.{key}={value}" for key, value in sizes.items()]
    made = run_python(
        "scripts/random_checkpoint.py", str(folder), "model=tiny-random", *words, cwd=ROOT
    )
    assert made.returncode == 0, made.stderr
    return folder


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("placement", "method"),
    [
        ("disk", ["permutation=none"]),
        slow("disk", ["permutation=lcp", "permutation.init=random", "permutation.epochs=1"]),
        slow("device", ["permutation=none", "pruner=sparsegpt"]),
        slow("device", ["permutation=none", "mask=score", "mask.epochs=1"]),
    ],
    ids=["none", "lcp", "sparsegpt", "score"],
)
def test_the_plan_says_what_is_taken(
    tmp_path: Path, wide: Path, placement: str, method: list[str]
) -> None:
    words = ["model=local", f"model.path={wide}", "model.dtype=float32", "logger=none", *method]
    words += [f"model.placement={placement}", "calibration=builtin", "calibration.samples=4"]
    words += ["calibration.seqlen=64", "evaluation.perplexity.dataset=builtin"]
    words += ["evaluation.perplexity.seqlen=64", "evaluation.perplexity.limit=1"]
    done = run_command(*words, "evaluation.tasks=[]", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("runs/*/metrics.json")
    metrics = json.loads(file.read_text())
    planned, peak = metrics["planned_memory_bytes"], metrics["peak_memory_bytes"]
    assert planned == pytest.approx(peak, rel=0.15)
    assert f"{peak / 1e9:.2f} GB at the peak ({planned / 1e9:.2f} GB were planned)" in done.stdout
