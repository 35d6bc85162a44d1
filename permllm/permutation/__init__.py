"""Methods that find a permutation of the input channels."""
