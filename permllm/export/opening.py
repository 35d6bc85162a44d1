"""Open a checkpoint that an export wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from permllm.models.checkpoint import check_checkpoint, check_values, transformers_reads


def opened(folder: Path, **options: Any) -> PreTrainedModel:
    """`permllm.load`."""
    check_checkpoint(folder)
    with transformers_reads(folder):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **options
        )
    check_values(folder, model)
    return model.eval()
