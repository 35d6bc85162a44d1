"""Permutations, masks and changed weights of a run that has pruned its model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from permllm.errors import DataError
from permllm.runs.directory import check_sha256
from permllm.runs.names import MASKS, PERMUTATIONS, WEIGHTS
from permllm.runs.tensors import load_masks, load_orders, load_tensor, tensor_formats


class Pruned:
    """Pruned model of a run, one weight at a time.

    Args:
        directory: of the run.
        metrics: of the run.

    Attributes:
        orders: int64 `(C_in,)` by channel group.
        weights_changed: the kept weights differ from those of the dense model.
        weight_files: file of each changed weight, by linear.

    Raises:
        DataError: a file is missing, or is not what the run wrote.
    """

    def __init__(self, directory: Path, metrics: Mapping[str, Any]) -> None:
        digests = metrics.get("sha256", {})
        for name, digest in digests.items():
            check_sha256(directory, name, digest)
        self._directory = directory
        self.orders = load_orders(directory / PERMUTATIONS)
        self._masks = load_masks(directory / MASKS)
        self.weights_changed: bool = metrics["sparsity"]["weights_changed"]
        self.weight_files: dict[str, Path] = {}
        if self.weights_changed:
            if not metrics["sparsity"]["weights_kept"]:
                raise DataError(f"{directory} has no weights: it was run with save_weights=false and cannot be rebuilt")
            files = [directory / name for name in digests if name.startswith(f"{WEIGHTS}/")]
            self.weight_files = {name: file for file in files for name in tensor_formats(file)}

    def mask(self, path: str) -> Tensor:
        """Return the mask of a linear, bool `(C_out, C_in)` in original channel order."""
        if path not in self._masks:
            raise DataError(f"{self._directory / MASKS} lacks {path}: it is of another model")
        return self._masks[path]

    def weight(self, path: str, dense: Tensor) -> Tensor:
        """Return the pruned weight of a linear, original channel order, on the device of `dense`, the dense weight."""
        mask = self.mask(path).to(dense.device)
        if mask.shape != dense.shape:
            shapes = f"the mask of {path} is {tuple(mask.shape)}, the linear {tuple(dense.shape)}"
            raise DataError(f"{self._directory / MASKS}: {shapes}")
        new = load_tensor(self.weight_files[path], path) if self.weights_changed else dense
        return torch.where(mask, new.to(dense), 0.0)
