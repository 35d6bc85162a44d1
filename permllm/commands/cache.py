"""What jobs keep for each other, by kind; with --clear it is removed, all or some kinds of it, which costs time alone."""

from __future__ import annotations

import argparse

from permllm.commands.answer import Answer
from permllm.errors import ConfigError
from permllm.record.cache_folder import cache_bound, cache_directory
from permllm.record.caching import forget, kept_files, size_of


def arguments(parser: argparse.ArgumentParser) -> None:
    """What may be typed."""
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="such as tokens, saliency, target or dense; default: all")
    parser.add_argument("--clear", action="store_true", help="remove them; only time is lost")


def work(options: argparse.Namespace) -> Answer:
    """How much of each kind is kept, and what was cleared."""
    kept = kept_files()
    for kind in options.kinds:
        if kind not in kept:
            raise ConfigError(f"{kind}: nothing of that kind is kept; there are: {', '.join(kept) or 'none'}")
    kinds = {}
    for kind in options.kinds or kept:
        kinds[kind] = {"results": len(kept[kind]), "bytes": sum(map(size_of, kept[kind]))}
        if options.clear:
            kinds[kind]["cleared_bytes"] = forget(kept[kind])
    directory, bound = str(cache_directory()), cache_bound()

    def show() -> None:
        print(f"{directory}{'' if bound is None else f', at most {bound / 1e9:g} GB'}")
        for kind, values in kinds.items():
            count = f"{values['results']} {'result' if values['results'] == 1 else 'results'}"
            freed = f", {values['cleared_bytes'] / 1e6:.1f} MB cleared" if options.clear else ""
            print(f"{kind:<10} {count}, {values['bytes'] / 1e6:.1f} MB{freed}")

    return Answer({"directory": directory, "bound_bytes": bound, "kinds": kinds}, show)
