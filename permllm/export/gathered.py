"""The classes with which transformers loads gathered checkpoints. `import permllm.export` registers them.

Such a checkpoint must never load as a plain model with wrong logits. Its config.json therefore
carries a model type of its own and, where a plain config has its width, a text that says what to
import; the dense model's config lies inside, under `dense_config`. A plain class refuses the text,
`AutoModelForCausalLM` the type, and both errors quote them.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from permllm.errors import DataError
from permllm.models.checkpoint import META, TRIPWIRES, check_checkpoint, check_values
from permllm.models.discovery import causal_types
from permllm.models.families import channel_groups, family_names
from permllm.runtime.version import __version__

# No name to install: nobody vouches for what a package index has under it.
_HINT = "make a checkout of the project importable and import permllm.export before loading this checkpoint"
# Of what `from_pretrained` takes: where on the hub a checkpoint is, and how it may be had.
_HUB = ("revision", "cache_dir", "token", "local_files_only", "force_download")


def model_type_of(dense_type: str) -> str:
    """Model type of a gathered model of a family; transformers quotes it when it does not know it.

    The same in all versions but for the hint, so that any of them knows the checkpoints of those
    before.
    """
    return f"{dense_type}, N:M sparse, written by PermLLM (arXiv 2510.10136): {_HINT}"


def writer() -> str:
    """The project and version that writes checkpoints."""
    return f"PermLLM {__version__} (arXiv 2510.10136)"


def sparse_config(dense: PreTrainedConfig, gathers: list[str]) -> PreTrainedConfig:
    """The config of a gathered model.

    Args:
        dense: the dense model's.
        gathers: paths of the modules whose input is gathered.
    """
    settings = {
        key: value
        for key, value in dense.to_dict().items()
        if key not in ("model_type", "architectures")
    }
    config = _config_class(dense.model_type)(**settings)
    config.gathers = gathers
    return config


class _SparseConfig:
    """Mixed into the config class of a family: how it is written and read."""

    gathers: list[str]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        inner = config_dict.get("dense_config")
        if inner is not None:
            config_dict = {
                key: value
                for key, value in config_dict.items()
                if key not in ("dense_config", *TRIPWIRES)
            } | inner
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        inner = json.loads(self.to_json_string(use_diff=use_diff))  # type: ignore[attr-defined]
        outer = {
            key: inner.pop(key)
            for key in ("model_type", "architectures", "transformers_version")
            if key in inner
        }
        written = (
            outer
            | dict.fromkeys(TRIPWIRES, f"written by {writer()}: {_HINT}")
            | {"dense_config": inner}
        )
        Path(json_file_path).write_text(
            json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )


class _SparseModel:
    """Mixed into the model class of a family: gathers its activations, and is never loaded from files that lack something."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        attached: set[str] = set()
        for path in config.gathers:
            channels = _width_of(self, path)  # type: ignore[arg-type]
            if path in attached:
                raise DataError(f"gathers names {path} twice: its input would be gathered twice")
            attached.add(path)
            attach_gather(self.get_submodule(path), channels)  # type: ignore[attr-defined]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers.

        Raises:
            DataError: the files lack a tensor, hold one too many or of another shape or kind, are
                not as they were written, or hold values that are not finite or orders that are no
                permutations; the tensor is named.
        """
        # Without values nothing is computed: what the files lack is then in the report that the
        # caller can ask for.
        without_values = kwargs.get("device_map") == META
        if pretrained_model_name_or_path is not None and not without_values:
            folder = Path(pretrained_model_name_or_path)
            if not folder.is_dir():
                hub = {name: kwargs[name] for name in _HUB if kwargs.get(name) is not None}
                patterns = ["*.json", "*.safetensors"]
                folder = Path(
                    snapshot_download(
                        str(pretrained_model_name_or_path), allow_patterns=patterns, **hub
                    )
                )
            check_checkpoint(folder / kwargs.get("subfolder", ""))
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        check_values(pretrained_model_name_or_path, model)
        return loaded


def attach_gather(module: nn.Module, channels: int) -> None:
    """Give a module a buffer `input_order`, int32 `(channels,)`, and permute its input's last dimension by it."""
    module.register_buffer("input_order", torch.arange(channels, dtype=torch.int32))
    module.register_forward_pre_hook(_gather, with_kwargs=True)


def gathered_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose input is gathered, by path."""
    return {
        path: module for path, module in model.named_modules() if "input_order" in module._buffers
    }


def _gather(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    order: Tensor = module.input_order  # type: ignore[assignment]
    if args:
        return (args[0].index_select(-1, order), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": kwargs["hidden_states"].index_select(-1, order)}


def _width_of(model: nn.Module, path: str) -> int:
    for group in channel_groups(model):
        if path in [group.prefix + reader for reader in group.table.readers]:
            return group.channels
    raise DataError(f"{path} is no module whose input can be gathered")


def register() -> None:
    """Make gathered models known to transformers: of all families, and of other types once one is read."""
    for dense_type in family_names():
        if dense_type in CONFIG_MAPPING:  # a package's may be for another transformers
            _config_class(dense_type)
    for dense_type in causal_types():
        label = model_type_of(dense_type)
        if label not in CONFIG_MAPPING:
            AutoConfig.register(
                label, type("SparseConfigOnDemand", (_OnDemand,), {"dense_type": dense_type})
            )


class _OnDemand:
    """In the place of a config class: what transformers has for a type is imported where one is read."""

    dense_type: str

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return _config_class(cls.dense_type).from_dict(config_dict, **kwargs)


def __getattr__(name: str) -> Any:
    """A class of `_config_class` that a pickle asks for, of a type that none has been read of yet."""
    found = re.fullmatch(r"Sparse(\w+?)(Config|ForCausalLM)", name)
    kinds = causal_types() if found else ()
    dense = next(
        (kind for kind in kinds if found and CONFIG_MAPPING[kind].__name__ == f"{found[1]}Config"),
        None,
    )
    if dense is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _config_class(dense)
    return globals()[name]


def _config_class(dense_type: str) -> Any:
    """The config class of gathered models of a type; it and the model class are known to transformers after."""
    label = model_type_of(dense_type)
    if label in CONFIG_MAPPING and not issubclass(CONFIG_MAPPING[label], _OnDemand):
        return CONFIG_MAPPING[label]
    dense_config: Any = CONFIG_MAPPING[dense_type]
    dense_model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[dense_config]
    defaults = {"model_type": label, "dense_type": dense_type, "gathers": []}
    name = dense_config.__name__.removesuffix("Config")
    config = type(f"Sparse{name}Config", (_SparseConfig, dense_config), defaults)
    model = type(f"Sparse{name}ForCausalLM", (_SparseModel, dense_model), {"config_class": config})
    globals().update(
        {one.__name__: one for one in (config, model)}
    )  # by these names a pickle finds them
    AutoConfig.register(label, config, exist_ok=True)
    AutoModelForCausalLM.register(config, model)
    return config
