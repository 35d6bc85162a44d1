"""Checks of the model to prune, and of what its methods, which may be of any package, return."""

import logging

import torch
from torch import Tensor, nn

from permllm.errors import ConfigError, TrainingError
from permllm.models.checkpoint import all_finite
from permllm.models.families import ChannelGroup, linear_at
from permllm.models.offload import placement_of
from permllm.settings.config import NMPattern
from permllm.sparsity.nm import is_nm_mask

log = logging.getLogger(__name__)


def warn_if_pruned(model: nn.Module, groups: list[ChannelGroup], pattern: NMPattern) -> None:
    """Warn if one linear each of the first, middle and last layer looks pruned.

    Such a linear has as many zeros in each row as after pruning, but is not zero altogether: some
    models grow by layers that begin as zeros.
    """
    for group in (groups[0], groups[len(groups) // 2], groups[-1]):
        with placement_of(model).layer(group.layer):
            weight = linear_at(model, group.members[0]).weight
            zeros = int((weight == 0).sum(1, dtype=torch.int32).amin()) / group.channels
        if not 1 - pattern.n / pattern.m <= zeros < 1:
            return
    log.warning("the model has as many zeros as after pruning; give the dense model")


def check_result(
    where: str,
    shape: torch.Size,
    mask: Tensor,
    permutation: Tensor,
    pattern: NMPattern,
    weight: Tensor | None = None,
) -> None:
    """Raise an error unless a mask is N:M, and a changed weight is finite and zero outside of it.

    Args:
        where: method and linear, for the error.
        shape: shape of the dense weight, `(C_out, C_in)`.
        mask: mask that the method returned.
        permutation: permutation of the channels, int64 `(C_in,)`.
        pattern: N:M of the permuted mask.
        weight: weight that the method returned; None: it changes none.

    Raises:
        ConfigError: the mask or the weight is not valid.
        TrainingError: the weight is not finite.
    """
    if mask.shape != shape or not is_nm_mask(mask, permutation.to(mask.device), pattern):
        raise ConfigError(
            f"{where}: expected a mask {tuple(shape)} that keeps {pattern.n} of every {pattern.m} "
            "permuted channels"
        )
    if weight is None:
        return
    if weight.shape != shape or bool(((weight != 0) & ~mask).any()):
        raise ConfigError(f"{where}: expected a weight {tuple(shape)}, zero outside of its mask")
    if not all_finite(weight):
        raise TrainingError(f"{where} is not finite in {weight.dtype}")
