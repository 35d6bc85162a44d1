"""The tasks of an `srun` step as processes of torch.distributed: each gets the variables that torchrun would set."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

# Ports of the first process, one of them by the number of the step: jobs on one node do not meet.
_PORTS = range(20_000, 40_000)


def adopt_step() -> None:
    """In a step of several tasks, set what torchrun would set (`of_step`); what is set already stays."""
    for name, value in of_step(os.environ).items():
        os.environ.setdefault(name, value)


def of_step(variables: Mapping[str, str]) -> dict[str, str]:
    """What torch.distributed is to be told in a process with these environment variables; nothing where it is told already.

    A batch script is a step of one task however many the job has: what it starts without `srun` is one process.
    """
    if "WORLD_SIZE" in variables or int(variables.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return {}
    job, step = int(variables["SLURM_JOB_ID"]), int(variables["SLURM_STEP_ID"])
    gpu_each = "SLURM_GPUS_PER_TASK" in variables or "gpu" in variables.get("SLURM_TRES_PER_TASK", "")
    one_node = variables["SLURM_STEP_NUM_NODES"] == "1"
    return {
        "RANK": variables["SLURM_PROCID"],
        "WORLD_SIZE": variables["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": "0" if gpu_each else variables["SLURM_LOCALID"],  # which of the GPUs that the task sees
        "LOCAL_WORLD_SIZE": str(tasks_by_node(variables["SLURM_STEP_TASKS_PER_NODE"])[int(variables["SLURM_NODEID"])]),
        "MASTER_ADDR": "127.0.0.1" if one_node else first_node(variables["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(_PORTS[(16 * job + step) % len(_PORTS)]),
    }


def first_node(nodes: str) -> str:
    """Name of the first node of a list: `gpu[03-05,9],cpu1` begins with `gpu03`."""
    match = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes)
    if match is None:
        raise ValueError(f"{nodes!r} is no list of nodes")
    return "".join(part or "" for part in match.groups())


def tasks_by_node(counts: str) -> list[int]:
    """How many tasks each node has: `2(x3),1` is 2, 2, 2, 1."""
    found = []
    for part in counts.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        found += [int(count)] * int(times or 1)
    return found
