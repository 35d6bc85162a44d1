"""Memory and minutes that `plan=true` prints, and the settings that it names where nothing fits."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from permllm.errors import ConfigError
from permllm.models.load import meta_model
from permllm.pruning.footprint import Footprint
from permllm.pruning.methods import methods_of
from permllm.pruning.placement import FITS, placement_for, would_fit
from permllm.pruning.plan import print_plan
from permllm.runtime.speed import CARDS, speed_of
from permllm.training.losses import chunk_of
from tests.conftest import ROOT, run_command
from tests.test_config import config


def planned(*words: str, device: str = "cuda") -> Footprint:
    asked = config(*words, "logger=none")
    return Footprint(asked, shape(words[0]), methods_of(asked), torch.device(device))


@cache
def shape(model: str) -> PreTrainedModel:
    return meta_model(config(model).model)


def minutes(*words: str, place: str = "device") -> dict[str, float]:
    of = planned(*words, "plan=true", "plan_on=h100")
    return of.minutes(place, speed_of("h100", of.device, {of.products, of.dtype, torch.float32}))


def test_the_plan_needs_neither_weights_nor_network_and_writes_nothing(tmp_path: Path) -> None:
    result = run_command("model=qwen2.5-7b", "plan=true", "plan_on=h100", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for said in (
        "3584",
        "18944",
        "7615616512",
        "device, taken here",
        "orders learn 28 layers at a time, of 28",
    ):
        assert said in result.stdout
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "said", "unsaid"),
    [
        (["model=tiny"], "host", "disk"),  # a random model has no files
        (
            ["model=qwen2.5-7b", "permutation.layers_per_stage=8"],
            "orders learn 8 layers at a time, of 28",
            "residual",
        ),
        (["model=qwen2.5-7b", "permutation.constraint=foldable"], "residual_stream", "stays where"),
        (
            [
                "model=qwen2.5-7b",
                "permutation.constraint=foldable",
                "permutation.layers_per_stage=8",
            ],
            "residual_stream stays where it starts",
            "learn 28",
        ),
    ],
)
def test_the_plan_says_what_learns_together(
    words: list[str], said: str, unsaid: str, capsys: pytest.CaptureFixture[str]
) -> None:
    print_plan(planned(*words, "plan=true", "plan_on=h100"))
    printed = capsys.readouterr().out
    assert said in printed
    assert unsaid not in printed


def test_a_card_is_for_a_plan_alone() -> None:
    with pytest.raises(ConfigError, match="plan_on=h100"):
        config("model=tiny", "plan_on=h100")
    assert all(
        config("model=tiny", "plan=true", f"plan_on={card}").plan_on == card for card in CARDS
    )


def test_the_memory_of_a_step_is_that_of_its_tensors() -> None:
    hidden, inner, layers = 3584, 18944, 28
    a_layer = hidden * (hidden + 2 * 512) + hidden * hidden + 3 * hidden * inner
    a_group = 3 * 2 * hidden * 2 * inner  # the widest: its masked weight, and gradients of it

    def beside_weights(stage: str, *words: str) -> int:
        stages = planned("model=qwen2.5-7b", *words).needs("device").stages
        return stages[stage] - stages["weights"]

    # Scores, gradients and two moments in float32, and a masked weight that waits; what two layers
    # keep of a batch, with a copy of what they read for two of q, k and v and for one of gate and
    # up.
    learned, activations = (
        (4 * 4 + 2) * 2 * a_layer,
        4 * 1024 * ((11 + 3) * hidden + 4 * inner) * 2 * 2,
    )
    held = beside_weights("learn masks", "mask=score", "mask.layers_per_stage=2")
    assert held == pytest.approx(learned + activations + a_group, abs=2e7)
    # The Gram matrix of the widest input and its copies; weights, masks and what they take away of
    # the widest group.
    words = ("permutation=none", "mask=refined")
    refined = beside_weights("refine masks", *words) - beside_weights("calibrate", *words)
    assert refined == pytest.approx(5 * 4 * inner**2 + 6 * 4 * hidden * 2 * inner, abs=2e7)
    # Values, gradients and two moments in float32, and places; of all layers the states alone, as
    # they are recomputed.
    states = 4 * 1024 * (hidden * layers + 8 * hidden + 4 * 2 * inner) * 2
    head = 4 * 4 * chunk_of(torch.device("cuda"), 152064) * 152064  # four numbers a logit
    held = beside_weights("learn weights", "reconstruction=distill", "permutation=none")
    assert held == pytest.approx(5 * 4 * layers * a_layer // 2 + states + a_group + head, abs=2e7)
    # Logits of eight sequences of the longest task, and their logarithms.
    assert beside_weights("tasks", "permutation=none") == 8 * 280 * 152064 * 2 * 2
    # Logits of a batch, and those of a window in float32 with their logarithms.
    words = (
        "evaluation.perplexity.batch_tokens=2048",
        "evaluation.perplexity.seqlen=1024",
        "model.dtype=bfloat16",
    )
    stages = planned("model=tiny", "permutation=none", *words).needs("device").stages
    assert stages["perplexity"] - stages["weights"] == (2048 * 2 + 1024 * 8) * 259


@pytest.mark.parametrize(
    ("words", "stage", "expected"),
    [
        (["model=qwen2.5-7b"], "learn", 1.2),
        (["model=qwen2.5-7b"], "tasks", 5.5),
        (["model=qwen2.5-7b", "permutation=heuristic"], "search", 1.75),
        (["model=llama-2-7b", "protocol=paper"], "learn", 13.0),
        (["model=llama-2-7b", "pruner=sparsegpt", "permutation=none"], "prune", 2.0),
    ],
)
def test_minutes_are_within_a_factor_of_two_of_a_detailed_estimate(
    words: list[str], stage: str, expected: float
) -> None:
    assert expected / 2 < minutes(*words)[stage] < expected * 2


def test_layers_that_come_in_each_batch_of_tasks_take_the_time_of_their_way() -> None:
    assert (
        minutes("model=qwen2.5-7b", place="host")["tasks"]
        > 10 * minutes("model=qwen2.5-7b")["tasks"]
    )


def test_settings_that_would_fit_are_named_with_what_they_need(
    caplog: pytest.LogCaptureFixture,
) -> None:
    card = ("plan=true", "plan_on=rtx4090")
    of = planned("model=qwen2.5-7b", "method=folded-masks", *card)
    named = [line.partition(" would fit")[0] for line in would_fit(of)]
    assert named == ["mask=lowrank", "method=order-folded"]
    placement_for(of)
    assert "mask=lowrank would fit: 19." in caplog.text
    stages = planned(
        "model=qwen2.5-7b", "permutation=none", "mask=score", "plan=true", "plan_on=a100"
    )
    assert would_fit(stages)[0].startswith("mask.layers_per_stage=4 would fit: ")
    assert would_fit(planned("model=qwen2.5-7b", *card)) == []
    given = planned("model=llama-2-13b", "model.placement=device", *card)
    assert [line.partition(" would fit")[0] for line in would_fit(given)] == [
        "model.placement=auto"
    ]


def test_commands_of_the_readme_fit_the_cards_that_they_name() -> None:
    lines = [
        line
        for line in (ROOT / "README.md").read_text().splitlines()
        if " GB GPU" in line and "run.py" in line
    ]
    assert len(lines) == 3
    for line in lines:
        command, _, comment = line.replace(
            "model=hub model.hub_name=OWNER/NAME", "model=qwen2.5-7b"
        ).partition("#")
        needed = planned(*command.split("run.py ")[1].split()).needs("device").device
        assert needed <= FITS * 1e9 * int(comment.partition(" GB GPU")[0].rpartition(" ")[2])
