"""The version of this project."""

__version__ = "1.1.0"
