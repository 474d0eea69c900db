"""Choose the files of a model directory that are not weights, and copy them into a directory that is being written."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from qlora_trainer.common.atomic import disk_errors, real_path
from qlora_trainer.common.errors import DiskError
from qlora_trainer.common.units import gib
from qlora_trainer.weights.listing import file_inside
from qlora_trainer.weights.turn_files import MORE_TEMPLATES

_COPIED_SUFFIXES = {".json", ".model", ".txt", ".jinja", ".tiktoken"}
_COPIED_STEMS = {"LICENSE", "NOTICE"}
_NOT_COPIED = {
    "config.json",  # written by us
    "adapter_config.json",  # would be applied a second time
    "quantize_config.json",
    "quantization_config.json",
    "hf_quant_config.json",
    "import.json",
    "manifest.json",
    "trainer_state.json",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
    "qlora_merge.json",
    "qlora_quantize.json",
}


def files_to_copy(directory: Path) -> list[Path]:
    """List tokenizer, templates, generation settings and license, to be copied byte for byte.

    Other programs and older versions then find what they expect.

    Args:
        directory: the model directory.

    Returns:
        Paths of files inside it.
    """
    templates = directory / MORE_TEMPLATES
    names = [path for path in sorted(directory.iterdir()) if path.is_file()]
    copied = [
        path
        for path in names
        if path.name not in _NOT_COPIED
        and not path.name.endswith(".index.json")
        and (path.suffix in _COPIED_SUFFIXES or path.name.partition(".")[0].upper() in _COPIED_STEMS)
    ]
    if templates.is_dir():
        copied += sorted(templates.glob("*.jinja"))
    return [file_inside(path.parent, path.name) for path in copied]


def copy_files(directory: Path, files: Sequence[Path], work: Path) -> None:
    """Copy files to the same places in another directory; DiskError if that fails.

    Args:
        directory: the source.
        files: paths inside it.
        work: the target.
    """
    for path in files:
        target = work / path.relative_to(directory)
        with disk_errors(work):
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)


def refuse_full_disk(output: Path, needed: int, what: str) -> None:
    """Refuse to write where the disk has too little space.

    Args:
        output: the directory to be written; it need not exist.
        needed: bytes of tensors and files.
        what: begins the message, such as "The merged model".

    Raises:
        DiskError: less is free.
    """
    home = next(parent for parent in real_path(output).parents if parent.exists())
    free = shutil.disk_usage(home).free
    if needed + 2**24 > free:  # headers, index and record are far below 16 MiB
        raise DiskError(
            f"{what} takes {gib(needed)}, and the disk of {home} has {gib(free)} free. "
            "Free some space or choose another disk; nothing was written."
        )
