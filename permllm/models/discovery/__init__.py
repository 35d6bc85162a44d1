"""The family of a model type without a table, found in a small random model of its config.

One forward shows which linears read the same tensor (`readings`), one with cuts whose rows their
channels are (`axes`). What
that says is then proved: an order that folds must leave the logits as they were (`proof`). What
fails has no producers.
"""

from __future__ import annotations

from permllm.models.discovery.family import family_by_structure
from permllm.models.discovery.small import causal_types

__all__ = ["causal_types", "family_by_structure"]
