"""Settings of a checkpoint in the words that transformers 4 reads.

transformers 5 writes `rope_parameters`. transformers 4 ignores this key without a warning and takes
the defaults of its own, so that its logits would be wrong. It also refuses a tokenizer of the class
`TokenizersBackend`, which transformers 5 names.
"""

from copy import deepcopy
from typing import Any

from transformers import PreTrainedConfig

# The values of `rope_type` that transformers 4 knows.
_ROPES = ("default", "dynamic", "linear", "llama3", "longrope", "yarn")
# Model types for which transformers 4 expects the older `type` in the place of `rope_type`.
_TYPE = ("olmo2", "phi3")


def legacy_tokenizer(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a tokenizer with a class that both versions of transformers know."""
    if settings.get("tokenizer_class") == "TokenizersBackend":
        return settings | {"tokenizer_class": "PreTrainedTokenizerFast"}
    return settings


def legacy_rope(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the keys for transformers 4; empty: it knows no such rotary embedding.

    transformers 5 reads these keys too, and `rope_scaling` before `rope_parameters`. Where it would
    read another rotary embedding then, as of GPT-NeoX, the result is empty as well.
    """
    keys = _rope_keys(config)
    read = type(config).from_dict(config.to_dict() | deepcopy(keys))
    same = _without_type(read) == _without_type(config)
    return keys if same else {}


def _without_type(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the rotary embedding without the key that transformers 5 keeps from `rope_scaling`."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return {key: value for key, value in parameters.items() if key != "type"}


def _rope_keys(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the keys for transformers 4, whatever transformers 5 reads from them."""
    parameters = getattr(config, "rope_parameters", None) or {}
    rope = dict(parameters.get("full_attention", parameters) or {})
    if "rope_theta" not in rope or rope.get("rope_type") not in _ROPES:
        return {}
    keys = {"rope_theta": rope.pop("rope_theta")}
    if "sliding_attention" in parameters:
        keys["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
    if "partial_rotary_factor" in rope:
        keys["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    if rope["rope_type"] == "default":
        return keys
    if config.model_type in _TYPE:
        rope["type"] = rope.pop("rope_type")
    if config.model_type == "phi3":  # it has this length at the top, and no fourth key here
        rope.pop("original_max_position_embeddings", None)
    return keys | {"rope_scaling": rope}
