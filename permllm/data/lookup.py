"""Texts that the settings of a job name."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

from permllm.data.texts import TEXTS, JoinedTexts, Text, TextFile
from permllm.errors import ConfigError, first_line
from permllm.settings.config import CalibrationConfig, EvaluationConfig, PerplexityConfig

# Name in the settings for a file of the user, and key of the texts for perplexity.
_FILE = "text"
# Text for trying commands, which may be evaluated on what it calibrates on.
_BUILTIN = "builtin"
PERPLEXITY = "evaluation.perplexity.dataset"


@dataclass(frozen=True)
class JobTexts:
    """Texts of a job, which the settings name.

    Attributes:
        calibration: the text for calibration.
        perplexity: texts for perplexity, by their names in results. Empty: it is not measured.
    """

    calibration: Text
    perplexity: dict[str, Text]

    @property
    def calibration_parts(self) -> Sequence[Text]:
        """Texts that the text for calibration joins, or that text alone."""
        text = self.calibration
        return text.texts if isinstance(text, JoinedTexts) else [text]

    def check_tasks(self, names: Iterable[str]) -> None:
        """Raise ConfigError if a task of lm-eval asks about documents of calibration.

        Args:
            names: names or files of tasks, such as `mmlu_anatomy`, which is one of `mmlu`.
        """
        learned = [task for text in self.calibration_parts for task in text.tasks]
        for name in names:
            for task in learned:
                if task in Path(name).name.lower():
                    raise ConfigError(
                        f"evaluation.tasks: {name} is not held out from calibration, which uses "
                        f"texts of {task}"
                    )

    def download(self, calibration: bool) -> None:
        """Download what the texts lack; a pruned run does not read the text for calibration."""
        for text in self.perplexity.values():
            text.download(calibration=False)
        if calibration:
            self.calibration.download(calibration=True)

    def perplexity_digests(self) -> dict[str, str]:
        """Return the digest of each text for perplexity by its name."""
        return {name: text.digest(calibration=False) for name, text in self.perplexity.items()}


def texts_of_job(calibration: CalibrationConfig, evaluation: EvaluationConfig) -> JobTexts:
    """Return the texts of a job, without a download.

    Raises:
        ConfigError: a name is not valid, or perplexity or a task would be measured on the documents
            of calibration.
        DataError: a file does not exist, or its suffix is not known.
    """
    perplexity = evaluation.perplexity
    texts = JobTexts(calibration_text(calibration), perplexity_texts(perplexity))
    texts.check_tasks(evaluation.tasks)
    parts = texts.calibration_parts
    for name, text in texts.perplexity.items():
        if calibration.data_files and perplexity.data_files:
            files = [part for part in parts if isinstance(part, TextFile)]
            if text.digest(calibration=False) in [file.digest(calibration=True) for file in files]:
                raise ConfigError(
                    f"evaluation.perplexity.data_files={perplexity.data_files!r} is also the file "
                    "of calibration: give a held-out text"
                )
        elif text in parts and not text.held_out and calibration.dataset != _BUILTIN:
            raise ConfigError(
                f"{PERPLEXITY}={name!r} is not held out from "
                f"calibration.dataset={name!r}, which uses the whole text"
            )
    return texts


def calibration_text(config: CalibrationConfig) -> Text:
    """Return the text for calibration, or several joined. Errors as in `texts_of_job`."""
    if config.data_files and _FILE not in config.names:
        raise ConfigError(f"calibration.data_files={config.data_files!r} needs calibration=text")
    texts = [_calibration_part(config, name) for name in config.names]
    return texts[0] if len(texts) == 1 else JoinedTexts(texts)


def _calibration_part(config: CalibrationConfig, name: str) -> Text:
    if name != _FILE:
        return text_named("calibration.dataset", name, "calibrates")
    if not config.data_files:
        raise ConfigError("calibration=text needs calibration.data_files=PATH")
    return TextFile("calibration.data_files", config.data_files)


def perplexity_texts(config: PerplexityConfig) -> dict[str, Text]:
    """Return the texts for perplexity by their names in results. Errors as in `texts_of_job`."""
    if config.data_files:
        text = TextFile("evaluation.perplexity.data_files", config.data_files)
        return {config.names[0]: text}
    texts = {
        dataset.rpartition(".")[2]: text_named(PERPLEXITY, dataset, "evaluates")
        for dataset in config.names
    }
    if len(texts) < len(config.names):
        raise ConfigError(f"{PERPLEXITY}={config.names}: expected texts of different names")
    return texts


def text_named(key: str, name: str, use: Literal["calibrates", "evaluates"]) -> Text:
    """Return a text by its name in `TEXTS`, or by the dotted name of a module with a `TEXT`."""
    if "." not in name:
        valid = [valid for valid, text in TEXTS.items() if getattr(text, use)]
        if name not in valid:
            raise ConfigError(f"{key}={name!r} is not valid; valid are: {', '.join(valid)}")
        return TEXTS[name]
    try:
        text: Text = import_module(name).TEXT
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{key}={name} cannot be imported: {first_line(error)}") from error
    if not getattr(text, use):
        raise ConfigError(f"{key}={name}: its TEXT needs `{use} = True`")
    return text
