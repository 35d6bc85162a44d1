"""The token that windows begin with where a model needs it."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from permllm.errors import ConfigError


def bos_of(tokenizer: PreTrainedTokenizerBase, bos: bool) -> int | None:
    """The token that windows begin with; None for none.

    Raises ConfigError where the tokenizer has no such token.
    """
    if not bos:
        return None
    if tokenizer.bos_token_id is None:
        raise ConfigError("model.bos=true: the model's tokenizer has no BOS token; false adds none")
    return int(tokenizer.bos_token_id)
