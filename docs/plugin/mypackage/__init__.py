"""Examples of everything that a package can add to PermLLM (CONTRIBUTING.md)."""
