"""What a model directory holds next to its weights, and carrying it over into a directory that is being written."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from qlora_trainer.common.atomic import disk_errors, real_path
from qlora_trainer.common.errors import DiskError
from qlora_trainer.weights.listing import file_inside

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
    """Tokenizer, templates, generation settings and license: kept byte for byte, for readers older than ours."""
    templates = directory / "additional_chat_templates"
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
    """Copy files of `directory` to the same places in `work`; DiskError where that fails."""
    for path in files:
        target = work / path.relative_to(directory)
        with disk_errors(work):
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)


def refuse_full_disk(output: Path, needed: int, what: str) -> None:
    """DiskError where the disk of `output` has too little space for `needed` bytes of tensors and files."""
    home = next(parent for parent in real_path(output).parents if parent.exists())
    free = shutil.disk_usage(home).free
    if needed + 2**24 > free:  # headers, index and record are far below 16 MiB
        raise DiskError(
            f"{what} takes {needed / 1e9:.2f} GB, and the disk of {home} has {free / 1e9:.2f} GB free. "
            "Free some space or choose another disk; nothing was written."
        )
