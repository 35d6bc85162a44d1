"""Code that Triton makes for GPUs that are not there."""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 100)  # A100, H100, B200


def spilled_bytes(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], architecture: int, warps: int = 4
) -> int:
    """Compile a kernel for an architecture; return the bytes of a thread's state that have no place in registers.

    Args:
        kernel: a Triton function.
        types: of the arguments that are not constants, such as `*bf16`; `i32:16` is divisible by
            16, as every pointer is.
        constants: by argument.
        architecture: compute capability, as in 90.
        warps: of a program.
    """
    triton = importlib.import_module("triton")
    compiler, backends = (
        importlib.import_module(f"triton.{name}") for name in ("compiler", "backends.compiler")
    )
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else types[name].partition(":")[0] for name in names
    }
    divisible = [
        name
        for name in names
        if name not in constants and (types[name][0] == "*" or types[name].endswith(":16"))
    ]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = compiler.ASTSource(
        fn=kernel, signature=signature, constexprs=constants, attrs=attributes
    )
    made = triton.compile(
        source, target=backends.GPUTarget("cuda", architecture, 32), options={"num_warps": warps}
    )
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        said = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    used = re.search(r"STACK:(\d+)", said)
    assert used is not None, said
    return int(used.group(1))
