"""Gradient training of orders, masks and weights through masked linears."""
