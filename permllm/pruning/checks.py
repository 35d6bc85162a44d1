"""Checks of what a job prunes, and of what its methods, which may be of any package, return."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from permllm.errors import ConfigError, TrainingError
from permllm.models.checkpoint import all_finite
from permllm.models.families import ChannelGroup, linear_at
from permllm.models.offload import placement_of
from permllm.pruner.base import Pruner
from permllm.pruning.methods import Job, ModelGroups
from permllm.settings.config import NMPattern, RunConfig
from permllm.sparsity.nm import is_nm_mask
from permllm.sparsity.saliency import SaliencyFactors
from permllm.store.tensors import is_permutation


def check_not_pruned(model: nn.Module, groups: ModelGroups, pattern: NMPattern) -> None:
    """Raise ConfigError if each row of a linear to prune has as many zeros as after pruning."""
    for group in groups.pruned:
        kept = group.pattern or pattern
        path = group.members[0]
        with placement_of(model).layer(group.layer):
            weight = linear_at(model, path).weight
            zeros = int((weight == 0).sum(1, dtype=torch.int32).amin()) / group.channels
        # A linear of zeros alone is not pruned: some models grow by layers that begin as zeros.
        if 1 - kept.n / kept.m <= zeros < 1:
            raise ConfigError(
                f"model: {zeros:.0%} of each row of {path} are zeros, as after pruning; give the "
                "dense model"
            )


def checked_factors(pruner: Pruner, path: str, weight: Tensor, factors: object) -> SaliencyFactors:
    """Return the saliency factors of a linear that a pruner has made.

    Raises:
        ConfigError: the factors are not valid.
        TrainingError: they are not finite, perhaps because a float16 model overflows.
    """
    where = f"{type(pruner).__module__}.{type(pruner).__qualname__}: the factors of {path}"
    if not isinstance(factors, SaliencyFactors):
        raise ConfigError(f"{where} are a {type(factors).__name__}; expected SaliencyFactors")
    rows, channels = weight.shape
    column = factors.column
    row = factors.row
    if factors.power not in ((0, 1, 2) if factors.dense else (1, 2)):
        raise ConfigError(
            f"{where} have the power {factors.power}; expected 1 or 2, or 0 with a score for each "
            "weight"
        )
    terms = 1 if row is None else len(column)
    fits = column.shape in ((terms, channels), (rows, channels))
    if not fits or (row is not None and row.shape != (terms, rows)):
        shapes = f"column {tuple(column.shape)}, row {row if row is None else tuple(row.shape)}"
        raise ConfigError(
            f"{where} are {shapes}; expected column (K, {channels}) and row (K, {rows}), or a "
            f"score ({rows}, {channels}) and None"
        )
    for part in (column,) if row is None else (column, row):
        if not all_finite(part):
            raise TrainingError(
                f"the saliency of {path} is not finite: are its inputs too large for "
                f"{weight.dtype}, or its weights broken?"
            )
        if bool(part.amin() < 0):
            raise ConfigError(f"{where} are negative; expected 0 or more")
    return factors


def checked_permutation(config: RunConfig, group: ChannelGroup, permutation: object) -> Tensor:
    """Return a permutation that a method has found, on the CPU.

    Args:
        config: settings of the run, which name the method.
        group: the channel group.
        permutation: result of the method.

    Raises:
        ConfigError: the result is no int64 permutation of the channels.
    """
    actual = _what(permutation)
    if isinstance(permutation, Tensor):
        if (
            permutation.dtype == torch.int64
            and is_permutation(permutation)
            and len(permutation) == group.channels
        ):
            return permutation.cpu()
        actual = f"{permutation.dtype} {tuple(permutation.shape)}"
    raise ConfigError(
        f"permutation={config.permutation.get('name')}: the permutation of {group.name} is "
        f"{actual}; expected int64 ({group.channels},) with each channel once"
    )


def checked_permutations(job: Job, permutations: object) -> dict[str, Tensor]:
    """Return the permutations of all pruned groups, on the CPU; ConfigError: one is missing."""
    if not isinstance(permutations, Mapping):
        raise ConfigError(
            f"permutation={job.config.permutation.get('name')}: the result is "
            f"{_what(permutations)}; expected permutations by group"
        )
    return {
        group.name: checked_permutation(job.config, group, permutations.get(group.name))
        for group in job.groups.pruned
    }


def checked_masks(
    job: Job, masks: object, permutations: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """Return the masks of all linears; raise ConfigError unless each pruned one has an N:M mask."""
    method = f"mask={job.config.mask.get('name')}"
    if not isinstance(masks, Mapping):
        raise ConfigError(f"{method}: the result is {_what(masks)}; expected masks by path")
    for group in job.groups.pruned:
        pattern = group.pattern or job.config.pattern
        for path, rows in zip(group.members, group.rows, strict=True):
            shape = torch.Size((rows, group.channels))
            where = f"{method}: the mask of {path}"
            _check_mask(where, masks.get(path), shape, permutations[group.name], pattern)
    return masks


def _check_mask(
    where: str, mask: object, shape: torch.Size, permutation: Tensor, pattern: NMPattern
) -> None:
    """Raise ConfigError unless a method's result is an N:M mask.

    Args:
        where: method and linear, for the error.
        mask: the result.
        shape: shape of the weight.
        permutation: permutation of the channels, int64 `(C_in,)`.
        pattern: N:M of the permuted mask.
    """
    if not isinstance(mask, Tensor):
        actual = _what(mask)
    elif mask.dtype != torch.bool or mask.shape != shape:
        actual = f"{mask.dtype} {tuple(mask.shape)}"
    elif not is_nm_mask(mask, permutation.to(mask.device), pattern):
        actual = f"not {pattern}"
    else:
        return
    raise ConfigError(
        f"{where} is {actual}; expected bool {tuple(shape)} that keeps {pattern.n} of every "
        f"{pattern.m} permuted channels"
    )


def checked_update(
    where: str,
    updated: object,
    dense: Tensor,
    given: Tensor | None,
    permutation: Tensor,
    pattern: NMPattern,
) -> tuple[Tensor, Tensor]:
    """Return a weight that a pruner has updated, and its N:M mask.

    Args:
        where: pruner and linear, for the error.
        updated: result of the pruner.
        dense: the dense weight, `(C_out, C_in)`.
        given: mask that the pruner had to keep, bool `(C_out, C_in)`; None: it chose one.
        permutation: permutation of the channels, int64 `(C_in,)`.
        pattern: N:M of the permuted mask.

    Raises:
        ConfigError: the result is no weight with an N:M mask, or not with the given one.
    """
    if not (isinstance(updated, tuple) and len(updated) == 2 and isinstance(updated[0], Tensor)):
        raise ConfigError(f"{where} is {_what(updated)}; expected a weight and its mask")
    weight, mask = updated
    _check_mask(f"{where}: the mask", mask, dense.shape, permutation, pattern)
    if given is not None and not torch.equal(mask, given):
        raise ConfigError(f"{where}: the mask is not the one that was given")
    return weight, mask


def checked_weight(where: str, weight: object, mask: Tensor, dense: Tensor) -> Tensor:
    """Return a changed weight in the dtype of the dense weight.

    Args:
        where: method and linear, for the error.
        weight: result of a pruner or a reconstruction.
        mask: mask of the linear, bool `(C_out, C_in)`.
        dense: the dense weight, `(C_out, C_in)`.

    Raises:
        ConfigError: the result is no tensor, has another shape, or values outside of the mask.
        TrainingError: it is not finite in this dtype.
    """
    if not isinstance(weight, Tensor):
        raise ConfigError(f"{where} is {_what(weight)}; expected a tensor")
    if weight.shape != dense.shape:
        raise ConfigError(f"{where} is {tuple(weight.shape)}; expected {tuple(dense.shape)}")
    converted = weight.to(dense.dtype)
    if not all_finite(converted):
        raise TrainingError(f"{where} is not finite in {dense.dtype}")
    if bool(((converted != 0) & ~mask).any()):
        raise ConfigError(f"{where} is not zero outside of the mask")
    return converted


def _what(result: object) -> str:
    """Name what a method returned instead of tensors; None: it forgot to return."""
    return "missing" if result is None else f"a {type(result).__name__}"
