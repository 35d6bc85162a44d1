"""Writer of pruned models as checkpoints, with one file of weights in memory at a time.

Runs, the command `permllm export` and `permllm.save` use it.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn

from permllm.errors import ConfigError, DataError
from permllm.export.card import model_card, model_notice
from permllm.export.fold import StoredOrder, stored_order
from permllm.export.gathered import GATHERS, permuted_names, write_gathered
from permllm.export.legacy import legacy_rope, legacy_tokenizer
from permllm.export.serve import SETTINGS, check_serve, groups_on_kernels, serving
from permllm.models.checkpoint import all_finite, parameter_names
from permllm.models.families import ChannelGroup, channel_groups
from permllm.models.selection import recorded_groups
from permllm.models.source import DenseSource, dense_source
from permllm.runtime.files import cache_lock, file_sha256
from permllm.settings.config import ExportConfig, ModelConfig, NMPattern
from permllm.settings.identity import digest_of
from permllm.settings.values import validated
from permllm.store.files import (
    CONFIG,
    METRICS,
    SUMMARY,
    new_folder,
    read_json,
    read_yaml,
    write_json,
    write_text,
)
from permllm.store.tensors import PrunedTensors, save_tensors


@dataclass(frozen=True)
class PrunedSource:
    """Pruned model that is read one tensor at a time.

    Attributes:
        config: resolved settings of the run.
        metrics: metrics of the run, as in `metrics.json`.
        permutations: permutations, int64 `(C_in,)`, by channel group.
        weight: function that returns the pruned weight of a linear, in original channel order, for
            its path and its dense weight.
    """

    dense: DenseSource
    config: dict[str, Any]
    metrics: dict[str, Any]
    permutations: dict[str, Tensor]
    weight: Callable[[str, Tensor], Tensor]


def export_run(
    directory: Path, settings: ExportConfig, target: Path, overwrite: bool = False
) -> dict[str, Any]:
    """Write the pruned model of a run.

    Args:
        directory: directory of a finished run.
        settings: settings of the export.
        target: folder to write, new or empty. It appears when it is complete.
        overwrite: True: replace an earlier checkpoint in the target once the new one is complete.

    Returns the summary, which is also in the target: form, pattern, bytes, seconds and more.

    Raises:
        ConfigError: the directory has no finished run, the permutations do not fold, or the target
            is not empty.
        DataError: the dense model is not the model that was pruned, or a file is damaged.
    """
    metrics, config = finished_record(directory)
    original = dense_source(validated(ModelConfig, config["model"], "model"), config["seed"])
    pruned = PrunedTensors(directory, metrics, original.identity)
    source = PrunedSource(original, config, metrics, pruned.permutations, pruned.weight)
    return write_checkpoint(source, settings, target, overwrite)


def read_record(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the metrics and settings of a run. Raise DataError if a file is missing or damaged."""
    metrics = read_json(directory / METRICS)
    config = read_yaml(directory / CONFIG)
    if config["model"]["source"] == "hub" and "model" in metrics:
        # The commit, because the branch may have moved. A run that still loads has none.
        config["model"]["revision"] = metrics["model"].split(":")[2]
    return metrics, config


def finished_record(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the metrics and the settings of a run; raise ConfigError if it is not finished."""
    metrics, config = read_record(directory)
    if metrics["status"] != "finished":
        raise ConfigError(f"{directory} is not finished; the same command continues it")
    return metrics, config


def write_checkpoint(
    source: PrunedSource, settings: ExportConfig, target: Path, overwrite: bool = False
) -> dict[str, Any]:
    """Write a pruned model; arguments, result and errors are as in `export_run`."""
    started = time.perf_counter()
    model = source.dense.skeleton
    sparsity = source.metrics["sparsity"]
    groups = channel_groups(model)
    pruned = recorded_groups(groups, sparsity.get("patterns", {}))
    stored = stored_order(settings.form, model, groups, source.permutations)
    dtype = settings.dtype or source.config["model"]["dtype"]
    settings = replace(settings, form=stored.form, dtype=dtype)
    fitting: list[ChannelGroup] = []
    if settings.serve:
        check_serve(settings)
        pattern = NMPattern.parse(sparsity["pattern"])
        fitting = groups_on_kernels(model.config.model_type, groups, pruned, pattern)
    tensors = _StoredTensors(source, stored, groups, pruned, getattr(torch, dtype))
    planned = tensors.planned()
    with new_export(target, overwrite) as folder:
        _write_settings(source.dense, stored, tensors.dtype, folder)
        files = write_shards(folder, planned, tensors.read, int(settings.shard_gb * 1e9))
        if stored.gathers:
            files.append(GATHERS)
        summary = {
            **asdict(settings),
            "sparsity": sparsity["pattern"],
            "bytes": sum(tensor.nbytes for tensor in planned.values()),
            "config_hash": source.metrics["config_hash"],
            "gathers": len(stored.gathers),
        }
        if "patterns" in sparsity:
            summary["patterns"] = sparsity["patterns"]
        if settings.serve:
            content, summary["served"] = serving(groups, fitting, tensors.zero_rows)
            write_json(folder / SETTINGS, content)
            files.append(SETTINGS)
        summary["sha256"] = {name: file_sha256(folder / name) for name in files}
        summary["seconds"] = time.perf_counter() - started
        write_json(folder / SUMMARY, summary)
        write_text(folder / "README.md", model_card(source.config, source.metrics, summary))
        if notice := model_notice(source.config):
            write_text(folder / "NOTICE", f"{notice}\n")
    return summary


@contextmanager
def new_export(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder, which becomes the target at the end; errors as `export_run`.

    Processes that write the same target take turns, so that the first one gets it.
    """
    folder = target.resolve()
    digest = digest_of({"folder": str(folder)})
    with cache_lock(f"export-{digest}"):
        if target.exists() and not overwrite:
            is_fixed = target.samefile(Path.cwd()) or target.is_mount()
            if is_fixed or not target.is_dir() or any(target.iterdir()):
                raise ConfigError(
                    f"{target} is not empty, or cannot be replaced; choose another folder"
                )
        with new_folder(folder) as scratch:
            yield scratch


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Read the summary of an export; None: the folder is not an export of PermLLM.

    Raises DataError if it cannot be read, or lacks the pattern or the digests.
    """
    file = folder / SUMMARY
    if not file.is_file():
        return None
    summary = read_json(file)
    if lacking := {"sparsity", "sha256"} - summary.keys():
        raise DataError(f"{file} lacks {min(lacking)}")
    return summary


def check_files(folder: Path, summary: dict[str, Any]) -> None:
    """Raise DataError unless the files of an export are those that its summary states."""
    digests = summary["sha256"]
    for name in sorted(digests.keys() | {file.name for file in folder.glob("*.safetensors")}):
        if file_sha256(folder / name) != digests.get(name):
            raise DataError(f"{folder / name} was changed after the export (its sha256 differs)")


def present_export(folder: Path) -> dict[str, Any] | None:
    """Return the summary of a complete export with unchanged files; None: there is none."""
    try:
        summary = read_summary(folder)
        if summary:
            check_files(folder, summary)
        return summary
    except DataError:
        return None


def write_card(folder: Path, directory: Path, summary: dict[str, Any]) -> None:
    """Write the model card of an export again, with the present evaluation of its run."""
    metrics, config = read_record(directory)
    write_text(folder / "README.md", model_card(config, metrics, summary))


class _StoredTensors:
    """Tensors of a checkpoint as they are stored.

    Attributes:
        dtype: dtype of the stored weights.
        zero_rows: paths of modules, of those read, whose weight has a row of zeros.
    """

    def __init__(
        self,
        source: PrunedSource,
        stored: StoredOrder,
        groups: list[ChannelGroup],
        pruned: list[ChannelGroup],
        dtype: torch.dtype,
    ) -> None:
        self.dtype = dtype
        self.zero_rows: set[str] = set()
        self._source = source
        self._stored = stored
        self._pruned = {path for group in pruned for path in group.members}
        permuted = permuted_names(groups, stored.gathers)
        # Names in the model by stored name.
        self._names = {
            permuted.get(name, name): name for name in parameter_names(source.dense.skeleton)
        }

    def planned(self) -> dict[str, Tensor]:
        """Return tensors of the stored shapes and dtypes on the meta device, by stored name."""
        model: nn.Module = self._source.dense.skeleton
        state = model.to(self.dtype).state_dict()
        return {stored_name: state[name] for stored_name, name in self._names.items()}

    def read(self, stored_name: str) -> Tensor:
        """Return a tensor by its stored name. Raise DataError if it is not finite in the dtype."""
        name = self._names[stored_name]
        tensor = self._source.dense.read(name)
        if not tensor.is_floating_point():
            return tensor
        path = name.removesuffix(".weight")
        is_pruned = path in self._pruned
        if is_pruned:
            tensor = self._source.weight(path, tensor)
        tensor = tensor.to(self.dtype)
        if not all_finite(tensor):
            raise DataError(f"{name} holds values that are not finite in {self.dtype}")
        if not tensor.any(-1).all():
            self.zero_rows.add(path)
        if is_pruned:
            # Turns -0.0 into +0.0, because some sparse kernels give wrong results for -0.0.
            tensor = tensor + 0.0
        return self._stored.apply(name, tensor)


def write_shards(
    folder: Path, planned: Mapping[str, Tensor], tensor_of: Callable[[str], Tensor], largest: int
) -> list[str]:
    """Write `model.safetensors`, or several files and the index that transformers reads.

    Args:
        folder: an existing folder.
        planned: tensors with the right shapes and dtypes, by name; may be on the meta device.
        tensor_of: function that returns a tensor by its name; those of a file are held together.
        largest: largest size of a file in bytes, unless a single tensor is larger.

    Returns the names of the files with tensors.
    """
    split = split_torch_state_dict_into_shards(
        dict(planned), filename_pattern="model{suffix}.safetensors", max_shard_size=largest
    )
    for file, names in split.filename_to_tensors.items():
        save_tensors(folder / file, {name: tensor_of(name) for name in names})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
    return list(split.filename_to_tensors)


def _write_settings(
    dense: DenseSource, stored: StoredOrder, dtype: torch.dtype, folder: Path
) -> None:
    """Write all but the weights that transformers reads, first, because this may fail."""
    config = dense.skeleton.config
    vars(config).pop("auto_map", None)  # it names code that an export does not contain
    config.architectures = [type(dense.skeleton).__name__]
    config.dtype = dtype
    try:
        config.save_pretrained(folder)
        dense.skeleton.generation_config.save_pretrained(folder)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"transformers cannot save the model's settings: {reason}") from error
    if stored.gathers:
        write_gathered(folder, config, stored.gathers)
    else:  # transformers 4 loads no gathered checkpoint
        file = folder / "config.json"
        write_json(file, read_json(file) | legacy_rope(config))
    dense.save_tokenizer(folder)
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.exists():  # `permllm.save` may have no tokenizer
        write_json(tokenizer, legacy_tokenizer(read_json(tokenizer)))
