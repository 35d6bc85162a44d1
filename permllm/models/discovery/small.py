"""A small random model of the class and settings of a large one, in float64 on the host: its structure is the large one's.

Widths shrink, each to a size of its own where the class lets them; layers, biases, norms, kinds of
attention and ties stay.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from permllm.errors import ConfigError, PermLLMError, first_line

# A head's width: any twentieth of it is even, as partly rotary embeddings want it.
_HEAD = 40
_VOCABULARY, _POSITIONS, _INNER, _PROJECTED, _HIDDEN = 120, 64, 112, 72, 96
_BATCH, _TOKENS = 2, 12
# Settings, at any depth, that say what a model is beside attention and linears.
_EXPERTS = re.compile(r"(^|_)n(um)?_((routed|local)_)?experts$")
_STATE = re.compile(
    r"^(mamba_\w+|ssm_\w+|state_size|linear_conv_kernel_dim|conv_L_cache|conv_kernel|lru_width|rescale_every)$"
)


class Refused(ConfigError):
    """The structure of a model type cannot be told; the message says why."""

    def __init__(self, model_type: str, why: str) -> None:
        super().__init__(f"the structure of model type {model_type!r} cannot be told: {why}")


def causal_types() -> list[str]:
    """The model types that transformers has a causal language model of."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def check_kind(config: PreTrainedConfig, model_type: str) -> None:
    """Refuse what is no decoder of attention and linears by its settings, before anything is built.

    Raises:
        ConfigError: in one line, with the setting that tells.
    """

    def refuse(kind: str, key: str, value: object) -> None:
        shown = f"={value}" if value else ""
        raise ConfigError(
            f"model type {model_type!r} is {kind} ({key}{shown}): only decoders of attention and dense linears can be pruned"
        )

    if model_type not in causal_types():
        raise ConfigError(
            f"model type {model_type!r} has no table, and transformers has no causal language model of it to tell one from"
        )
    if config.is_encoder_decoder:
        refuse("an encoder and a decoder", "is_encoder_decoder", True)
    if config.get_text_config(decoder=True) is not config:
        refuse("more than a language model", type(config).__name__, None)
    if "moe" in type(config).__name__.lower():
        refuse("a mixture of experts", type(config).__name__, None)
    for key, value in _settings(config.to_dict()):
        if isinstance(value, int) and value > 1 and _EXPERTS.search(key):
            refuse("a mixture of experts", key, value)
        if value and _STATE.search(key):
            refuse("a state-space or convolutional model", key, value)


def small_model(config: PreTrainedConfig, model_type: str) -> PreTrainedModel:
    """The small model, its weights, norms and biases random but for what is not trained.

    Args:
        config: of a dense or gathered model.
        model_type: of the dense model.

    Raises:
        Refused: transformers cannot build or run it.
    """
    failure: Exception | None = None
    for hidden in (_HIDDEN, None):
        try:
            settings = small_config(config, model_type, hidden)
            model = AutoModelForCausalLM.from_config(
                settings, dtype=torch.float64, attn_implementation="eager"
            )
            model.eval().requires_grad_(False)
            _randomise(model)
            logits(model)
        except (PermLLMError, MemoryError):
            raise
        except Exception as error:  # a class of any kind may raise anything
            failure = failure or error
        else:
            return model
    assert failure is not None
    raise Refused(
        model_type, f"transformers cannot run a small model of its config: {first_line(failure)}"
    ) from failure


def small_config(config: PreTrainedConfig, model_type: str, hidden: int | None) -> PreTrainedConfig:
    """The settings of the small model.

    Args:
        config: of a dense or gathered model.
        model_type: of the dense model.
        hidden: width of the residual stream; None for that of all query heads together.
    """
    small = copy.deepcopy(config)
    if small.model_type != model_type:
        inner = {
            key: value
            for key, value in config.to_dict().items()
            if key not in ("model_type", "architectures")
        }
        for key in ("gathers", "dense_type"):
            inner.pop(key, None)
        small = CONFIG_MAPPING[model_type](**inner)
    small.quantization_config = None
    for key in [
        key for key in vars(small) if key.endswith("_token_id")
    ]:  # within the vocabulary, and no token of the text
        value = getattr(small, key)
        if value is not None:
            setattr(small, key, [0] if isinstance(value, list) else 0)
    query, key_value = _heads(small)
    sizes = {
        "num_attention_heads": query,
        "num_key_value_heads": key_value,
        "num_kv_heads": key_value,
        "head_dim": _HEAD,
        "hidden_size": hidden or query * _HEAD,
        "intermediate_size": _INNER,
        "ffn_dim": _INNER,
        "n_inner": _INNER,
        "ffn_hidden_size": _INNER,
        "vocab_size": _VOCABULARY,
        "max_position_embeddings": _POSITIONS,
        "rotary_dim": _HEAD // 2,
    }
    projected, width = getattr(small, "word_embed_proj_dim", None), small.hidden_size
    if projected is not None:
        sizes["word_embed_proj_dim"] = sizes["hidden_size"] if projected == width else _PROJECTED
    for key, value in sizes.items():
        found = getattr(small, key, None)
        computed = isinstance(getattr(type(small), key, None), property)
        if isinstance(found, list):
            setattr(small, key, [value] * len(found))
        elif not computed and (found is not None or key == "num_key_value_heads"):
            setattr(small, key, value)
    _plain_rope(getattr(small, "rope_parameters", None))
    return small


def tokens() -> Tensor:
    """Tokens for the small model, int64 `(2, 12)`."""
    return torch.randint(
        3, _VOCABULARY, (_BATCH, _TOKENS), generator=torch.Generator().manual_seed(1)
    )


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor | None = None) -> Tensor:
    """Logits of the small model, `(2, 12, vocabulary)`; ValueError where one is not finite."""
    found: Tensor = model(input_ids=tokens() if ids is None else ids, use_cache=False).logits
    if not bool(found.isfinite().all()):
        raise ValueError("its logits are not finite")
    return found


def _heads(config: PreTrainedConfig) -> tuple[int, int]:
    """Query and key-value heads: one or two of the latter, one or two of the former for each."""
    query = getattr(config, "num_attention_heads", None) or 1
    key_value = getattr(config, "num_key_value_heads", None) or query
    if not isinstance(query, int) or not isinstance(key_value, int):  # of each layer its own
        return 2, 2
    few = min(key_value, 2)
    return few * min(max(query // key_value, 1), 2), few


def _plain_rope(parameters: Any) -> None:
    """Scales of each channel have the number of the head's; what is not scaled turns the same channels."""
    if not isinstance(parameters, dict):
        return
    lists = [key for key, value in parameters.items() if isinstance(value, list)]
    if lists:
        parameters["rope_type"] = "default"
        for key in lists:
            del parameters[key]
    for value in parameters.values():
        _plain_rope(value)


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Products keep the size of what they read; norms and biases are far from the ones and zeros that hide a permutation."""
    generator = torch.Generator().manual_seed(0)
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not tensor.is_floating_point() or not tensor.dim():
            continue
        if name.endswith("bias"):
            tensor.normal_(0.0, 0.3, generator=generator)
        elif tensor.dim() == 1:
            tensor.uniform_(0.5, 1.5, generator=generator)
        else:
            fan_in = 1 if id(tensor) in embeddings else tensor[0].numel()
            tensor.normal_(0.0, fan_in**-0.5, generator=generator)


def _settings(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        yield str(key), value
        if isinstance(value, dict):
            yield from _settings(value)
