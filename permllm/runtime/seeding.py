"""Seeds of everything that draws random numbers, and reproducible kernels."""

from __future__ import annotations

import os
import random

import numpy as np
import torch


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed Python's, numpy's and torch's global generators.

    Args:
        seed: of all of them.
        deterministic: choose kernels of a GPU that give the same bits each time; attention's
            backward adds in any order else.
    """
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which torch asks for
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
