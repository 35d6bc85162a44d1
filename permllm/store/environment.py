"""Environment of a run: versions, commit, hardware, command."""

import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from permllm.runtime import parallel
from permllm.runtime.devices import cores
from permllm.runtime.precision import multiplies_bfloat16
from permllm.runtime.version import __version__

_PACKAGES = (
    "torch",
    "transformers",
    "datasets",
    "tokenizers",
    "hydra-core",
    "omegaconf",
    "lm-eval",
    "wandb",
    "numpy",
    "scipy",
)

_PACKAGE = Path(__file__).resolve().parents[1]

_NAME = r"(?:key|token|secret|password|passwd|credentials?)"
# The patterns find the value of a key that looks like a secret, for a whole word and inside braces.
# A switch such as add_bos_token=true is not a secret.
_VALUE = r"(?!(?:true|false|null)(?:[,}\s]|$))"
_SECRETS = (
    re.compile(rf"^([^={{]*{_NAME}=){_VALUE}.+$", re.IGNORECASE | re.DOTALL),
    re.compile(rf"({_NAME}['\"]?\s*:\s*){_VALUE}[^,}}]+", re.IGNORECASE),
)


@cache
def versions() -> dict[str, str]:
    """Return the versions of this package, Python, and the libraries that results depend on."""
    return {
        "permllm": __version__,
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in _PACKAGES},
    }


def environment(seed: int, device: torch.device) -> dict[str, Any]:
    """Return versions, commit, hardware, seed, command and time, as plain values."""
    return {
        "versions": versions(),
        "git": git_commit(),
        "hardware": hardware(device),
        "seed": seed,
        "command": command_line(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def command_line() -> str:
    """Return the command that was typed, without secrets."""
    words = sys.argv[1:]
    for secret in _SECRETS:
        words = [secret.sub(r"\1***", word) for word in words]
    program = Path(sys.argv[0]).name  # may be `permllm run`, which is no single word
    return f"{program} {shlex.join(words)}".rstrip()


def hardware(device: torch.device) -> dict[str, Any]:
    """Return processor, vector instructions, cores, memory (bytes), processes and the GPU, if any.

    The instructions are part of it, because processors with the same name can differ in them, and
    then in their speed by a factor.
    """
    facts: dict[str, Any] = {
        "system": " ".join([platform.system(), platform.machine(), *platform.libc_ver()]).strip(),
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16_products": multiplies_bfloat16(device),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": str(device),
    }
    if parallel.world_size() > 1:
        facts["processes"] = parallel.world_size()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return facts


@cache
def git_commit(package: Path = _PACKAGE) -> dict[str, Any] | None:
    """Return the commit of the package's checkout; None: the package lies outside of one.

    `dirty`: the package has uncommitted changes or untracked files, or git cannot tell.
    """
    checkout = package.parent
    if not (checkout / ".git").exists():
        return None
    words = ["git", "-C", str(checkout), "status", "--porcelain=v2", "--branch"]
    words += ["--untracked-files=all", "--", str(package)]
    try:
        status = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # git is missing, or distrusts the folder
        return {"commit": "unknown", "dirty": True}
    # The first line is `# branch.oid COMMIT`. Changes follow other lines with a number sign.
    lines = status.splitlines()
    dirty = any(not line.startswith("#") for line in lines)
    return {"commit": lines[0].split()[-1], "dirty": dirty}


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    text = file.read_text() if file.exists() else ""
    named = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return named[1] if named else platform.processor() or platform.machine()
