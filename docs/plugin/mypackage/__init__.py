"""Examples of what a package can add to PermLLM (docs/extending.md)."""
