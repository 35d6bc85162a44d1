"""Calibration of the dense model: statistics of its linears' inputs, saliency, the target of learning."""
