"""Settings by which vLLM runs a folded checkpoint's linears on FP8 kernels of torchao.

vLLM reads the settings from a file in the checkpoint's folder. It rounds the weights to FP8 while
it loads them. It joins the linears of a channel group to one, under the name of the group.
"""

import copy
import json
import logging
import re
from collections.abc import Set as AbstractSet
from typing import Any

from permllm.errors import ConfigError
from permllm.models.families import ChannelGroup
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


# Result of torchao 0.18.0's `config_to_dict` for FP8 and 2:4. `activation_value_lb` is the least
# magnitude for the scale of a token. Without it torchao would make NaN of a token of zeros.
KERNELS: dict[str, Any] = json.loads("""
{
  "_type": "Float8DynamicActivationFloat8WeightConfig",
  "_version": 2,
  "_data": {
    "activation_dtype": {"_type": "torch.dtype", "_data": "float8_e4m3fn"},
    "weight_dtype": {"_type": "torch.dtype", "_data": "float8_e4m3fn"},
    "granularity": [
      {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}},
      {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
    ],
    "packing_format": {"_type": "Float8PackingFormat", "_data": "SPARSE_2D_DATA_2D_METADATA"},
    "mm_config": {
      "_type": "Float8MMConfig",
      "_version": 1,
      "_data": {"emulate": false, "use_fast_accum": true, "pad_inner_dim": false}
    },
    "activation_value_lb": 1e-12,
    "activation_value_ub": null,
    "kernel_preference": {"_type": "KernelPreference", "_data": "AUTO"},
    "set_inductor_config": true,
    "alg_id": 0
  }
}
""")
# The same for dense linears. torchao leaves those in bfloat16 whose sizes are not multiples of 16.
DENSE_KERNELS = copy.deepcopy(KERNELS)
DENSE_KERNELS["_data"]["packing_format"]["_data"] = "PLAIN"


def check_serve(settings: ExportConfig) -> None:
    """Raise ConfigError unless vLLM can serve a checkpoint in this form and dtype."""
    if settings.form != "folded":
        raise ConfigError(
            f"export.serve=vllm: vLLM does not load export={settings.form}; set export=folded and "
            "permutation.constraint=foldable"
        )
    if settings.dtype != "bfloat16":
        raise ConfigError(
            f"export.serve=vllm: the kernels do not take {settings.dtype}; set "
            "export.dtype=bfloat16"
        )


def groups_on_kernels(
    model_type: str, groups: list[ChannelGroup], pruned: list[ChannelGroup], pattern: NMPattern
) -> list[ChannelGroup]:
    """Return the channel groups that fit the FP8 kernels for 2:4, and warn of 2:4 ones that do not.

    Args:
        model_type: type of the model in its config.
        groups: all its channel groups.
        pruned: the groups pruned to `pattern`; some members of a group may be missing.

    Raises:
        ConfigError: vLLM cannot run this kind of model on the kernels, or no group fits them.
    """
    if model_type in _THROUGH_TRANSFORMERS:
        raise ConfigError(
            f"export.serve=vllm: vLLM runs {model_type} through its Transformers backend, whose "
            "activations have three dimensions, and the kernels take two; leave export.serve out"
        )
    # Of some other patterns too, such as 1:4, all weights are 2:4.
    is_two_of_four = 4 % pattern.m == 0 and 2 * pattern.n <= pattern.m
    whole = [group for group in groups if is_two_of_four and group in pruned]
    fitting = [
        group for group in whole if sum(group.rows) % _ROWS == 0 and group.channels % _CHANNELS == 0
    ]
    unfit = [group.name for group in whole if group not in fitting]
    sizes = f"rows divisible by {_ROWS} and channels divisible by {_CHANNELS}"
    if not fitting:
        raise ConfigError(
            f"export.serve=vllm: the kernels need 2:4 linears with {sizes}, and this model has "
            "none; set sparsity=2:4, or leave export.serve out"
        )
    if unfit:
        log.warning(
            "vLLM runs %d of %d linears as dense ones: its 2:4 kernels need %s; 'keep_dense=[%s]' "
            "would leave them unpruned",
            len(unfit),
            len(groups),
            sizes,
            ",".join(unfit),
        )
    return fitting


def serving(
    groups: list[ChannelGroup], fitting: list[ChannelGroup], zero_rows: AbstractSet[str]
) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the content of the file `SETTINGS`, and numbers of linears as vLLM joins them.

    Args:
        groups: all channel groups of the model.
        fitting: those that fit the kernels.
        zero_rows: linears whose weight has a row of zeros, which stay in bfloat16. The scale of
            such a row is 0, and its product with any input NaN.

    The numbers are `sparse`, on the kernels, and `all`.
    """
    without_scale = [group.name for group in groups if not zero_rows.isdisjoint(group.members)]
    if without_scale:
        log.warning(
            "vLLM runs %s in bfloat16, because FP8 has no scale for a row of zeros",
            ", ".join(without_scale),
        )
    sparse = [group.name for group in fitting if group.name not in without_scale]
    # A dict keeps the order, and a linear alone in its group has the name of the group.
    on_kernels: dict[str, None] = {}
    dense: dict[str, Any] = {}
    for group in groups:
        for name in (group.name, *group.members):
            if group.name in sparse:
                on_kernels[re.escape(name.removeprefix(group.prefix))] = None
            else:
                dense[name] = None if group.name in without_scale else DENSE_KERNELS
    layers = groups[0].prefix.rstrip(".").rpartition(".")[0]
    expression = rf"re:{re.escape(layers)}\.\d+\.(?:{'|'.join(on_kernels)})"
    by_name = {expression: KERNELS, **dense} if on_kernels else dense
    both = {"fqn_to_config": by_name, "module_fqn_to_config": by_name}
    content = {"_type": "FqnToConfig", "_version": 1, "_data": both}
    return content, {"sparse": len(sparse), "all": len(groups)}
