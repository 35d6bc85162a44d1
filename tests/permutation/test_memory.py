"""Peak memory of learning, over a whole model and stage by stage, against the bound by design.

It is measured in a process of its own, in which tensors go back to the system when they are freed:
what is held at a time counts, not what the C library keeps in reserve.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_python

LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY, SAMPLES, LENGTH, BLOCK = 8, 384, 1056, 512, 2, 128, 64
THRESHOLD = 262144  # bytes from which memory is the system's, not of the C library's reserve

CHILD = f"""
import ctypes, sys, torch
sys.path.insert(0, {str(ROOT)!r})
from permllm.runtime.memory import host_memory, peak_host_memory, reset_peak_memory
from permllm.sparsity.saliency import SaliencyFactors
from permllm.training.problem import LearningProblem
from tests.conftest import tiny_model
from tests.problems import CPU, PATTERN, channel_groups, lcp

ctypes.CDLL(None).mallopt(-3, {THRESHOLD})  # M_MMAP_THRESHOLD
import torch._dynamo  # which learning imports, and Triton with it where it is installed
layers = int(sys.argv[1]) if sys.argv[1].isdigit() else sys.argv[1]
learning = lcp(block_size={BLOCK}, init="random", epochs=1, batch_size={SAMPLES}, loss=None,
               layers_per_stage=layers, activation_checkpointing=True, compile=False)

def learn(**sizes):
    model = tiny_model("llama", vocab_size={VOCABULARY}, **sizes)
    groups = channel_groups(model)
    factors = {{path: SaliencyFactors(1, torch.rand(1, group.channels))
               for group in groups for path in group.members}}
    tokens = torch.zeros({SAMPLES}, {LENGTH}, dtype=torch.int64)
    target = torch.randn({SAMPLES}, {LENGTH}, model.config.hidden_size)
    learning.permutations(LearningProblem(model, groups, tokens, factors, target, tokens, PATTERN,
                                          seed=0, calibration_batch_size={SAMPLES}))

learn()  # loads what libraries load at their first use
before = host_memory()
reset_peak_memory(CPU)
learn(hidden_size={HIDDEN}, intermediate_size={INTERMEDIATE}, num_hidden_layers={LAYERS},
      num_key_value_heads=4, tie_word_embeddings=True)
print(peak_host_memory() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("layers", ["all", pytest.param(4, marks=pytest.mark.slow)])
def test_learning_stays_within_its_memory(layers: str | int, tmp_path: Path) -> None:
    script = tmp_path / "learn.py"
    script.write_text(CHILD)
    done = run_python(str(script), str(layers))
    assert done.returncode == 0, done.stderr
    growth = int(done.stdout)

    layer = 4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE
    depth = LAYERS if layers == "all" else int(layers)
    weights = LAYERS * layer + VOCABULARY * HIDDEN
    logits = depth * BLOCK * (3 * HIDDEN + INTERMEDIATE)
    states = SAMPLES * LENGTH * HIDDEN
    # What one layer keeps for its own backward: norms, queries, keys, values, attention, and the
    # gated product.
    internals = SAMPLES * LENGTH * (16 * HIDDEN + 6 * INTERMEDIATE)
    # Calibration inputs and targets; of a stage those of the stage, and the dense and the pruned
    # stream they come from.
    calibration = states * (2 if layers == "all" else 4)
    bound = 4 * (weights + 4 * logits + 3 * layer + depth * states + internals + calibration)
    assert growth <= bound, bound
    # The bound is tight enough to notice masks or saliencies that are kept: they alone would be as
    # large as the weights.
    assert bound - growth < 4 * depth * layer
