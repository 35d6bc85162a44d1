"""N:M masks, saliency, statistics of inputs, and the calibration of the dense model."""
