"""Readers of runs: tables, comparisons, page, pictures, published numbers."""
