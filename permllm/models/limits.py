"""Limits of a model: its vocabulary and its positions."""

from __future__ import annotations

import logging

from torch import Tensor
from transformers import PreTrainedModel

from permllm.errors import DataError
from permllm.models.checkpoint import vocabulary_of
from permllm.models.families import family_of

log = logging.getLogger(__name__)


def check_windows(what: str, windows: Tensor, model: PreTrainedModel) -> None:
    """Raise DataError where the model lacks tokens of the windows, or positions for them.

    Args:
        what: name of their text.
        windows: int64 `(windows, tokens)`.
        model: reads them.
    """
    known, largest = vocabulary_of(model), int(windows.max())
    if largest >= known:
        found = f"there is a token {largest}, and the model knows {known} from 0 on"
        raise DataError(f"{what}: {found}: is it its tokenizer?")
    positions, length = getattr(model.config, "max_position_embeddings", None), windows.shape[1]
    if positions is None or length <= positions:
        return
    said = f"{what}: windows of {length} tokens, and the model has positions for {positions}"
    if len(family_of(model).embeddings) > 1:  # learned ones, of which there are no more
        raise DataError(said)
    log.warning("%s", said)
