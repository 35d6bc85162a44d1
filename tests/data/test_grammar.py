"""Stories of the grammar: what a seed gives, and which words they keep."""

from __future__ import annotations

from permllm.data.grammar import stories
from permllm.data.texts import TEXTS


def test_a_seed_always_gives_the_same_stories_and_another_one_gives_others() -> None:
    assert stories("a", 5) == stories("a", 5)
    assert set(stories("a", 200)).isdisjoint(stories("b", 200))


def test_calibration_evaluation_and_training_share_no_story() -> None:
    text = TEXTS["grammar"]
    evaluated = set(text.evaluation().split("\n\n"))
    drawn = [evaluated, set(text.calibration(0)), set(text.calibration(1))]
    drawn.append(set(stories("training", 12_000)))
    assert len(set.union(*drawn)) == sum(map(len, drawn))


def test_a_story_has_no_part_that_is_not_filled() -> None:
    assert not {"{", "}"} & set("".join(stories("a", 200)))
