"""Base pruners, one module for each option of the group `pruner`."""
