"""Measurements of several calls in turns."""

from __future__ import annotations

import pytest
import torch

from permllm.planning import speed


def test_measurements_take_turns_with_calls_enough_for_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = {"short": 0.004, "long": 5.0}
    turns: list[tuple[str, int]] = []
    now = ""

    def work(name: str) -> None:
        nonlocal now
        now = name

    def clock(call: object, device: torch.device, calls: int = 1) -> float:
        call()  # type: ignore[operator]
        turns.append((now, calls))
        return seconds[now]

    monkeypatch.setattr(speed, "clock", clock)
    works = {name: lambda name=name: work(name) for name in seconds}
    found = speed.interleaved(works, 2, torch.device("cpu"))
    assert turns == [("short", 1), ("long", 1), *[("short", 5), ("long", 1)] * 2]
    assert found == {"short": [0.004] * 2, "long": [5.0] * 2}
