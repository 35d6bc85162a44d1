"""Weights on kernels for 2:4: windows of a pattern, and their bytes."""

from __future__ import annotations

import pytest

from permllm.settings.config import NMPattern
from scripts.two_of_four import stored_share, window_count


@pytest.mark.parametrize(("text", "windows"), [("2:4", 1), ("4:6", 2), ("6:8", 3), ("14:16", 7)])
def test_windows_begin_two_channels_apart(text: str, windows: int) -> None:
    pattern = NMPattern.parse(text)
    assert window_count(pattern) == windows
    # Two stored values for each window, of eight bits and of two for their place.
    assert stored_share(pattern, 8) == pytest.approx(2 * windows / pattern.m * 10 / 8)


@pytest.mark.parametrize("text", ["4:8", "1:4", "3:5", "5:8"])
def test_other_patterns_have_no_windows_and_are_stored_dense(text: str) -> None:
    assert window_count(NMPattern.parse(text)) is None
    assert stored_share(NMPattern.parse(text), 8) == 1.0
