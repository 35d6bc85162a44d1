"""Gathered checkpoints, which `import permllm.export` lets transformers load.

The weights lie in `model.safetensors` as those of any model of the family, and the orders in which
modules gather their inputs in `gathers.safetensors`. Without the orders the logits would be wrong.
So `config.json` has a model type that this module alone knows, and a text where a plain config has
its width; the dense model's config lies inside, under `dense_config`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils.hub import cached_file

from permllm.errors import DataError, printable
from permllm.models.families import channel_groups
from permllm.runs.files import write_json
from permllm.runs.tensors import load_orders, save_tensors

ORDERS = "gathers.safetensors"
_ORDER = "input_order"
# No name to install: nobody vouches for what a package index has under it. transformers quotes both
# texts where it refuses such a checkpoint.
_HINT = "make a checkout of PermLLM importable and import permllm.export before loading this model"
_MODEL_TYPE = f"N:M sparse with gathered inputs (arXiv 2510.10136): {_HINT}"
# Arguments of `from_pretrained` that say where a file of the checkpoint is.
_PLACE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class GatheredConfig(PreTrainedConfig):
    """`config.json` of a gathered checkpoint."""

    model_type = _MODEL_TYPE
    # transformers also makes a config without arguments.
    dense_config: Any = None
    gathers: Any = None


class GatheredForCausalLM:
    """Loader of gathered checkpoints: what it gives is a model of the dense class."""

    config_class = GatheredConfig

    @classmethod
    def from_pretrained(
        cls, checkpoint: str, *args: Any, config: GatheredConfig, **options: Any
    ) -> Any:
        """Load the dense model and attach the orders; arguments as in transformers.

        Raises:
            DataError: the orders are not those of `config.json`, or not of this model.
        """
        dense: Any = CONFIG_MAPPING[config.dense_config["dense_type"]]
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[dense]
        loaded = model_class.from_pretrained(
            checkpoint,
            *args,
            config=dense.from_dict(config.dense_config),
            attn_implementation=config._attn_implementation,
            **options,
        )
        place = {key: options[key] for key in _PLACE if options.get(key) is not None}
        file = Path(str(cached_file(checkpoint, ORDERS, **place)))
        stored = load_orders(file)
        orders = {name.removesuffix(f".{_ORDER}"): order for name, order in stored.items()}
        if other := sorted(orders.keys() ^ set(config.gathers or ())):
            raise DataError(
                f"{file}: it and config.json do not both have an order of {printable(other[0])}"
            )
        _attach(loaded[0] if isinstance(loaded, tuple) else loaded, orders, file)
        return loaded


def write_gathered(folder: Path, config: PreTrainedConfig, orders: Mapping[str, Tensor]) -> None:
    """Write what a dense model's checkpoint needs to be a gathered one.

    Args:
        folder: of the checkpoint; its `config.json` is replaced.
        config: of the dense model.
        orders: whole numbers `(channels,)` by the path of the module whose input they gather.
    """
    dense = json.loads(config.to_json_string())
    # A plain class takes the part of a config that has its `model_type`.
    dense["dense_type"] = dense.pop("model_type")
    own = {"model_type": _MODEL_TYPE, "hidden_size": _HINT, "gathers": sorted(orders)}
    write_json(folder / "config.json", own | {"dense_config": dense})
    stored = {f"{path}.{_ORDER}": order.to(torch.int32) for path, order in orders.items()}
    save_tensors(folder / ORDERS, stored)


def gathered_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules whose input is gathered, by path."""
    return {path: module for path, module in model.named_modules() if _ORDER in module._buffers}


def leave_out_gathers(model: nn.Module) -> None:
    """Take the gathers away: the model computes something else then, in the same shapes."""
    for module in gathered_modules(model).values():
        module._forward_pre_hooks.clear()


def _attach(model: PreTrainedModel, orders: Mapping[str, Tensor], file: Path) -> None:
    """Hook a gather before each module, and replace `save_pretrained` so that it keeps them."""
    groups = channel_groups(model)
    readers = {
        group.prefix + path: group.channels for group in groups for path in group.table.readers
    }
    for path, order in orders.items():
        if readers.get(path) != len(order):
            raise DataError(
                f"{file}: {printable(path)} reads no {len(order)} channels that can be gathered"
            )
        module = model.get_submodule(path)
        device = next(module.parameters()).device
        module.register_buffer(_ORDER, order.to(device, torch.int32), persistent=False)
        module.register_forward_pre_hook(_gather, with_kwargs=True)
    model.save_pretrained = partial(_save, model)  # type: ignore[method-assign]


def _save(model: PreTrainedModel, folder: str | Path, **options: Any) -> None:
    type(model).save_pretrained(model, folder, **options)
    modules = gathered_modules(model)
    orders = {path: module.get_buffer(_ORDER) for path, module in modules.items()}
    write_gathered(Path(folder), model.config, orders)


def _gather(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    order = module.get_buffer(_ORDER)
    if args:
        return (args[0].index_select(-1, order), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": kwargs["hidden_states"].index_select(-1, order)}


def register() -> None:
    """Make gathered checkpoints known to transformers."""
    AutoConfig.register(_MODEL_TYPE, GatheredConfig, exist_ok=True)
    model: Any = GatheredForCausalLM
    AutoModelForCausalLM.register(GatheredConfig, model, exist_ok=True)
