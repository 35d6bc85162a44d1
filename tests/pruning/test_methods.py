"""A method that lacks what it will be asked for is refused before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from permllm import config, job
from permllm.config import read_config
from permllm.errors import ConfigError
from permllm.pruning import methods
from permllm.sparsity.norm import Norm
from permllm.sparsity.statistics import InputStatistic
from tests.test_config import composed


@dataclass
class Pruner:
    statistics = ()
    updates_weights = False

    def factors(self, weight: Any, statistics: Any) -> Any:
        raise AssertionError("asked")


@dataclass
class Local:
    learned = False
    local = True
    constraint = "free"

    def order(self, group: str, saliency: Any, pattern: Any) -> Any:
        raise AssertionError("asked")


@dataclass
class Learned:
    learned = True
    local = False
    constraint = "free"
    batch_size = 1

    def orders(self, problem: Any) -> Any:
        raise AssertionError("asked")

    def plan(self, groups: Any, layers: int) -> Any:
        raise AssertionError("asked")


@dataclass
class Reconstruction:
    changes_weights = False
    learned = False
    statistics = ()

    def linear(self, pruned: Any) -> Any:
        raise AssertionError("asked")

    network = linear


OF_A_RECONSTRUCTION = ("changes_weights", "learned", "statistics", "linear", "network")
CASES: list[tuple[type, str, str]] = [
    *((Pruner, name, "pruner=wanda") for name in ("statistics", "updates_weights", "factors")),
    *((Local, name, "permutation=none") for name in ("learned", "local", "constraint", "order")),
    *((Learned, name, "permutation=none") for name in ("orders", "plan", "batch_size", "constraint")),
    *((Reconstruction, name, "reconstruction=none") for name in OF_A_RECONSTRUCTION),
]
PACKAGES = {"pruner": "pruning", "permutation": "permutation", "reconstruction": "pruning.reconstruction"}


def put(method: object, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a method made in the place of the one that a setting names."""
    group, _, name = key.partition("=")
    real = methods.instantiate

    def made(settings: dict[str, Any]) -> Any:
        mine = settings["name"] == name and f"permllm.{PACKAGES[group]}." in settings["_target_"]
        return method if mine else real(settings)

    for module in (methods, config):  # which makes a permutation
        monkeypatch.setattr(module, "instantiate", made)


@pytest.mark.parametrize(("kind", "name", "key"), CASES)
def test_what_a_method_lacks_is_named(
    kind: type, name: str, key: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kind, name, "wrong")
    put(kind(), key, monkeypatch)
    config = read_config(composed("model=tiny", "logger=none", "permutation=none", f"run_dir={tmp_path}/run"))
    with pytest.raises(ConfigError, match=f"^{key}: .*{name}") as caught:
        job.run(config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_statistic_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unfinished(InputStatistic):
        """Without `update`."""

    for wrong in ((int,), (Norm(4, "cpu", 1),), (Norm, Unfinished), [Norm]):
        monkeypatch.setattr(Pruner, "statistics", wrong)
        put(Pruner(), "pruner=wanda", monkeypatch)
        with pytest.raises(ConfigError, match=r"^pruner=wanda: .* needs an attribute `statistics`"):
            methods.methods_of(read_config(composed("model=tiny", "logger=none", "permutation=none")))
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        (Pruner, "pruner=wanda"),
        (Local, "permutation=none"),
        (Learned, "permutation=none"),
        (Reconstruction, "reconstruction=none"),
    ],
)
def test_a_method_with_all_of_it_is_taken(kind: type, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = kind()
    put(method, key, monkeypatch)
    found = methods.methods_of(read_config(composed("model=tiny", "logger=none", "permutation=none")))
    assert getattr(found, key.partition("=")[0]) is method
