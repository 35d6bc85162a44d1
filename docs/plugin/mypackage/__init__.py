"""Examples of what a package can add to PermLLM (CONTRIBUTING.md)."""
