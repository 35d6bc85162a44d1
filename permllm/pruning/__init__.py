"""Pruners, reconstructions, and the stages of a job that prunes."""
