"""Updates of kept weights."""
