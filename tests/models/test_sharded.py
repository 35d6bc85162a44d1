"""Layers in parts on several processes, or streamed by each, give what one process makes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from permllm import job
from permllm.errors import ConfigError
from permllm.pruning.methods import methods_of
from permllm.runtime import parallel
from tests.models.test_offload import saved
from tests.runtime.test_parallel import check_equal, ranks
from tests.settings.test_config import config

# The shares of 13 and of 4 samples differ between three ranks, and two of them have none of the
# last batch.
WORDS = ("model=local", "calibration=builtin", "evaluation=builtin", "calibration.samples=13")
WORDS += ("model.dtype=float64", "evaluation.perplexity.limit=2", "logger=none")
LCP = ("permutation=lcp", "permutation.epochs=1", "permutation.batch_size=4")
LCP += ("permutation.select_from=1",)
# Windows of one layer, of which each knows the layers before; portions that one rank has none of;
# weights that change go back to their parts.
STAGES = (*LCP, "permutation.layers_per_stage=1", "permutation.micro_batch_size=1")
STAGES += ("reconstruction=obs", "allocation=sensitive", "allocation.share=0.2")
# A rank has no sample of the last batch, and nothing learns in the layer before those that do.
DENSE = (*LCP, "keep_dense=[0]", "permutation.batch_size=2", "export=gathered")
MASKS = ("permutation=heuristic", "mask=score", "mask.layers_per_stage=1", "mask.batch_size=4")
MASKS += ("pruner=sparsegpt",)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a small model into several files."""
    # No multiple of three: parts of other sizes.
    shape = {"hidden_size": 40, "intermediate_size": 52}
    shape |= {"num_attention_heads": 5, "num_key_value_heads": 5}
    return saved("llama", tmp_path_factory.mktemp("checkpoint"), torch.float64, **shape)


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> Callable[[tuple[str, ...]], Path]:
    """Return the directory of what one process makes of the model."""

    @functools.cache
    def made(method: tuple[str, ...]) -> Path:
        place = f"runs_dir={checkpoint / 'runs'}"
        found = job.run(config(*WORDS, *method, f"model.path={checkpoint}", place))
        assert found is not None
        return found.directory

    return made


@pytest.mark.parametrize(
    ("processes", "placement", "method"),
    [
        (3, "sharded", STAGES),
        (2, "sharded", DENSE),
        (2, "sharded", MASKS),
        (2, "disk", STAGES),  # each streams all layers for itself
    ],
    ids=["stages", "dense-first", "masks", "disk"],
)
def test_it_is_what_one_process_makes_of_the_model(
    alone: Callable[[tuple[str, ...]], Path],
    checkpoint: Path,
    tmp_path: Path,
    processes: int,
    placement: str,
    method: tuple[str, ...],
) -> None:
    words = (*WORDS, *method, f"model.path={checkpoint}", "run_dir=run")
    done = ranks(tmp_path, *words, f"model.placement={placement}", processes=processes)
    assert [one.returncode for one in done] == [0] * processes, done
    check_equal(alone(method), tmp_path / "rank0" / "run", of_weights=1e-5)


def test_settings_that_sharding_cannot_have_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("model=tiny-random", "logger=none", "permutation=none", "model.placement=sharded")
    with pytest.raises(ConfigError, match=r"^model\.placement=sharded needs several processes"):
        methods_of(config(*words))
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    methods_of(config(*words))
    with pytest.raises(ConfigError, match=r"which needs model\.placement=device$"):
        methods_of(config(*words, "reconstruction=distill"))
