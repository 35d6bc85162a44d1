"""Gathered checkpoints, which transformers loads after `import permllm.export`.

The weights are in `model.safetensors`. The permutations of modules' inputs are in
`gathers.safetensors`; without them the logits would be wrong. To prevent that, `config.json` has a
model type that only this module knows, and a text in the place of the width. It contains the dense
model's config under `dense_config`. For a reader with a config of its own, the weights of linears
whose inputs are gathered have names that no model knows.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils.hub import cached_file

from permllm.errors import DataError, printable
from permllm.models.families import ChannelGroup, channel_groups
from permllm.store.files import write_json
from permllm.store.tensors import load_permutations, save_tensors

GATHERS = "gathers.safetensors"
_INPUT_ORDER = "input_order"
# transformers quotes these texts when it refuses such a checkpoint. They name no package to
# install, because anyone could publish a package of that name.
_HINT = "make a checkout of PermLLM importable and import permllm.export before loading this model"
_MODEL_TYPE = f"N:M sparse with gathered inputs (arXiv 2510.10136): {_HINT}"
# Name of a weight, its name where its linear reads gathered inputs, and the pattern of such a name.
_WEIGHT = "weight"
_PERMUTED = "permuted_weight"
_NAMES = {rf"\.{_PERMUTED}$": f".{_WEIGHT}"}
# Arguments of `from_pretrained` about the place of a checkpoint's files.
_PLACE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class GatheredConfig(PreTrainedConfig):
    """`config.json` of a gathered checkpoint."""

    model_type = _MODEL_TYPE
    # transformers also makes a config without arguments.
    dense_config: Any = None
    gathers: Any = None


class GatheredForCausalLM:
    """Loader of gathered checkpoints, which returns a model of the dense class."""

    config_class = GatheredConfig

    @classmethod
    def from_pretrained(
        cls, checkpoint: str, *args: Any, config: GatheredConfig, **options: Any
    ) -> Any:
        """Load the dense model and attach the permutations; arguments as in transformers.

        Raises DataError if the permutations do not belong to `config.json` or to this model.
        """
        dense: Any = CONFIG_MAPPING[config.dense_config["dense_type"]]
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[dense]
        loaded = model_class.from_pretrained(
            checkpoint,
            *args,
            config=dense.from_dict(config.dense_config),
            attn_implementation=config._attn_implementation,
            key_mapping=_NAMES,
            **options,
        )
        place = {key: options.get(key) for key in _PLACE}
        file = Path(str(cached_file(checkpoint, GATHERS, **place)))
        permutations = {
            name.removesuffix(f".{_INPUT_ORDER}"): permutation
            for name, permutation in load_permutations(file).items()
        }
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.config.__class__ = _reads_gathered(dense)
        _check_inputs(file, model, config.gathers or (), permutations)
        _attach(model, permutations)
        return loaded


def _check_inputs(
    file: Path, model: nn.Module, gathers: Iterable[str], permutations: Mapping[str, Tensor]
) -> None:
    """Raise DataError unless a file has the permutations of the inputs that config.json names."""
    inputs = {
        group.prefix + reader: group.channels
        for group in channel_groups(model)
        for reader in group.table.readers
    }
    expected = {path: inputs.get(path) for path in gathers}
    sizes = {path: len(permutation) for path, permutation in permutations.items()}
    if wrong := sorted(path for path, _ in sizes.items() ^ expected.items()):
        raise DataError(
            f"{file}: the permutation of {printable(wrong[0])} does not fit config.json and the "
            "model"
        )


@cache
def _reads_gathered(dense: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """Return a class of the dense model's config that reads `config.json` of gathered checkpoints.

    peft reads that of the base model by the class of the model's config, to save an adapter.
    """

    class DenseConfig(dense):  # type: ignore[misc, valid-type]
        @classmethod
        def from_pretrained(cls, checkpoint: str, **options: Any) -> PreTrainedConfig:
            config = AutoConfig.from_pretrained(checkpoint, **options)
            if isinstance(config, GatheredConfig):
                return dense.from_dict(config.dense_config)
            return config

    return DenseConfig


def permuted_names(groups: Iterable[ChannelGroup], gathers: Collection[str]) -> dict[str, str]:
    """Return the stored names of weights whose linears read gathered inputs, by weight name.

    The channel groups are all of the model, and `gathers` the modules whose input is gathered.
    """
    return {
        f"{path}.{_WEIGHT}": f"{path}.{_PERMUTED}"
        for group in groups
        if any(group.prefix + reader in gathers for reader in group.table.readers)
        for path in group.members
    }


def write_gathered(
    folder: Path, config: PreTrainedConfig, permutations: Mapping[str, Tensor]
) -> None:
    """Turn a dense model's checkpoint, with its config, into a gathered one.

    The permutations `(channels,)` of modules' inputs are by path of the module.
    """
    dense = json.loads(config.to_json_string())
    # Renamed, because a class of transformers accepts a nested config with its own `model_type`.
    dense["dense_type"] = dense.pop("model_type")
    own = {"model_type": _MODEL_TYPE, "hidden_size": _HINT, "gathers": sorted(permutations)}
    write_json(folder / "config.json", own | {"dense_config": dense})
    stored = {
        f"{path}.{_INPUT_ORDER}": permutation.to(torch.int32)
        for path, permutation in permutations.items()
    }
    save_tensors(folder / GATHERS, stored)


def _attach(model: PreTrainedModel, permutations: Mapping[str, Tensor]) -> None:
    """Add a gather to each module, and let `save_pretrained` write a gathered checkpoint."""
    for path, permutation in permutations.items():
        module = model.get_submodule(path)
        device = next(module.parameters()).device
        module.register_buffer(_INPUT_ORDER, permutation.to(device, torch.int32), persistent=False)
        module.register_forward_pre_hook(_gather, with_kwargs=True)
    model.save_pretrained = partial(_save, model)  # type: ignore[method-assign]
    names = permuted_names(channel_groups(model), permutations)
    model.register_load_state_dict_pre_hook(partial(_rename, names))


def _save(model: PreTrainedModel, folder: str | Path, **options: Any) -> None:
    permutations = {
        path: module.get_buffer(_INPUT_ORDER)
        for path, module in model.named_modules()
        if _INPUT_ORDER in module._buffers
    }
    names = permuted_names(channel_groups(model), permutations)
    state = options.pop("state_dict", None) or model.state_dict()
    renamed = {names.get(name, name): tensor for name, tensor in state.items()}
    # transformers would apply `_NAMES` backwards, to every weight.
    options |= {"state_dict": renamed, "save_original_format": False}
    type(model).save_pretrained(model, folder, **options)
    write_gathered(Path(folder), model.config, permutations)


def _rename(
    names: dict[str, str], _: nn.Module, state: dict[str, Any], prefix: str, *more: Any
) -> None:
    """Give weights with stored names, which a Trainer reads to continue, the model's names."""
    for name, stored in names.items():
        if prefix + stored in state:
            state[prefix + name] = state.pop(prefix + stored)


def _gather(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (gathered_input(module, args[0]), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": gathered_input(module, kwargs["hidden_states"])}


def gathered_input(module: nn.Module, x: Tensor) -> Tensor:
    """Return an input `(..., channels)` of a module as its gather, if it has one, permutes it."""
    permutation = module._buffers.get(_INPUT_ORDER)
    return x if permutation is None else x.index_select(-1, permutation)


def register() -> None:
    """Make gathered checkpoints known to transformers."""
    AutoConfig.register(_MODEL_TYPE, GatheredConfig, exist_ok=True)
    AutoModelForCausalLM.register(
        GatheredConfig,
        GatheredForCausalLM,  # type: ignore[arg-type]
        exist_ok=True,
    )
