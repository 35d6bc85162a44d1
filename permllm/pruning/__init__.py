"""Phases of a job that prunes, and the loop over its layers."""
