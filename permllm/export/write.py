"""Writer of pruned models as checkpoints, with one file of weights in memory at a time.

Runs, the command `permllm export` and `permllm.save` use it.
"""

import argparse
import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pydantic.dataclasses
import torch
from filelock import FileLock
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers.utils.logging import set_verbosity_error

from permllm.command import Answer
from permllm.errors import ConfigError, DataError
from permllm.export.card import model_card, model_notice
from permllm.export.fold import FORMS, Form, StoredOrder, first_form, stored_order
from permllm.export.gathered import ORDERS, permuted_names, write_gathered
from permllm.export.legacy import legacy_rope, legacy_tokenizer
from permllm.export.serve import COMMAND, SETTINGS, check_serve, serving
from permllm.models.checkpoint import all_finite, parameter_names
from permllm.models.families import channel_groups
from permllm.models.selection import DENSE
from permllm.models.source import DenseSource, dense_source
from permllm.settings import values
from permllm.settings.config import Dtype, ModelConfig, NMPattern
from permllm.store.cache import cache_directory
from permllm.store.files import (
    CONFIG,
    METRICS,
    file_sha256,
    new_folder,
    read_json,
    read_yaml,
    write_json,
)
from permllm.store.tensors import Pruned, save_tensors

log = logging.getLogger(__name__)

SUMMARY = "permllm.json"


@pydantic.dataclasses.dataclass(config=values.SETTINGS, frozen=True)
class Request:
    """Settings of an export, group `export`.

    Attributes:
        form: form of the checkpoint; None: the first form that the permutations allow.
        dtype: dtype of the weights; None: the model's dtype in the run.
        shard_gb: largest size of a file, in 10^9 bytes.
        serve: server for which a file of settings is written; None: no such file.
    """

    form: Form | None = None
    dtype: Dtype | None = None
    shard_gb: values.Positive = 5.0
    serve: Literal["vllm"] | None = None


@dataclass(frozen=True)
class PrunedModel:
    """Pruned model that is read one tensor at a time.

    Attributes:
        source: the dense model.
        config: resolved settings of the run.
        metrics: metrics of the run, as in `metrics.json`.
        orders: permutations, int64 `(C_in,)`, by channel group.
        weight: function that returns the pruned weight of a linear, in original channel order, for
            its path and its dense weight.
    """

    source: DenseSource
    config: dict[str, Any]
    metrics: dict[str, Any]
    orders: dict[str, Tensor]
    weight: Callable[[str, Tensor], Tensor]


def export_run(
    directory: Path,
    request: Request,
    target: Path,
    dense: Path | None = None,
    replace: bool = False,
) -> dict[str, Any]:
    """Write the pruned model of a run.

    Args:
        directory: directory of a finished run.
        request: settings of the export.
        target: folder to write, new or empty. It appears when it is complete.
        dense: folder of the dense model; None: where the run found it.
        replace: True: replace an earlier checkpoint in the target once the new one is complete.

    Returns:
        The summary, which is also written into the target: form, pattern, bytes, seconds and more.

    Raises:
        ConfigError: the directory has no finished run, the permutations do not fold, or the target
            is not empty.
        DataError: the dense model is not the model that was pruned, or a file is damaged.
    """
    return write_checkpoint(_model_of(directory, dense), request, target, replace)


def _model_of(directory: Path, dense: Path | None) -> PrunedModel:
    if not (directory / METRICS).is_file():
        raise ConfigError(f"{directory} is not a run directory: it has no {METRICS}")
    metrics = read_json(directory / METRICS)
    config = read_yaml(directory / CONFIG)
    if metrics.get("status") != "finished":
        raise ConfigError(f"{directory} is not finished; the same command continues it")
    identity: str = metrics["model"]
    moved = {"source": "local", "path": str(dense)} if dense else {}
    model = ModelConfig(**config["model"] | moved)
    if model.source == "hub":
        model.revision = identity.split(":")[2]  # the commit, because the branch may have moved
    source = dense_source(model, config["seed"])
    if dense and not identity.startswith("local:"):
        log.warning("cannot check that %s is the model that was pruned, %s", dense, identity)
    elif source.identity != identity:
        raise DataError(
            f"{directory} was pruned from {identity}, and this model is {source.identity}"
        )
    pruned = Pruned(directory, metrics)
    return PrunedModel(source, config, metrics, pruned.orders, pruned.weight)


def write_checkpoint(
    model: PrunedModel, request: Request, target: Path, replace: bool = False
) -> dict[str, Any]:
    """Write a pruned model; arguments, result and errors are as in `export_run`.

    Processes that write the same target take turns, so that the first one gets it.
    """
    folder = target.resolve()
    digest = hashlib.sha256(str(folder).encode()).hexdigest()[:12]
    with FileLock(cache_directory() / f"export-{digest}.lock"):
        if not replace:
            _check_free(target)
        with new_folder(folder) as scratch:
            return _write(model, request, scratch)


def _check_free(target: Path) -> None:
    """Raise ConfigError unless a folder is missing, or is empty and can be replaced."""
    if not target.exists():
        return
    if not target.is_dir() or any(target.iterdir()):
        raise ConfigError(f"{target} exists already and is not empty; choose another folder")
    if target.samefile(Path.cwd()) or target.is_mount():
        raise ConfigError(f"{target} cannot be replaced; name a folder below it")


def present_export(folder: Path) -> dict[str, Any] | None:
    """Return the summary of a complete export with unchanged files; None: there is none."""
    try:
        summary = read_json(folder / SUMMARY)
        whole = all(
            file_sha256(folder / name) == digest for name, digest in summary["sha256"].items()
        )
        return summary if whole else None
    except (DataError, KeyError):
        return None


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Read the summary of an export; None: the folder is not an export of PermLLM.

    Raises:
        DataError: the summary cannot be read, or lacks a key.
    """
    file = folder / SUMMARY
    if not file.is_file():
        return None
    summary = read_json(file)
    if missing := {"sparsity", "sha256"} - summary.keys():
        raise DataError(f"{file} lacks {min(missing)}")
    return summary


def _write(model: PrunedModel, request: Request, folder: Path) -> dict[str, Any]:
    started = time.perf_counter()
    source = model.source
    sparsity = model.metrics["sparsity"]
    groups = channel_groups(source.skeleton)
    patterns = sparsity.get("patterns", {})
    form = request.form or first_form(groups, model.orders)
    stored = stored_order(form, source.skeleton, groups, model.orders)
    dtype_name = request.dtype or model.config["model"]["dtype"]
    dtype = getattr(torch, dtype_name)
    served = dict[str, int]()
    if request.serve:
        texts = {*patterns.values(), sparsity["pattern"]} - {DENSE}
        check_serve(form, dtype_name, [NMPattern.parse(text) for text in sorted(texts)])
        serving(source.skeleton, sparsity["pattern"], patterns)  # first, because it may fail
    _write_settings(source, stored, dtype, folder)  # first, because it may fail
    state = source.skeleton.state_dict()
    names = permuted_names(groups, stored.gathers)
    planned = {}
    for name in parameter_names(source.skeleton):
        stored_dtype = dtype if state[name].is_floating_point() else None
        planned[names.get(name, name)] = torch.empty_like(state[name], dtype=stored_dtype)
    members = [path for group in groups for path in group.members]
    pruned = {f"{path}.weight": path for path in members if patterns.get(path) != DENSE}
    zero_rows = set[str]()
    originals = {stored_name: name for name, stored_name in names.items()}

    def tensor_of(stored_name: str) -> Tensor:
        name = originals.get(stored_name, stored_name)
        return _stored_tensor(model, stored, dtype, pruned, zero_rows, name)

    files = write_shards(folder, planned, tensor_of, int(request.shard_gb * 1e9))
    if stored.gathers:
        files.append(ORDERS)
    if request.serve:
        settings, served = serving(source.skeleton, sparsity["pattern"], patterns, zero_rows)
        write_json(folder / SETTINGS, settings)
        files.append(SETTINGS)
    source.save_tokenizer(folder)
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.exists():  # `permllm.save` may have no tokenizer
        write_json(tokenizer, legacy_tokenizer(read_json(tokenizer)))
    summary = {
        "form": form,
        "sparsity": sparsity["pattern"],
        **({"patterns": patterns} if patterns else {}),
        "dtype": dtype_name,
        "bytes": sum(tensor.nbytes for tensor in planned.values()),
        "config_hash": model.metrics["config_hash"],
        "shard_gb": request.shard_gb,
        "gathers": len(stored.gathers),
        "serve": request.serve,
        **({"served": served} if served else {}),
        "sha256": {name: file_sha256(folder / name) for name in files},
        "seconds": time.perf_counter() - started,
    }
    write_json(folder / SUMMARY, summary)
    card = model_card(model.config, model.metrics, summary)
    (folder / "README.md").write_text(card, encoding="utf-8")
    if notice := model_notice(model.config):
        (folder / "NOTICE").write_text(f"{notice}\n", encoding="utf-8")
    return summary


def _stored_tensor(
    model: PrunedModel,
    stored: StoredOrder,
    dtype: torch.dtype,
    pruned: dict[str, str],
    zero_rows: set[str],
    name: str,
) -> Tensor:
    """Return a tensor as it is stored.

    Args:
        model: the pruned model.
        stored: stored order of the tensors.
        dtype: dtype of the stored weights.
        pruned: paths of the pruned linears by the name of their weight.
        zero_rows: the path of a pruned linear is added if its weight has a row of zeros.
        name: name of the tensor.
    """
    tensor = model.source.read(name)
    if not tensor.is_floating_point():
        return tensor
    if name in pruned:
        tensor = model.weight(pruned[name], tensor)
    cast = tensor.to(dtype)
    if not all_finite(cast):
        dtype_name = str(dtype).removeprefix("torch.")
        raise DataError(f"{name} holds values that are not finite in {dtype_name}")
    if name not in pruned:
        return stored.apply(name, cast)
    if not cast.any(-1).all():
        zero_rows.add(pruned[name])
    # Adding 0.0 turns -0.0 into +0.0, because some sparse kernels give wrong results for -0.0.
    return stored.apply(name, cast + 0.0)


def write_shards(
    folder: Path, planned: Mapping[str, Tensor], tensor_of: Callable[[str], Tensor], largest: int
) -> list[str]:
    """Write `model.safetensors`, or several files and the index that transformers reads.

    Args:
        folder: an existing folder.
        planned: tensors with the right shapes and dtypes, by name; may be on the meta device.
        tensor_of: function that returns a tensor by its name; the tensors of a file are in memory
            together.
        largest: largest size of a file in bytes, unless a single tensor is larger.

    Returns:
        The names of the files with tensors.
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
    source: DenseSource, stored: StoredOrder, dtype: torch.dtype, folder: Path
) -> None:
    config = source.skeleton.config
    vars(config).pop("auto_map", None)  # it names code that an export does not contain
    config.architectures = [type(source.skeleton).__name__]
    config.dtype = dtype
    try:
        config.save_pretrained(folder)
        source.generation.save_pretrained(folder)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"transformers cannot save the model's settings: {reason}") from error
    if stored.gathers:
        write_gathered(folder, config, stored.gathers)
    else:  # transformers 4 loads no gathered checkpoint
        file = folder / "config.json"
        write_json(file, read_json(file) | legacy_rope(config))


def work(options: argparse.Namespace) -> Answer:
    """Run the command `permllm export`."""
    set_verbosity_error()  # warnings of transformers are errors here
    names = ("form", "dtype", "shard_gb", "serve")
    settings = {name: getattr(options, name) for name in names}
    request = values.validated(Request, settings, "export")
    summary = export_run(options.run, request, options.to, options.dense)
    report = (
        f"{options.to}: {summary['bytes'] / 1e6:.1f} MB ({summary['form']}, {summary['dtype']}), "
        f"{summary['gathers']} gathers, {summary['seconds']:.1f} s"
    )
    if options.form is None:
        report += f"\n{summary['form']} is the first of {', '.join(FORMS)} that this run allows"
    if options.serve:
        report += f"\nserve it in {options.to} by: {COMMAND}"
    return Answer(summary, lambda: print(report))
