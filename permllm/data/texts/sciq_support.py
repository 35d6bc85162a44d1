"""Support passages of SciQ's validation split, from science textbooks: to calibrate on, or to measure perplexity on."""

from permllm.data.texts.base import WheelText

TEXT = WheelText("sciq/none", "support")
