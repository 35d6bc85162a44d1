"""Selection of the linears that a job prunes: valid names of layers and modules, and errors."""

from __future__ import annotations

import itertools

import pytest

from permllm.errors import ConfigError
from permllm.models.families import ChannelGroup, channel_groups
from permllm.models.selection import DENSE, pruned_groups, recorded_groups, recorded_patterns
from tests.conftest import tiny_model

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
    left = pruned_groups(groups, names)
    expected = {path: rows for path, rows in rows_of(groups).items() if path not in dense}
    assert rows_of(left) == expected


def test_what_stays_dense_is_recorded_and_read_again(groups: list[ChannelGroup]) -> None:
    left = pruned_groups(groups, ["0", "v_proj"])
    told = recorded_patterns(groups, left)
    assert told == dict.fromkeys(in_layer(0) | in_layer(1, "self_attn.v_proj"), DENSE)
    assert list(told) == [path for path in rows_of(groups) if path in told]
    assert recorded_groups(groups, told) == left
    assert recorded_groups(groups, {}) == groups


@pytest.mark.parametrize(
    ("keep_dense", "message"),
    [
        (["2"], r"^keep_dense: .*'2'"),
        (["down_pro"], r"^keep_dense: .*'down_pro'.* one of down_proj, "),
        (["lm_head"], r"^keep_dense: .*'lm_head'"),
        (["self_attn", "mlp"], r"^keep_dense=\[self_attn,mlp\] "),
    ],
)
def test_names_that_cannot_be_are_one_line(
    groups: list[ChannelGroup], keep_dense: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as told:
        pruned_groups(groups, keep_dense)
    assert "\n" not in str(told.value)
