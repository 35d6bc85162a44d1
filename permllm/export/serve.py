"""Settings by which vLLM runs a folded checkpoint's 2:4 linears on FP8 kernels of torchao.

vLLM reads the settings from a file in the checkpoint's folder. It rounds the weights to FP8 while
it loads them.
"""

import logging
import re
from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet
from functools import cache
from typing import Any

from transformers import PreTrainedModel

from permllm.errors import ConfigError
from permllm.models.families import ChannelGroup, channel_groups
from permllm.models.selection import DENSE
from permllm.settings.config import NMPattern

log = logging.getLogger(__name__)

SETTINGS = "torchao_sparse24.json"
# Versions that read the file: vLLM by our reading of its code, torchao in a test.
READERS = "vLLM 0.20.2 and 0.33.0, with torchao 0.18.0"
COMMAND = (
    "vllm serve . --quantization torchao --dtype bfloat16 --hf-overrides "
    f'\'{{"quantization_config_file": "{SETTINGS}"}}\''
)
# torchao 0.18.0's kernels need multiples of these numbers. Metadata comes in tiles of 64 rows and
# 128 channels. Tiles may be padded along the channels since torchao 0.16, but not along the rows.
_ROWS = 64
_CHANNELS = 32
# Model types that vLLM runs through its Transformers backend.
_THROUGH_TRANSFORMERS = ("olmo2", "smollm3")
# Names of linears that vLLM joins, and the names of the joined linears.
_JOINED = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj")
_JOINED |= dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj")


def _of_type(kind: str, data: Any, version: int | None = None) -> dict[str, Any]:
    """Return a value in the form in which torchao writes it into JSON."""
    versions = {} if version is None else {"_version": version}
    return {"_type": kind, **versions, "_data": data}


# Least magnitude for the scale of a token. Without it torchao would make NaN of a token of zeros.
_LEAST = 1e-12
_BY_ROW = _of_type("PerRow", {"dim": -1}, 1)
# Result of torchao 0.18.0's `config_to_dict` for FP8 and 2:4, used if torchao is not installed.
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
        "activation_value_lb": _LEAST,
        "activation_value_ub": None,
        "kernel_preference": _of_type("KernelPreference", "AUTO"),
        "set_inductor_config": True,
        "alg_id": 0,
    },
    2,
)


def check_serve(form: str, dtype: str, patterns: Collection[NMPattern]) -> None:
    """Raise ConfigError unless vLLM can serve a checkpoint of this form, dtype and N:M."""
    if not any(map(_two_of_four, patterns)):
        names = ", ".join(map(str, patterns))
        raise ConfigError(f"export.serve=vllm: no kernel multiplies {names}; set sparsity=2:4")
    if form != "folded":
        raise ConfigError(
            f"export.serve=vllm: vLLM does not load export={form}; set export=folded and "
            "permutation.constraint=foldable"
        )
    if dtype != "bfloat16":
        raise ConfigError(
            f"export.serve=vllm: the kernels do not take {dtype}; set export.dtype=bfloat16"
        )


def serving(
    model: PreTrainedModel,
    pattern: str,
    patterns: Mapping[str, str],
    zero_rows: AbstractSet[str] = frozenset(),
) -> tuple[dict[str, Any], dict[str, int]]:
    """Find the linears of a model that vLLM runs on FP8 kernels for 2:4.

    Args:
        model: the model; may be on the meta device.
        pattern: N:M of linears that are not in `patterns`.
        patterns: N:M, or `dense`, by linear.
        zero_rows: linears whose weight has a row of zeros. The scale of such a row is 0, and its
            product with any input NaN.

    Returns:
        The content of the file `SETTINGS`, and numbers of linears as vLLM joins them: `sparse`, on
        the kernels, and `all`.

    Raises:
        ConfigError: vLLM cannot run this kind of model on the kernels, or no linear is 2:4, of a
            suitable size and without a row of zeros.
    """
    model_type = model.config.model_type
    if model_type in _THROUGH_TRANSFORMERS:
        raise ConfigError(
            f"export.serve=vllm: vLLM runs {model_type} through its Transformers backend, whose "
            "activations have three dimensions, and the kernels take two; leave export.serve out"
        )
    groups = channel_groups(model)
    kinds = dict[str, None]()
    layers = ""
    sparse = 0
    dense = list[str]()
    unfit = list[str]()
    without_scale = list[str]()
    linears = [(group, name, rows) for group in groups for name, rows in _joined(group).items()]
    for group, name, rows in linears:
        texts = [patterns.get(path, pattern) for path in rows]
        pruned = all(text != DENSE and _two_of_four(NMPattern.parse(text)) for text in texts)
        names = dict.fromkeys([name, *rows])
        fits = sum(rows.values()) % _ROWS == 0 and group.channels % _CHANNELS == 0
        finite = zero_rows.isdisjoint(rows)
        if pruned and fits and finite:
            layers = group.prefix.rstrip(".").rpartition(".")[0]
            kinds |= dict.fromkeys(re.escape(path.removeprefix(group.prefix)) for path in names)
            sparse += 1
        else:
            dense += names
            if pruned and not fits:
                unfit.append(name)
            elif pruned:
                without_scale.append(name)
    if without_scale:
        log.warning(
            "vLLM runs %s as dense linears, because FP8 has no scale for a row of zeros",
            ", ".join(without_scale),
        )
    if not sparse:
        raise ConfigError(
            f"export.serve=vllm: the kernels need rows divisible by {_ROWS} and channels divisible "
            f"by {_CHANNELS} and no row of zeros, and no 2:4 linear of this model has all of this; "
            "leave export.serve out"
        )
    if unfit:
        _warn(len(unfit), len(linears), unfit[0])
    expression = rf"re:{re.escape(layers)}\.\d+\.(?:{'|'.join(kinds)})"
    by_name = {expression: _for_kernels(), **dict.fromkeys(dense)}
    both = {"fqn_to_config": by_name, "module_fqn_to_config": by_name}
    return _of_type("FqnToConfig", both, 1), {"sparse": sparse, "all": len(linears)}


def _for_kernels() -> dict[str, Any]:
    """Return the settings of the kernels, made by torchao if it is installed."""
    try:
        from torchao.core.config import config_to_dict
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow
        from torchao.quantization.quantize_.workflows import Float8PackingFormat
    except ImportError:  # torchao is missing, or older than the kernels
        return KEPT
    packing = Float8PackingFormat.SPARSE_2D_DATA_2D_METADATA
    config = Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow(), packing_format=packing, activation_value_lb=_LEAST
    )
    return dict(config_to_dict(config))


def _joined(group: ChannelGroup) -> dict[str, dict[str, int]]:
    """Return the linears of a group as vLLM joins them: C_out of each member by its path."""
    joined: dict[str, dict[str, int]] = {}
    for path, rows in zip(group.members, group.rows, strict=True):
        parent, _, name = path.rpartition(".")
        joined.setdefault(f"{parent}.{_JOINED.get(name, name)}", {})[path] = rows
    return joined


@cache  # because a run finds the linears before it prunes, and again when it writes the checkpoint
def _warn(unfit: int, linears: int, example: str) -> None:
    log.warning(
        "vLLM runs %s of %s linears as dense ones, such as %s: its kernels need rows divisible "
        "by %s and channels divisible by %s; keep_dense=[...] would leave them unpruned",
        unfit,
        linears,
        example,
        _ROWS,
        _CHANNELS,
    )


def _two_of_four(pattern: NMPattern) -> bool:
    """Tell if all weights of a pattern are also 2:4, such as 1:4."""
    return 4 % pattern.m == 0 and 2 * pattern.n <= pattern.m
