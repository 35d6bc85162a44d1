"""Machines, versions and days of environments of runs, for the lines below tables of documents."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def machine(environments: Iterable[dict[str, Any]]) -> str:
    """Return processors, threads, versions, commits and days of environments, in one line."""
    machines = set()
    versions = set()
    commits = set()
    days = set()
    names = {"python": "Python", "torch": "torch", "transformers": "transformers"}
    for environment in environments:
        hardware = environment["hardware"]
        of_cpu = "instructions" in hardware and "gpu" not in hardware
        instructions = f" ({hardware['instructions']})" if of_cpu else ""
        processes = f", {hardware['processes']} processes" if "processes" in hardware else ""
        named = f"{processor(environment)}{instructions}"
        machines.add(f"{named}, {hardware['threads']} threads{processes}")
        versions.add(", ".join(f"{names[name]} {environment['versions'][name]}" for name in names))
        days.add(environment["started"][:10])
        if git := environment.get("git"):
            commits.add(git["commit"][:10] + (" with changes" if git["dirty"] else ""))
    parts = [*sorted(machines), *sorted(versions)]
    if commits:
        parts.append(f"commit {', '.join(sorted(commits))}")
    first = min(days)
    last = max(days)
    parts.append(first if first == last else f"{first} to {last}")
    return "; ".join(parts) + "."


def processor(environment: dict[str, Any]) -> str:
    """Return the name of the GPU, or else of the processor."""
    hardware = environment["hardware"]
    return str(hardware["gpu"]["name"] if "gpu" in hardware else hardware["processor"])
