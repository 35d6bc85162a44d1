"""Machines, versions and days of runs, for the lines below tables of documents."""

from __future__ import annotations

from collections.abc import Iterable

from permllm.report.read import Run


def machine(runs: Iterable[Run]) -> str:
    """Return processors, threads, versions, commits and days of runs, in one line."""
    machines = set()
    versions = set()
    commits = set()
    days = set()
    names = {"python": "Python", "torch": "torch", "transformers": "transformers"}
    for run in runs:
        environment = run.environment
        hardware = environment["hardware"]
        of_cpu = "instructions" in hardware and "gpu" not in hardware
        instructions = f" ({hardware['instructions']})" if of_cpu else ""
        processes = f", {hardware['processes']} processes" if "processes" in hardware else ""
        machines.add(f"{processor(run)}{instructions}, {hardware['threads']} threads{processes}")
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


def processor(run: Run) -> str:
    """Return the name of a run's GPU, or else of its processor."""
    hardware = run.environment["hardware"]
    return str(hardware["gpu"]["name"] if "gpu" in hardware else hardware["processor"])
