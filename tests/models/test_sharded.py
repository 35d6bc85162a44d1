"""Layers in parts on several processes, or streamed by each, give what one process makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from permllm.config import read_config
from permllm.errors import ConfigError
from permllm.pruning.methods import methods_of
from permllm.runtime import parallel
from tests.conftest import ROOT, run_command, run_python
from tests.runtime.test_parallel import check_equal, ranks
from tests.test_config import composed

# The shares of 13 and of 4 samples differ between three ranks, and two of them have none of the
# last batch.
WORDS = ("calibration=builtin", "evaluation=builtin", "calibration.samples=13", "budget.epochs=1")
WORDS += ("model.dtype=float64", "evaluation.perplexity.limit=2", "logger=none", "run_dir=run")
LCP = ("permutation=lcp", "permutation.batch_size=4", "permutation.select_from=6")
MASKS = ("permutation=heuristic", "mask=score", "mask.layers_per_stage=1", "mask.batch_size=4")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a small model into several files."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    # No multiple of three: parts of other sizes.
    shape = {"hidden_size": 40, "intermediate_size": 52}
    shape |= {"num_attention_heads": 5, "num_key_value_heads": 5}
    words = [f"model.architecture.{key}={value}" for key, value in shape.items()]
    words += ["model=tiny", "model.dtype=float64", "--shard-gb", "0.0001"]
    made = run_python("scripts/random_checkpoint.py", str(folder), *words, cwd=ROOT)
    assert made.returncode == 0, made.stderr
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.mark.parametrize(
    ("processes", "placement", "method"),
    [
        # Windows of one layer, of which each knows the layers before; portions that one rank has
        # none of; weights that change go back to their parts.
        (
            3,
            "sharded",
            (
                *LCP,
                "permutation.layers_per_stage=1",
                "permutation.micro_batch_size=1",
                "reconstruction=obs",
            ),
        ),
        # A rank has no sample of the last batch, and nothing learns in the layer before those that
        # do.
        (2, "sharded", (*LCP, "keep_dense=[0]", "permutation.batch_size=2", "export=gathered")),
        (2, "sharded", (*MASKS, "pruner=sparsegpt")),
        # Each streams all layers for itself: from the same files, or from its own memory.
        (2, "disk", (*LCP, "permutation.layers_per_stage=1", "reconstruction=obs")),
        (2, "host", (*LCP, "mask=score", "mask.batch_size=4")),
    ],
    ids=["stages", "dense-first", "masks", "disk", "host"],
)
def test_it_is_what_one_process_makes_of_the_model(
    checkpoint: Path, tmp_path: Path, processes: int, placement: str, method: tuple[str, ...]
) -> None:
    words = ("model=local", f"model.path={checkpoint}", *WORDS, *method)
    one = run_command(*words, cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    done = ranks(tmp_path, *words, f"model.placement={placement}", processes=processes)
    assert [one.returncode for one in done] == [0] * processes, done
    check_equal(tmp_path / "run", tmp_path / "rank0" / "run")


def test_settings_that_sharding_cannot_work_with_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ("model=tiny", "logger=none", "permutation=none", "model.placement=sharded")
    with pytest.raises(ConfigError, match=r"^model\.placement=sharded needs several processes"):
        methods_of(read_config(composed(*words)))
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    methods_of(read_config(composed(*words)))
    with pytest.raises(ConfigError, match=r"which needs model\.placement=device$"):
        methods_of(read_config(composed(*words, "reconstruction=distill")))
