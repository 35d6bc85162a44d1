"""Limits of a model: the size of its vocabulary and the number of its positions."""

import logging

from torch import Tensor
from transformers import PreTrainedModel

from permllm.errors import DataError
from permllm.models.checkpoint import vocabulary_of
from permllm.models.families import family_of

log = logging.getLogger(__name__)


def check_windows(what: str, windows: Tensor, model: PreTrainedModel) -> None:
    """Raise DataError where windows have tokens or positions that a model lacks.

    Rotary positions have no end, so that long windows are a warning for most models.

    Args:
        what: name of the text; messages begin with it.
        windows: int64 `(windows, tokens)`.
        model: the model that will read the windows.
    """
    vocabulary = vocabulary_of(model)
    largest = int(windows.max())
    if largest >= vocabulary:
        raise DataError(
            f"{what}: it has a token {largest}, and the model's tokens are 0 to {vocabulary - 1}: "
            "does the tokenizer belong to the model?"
        )
    positions = getattr(model.config, "max_position_embeddings", None)
    length = windows.shape[1]
    if positions is None or length <= positions:
        return
    message = f"{what}: windows of {length} tokens, but the model has {positions} positions"
    if len(family_of(model).embeddings) > 1:  # an embedding of positions has no further rows
        raise DataError(message)
    log.warning("%s", message)
