"""Peak memory of learning over a whole model and stage by stage, against the bound that design allows.

Measured in a process of its own, as growth over the memory after the imports. Tensors go back to the system when they are
freed there: what counts is what is held at a time, not what the C library keeps in reserve.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

LAYERS, HIDDEN, INTERMEDIATE, HEADS, VOCABULARY = 8, 512, 1408, 8, 512
SAMPLES, LENGTH, BATCH, BLOCK = 4, 128, 2, 64

CHILD = f"""
import json, sys
import torch
import torch._dynamo  # which learning imports, and Triton with it where it is installed
from transformers import AutoConfig, AutoModelForCausalLM
from permllm.runtime.memory import peak_host_memory, reset_peak_memory
from permllm.models.families import channel_groups
from permllm.permutation.lcp.lcp import LCP
from permllm.training.problem import LearningProblem
from permllm.permutation.lcp.temperature import Linear
from permllm.sparsity.saliency import SaliencyFactors
from permllm.config import NMPattern

layers = json.loads(sys.argv[1])
torch.ones(64, 64) @ torch.ones(64, 64)
config = AutoConfig.for_model("llama", hidden_size={HIDDEN}, intermediate_size={INTERMEDIATE}, num_hidden_layers={LAYERS},
                              num_attention_heads={HEADS}, num_key_value_heads={HEADS}, vocab_size={VOCABULARY},
                              tie_word_embeddings=True)
before = int(open("/proc/self/statm").read().split()[1]) * 4096
reset_peak_memory(torch.device("cpu"))
model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
groups = channel_groups(model)
factors = {{path: SaliencyFactors(1, torch.rand(1, group.channels)) for group in groups for path in group.members}}
tokens = torch.randint(0, {VOCABULARY}, ({SAMPLES}, {LENGTH}))
target = torch.randn({SAMPLES}, {LENGTH}, {HIDDEN})
problem = LearningProblem(model, groups, tokens, factors, target, NMPattern(2, 4), seed=0, calibration_batch_size={BATCH})
settings = LCP(block_size={BLOCK}, temperature=Linear(), init="random", epochs=1, batch_size={BATCH}, layers_per_stage=layers,
               activation_checkpointing=True, compile=False)
settings.orders(problem)
print(json.dumps(peak_host_memory() - before))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("layers", ["all", 4])
def test_learning_stays_within_its_memory(layers: str | int) -> None:
    result = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(layers)],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    growth = json.loads(result.stdout.splitlines()[-1])

    layer = 4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE
    depth = LAYERS if layers == "all" else layers
    weights = LAYERS * layer + VOCABULARY * HIDDEN
    logits = depth * BLOCK * (3 * HIDDEN + INTERMEDIATE)
    states = BATCH * LENGTH * HIDDEN
    # What one layer keeps for its own backward: norms, queries, keys, values, attention, and the gated product.
    internals = BATCH * LENGTH * (16 * HIDDEN + 6 * INTERMEDIATE)
    # Calibration inputs and targets; of a stage those of the stage, and the dense and the pruned stream they come from.
    calibration = SAMPLES * LENGTH * HIDDEN * (2 if layers == "all" else 4)
    bound = 4 * (weights + 4 * logits + 6 * layer + depth * states + internals + calibration)
    assert growth <= bound, f"{growth / 1e6:.0f} MB, allowed are {bound / 1e6:.0f} MB"
    # The bound is tight enough to notice masks or saliencies that are kept: they alone would be as large as the weights.
    assert bound - growth < 4 * depth * layer, "the bound would not notice what it is there to notice"
