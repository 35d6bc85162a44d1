"""Host memory of an export: that of a file of the checkpoint, whatever the size of the model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.export.test_checkpoint import make_run, variant_model

# What the process grows by over its memory after the imports: all pages, those of mapped files too.
CHILD = """
import sys
from pathlib import Path
import torch
from permllm.export.checkpoint import Request, export_run
from permllm.runtime.memory import peak_host_memory, reset_peak_memory
reset_peak_memory(torch.device("cpu"))
before = peak_host_memory()
export_run(Path(sys.argv[1]), Request("folded", shard_gb=float(sys.argv[3])), Path(sys.argv[2]))
print(peak_host_memory() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_an_export_holds_a_file_of_tensors_and_not_the_model(tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    }
    model = variant_model("llama", torch.bfloat16, num_hidden_layers=6, **sizes)
    total = sum(parameter.nbytes for parameter in model.parameters())
    largest = max(parameter.nbytes for parameter in model.parameters())
    run = make_run(tmp_path, model, "foldable", dtype="bfloat16")
    shard = 4 * largest
    command = [sys.executable, "-c", CHILD, str(run), str(tmp_path / "out"), str(shard / 1e9)]
    growth = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    # A file is held twice while safetensors writes it; beside it some tensors and what was read of
    # the masks.
    assert 0 < growth < 2 * shard + 8 * largest < total
