"""Models: loading, families, channel groups, layers, and weights that lie elsewhere."""
