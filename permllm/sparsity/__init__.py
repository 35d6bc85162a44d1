"""N:M masks, blocks, saliency, statistics of inputs, and the base of all methods."""
