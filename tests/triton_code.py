"""Triton kernels without a GPU: in Triton's interpreter, and compiled for a GPU."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.conftest import ROOT

ARCHITECTURES = (80, 90, 100)  # A100, H100, B200


def interpreted(code: str, given: Any) -> Any:
    """Return what `code`, in Triton's interpreter, makes of `given`.

    Triton decides when it is imported whether it interprets, so this is a process of its own.

    Args:
        code: Python that reads `given` and sets `found`.
        given: a value for `torch.save`, like what is returned.
    """
    before, after = "given = torch.load(sys.argv[1])", "torch.save(found, sys.argv[2])"
    frame = "\n".join(["import sys, torch", before, code, after])
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / name) for name in ("given.pt", "found.pt")]
        torch.save(given, paths[0])
        environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", frame, *paths]
        subprocess.run(command, env=environment, check=True, timeout=300)
        return torch.load(paths[1])


def spilled_bytes(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], architecture: int, warps: int
) -> int:
    """Compile a kernel; return the bytes of a thread's state that have no place in registers.

    Args:
        kernel: a Triton function.
        types: of the arguments that are not constants, such as `*bf16`; `i32:16` is divisible by
            16, as every pointer is.
        constants: by argument.
        architecture: compute capability, as in 90.
        warps: of a program.
    """
    triton = importlib.import_module("triton")
    compiler = importlib.import_module("triton.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", architecture, 32)
    names = kernel.arg_names
    kinds = {name: kind.partition(":") for name, kind in types.items() if name in names}
    signature = {name: kinds[name][0] if name in kinds else "constexpr" for name in names}
    divisible = [name for name, (kind, _, by) in kinds.items() if kind[0] == "*" or by == "16"]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = compiler.ASTSource(
        fn=kernel, signature=signature, constexprs=constants, attrs=attributes
    )
    made = triton.compile(source, target=target, options={"num_warps": warps})
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = re.search(r"STACK:(\d+)", said)
    assert used is not None, said
    return int(used.group(1))
