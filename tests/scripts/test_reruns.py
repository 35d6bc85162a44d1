"""Runs that were measured again: by how much of the gap they differ, over common windows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from permllm.report.read import collect
from scripts.reruns import reruns
from tests.kept import evaluation, make_run


def test_a_rerun_differs_by_points_of_the_gap_over_common_windows(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    dense = generator.normal(3.0, 0.1, 40)

    def made(name: str, shift: float, windows: int, permutation: str, commit: str) -> None:
        of_windows = dense[:windows]
        # What only the longer record has measured must not count.
        of_text = of_windows + shift + 5.0 * (np.arange(windows) >= 30)
        values = evaluation({"wikitext2": {"dense": of_windows, "sparse": of_text}})
        folder = make_run(tmp_path / name, 0.0, values, permutation=permutation)
        environment = '{"hardware": {"processor": "CPU", "threads": 1}, "git": {"commit": "%s"}}'
        (folder / "environment.json").write_text(environment % commit)

    made("none", 1.0, 30, "none", "a")
    made("lcp", 0.4, 40, "lcp", "a")
    made("again", 0.5, 30, "lcp", "b")
    made("same", 0.4, 30, "lcp", "c")
    (line,) = reruns(collect([tmp_path], apart=True).runs).to_dict("records")
    assert float(line["points"]) == pytest.approx(10.0)
    assert "(a, CPU, 1, float32)" in line["other record"] + line["record"]
    assert reruns(collect([tmp_path], apart=True).runs, least=11.0).empty
