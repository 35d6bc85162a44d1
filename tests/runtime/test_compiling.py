"""What cannot be compiled here is a warning, and what is done without it."""

from __future__ import annotations

import logging

import pytest
import torch

from permllm.runtime.compiling import usable


def test_what_has_run_once_is_used(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert usable(lambda: "kernel", "cpu", "without") == "kernel"
    assert not caplog.messages


def test_a_failure_that_a_gpu_shows_when_it_is_waited_for_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def synchronize() -> None:
        raise RuntimeError("an illegal address\nat line 3")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with caplog.at_level(logging.WARNING):
        assert usable(lambda: "kernel", "cuda", "slower without") is None
    assert caplog.messages == ["slower without: an illegal address"]
