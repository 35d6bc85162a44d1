"""Texts, windows of tokens, and files of the package index and the hub."""
