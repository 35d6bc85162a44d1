"""A step of LCP on layers of LLaMA-2-7B's size, on the simulated device without values: `python -m tests.gpu.llama_step`.

Prints a JSON object: how often a step waits, what it launches, reads and writes, copies between host and device and
keeps for backward, what the estimate of that is, and whether layers are recomputed on cards of two sizes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LAYERS, SAMPLES, LENGTH = 3, 4, 1024


def main() -> dict[str, Any]:  # noqa: PLR0915 - imports come after the device
    """Everything that is counted."""
    from tests.gpu import simulated

    simulated.enable(package=str(Path(__file__).parent.parent.parent), data="meta")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from permllm.calibration.saliency import SaliencyFactors
    from permllm.learning import training
    from permllm.learning.kernels import EAGER, KernelUse, compiled_kernels
    from permllm.learning.problem import LearningProblem
    from permllm.models.families import channel_groups
    from permllm.permutation.lcp.learner import OrderLearner
    from permllm.permutation.lcp.method import LCP
    from permllm.permutation.lcp.temperature import Linear
    from permllm.permutation.shared import shared_orders
    from permllm.sparsity import NMPattern

    device = torch.device("cuda", 0)
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
    with device:
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("llama", num_hidden_layers=LAYERS, **shape), dtype=torch.bfloat16
        )
    model.eval().requires_grad_(False)
    groups = channel_groups(model)
    factors = {path: SaliencyFactors(1, torch.ones(1, group.channels)) for group in groups for path in group.members}
    tokens = torch.zeros(SAMPLES, LENGTH, dtype=torch.int64)
    target = torch.zeros(SAMPLES, LENGTH, 4096, dtype=torch.bfloat16)
    problem = LearningProblem(model, groups, tokens, factors, target, NMPattern(2, 4), seed=0)
    shared = shared_orders(groups, "free")
    orders = {order.name: torch.arange(order.channels) for order in shared}
    ledger = simulated.LEDGER

    def step(kernels: Any, layers: int = LAYERS, **settings: Any) -> dict[str, Any]:
        window = training.Window(0, 0, 0, layers, None, target)
        lcp = LCP(block_size=64, temperature=Linear(), **settings)
        logits = lcp.start_logits(problem, [order for order in shared if order.layers.stop <= layers], orders, near=True)
        with lcp.masked(problem, shared, window, kernels) as linears:
            learner = OrderLearner(lcp, problem, shared, window, orders, logits, linears)
            learning = training.Training(lcp, problem, window, [learner], "lcp", "checkpoint")
            held: list[int] = []
            forward = learning._loss

            def watched(*arguments: Any) -> Any:
                held.append(ledger.live)
                loss = forward(*arguments)
                held.append(ledger.live)
                return loss

            learning._loss = watched  # type: ignore[method-assign]
            learning.step(torch.arange(SAMPLES), training.Moment(0, 2, 0, 1), after=torch.arange(SAMPLES))
            held.clear()
            ledger.clear()
            learning.step(torch.arange(SAMPLES), training.Moment(1, 2, 0, 1), after=torch.arange(SAMPLES))
            totals = ledger.totals()
            counts = {name: totals[name] for name in ("syncs", "launches", "traffic", "transferred")}
            return {"kept": held[1] - held[0], "recomputes": learning._recomputes} | counts

    compiled = compiled_kernels(KernelUse("cuda", weights=torch.bfloat16, products=torch.bfloat16))
    assert compiled is not None
    kept = training.kept_a_token(groups, 4096, 2) * SAMPLES * LENGTH * 2 * LAYERS
    found = {"estimate": kept, "layers": LAYERS}
    found["compiled"] = step(compiled)
    found["two layers"] = step(compiled, layers=2)
    found["recomputed"] = step(compiled, activation_checkpointing=True)
    found["eager"] = step(EAGER)
    training.free_memory = lambda device: kept  # type: ignore[attr-defined]
    found["small card"] = step(compiled)
    return found


if __name__ == "__main__":
    print(json.dumps(main()))
