"""Load data sets of the hub, and folders that `Dataset.save_to_disk` wrote; the library datasets reads both.

Left out: files of rows (files.py).
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_trainer.common.errors import DataError, first_line
from qlora_trainer.config.override import override

if TYPE_CHECKING:
    import datasets


def load_hub(name: str, split: str, subset: str | None) -> "datasets.Dataset":
    """Load a data set of the hub.

    Args:
        name: of the data set.
        split: of it.
        subset: of it, where it has several.

    Returns:
        Its rows.

    Raises:
        DataError: it cannot be had, or has no such split or subset.
    """
    import datasets

    try:
        return datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # whatever the hub, the network or a script of the data set raises, the user must act
        raise DataError(_hub_message(name, split, error)) from error


def is_saved(folder: Path) -> bool:
    """Return True for a folder that save_to_disk of the library datasets wrote.

    Args:
        folder: maybe one.

    Returns:
        True if it is.
    """
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def load_saved(folder: Path, split: str) -> "datasets.Dataset":
    """Load what save_to_disk wrote: rows, or a split of several.

    Args:
        folder: holds it.
        split: which, where it has several.

    Returns:
        Its rows, memory-mapped, with all columns and as Python objects.

    Raises:
        DataError: it cannot be read, or has no such split.
    """
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever a library raises that reads damaged files
        raise DataError(f"{folder} cannot be read as a saved data set: {first_line(error)}") from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            named = override("data.train", [{"path": str(folder), "split": next(iter(found), "")}])
            raise DataError(f"{folder} has no split {split}; it has {', '.join(found)}. Name one: {named}")
        found = found[split]
    elif split != "train":
        raise DataError(f"{folder} is a saved data set without splits, and split {split} would have no effect.")
    return found.with_format(None)


def _hub_message(name: str, split: str, error: Exception) -> str:
    """Say what went wrong in our words: the errors of datasets name the splits and subsets there are, in lists."""
    said = str(error)
    if "Unknown split" in said:
        there = re.findall(r"'([^']+)'", said.partition("one of")[2])
        named = f" Name one: {override('data.train', [{'path': name, 'split': there[0]}])}" if there else ""
        return f"The hub data set {name} has no split {split}; it has {', '.join(there) or 'none'}.{named}"
    if "Config name is missing" in said or ("BuilderConfig" in said and "not found" in said):
        there = re.findall(r"'([^']+)'", said.partition("vailable")[2].partition("Example")[0])
        named = f" Name one: {override('data.train', [{'path': name, 'subset': there[0]}])}" if there else ""
        return f"The hub data set {name} has the subsets {', '.join(there)}.{named}"
    return (
        f"There is no file {name} here, and it cannot be loaded as a hub data set (split {split}): {first_line(error)}"
    )
