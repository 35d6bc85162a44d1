"""Settings with which vLLM multiplies a folded checkpoint's 2:4 linears by FP8 kernels of torchao.

vLLM reads them from a file beside the checkpoint, and rounds the weights while it loads them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from permllm.config import NMPattern
from permllm.errors import ConfigError
from permllm.models.families import ChannelGroup
from permllm.models.selection import DENSE

log = logging.getLogger(__name__)

SERVERS = ("vllm",)
SETTINGS = "torchao_sparse24.json"
# Versions whose code we read, or whose settings a test of ours reads.
READERS = "vLLM 0.20.2 and 0.33.0, with torchao 0.18.0"
COMMAND = (
    "vllm serve . --quantization torchao --dtype bfloat16 --hf-overrides "
    f'\'{{"quantization_config_file": "{SETTINGS}"}}\''
)
# The kernel's metadata comes in tiles of so many rows and channels, and torchao refuses others.
_ROWS, _CHANNELS = 64, 128
# Linears that vLLM joins into one.
_JOINED = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj")
_JOINED |= dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj")


def _of_type(kind: str, data: Any, version: int | None = None) -> dict[str, Any]:
    """Return a value as torchao writes it into JSON."""
    versions = {} if version is None else {"_version": version}
    return {"_type": kind, **versions, "_data": data}


_BY_ROW = _of_type("PerRow", {"dim": -1}, 1)
# `config_to_dict` of torchao 0.18.0 for FP8 and 2:4, where torchao is not installed.
KEPT = _of_type(
    "Float8DynamicActivationFloat8WeightConfig",
    {
        "activation_dtype": _of_type("torch.dtype", "float8_e4m3fn"),
        "weight_dtype": _of_type("torch.dtype", "float8_e4m3fn"),
        "granularity": [_BY_ROW, _BY_ROW],
        "packing_format": _of_type("Float8PackingFormat", "SPARSE_2D_DATA_2D_METADATA"),
        "mm_config": _of_type(
            "Float8MMConfig", {"emulate": False, "use_fast_accum": True, "pad_inner_dim": False}, 1
        ),
        "activation_value_lb": None,
        "activation_value_ub": None,
        "kernel_preference": _of_type("KernelPreference", "AUTO"),
        "set_inductor_config": True,
        "alg_id": 0,
    },
    2,
)


@dataclass(frozen=True)
class Serving:
    """Linears of a model as vLLM has them, which joins some.

    Attributes:
        sparse: regular expression of the module paths that FP8 and 2:4 kernels multiply.
        dense: module paths that vLLM leaves in bfloat16.
        counts: number of linears that the kernels multiply (`sparse`), and of `all`.
    """

    sparse: str
    dense: list[str]
    counts: dict[str, int]

    def settings(self) -> dict[str, Any]:
        """Return the content of the file `SETTINGS`, which torchao makes where it is installed."""
        try:
            return _by_torchao(self.sparse, self.dense)
        except ImportError:  # or it is older than the kernels
            pass
        by_name = {self.sparse: KEPT, **dict.fromkeys(self.dense)}
        return _of_type(
            "FqnToConfig", {"fqn_to_config": by_name, "module_fqn_to_config": by_name}, 1
        )


def _by_torchao(sparse: str, dense: Iterable[str]) -> dict[str, Any]:
    for noisy in ("torchao", "torch.utils._pytree"):  # about kernels that only a GPU has
        logging.getLogger(noisy).setLevel(logging.ERROR)
    from torchao.core.config import config_to_dict
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        FqnToConfig,
        PerRow,
    )
    from torchao.quantization.quantize_.workflows import Float8PackingFormat

    config = Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow(), packing_format=Float8PackingFormat.SPARSE_2D_DATA_2D_METADATA
    )
    found: dict[str, Any] = config_to_dict(FqnToConfig({sparse: config, **dict.fromkeys(dense)}))
    return found


def check_serve(form: str, dtype: str, patterns: Collection[NMPattern]) -> None:
    """Raise ConfigError unless vLLM serves a checkpoint of this form, dtype, N:M of linears."""
    if not any(map(_two_of_four, patterns)):
        its = ", ".join(map(str, patterns))
        raise ConfigError(f"export.serve=vllm: no kernel multiplies {its}; set sparsity=2:4")
    if form != "folded":
        raise ConfigError(
            f"export.serve=vllm: no server loads the form {form}; set export=folded and "
            "permutation.constraint=foldable"
        )
    if dtype != "bfloat16":
        raise ConfigError(
            f"export.serve=vllm: its kernels take bfloat16, not {dtype}; set export.dtype=bfloat16"
        )


@dataclass
class _Linear:
    """Linear of vLLM: its layer, the linears that it joins, and their common sizes."""

    prefix: str
    channels: int
    paths: list[str] = field(default_factory=list)
    rows: int = 0
    sparse: bool = True


def serving(groups: Iterable[ChannelGroup], pattern: str, patterns: Mapping[str, str]) -> Serving:
    """Return which linears of a model vLLM multiplies by FP8 and 2:4 kernels.

    Args:
        groups: channel groups of the model, all layers.
        pattern: N:M of the linears that are not in `patterns`.
        patterns: N:M by linear, or `dense`.

    Raises:
        ConfigError: there is none.
    """
    linears: dict[str, _Linear] = {}
    for group in groups:
        for path, rows in zip(group.members, group.rows, strict=True):
            parent, _, name = path.rpartition(".")
            served = f"{parent}.{_JOINED.get(name, name)}"
            linear = linears.setdefault(served, _Linear(group.prefix, group.channels))
            linear.paths.append(path)
            linear.rows += rows
            its = patterns.get(path, pattern)
            linear.sparse &= its != DENSE and _two_of_four(NMPattern.parse(its))
    kinds, layers = dict[str, None](), ""
    dense, unfit, count = list[str](), list[str](), 0
    for name, linear in linears.items():
        names = dict.fromkeys([name, *linear.paths])
        fits = linear.rows % _ROWS == linear.channels % _CHANNELS == 0
        if linear.sparse and fits:
            layers = linear.prefix.rstrip(".").rpartition(".")[0]
            kinds |= dict.fromkeys(re.escape(one.removeprefix(linear.prefix)) for one in names)
            count += 1
        else:
            dense += names
            unfit += [name] * linear.sparse
    if not count:
        raise ConfigError(
            f"export.serve=vllm: its kernels need rows that {_ROWS} divides and channels that "
            f"{_CHANNELS} divides, which no 2:4 linear of this model has; leave export.serve out"
        )
    if unfit:
        log.warning(
            "vLLM leaves %s of %s linears dense, such as %s: its kernels need rows that %s divides "
            "and channels that %s divides; keep_dense would leave their weights whole",
            *(len(unfit), len(linears), unfit[0], _ROWS, _CHANNELS),
        )
    sparse = rf"re:{re.escape(layers)}\.\d+\.(?:{'|'.join(kinds)})"
    return Serving(sparse, dense, {"sparse": count, "all": len(linears)})


def _two_of_four(pattern: NMPattern) -> bool:
    """Tell whether weights of a pattern are 2:4."""
    return 4 % pattern.m == 0 and 2 * pattern.n <= pattern.m
