"""Settings by which vLLM runs a folded checkpoint's 2:4 linears on FP8 kernels of torchao.

vLLM reads the settings from a file in the checkpoint's folder. It rounds the weights to FP8 while
it loads them.
"""

import logging
import re
from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from transformers import PreTrainedModel

from permllm.errors import ConfigError
from permllm.models.families import ChannelGroup, channel_groups
from permllm.models.selection import DENSE
from permllm.settings.config import ExportConfig, NMPattern

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


def check_serve(settings: ExportConfig, patterns: Collection[NMPattern]) -> None:
    """Raise ConfigError unless vLLM can serve a checkpoint with these settings and N:M."""
    if not any(map(_two_of_four, patterns)):
        names = ", ".join(map(str, patterns))
        reason = f"no kernel multiplies {names}; set sparsity=2:4"
    elif settings.form != "folded":
        reason = (
            f"vLLM does not load export={settings.form}; set export=folded and "
            "permutation.constraint=foldable"
        )
    elif settings.dtype != "bfloat16":
        reason = f"the kernels do not take {settings.dtype}; set export.dtype=bfloat16"
    else:
        return
    raise ConfigError(f"export.serve=vllm: {reason}")


def serving(
    model: PreTrainedModel,
    pattern: str,
    patterns: Mapping[str, str],
    zero_rows: AbstractSet[str] | None = None,
) -> tuple[dict[str, Any], dict[str, int]]:
    """Find the linears of a model that vLLM runs on FP8 kernels for 2:4.

    Args:
        model: the model; may be on the meta device.
        pattern: N:M of linears that are not in `patterns`.
        patterns: N:M, or `dense`, by linear.
        zero_rows: linears whose weight has a row of zeros. The scale of such a row is 0, and its
            product with any input NaN. None: the weights are not known yet.

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
    prefix = ""
    on_kernels = dict[str, None]()
    sparse = 0
    dense = list[str]()
    unfit = list[str]()
    without_scale = list[str]()
    linears = [
        (group, path, rows)
        for group in channel_groups(model)
        for path, rows in _joined(group).items()
    ]
    for group, path, rows in linears:
        texts = [patterns.get(member, pattern) for member in rows]
        names = dict.fromkeys([path, *rows])
        if DENSE in texts or not all(_two_of_four(NMPattern.parse(text)) for text in texts):
            dense += names
        elif sum(rows.values()) % _ROWS or group.channels % _CHANNELS:
            dense += names
            unfit.append(path)
        elif zero_rows and not zero_rows.isdisjoint(rows):
            dense += names
            without_scale.append(path)
        else:
            prefix = group.prefix
            on_kernels |= {name.removeprefix(prefix): None for name in names}
            sparse += 1
    if without_scale:
        log.warning(
            "vLLM runs %s as dense linears, because FP8 has no scale for a row of zeros",
            ", ".join(without_scale),
        )
    sizes = f"rows divisible by {_ROWS} and channels divisible by {_CHANNELS}"
    if not sparse:
        raise ConfigError(
            f"export.serve=vllm: the kernels need {sizes} and no row of zeros, and no 2:4 linear "
            "of this model has all of this; leave export.serve out"
        )
    if unfit and zero_rows is None:  # with the rows it is the second time
        log.warning(
            "vLLM runs %d of %d linears as dense ones, such as %s: its kernels need %s; "
            "keep_dense=[...] would leave them unpruned",
            len(unfit),
            len(linears),
            unfit[0],
            sizes,
        )
    layers = prefix.rstrip(".").rpartition(".")[0]
    expression = rf"re:{re.escape(layers)}\.\d+\.(?:{'|'.join(map(re.escape, on_kernels))})"
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


def _two_of_four(pattern: NMPattern) -> bool:
    """Tell if all weights of a pattern are also 2:4, such as 1:4."""
    return 4 % pattern.m == 0 and 2 * pattern.n <= pattern.m
