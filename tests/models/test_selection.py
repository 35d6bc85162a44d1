"""Which linears a job prunes, and to what: names of layers and modules, and what they cannot be."""

from __future__ import annotations

import itertools

import pytest

from permllm.errors import ConfigError
from permllm.models.families import ChannelGroup, channel_groups
from permllm.models.selection import DENSE, differing_patterns, pruned_groups, recorded_groups
from permllm.settings.config import NMPattern
from tests.conftest import tiny_model

PATTERN = NMPattern(2, 4)
ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
MLP = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


@pytest.fixture(scope="module")
def groups() -> list[ChannelGroup]:
    return channel_groups(tiny_model("llama"))


def rows_of(groups: list[ChannelGroup]) -> dict[str, int]:
    pairs = (zip(group.members, group.rows, strict=True) for group in groups)
    return dict(itertools.chain(*pairs))


def in_layer(index: int, *names: str) -> set[str]:
    return {f"model.layers.{index}.{name}" for name in names or (*ATTENTION, *MLP)}


@pytest.mark.parametrize(
    ("names", "dense"),
    [
        ([], set()),
        (["0"], in_layer(0)),
        (["-1"], in_layer(1)),
        (["layers.1"], in_layer(1)),
        (["mlp"], in_layer(0, *MLP) | in_layer(1, *MLP)),
        (
            ["down_proj", "model.layers.0.self_attn.v_proj"],
            in_layer(0, MLP[2], ATTENTION[2]) | in_layer(1, MLP[2]),
        ),
        (["mlp.gate_up_proj"], in_layer(0, *MLP[:2]) | in_layer(1, *MLP[:2])),
    ],
)
def test_names_of_layers_modules_and_channel_groups(
    groups: list[ChannelGroup], names: list[str], dense: set[str]
) -> None:
    left = pruned_groups(groups, PATTERN, names, {})
    expected = {path: rows for path, rows in rows_of(groups).items() if path not in dense}
    assert rows_of(left) == expected
    assert {group.pattern for group in left} == {None}


def test_patterns_by_name_are_told_where_they_differ_and_read_again(
    groups: list[ChannelGroup],
) -> None:
    left = pruned_groups(groups, PATTERN, ["0", "v_proj"], {"down_proj": "4:8", "o_proj": "2:4"})
    told = differing_patterns(groups, left)
    expected = dict.fromkeys(in_layer(0) | in_layer(1, "self_attn.v_proj"), DENSE)
    assert told == expected | {"model.layers.1.mlp.down_proj": "4:8"}
    assert recorded_groups(groups, PATTERN, told) == left
    assert recorded_groups(groups, PATTERN, {}) == groups


@pytest.mark.parametrize(
    ("keep_dense", "sparsity_of", "message"),
    [
        (["2"], {}, r"^keep_dense: .*'2'"),
        (["down_pro"], {}, r"^keep_dense: .*'down_pro'.* one of down_proj, "),
        ([], {"lm_head": "4:8"}, r"^sparsity_of: .*'lm_head'"),
        (["self_attn", "mlp"], {}, r"^keep_dense=\[self_attn,mlp\] "),
        ([], {"0": "4:8", "down_proj": "1:4"}, r"^sparsity_of: .*down_proj.*4:8.*1:4"),
        ([], {"v_proj": "4:8"}, r"^sparsity_of: .*q_proj.*v_proj"),
    ],
)
def test_names_that_cannot_be_are_one_line(
    groups: list[ChannelGroup], keep_dense: list[str], sparsity_of: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as told:
        pruned_groups(groups, PATTERN, keep_dense, sparsity_of)
    assert "\n" not in str(told.value)
