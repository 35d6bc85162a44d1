"""Commands of `permllm`, each a module."""
