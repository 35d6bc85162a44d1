"""Quality on a trained model: the learned permutation, then the heuristic, then none."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from permllm import job
from tests.settings.test_config import config

# One seed is fast; all of them are for the slow tests.
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_learned_permutation_beats_the_heuristic_which_beats_none(
    cache: Path, tmp_path: Path, seed: int, dtype: str
) -> None:
    found = []
    for permutation in ("none", "heuristic", "lcp"):
        words = ("model=tiny", f"permutation={permutation}", f"seed={seed}", "logger=none")
        done = job.run(config(*words, f"compute_dtype={dtype}", f"runs_dir={tmp_path}"))
        assert done is not None
        values = [done.metrics["perplexity"][of]["grammar"]["value"] for of in ("dense", "sparse")]
        found.append(math.log(values[1] / values[0]))
    none, heuristic, learned = found
    assert 0 < learned < 0.7 * heuristic, found
    assert heuristic < 0.7 * none, found
