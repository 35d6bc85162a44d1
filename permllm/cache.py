"""`python -m permllm.cache` lists what jobs keep for each other; with `--clear` it is removed, all or some kinds of it."""

import argparse
import sys

from permllm.runtime.interruption import starting


def main() -> int:
    """The exit code."""
    from permllm.runtime.tool import run_tool

    parser = argparse.ArgumentParser(prog="python -m permllm.cache", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="such as tokens, saliency, target or dense; default: all")
    parser.add_argument("--clear", action="store_true", help="remove them; only time is lost")
    options = parser.parse_args()
    return run_tool(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    from permllm.errors import ConfigError
    from permllm.record.cache_folder import cache_bound, cache_directory
    from permllm.record.caching import forget, kept_files

    kept = kept_files()
    for kind in options.kinds:
        if kind not in kept:
            raise ConfigError(f"{kind}: nothing of that kind is kept; there are: {', '.join(kept) or 'none'}")
    bound = cache_bound()
    print(f"{cache_directory()}{'' if bound is None else f', at most {bound / 1e9:g} GB'}")
    for kind in options.kinds or kept:
        size = sum(file.stat().st_size for file in kept[kind])
        freed = f", {forget(kept[kind]) / 1e6:.1f} MB cleared" if options.clear else ""
        print(f"{kind:<10} {len(kept[kind])} results, {size / 1e6:.1f} MB{freed}")
    return 0


if __name__ == "__main__":
    starting()
    sys.exit(main())
