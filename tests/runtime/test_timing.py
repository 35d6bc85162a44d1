"""What is timed, and how often: a short kernel over many calls, a GPU by its own events."""

from __future__ import annotations

import pytest
import torch

from permllm.runtime import timing


def test_what_is_short_is_called_until_it_can_be_seen() -> None:
    assert timing.calls_to_be_seen(4e-5) == 500
    assert timing.calls_to_be_seen(0.0) == 1000
    assert timing.calls_to_be_seen(3.0) == 1


def test_a_gpu_is_timed_by_events_around_all_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object) -> None:
            happened.append(f"event in {stream}")

        def synchronize(self) -> None:
            happened.append("wait")

        def elapsed_time(self, last: Event) -> float:
            return 12.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: happened.append("idle"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    seconds = timing.clock(lambda: happened.append("call"), torch.device("cuda:1"), calls=3)
    event = "event in the stream of cuda:1"
    assert happened == ["idle", event, "call", "call", "call", event, "wait"]
    assert seconds == pytest.approx(0.004)


def test_measurements_take_turns_with_calls_enough_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
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

    monkeypatch.setattr(timing, "clock", clock)
    works = {name: lambda name=name: work(name) for name in seconds}
    found = timing.interleaved(works, 2, torch.device("cpu"))
    assert turns == [("short", 1), ("long", 1), *[("short", 5), ("long", 1)] * 2]
    assert found == {"short": [0.004] * 2, "long": [5.0] * 2}
