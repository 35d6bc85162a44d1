"""Output of `plan=true`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from permllm import job
from permllm.errors import ConfigError
from permllm.planning.placement import FITS
from permllm.planning.speed import CARDS, speed_of
from permllm.settings.config import read_config
from tests.conftest import ROOT
from tests.planning.test_footprint import planned
from tests.settings.test_config import composed, config

PLAN = ("plan=true", "plan_on=h100")
QWEN = "model=qwen2.5-7b"


def minutes(*words: str, place: str = "device") -> dict[str, float]:
    of = planned(*words, *PLAN)
    return of.minutes(place, speed_of("h100", of.device, {of.compute_dtype, torch.float32}))


def test_the_plan_needs_neither_weights_nor_network_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job.run(config(QWEN, *PLAN, f"runs_dir={tmp_path}/runs")) is None
    said = capsys.readouterr().out
    for part in ("3584", "18944", "7615616512", "device (chosen)"):
        assert part in said
    assert not (tmp_path / "runs").exists()


def test_a_plan_in_which_nothing_fits_has_no_minutes_and_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config("model=tiny-random", "plan=true")
    assert job.run(settings) is None
    printed = capsys.readouterr().out
    assert "device (chosen)" in printed
    assert "│ minutes" in printed
    assert "minutes, device" in printed
    monkeypatch.setattr("permllm.planning.placement.available_host_memory", lambda: 1000)
    with pytest.raises(ConfigError, match=r"^plan=true"):
        job.run(settings)
    printed = capsys.readouterr().out
    assert "host (does not fit)" in printed
    assert "│ peak" in printed
    assert "│ minutes" not in printed
    assert "minutes, " not in printed.replace("minutes within", "")


def test_a_card_is_for_a_plan_alone() -> None:
    with pytest.raises(ConfigError, match="plan_on=h100"):
        config("model=tiny-random", "plan_on=h100")
    settings = composed("model=tiny-random", "plan=true", "plan_on=h100")
    for settings.plan_on in CARDS:
        assert read_config(settings).plan_on == settings.plan_on


@pytest.mark.parametrize(
    ("words", "phase", "expected"),
    [
        ([QWEN], "permute", 2.95),
        ([QWEN], "evaluate sparse", 2.75),
        ([QWEN, "permutation=heuristic"], "permute", 1.75),
        (["model=llama-2-7b", "protocol=paper"], "permute", 13.0),
        (["model=llama-2-7b", "pruner=sparsegpt", "permutation=none"], "prune", 2.0),
    ],
)
def test_minutes_are_within_a_factor_of_two_of_a_detailed_estimate(
    words: list[str], phase: str, expected: float
) -> None:
    assert expected / 2 < minutes(*words)[phase] < expected * 2


def test_layers_that_come_in_each_batch_of_tasks_take_the_time_of_their_way() -> None:
    on_host, on_device = (minutes(QWEN, place=place) for place in ("host", "device"))
    assert on_host["evaluate sparse"] > 10 * on_device["evaluate sparse"]


def test_commands_of_the_readme_fit_the_cards_that_they_name() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    lines = [line for line in lines if " GB GPU" in line and "run.py" in line]
    assert len(lines) == 3
    for line in lines:
        command, _, comment = line.partition("#")
        words = command.replace("model=hub model.hub_name=OWNER/NAME", "model=qwen2.5-7b")
        needed = planned(*words.split("run.py ")[1].split()).needs("device").device
        assert needed <= FITS * 1e9 * int(comment.partition(" GB GPU")[0].rpartition(" ")[2])
