"""Proof that a checkpoint is N:M sparse as it is stored, and whole.

Any folder that transformers can load from safetensors files, ours or not, one tensor at a time: the
files hold what the config asks for and nothing else, floating-point numbers, all finite, every
order a permutation, every linear N:M as an export of ours says of it, or dense where it says that.
With `--against DENSE` also the difference of the logits from another model's: of a folded model
from its `simulate` form none, from the dense model what pruning costs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from permllm.config import NMPattern
from permllm.errors import ConfigError, DataError
from permllm.export.checkpoint import SUMMARY
from permllm.models.checkpoint import (
    ORDER,
    all_finite,
    odd_formats,
    read_weights,
    skeleton_of,
    tensor_places,
    transformers_reads,
    weight_files,
)
from permllm.models.families import decoder_layers, family_of
from permllm.models.schema import ExportSummary, read_json
from permllm.models.selection import DENSE
from permllm.runs.files import file_sha256
from permllm.runs.tensors import check_order, load_tensor, violations

_SEQUENCES, _LENGTH = 4, 64

Places = dict[str, tuple[Path, str]]


@dataclass
class LayerReport:
    """What one weight is.

    Attributes:
        name: of the tensor.
        shape: `(C_out, C_in)`.
        zeros: share of zeros.
        violations: groups of M with more than N nonzeros, in stored order; None where M does not
            divide C_in.
        negative_zeros: entries that are -0.0.
        nan: entries that are not finite.
        pattern: N:M that it should be.
    """

    name: str
    shape: tuple[int, int]
    zeros: float
    violations: int | None
    negative_zeros: int
    nan: int
    pattern: str

    def problems(self) -> list[str]:
        """What is wrong with it, a line each."""
        pattern = NMPattern.parse(self.pattern)
        found = [f"{self.name} holds values that are not finite"] if self.nan else []
        if self.violations is None:
            found.append(
                f"{self.name} has {self.shape[1]} inputs, which M = {pattern.m} does not divide"
            )
        elif self.violations:
            found.append(
                f"{self.name} has {self.violations} groups of {pattern.m} with more than {pattern.n} nonzeros"
            )
        if self.negative_zeros:
            found.append(f"{self.name} holds {self.negative_zeros} zeros as -0.0")
        return found


@dataclass
class Report:
    """What a checkpoint is.

    Attributes:
        pattern: N:M that was asked for.
        layers: every weight that should be sparse.
        dense: those of linears that the checkpoint says are not.
        bytes: of all files with weights.
        checksums: contents were compared with the sha256 that an export states.
        problems: everything that is wrong, a line each.
        difference: of the logits from another model's; None where none was asked for.
    """

    pattern: str
    layers: list[LayerReport]
    bytes: int
    checksums: bool
    problems: list[str]
    dense: list[str] = field(default_factory=list)
    difference: dict[str, float] | None = None

    @property
    def passed(self) -> bool:
        """The files hold what the config asks for, all finite, N:M wherever it should be, no -0.0."""
        return not self.problems


def verify(folder: Path, pattern: NMPattern | None = None, against: Path | None = None) -> Report:
    """Examine a checkpoint.

    Args:
        folder: a config.json and safetensors files.
        pattern: N:M of every linear; None takes what our exports state of each, else 2:4.
        against: another checkpoint, whose logits are compared.

    Raises:
        DataError: the config or the files are missing, truncated, corrupt, or not what they should
            be.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder")
    files = weight_files(folder)
    if files[0].suffix != ".safetensors":
        raise DataError(f"{folder} has no safetensors files: {files[0].name} cannot be verified")
    places = tensor_places(files)
    summary = _summary(folder)
    for file in tqdm(
        files if summary else [], desc="sha256", unit="file", leave=False, disable=None
    ):
        if summary and file_sha256(file) != summary["sha256"].get(file.name):
            raise DataError(f"{file} is not what was written (its sha256 differs)")
    stated = Stated(pattern) if pattern else stated_patterns(folder)
    skeleton, differences = skeleton_of(folder)
    problems = [f"it {what} {name}" for what, names in differences.each() for name in names]
    odd = odd_formats({name: found for name, (_, found) in places.items()}, skeleton)
    problems += [f"{name} is {found}" for name, found in odd.items()]
    problems += _against_summary(folder, places, skeleton)
    suffixes, expected = _linears(skeleton)
    layers: list[LayerReport] = []
    for name in tqdm(
        sorted(places.keys() - odd.keys()), desc="tensors", unit="tensor", leave=False, disable=None
    ):
        try:
            layers += _examine(name, places, stated, suffixes)
        except DataError as error:
            problems.append(str(error))
    dense = [
        name for name in sorted(places) if name.endswith(".weight") and stated.of(name) is None
    ]
    if not layers or expected not in (None, len(layers) + len(dense)):
        without = f" beside {len(dense)} that stay dense" if dense else ""
        problems.append(
            f"{len(layers)} weights of linears could be examined{without}, of {expected or 'any'}"
        )
    comparable = not problems
    problems += [problem for layer in layers for problem in layer.problems()]
    size = sum(file.stat().st_size for file in files)
    report = Report(str(stated.pattern), layers, size, summary is not None, problems, dense)
    if against is not None and comparable:
        report.difference = logits_difference(folder, against)
        if not all(math.isfinite(value) for value in report.difference.values()):
            problems.append(f"the difference of its logits from those of {against} is not finite")
    return report


def logits_difference(first: Path, second: Path) -> dict[str, float]:
    """How much the logits of two checkpoints differ on random tokens, in float32.

    Returns:
        `largest` and `relative`, the norm of the difference over that of the second's; `kl`, nats a
        token, from the second's distribution to the first's; `agreement`, share of tokens with the
        same most likely successor.
    """
    generator = torch.Generator().manual_seed(0)
    tokens: Tensor | None = None
    vocabulary = 0
    logits = []
    for folder in (first, second):
        model = read_weights(folder, torch.float32, torch.device("cpu")).eval()
        if tokens is None:
            vocabulary = model.config.vocab_size
            tokens = torch.randint(vocabulary, (_SEQUENCES, _LENGTH), generator=generator)
        elif model.config.vocab_size != vocabulary:
            raise ConfigError(
                f"{first} and {second} have vocabularies of {vocabulary} and {model.config.vocab_size} tokens"
            )
        with transformers_reads(folder), torch.no_grad():
            logits.append(model(input_ids=tokens).logits.double())
    ours, theirs = logits
    return {
        "largest": float((ours - theirs).abs().max()),
        "relative": float((ours - theirs).norm() / theirs.norm()),
        "kl": float(
            torch.nn.functional.kl_div(
                ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="none"
            )
            .sum(-1)
            .mean()
        ),
        "agreement": float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()),
    }


@dataclass(frozen=True)
class Stated:
    """What a checkpoint says of its linears.

    Attributes:
        pattern: N:M.
        others: the same by linear, or `dense`, of those that are not as the rest.
    """

    pattern: NMPattern
    others: Mapping[str, str] = field(default_factory=dict)

    def of(self, weight: str) -> NMPattern | None:
        """N:M of a linear by the name of its weight; None of one that stays dense."""
        text = self.others.get(weight.removesuffix(".weight"))
        return self.pattern if text is None else None if text == DENSE else NMPattern.parse(text)

    def all(self) -> set[NMPattern | None]:
        """Every one that some linear may be."""
        return {self.pattern, *map(self.of, self.others)}


def stated_patterns(folder: Path) -> Stated:
    """N:M as an export of ours states it; 2:4 where nothing does."""
    summary = _summary(folder)
    return (
        Stated(NMPattern.parse(summary["sparsity"]), summary.get("patterns", {}))
        if summary
        else Stated(NMPattern(2, 4))
    )


def _summary(folder: Path) -> ExportSummary | None:
    file = folder / SUMMARY
    return read_json(file, ExportSummary) if file.is_file() else None


def _against_summary(folder: Path, places: Places, skeleton: PreTrainedModel) -> list[str]:
    """In what a checkpoint is not the one that its `permllm.json` is of."""
    summary = _summary(folder)
    if summary is None:
        return []
    strange = [name for name in summary.get("patterns", {}) if f"{name}.weight" not in places]
    if strange:
        return [f"{SUMMARY} has a pattern of {name}, which has no weight" for name in strange]
    found: dict[str, object] = {
        "gathers": len(getattr(skeleton.config, "gathers", [])),
        "bytes": sum(_read(name, places).nbytes for name in places),
    }
    return [
        f"{SUMMARY} says {key}={summary[key]}, and the checkpoint has {value}"  # type: ignore[literal-required]
        for key, value in found.items()
        if summary[key] != value  # type: ignore[literal-required]
    ]


def _linears(skeleton: PreTrainedModel) -> tuple[tuple[str, ...], int | None]:
    """How the names of the weights end that should be sparse, and how many there are; None of a family that we do not know.

    Raises:
        DataError: it stores weights with inputs along the rows, where N:M would be looked for along
            the wrong axis.
    """
    try:
        family = family_of(skeleton)
    except ConfigError:
        if any(isinstance(module, Conv1D) for module in skeleton.modules()):
            raise DataError(
                f"{type(skeleton).__name__} stores weights as (C_in, C_out): they cannot be verified"
            ) from None
        head = skeleton.get_output_embeddings()
        linears = [
            name
            for name, module in skeleton.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        ]
        return tuple(f".{name}.weight" for name in linears), None
    members = [member for group in family.groups for member in group.members]
    return tuple(f".{member}.weight" for member in members), len(members) * len(
        decoder_layers(skeleton)
    )


def _examine(
    name: str, places: Places, stated: Stated, suffixes: tuple[str, ...]
) -> list[LayerReport]:
    """Look at a tensor; a report where it should be sparse.

    Raises:
        DataError: it is not finite, or no permutation.
    """
    tensor = _read(name, places)
    if name.endswith(ORDER):
        check_order(name, tensor)
        return []
    sparse = f".{name}".endswith(suffixes)
    pattern = stated.of(name)
    if not sparse or not pattern or tensor.dim() != 2 or not tensor.numel():
        if tensor.is_floating_point() and tensor.numel() and not all_finite(tensor):
            raise DataError(f"{name} holds values that are not finite")
        return []
    rows, channels = tensor.shape
    divides = channels % pattern.m == 0
    return [
        LayerReport(
            name=name,
            shape=(rows, channels),
            zeros=1 - int(tensor.count_nonzero()) / tensor.numel(),
            violations=violations(tensor, None, pattern) if divides else None,
            negative_zeros=_negative_zeros(tensor),
            nan=0 if all_finite(tensor) else int((~tensor.isfinite()).sum()),
            pattern=str(pattern),
        )
    ]


def _negative_zeros(tensor: Tensor) -> int:
    """How many numbers are -0.0: their bits are the least integer of their size."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int((tensor.view(bits) == torch.iinfo(bits).min).sum())


def _read(name: str, places: Places) -> Tensor:
    return load_tensor(places[name][0], name)
