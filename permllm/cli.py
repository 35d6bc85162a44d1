"""What `run.py` hands to Hydra: run a job, report errors as one line, and end with a table and an exit code."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from permllm import parallel
from permllm.config import read_config
from permllm.errors import PermLLMError
from permllm.results.table import print_comparison
from permllm.runner import run


class Session:
    """The jobs of one command: one, or those of a sweep."""

    def __init__(self) -> None:
        self.results: list[tuple[list[str], dict[str, Any], Path]] = []
        self.failures: list[str] = []

    def job(self, composed: DictConfig) -> None:
        """Run one job. A failure that a person can mend is one line on stderr, and does not stop the other jobs."""
        transformers.logging.set_verbosity_error()
        warnings.filterwarnings("ignore", category=FutureWarning)
        for name in ("httpx", "huggingface_hub"):
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            result = run(read_config(composed))
            if result is not None:
                self.results.append((_overrides(), *result))
        except (PermLLMError, torch.OutOfMemoryError, OSError) as error:
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            text = _one_line(error)
            self.failures.append(text)
            print(f"error: {text}", file=sys.stderr)
            if parallel.world_size() > 1:
                # The other processes wait for this one; torchrun ends them all.
                raise SystemExit(1) from error

    def close(self) -> int:
        """Print the comparison when there is one to make; the exit code."""
        if len(self.results) > 1:
            shared = set.intersection(*(set(overrides) for overrides, _, _ in self.results))
            print_comparison(
                [
                    (" ".join(word for word in overrides if word not in shared) or metrics["name"], metrics, directory)
                    for overrides, metrics, directory in self.results
                ]
            )
        return 1 if self.failures else 0


def _overrides() -> list[str]:
    """What was typed for this job, without what a sweep itself needs; nothing outside of Hydra."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def _one_line(error: BaseException) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU's memory is not enough: lower permutation.batch_size or calibration.batch_size, or see plan=true"
    return " ".join(str(error).split())
