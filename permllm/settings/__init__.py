"""Typed settings, the hash of a run, and composition by Hydra."""
