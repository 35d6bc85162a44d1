"""The tiny pipeline on the simulated CUDA device and on the host, job by job: `python -m tests.gpu.pipeline FOLDER`.

Prints a JSON object: for each job why it failed, whether orders and masks are those of the host, and how often a step of
learning waits. `tests/gpu/test_simulated.py` runs it once and looks at each of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

OPT = (
    "model.architecture.model_type=opt",
    "~model.architecture.num_key_value_heads",
    "~model.architecture.intermediate_size",
    "+model.architecture.ffn_dim=64",
    "+model.architecture.word_embed_proj_dim=32",
)
# No compiler can make kernels for a device that is simulated: what is compiled runs as it is.
JOBS: dict[str, tuple[str, ...]] = {
    "magnitude": ("pruner=magnitude", "permutation=none"),
    "wanda, heuristic": ("permutation=heuristic",),
    "ria, heuristic, foldable, folded": (
        "pruner=ria",
        "permutation=heuristic",
        "permutation.constraint=foldable",
        "export=folded",
    ),
    "sparsegpt, simulate": ("pruner=sparsegpt", "permutation=none", "export=simulate"),
    "lcp, gathered": ("permutation.compile=false", "export=gathered"),
    "lcp compiled, packed": ("permutation.compile=true", "export=gathered", "export.format=packed"),
    "sequential statistics": ("permutation=none", "calibration.statistics=sequential"),
    "lcp recomputed": ("permutation.activation_checkpointing=true",),
    "lcp from host memory": ("model.placement=host",),
    "masks from host memory": ("model.placement=host", "permutation=heuristic", "mask=score"),
    "lcp hard, cosine": ("permutation.straight_through=hard", "permutation.loss=cosine"),
    "lcp soft, mse": ("permutation.straight_through=soft", "permutation.loss=mse", "pruner=ria"),
    "lcp by windows": ("permutation.layers_per_stage=1", "permutation.rounds=2"),
    "lcp of the last layer": ("permutation.last_layers=1", "permutation.gumbel=0.1"),
    "lcp foldable, folded": ("permutation.constraint=foldable", "export=folded"),
    "lcp-paper": ("permutation=lcp-paper", "permutation.epochs=2", "permutation.batch_size=1"),
    "lcp under sparsegpt": ("pruner=sparsegpt",),
    "lcp under gblm, folded": ("pruner=gblm", "permutation.constraint=foldable", "export=folded"),
    "from_file": ("permutation=from_file", "permutation.path={lcp, gathered}"),
    "obs": ("permutation=heuristic", "reconstruction=obs", "reconstruction.columns=costly"),
    "admm": ("permutation=heuristic", "reconstruction=admm"),
    "block": ("permutation=heuristic", "reconstruction=block"),
    "distill": ("permutation=heuristic", "reconstruction=distill", "reconstruction.samples=3", "reconstruction.average=0.5"),
    "lcp, then a score": ("mask=score", "mask.learning_rate=0.1", "mask.compile=true"),
    "a score with the order": ("mask=score", "mask.orders=together", "mask.learning_rate=0.1"),
    "refined": ("permutation=none", "mask=refined", "export=folded"),
    "refined, then a score": ("permutation=heuristic", "mask=score", "mask.start=refined", "mask.learning_rate=0.1"),
    "lowrank": ("permutation=none", "mask=lowrank", "mask.learning_rate=0.3", "export=folded"),
    "bfloat16": ("permutation.compile=true", "model.dtype=bfloat16", "calibration.samples=3"),
    "opt": (*OPT, "permutation.compile=true"),
}
# Stopped after the first of its passes, and continued.
RESUMED = "lcp resumed"
SMALL = (
    "model=tiny",
    "model.dtype=float64",  # so that what is summed in another order does not choose another mask
    "logger=none",
    "block_size=8",
    "calibration.samples=2",
    "calibration.seqlen=8",
    "evaluation.perplexity.limit=2",
)
LEARNING = ("permutation.epochs=2", "permutation.batch_size=1", "permutation.learning_rate=0.05")


def main(folder: Path) -> dict[str, Any]:
    """What became of each job."""
    from tests.gpu import simulated

    simulated.enable(package=str(Path(__file__).parent.parent.parent))
    import torch
    from safetensors.torch import load_file

    from permllm import runner
    from permllm.config import read_config, register_resolvers
    from permllm.learning.training import Training
    from permllm.models import decoder
    from permllm.nodes import register
    from tests.test_config import composed

    register_resolvers()
    register()
    # On a host alone attention that learns is in float32: the device that is compared with it has none of that.
    decoder.attention_in_float32 = contextlib.nullcontext  # type: ignore[assignment]
    simulated.within("permllm.learning.training:Training.step")
    ledger = simulated.LEDGER

    def run(name: str, overrides: tuple[str, ...], device: str) -> Path:
        learns = not any(word.startswith("permutation=") for word in overrides)
        words = [*SMALL, *(LEARNING if learns else ()), *overrides, f"model.device={device}"]
        target = folder / device / name.replace(",", "").replace(" ", "-")
        words = [word.replace("{lcp, gathered}", str(folder / device / "lcp-gathered")) for word in words]
        runner.run(read_config(composed(*words, f"run_dir={target}")))
        return target

    save = Training._save

    def save_and_stop(training: Training) -> None:
        save(training)
        raise KeyboardInterrupt

    found: dict[str, Any] = {}
    for name, overrides in (JOBS | {RESUMED: ()}).items():
        ledger.clear()
        try:
            if name == RESUMED:
                Training._save = save_and_stop  # type: ignore[method-assign]
                with contextlib.suppress(KeyboardInterrupt):
                    run(name, overrides, "auto")
                Training._save = save  # type: ignore[method-assign]
            there = run(name, overrides, "auto")
            totals, calls = ledger.totals(), max(1, ledger.calls)
            here = run(name, overrides, "cpu")
            files = ("permutations.safetensors", "masks.safetensors")
            pairs = [[load_file(run / file) for run in (there, here)] for file in files]
            kinds = [kind for kind, _ in ledger.syncs if "pageable" in kind and "device to host" not in kind]
            found[name] = {
                "device": json.loads((there / "environment.json").read_text())["hardware"]["device"],
                "same": [all(torch.equal(a[key], b[key]) for key in b) for a, b in pairs],
                "peak": json.loads((there / "metrics.json").read_text())["peak_memory_bytes"],
                "steps": calls,
                "waits": totals["syncs"] / calls,
                "pageable": kinds,
                "lines": [f"{count / calls:.1f} {kind} {line}" for (kind, line), (count, _) in ledger.syncs.items()],
            }
        except Exception:
            found[name] = {"error": traceback.format_exc()}
    return found


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"
    print(json.dumps(main(Path(sys.argv[1]))))
