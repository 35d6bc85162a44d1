"""Settings that were renamed: earlier keys are taken with a word, and records keep the keys that they always had."""

from __future__ import annotations

import logging

import pytest

from permllm.config import read_config
from permllm.errors import ConfigError
from permllm.renamed import RENAMED, Renamed, typed_name, typed_value
from tests.test_config import composed, config


@pytest.mark.parametrize(
    ("earlier", "present"),
    [
        ("permutation.passes=5", "permutation.epochs=5"),
        ("permutation.window=model", "permutation.layers_per_stage=all"),
        ("permutation.window=layer", "permutation.layers_per_stage=1"),
        ("permutation.window=4", "permutation.layers_per_stage=4"),
        ("permutation.temperature_every=pass", "permutation.temperature_every=epoch"),
        ("calibration.length=32", "calibration.seqlen=32"),
        ("evaluation.perplexity.window=32", "evaluation.perplexity.seqlen=32"),
        ("budget.passes=7", "budget.epochs=7"),
    ],
)
def test_an_earlier_key_is_taken_and_the_warning_names_the_new_one(
    earlier: str, present: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = config("model=tiny", earlier)
    assert [record.getMessage() for record in caplog.records if present in record.getMessage()]
    caplog.clear()
    asked = config("model=tiny", present)
    assert not caplog.records
    assert (found.hash, found.evaluation_identity) == (asked.hash, asked.evaluation_identity)


def test_records_have_the_keys_that_they_always_had() -> None:
    words = ["permutation.epochs=5", "permutation.layers_per_stage=1", "reconstruction=distill", "budget=cpu"]
    resolved = config("model=tiny", *words, "permutation.temperature_every=epoch").resolved
    assert resolved["permutation"].items() >= {"passes": 5, "window": "layer", "temperature_every": "pass"}.items()
    assert (resolved["reconstruction"]["passes"], resolved["calibration"]["length"]) == (2, 64)
    assert resolved["evaluation"]["perplexity"]["window"] == 64
    assert resolved["budget"] == {"name": "cpu", "samples": 128, "length": 128, "passes": 2, "windows": 32, "items": 32}
    for group in (resolved["permutation"], resolved["reconstruction"], resolved["calibration"]):
        assert not {"epochs", "seqlen", "layers_per_stage"} & group.keys()


def test_two_names_of_one_setting_contradict_each_other_only_where_both_were_typed() -> None:
    both = composed("model=tiny", "permutation.passes=2", "permutation.epochs=4")
    with pytest.raises(ConfigError, match=r"^permutation\.passes=2 and permutation\.epochs=4 are the same setting"):
        read_config(both, ["permutation.passes", "permutation.epochs"])
    same = composed("model=tiny", "permutation.passes=4", "permutation.epochs=4")
    assert read_config(same, ["permutation.passes", "permutation.epochs"]).permutation["epochs"] == 4
    assert read_config(composed("model=tiny", "permutation.passes=2"), ["permutation.passes"]).permutation["epochs"] == 2


def test_settings_of_a_class_of_somebody_else_keep_their_names() -> None:
    settings = composed("model=tiny", "permutation=none")
    settings["permutation"] = {"name": "mine", "_target_": "mine.Method", "epochs": 3, "window": 2}
    resolved = read_config(settings).resolved
    assert resolved["permutation"] == {"name": "mine", "_target_": "mine.Method", "epochs": 3, "window": 2}


@pytest.mark.parametrize("entry", RENAMED, ids=lambda entry: entry.old)
def test_what_a_record_says_is_shown_under_the_name_that_is_typed(entry: Renamed) -> None:
    assert typed_name(entry.old) == entry.new
    assert typed_name("permutation.margin") == "permutation.margin"


def test_values_of_records_are_shown_as_they_are_typed() -> None:
    assert typed_value("permutation.window", "model") == "all"
    assert typed_value("permutation.window", "layer") == 1
    assert typed_value("permutation.window", 4) == 4
    assert typed_value("permutation.temperature_every", "pass") == "epoch"
    assert typed_value("permutation.rounds", 1) == 1
