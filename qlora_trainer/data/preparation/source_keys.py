"""List the sources of a config, look for their files, and open them; the error on one that is missing has its key."""

from collections.abc import Callable
from pathlib import Path

from qlora_trainer.common.errors import missing_files_name
from qlora_trainer.config.data_schema import DataConfig, SourceFile
from qlora_trainer.data.preparation.source_checks import check_effects
from qlora_trainer.data.reading.files import Content, RecordSource, check_path, open_source


def source_files(config: DataConfig) -> list[SourceFile]:
    """List all sources of a config: those of training, then those kept for evaluation.

    Args:
        config: gives what a source does not say itself.

    Returns:
        The sources, complete.
    """
    files: list[SourceFile] = [SourceFile(path=config.train)] if isinstance(config.train, str) else [*config.train]
    if not isinstance(config.eval, float):
        eval_sets = config.eval if isinstance(config.eval, list) else [config.eval]
        files += [SourceFile(path=item) if isinstance(item, str) else item for item in eval_sets]
    return [_with_defaults(file, config) for file in files]


def _with_defaults(file: SourceFile, config: DataConfig) -> SourceFile:
    made = file if file.columns or file.template else config  # the two belong together
    return file.model_copy(
        update={
            "format": config.format if file.format == "auto" else file.format,
            "columns": made.columns,
            "template": made.template,
            "ignore": file.ignore or config.ignore,
            "keep": file.keep or config.keep,
            "roles": file.roles or config.roles,
            "rendered": file.rendered or config.rendered,
            "header": file.header or config.header,
            "encoding": file.encoding or config.encoding,
            "rows": file.rows or config.rows,
        }
    )


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


def check_files(config: DataConfig) -> bool:
    """Look for each local file, so that one that is missing is reported before a model is read, which takes minutes.

    FileMissingError or DataError says what cannot be used.

    Args:
        config: of the rows.

    Returns:
        True if all sources are files that we read ourselves.
    """
    are_files = []
    for key, file in zip(source_keys(config), source_files(config), strict=True):
        with missing_files_name(key):
            are_files.append(check_path(file.path))
    return all(are_files)


def open_sources(config: DataConfig, content: Callable[[Path], Content]) -> list[tuple[SourceFile, RecordSource]]:
    """Open all sources of a config, in the order of `source_files`.

    FileMissingError or DataError says what cannot be used, or which setting has no effect.

    Args:
        config: of the rows.
        content: finds what is in a local file, as `open_source` takes it.

    Returns:
        Each source as it is set and as it was found, nothing of it read but its digest.
    """
    opened = []
    for key, file in zip(source_keys(config), source_files(config), strict=True):
        with missing_files_name(key):
            source = open_source(
                file.path,
                file.split,
                subset=file.subset,
                encoding=file.encoding,
                header=file.header,
                rows=file.rows,
                is_document=file.format == "text",
                content=content,
            )
        opened.append((file, source))
    check_effects(config, opened)
    return opened
