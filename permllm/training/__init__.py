"""Gradient training of permutations, masks and weights through masked linears."""
