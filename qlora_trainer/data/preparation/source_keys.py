"""Look for the files of a config before anything is read, and name the key of one that is missing."""

from qlora_trainer.common.errors import missing_files_name
from qlora_trainer.config.data_schema import DataConfig
from qlora_trainer.data.preparation.chunks import source_files
from qlora_trainer.data.reading.files import check_path


def source_keys(config: DataConfig) -> list[str]:
    """Name the key of each source, in the order of `source_files`.

    Args:
        config: of the rows.

    Returns:
        Such as ["data.train[0]", "data.train[1]", "data.eval"].
    """
    keys = _keys("data.train", config.train)
    return keys if isinstance(config.eval, float) else keys + _keys("data.eval", config.eval)


def _keys(key: str, value: object) -> list[str]:
    return [f"{key}[{index}]" for index in range(len(value))] if isinstance(value, list) and len(value) > 1 else [key]


def check_files(config: DataConfig) -> None:
    """Look for each local file, so that one that is missing is reported before a model is read, which takes minutes.

    FileMissingError or DataError says what cannot be used.

    Args:
        config: of the rows.
    """
    for key, file in zip(source_keys(config), source_files(config), strict=True):
        with missing_files_name(key):
            check_path(file.path)
