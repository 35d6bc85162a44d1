"""Base pruners."""
