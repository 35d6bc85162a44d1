"""Dealing groups to blocks between rounds: the masks stay, and channels meet others than before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from permllm.permutation.lcp import method
from permllm.permutation.shared import SharedOrder
from permllm.pruning.wanda import Wanda
from tests.conftest import tiny_model
from tests.pruning.test_pipeline import PATTERN, lcp, problem


def groups_of(order: Tensor, m: int = 4) -> set[tuple[int, ...]]:
    return {tuple(group) for group in order.view(-1, m).tolist()}


@pytest.mark.parametrize("segment", [32, 16])
def test_dealing_moves_whole_groups_inside_of_their_segments(segment: int) -> None:
    generator = torch.Generator().manual_seed(0)
    order = torch.cat([first + torch.randperm(segment, generator=generator) for first in range(0, 32, segment)])
    dealt = method.dealt(SharedOrder("x", 32, segment, 1, ()), order, PATTERN, generator)
    assert not torch.equal(order, dealt)
    assert groups_of(dealt) == groups_of(order)
    assert torch.equal(dealt // segment, order // segment)


@pytest.mark.parametrize("stage", ["all", 1])
def test_rounds_begin_with_groups_dealt_anew_and_continue_where_they_were_stopped(
    stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dealt: list[tuple[Tensor, Tensor]] = []
    real = method.dealt

    def watched(order: Any, present: Tensor, *more: Any) -> Tensor:
        dealt.append((present, real(order, present, *more)))
        return dealt[-1][1]

    monkeypatch.setattr(method, "dealt", watched)
    settings = {"rounds": 2, "block_size": 8, "epochs": 1, "layers_per_stage": stage}
    orders = lcp(**settings).orders(problem(tiny_model("llama"), Wanda()))
    assert len(dealt) == len(orders)  # between the two rounds of its stage, each once
    assert any(not torch.equal(before, after) for before, after in dealt)
    assert all(groups_of(before) == groups_of(after) for before, after in dealt)

    def stop(values: dict[str, Any]) -> None:
        if values["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lcp(**settings).orders(problem(tiny_model("llama"), Wanda(), directory=tmp_path, on_pass=stop))
    continued = lcp(**settings).orders(problem(tiny_model("llama"), Wanda(), directory=tmp_path))
    assert all(torch.equal(order, continued[name]) for name, order in orders.items())
