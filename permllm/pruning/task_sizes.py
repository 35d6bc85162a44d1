"""Sizes of lm-eval's tasks, for the plan of a job."""

from __future__ import annotations

from permllm.config import EvaluationConfig

# Items of a task, sequences of an item, their mean and largest length in tokens; a guess for a task
# that is not listed.
_SIZES = {
    "hellaswag": (10042, 4, 80, 155),
    "arc_easy": (2376, 4, 33, 110),
    "arc_challenge": (1172, 4, 38, 135),
}
_SIZES |= {
    "openbookqa": (500, 4, 16, 66),
    "rte": (277, 2, 81, 280),
    "piqa": (1838, 2, 37, 245),
    "sciq": (1000, 4, 108, 572),
}
_ANY_TASK = (2000, 3, 150, 1024)


def task_sizes(settings: EvaluationConfig) -> tuple[int, int, int]:
    """Estimate the sequences of all tasks, their tokens, and the tokens of the longest."""
    sequences = tokens = longest = 0
    for name, task in settings.tasks.items():
        items, of_item, mean, most = _SIZES.get(name, _ANY_TASK)
        count, shots = (
            min(items, task.limit or settings.lm_eval.limit or items) * of_item,
            1 + (task.num_fewshot or 0),
        )
        sequences, tokens, longest = (
            sequences + count,
            tokens + count * mean * shots,
            max(longest, most * shots),
        )
    return sequences, tokens, longest
