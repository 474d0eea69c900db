"""Import a .gguf file as a model directory: its config, its tokenizer, and a record of where each tensor is.

Training, fingerprints and the merge read a checkpoint by its own names, and so they read a GGUF base too. transformers
knows how a file's names, head permutations and norms translate; its tables are used here tensor by tensor. What it
drops of the metadata is restored (metadata.py, pre_tokenizer.py).
The weights stay in the file and are dequantized when they are read (reader.py), so the whole model is never in 16 bits,
in memory or on disk. The values are those of `from_pretrained(gguf_file=...)`, cast once to the dtype that the record
names. That dtype decides the NF4 codes: float16 for quantized tensors (their scales are float16, so it keeps more of
them than bfloat16), or float32 where a value would overflow; float tensors keep their dtype.

Left out: mixtures of experts (their layers are merged from several tensors, and cannot become 4-bit here) and files
split into several.
"""

import json
import math
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from qlora_trainer.common.atomic import new_directory, refuse_unwritable, write_text
from qlora_trainer.common.boundary import as_model_error, library_boundary
from qlora_trainer.common.errors import FileMissingError, ModelError, NotInstalledError, OutputExistsError
from qlora_trainer.common.file_identity import FileIdentity, FileRecords, file_sha256
from qlora_trainer.common.progress import Progress
from qlora_trainer.common.quiet import quiet_transformers
from qlora_trainer.common.transformers_internals import gguf_header_known
from qlora_trainer.common.units import counted, dtype_name
from qlora_trainer.weights.gguf.layout import Translation, readable_architectures, translate_tensors
from qlora_trainer.weights.gguf.pre_tokenizer import restore_split
from qlora_trainer.weights.gguf.reader import (
    IMPORT_RECORD,
    ImportedTensor,
    StoredTensor,
    examine_values,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# In the cache. The older folders `gguf`, with copies in 16 bits, and `gguf-2`, whose configs lack what transformers
# drops of a file's metadata, are no longer read and may be deleted.
FOLDER = "gguf-3"
FLOAT16_OVERFLOW = 65520.0  # the smallest number that rounds to infinity
FLOAT_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

TOKENIZER_PROBE = "Hello, wörld!\n  def f(x): return x+1 🙂 12345\tend"


def import_gguf(path: Path, cache_dir: Path, progress: Progress) -> Path:
    """Make the model directory that represents a GGUF file, or find the one made before.

    The first call reads every value. The directory is named after the file and its sha256, and written under a
    temporary name, so one that exists is complete. The file must stay, as the weights are read from it. ModelError is
    raised where it is no readable GGUF file or transformers cannot read its architecture, NotInstalledError where the
    package gguf is missing, DiskError where nothing can be written.

    Args:
        path: the .gguf file.
        cache_dir: the user's cache, as `user_cache` finds it.
        progress: gets bytes while the file is hashed, and elements while its tensors are examined.

    Returns:
        The directory, below `cache_dir`.

    Raises:
        FileMissingError: there is no such file.
        OutputExistsError: the directory exists and is not an import.
    """
    if not path.is_file():
        raise FileMissingError(f"There is no model file {path}.")
    digest = _known_sha256(path, cache_dir, progress)
    directory = cache_dir / FOLDER / f"{path.stem}-{digest[:16]}"
    if (directory / IMPORT_RECORD).is_file():
        _note_place(directory, path)
        return directory
    # Here, as the configs it imports take longer than to find an import that was made before.
    from qlora_trainer.weights.gguf.metadata import read_changes, read_metadata, restore_config, stop_tokens

    refuse_unwritable(directory, "XDG_CACHE_HOME")
    with quiet_transformers():
        progress(f"Reading the metadata of {path.name}", 0, None)
        reader = _open(path)
        metadata = read_metadata(reader, path)
        changes = read_changes(metadata, reader, path)
        with gguf_header_known(reader):
            config = restore_config(_read_config(path), changes)
            tokenizer = _read_tokenizer(path, config)
        with torch.device("meta"):
            model = _build_model(config, path)
        names = [tensor.name for tensor in reader.tensors]
        with library_boundary(f"The tensors in {path} cannot be translated"):
            translations = translate_tensors(metadata.architecture, names, model, path)
        warnings = restore_split(tokenizer, metadata.tokenizer, path) + metadata.warnings()
        tensors = _examine_tensors(path, reader, translations, progress)
        try:
            with new_directory(directory) as temporary:
                _write_config(temporary, config, model, tensors, stop_tokens(metadata, config, len(tokenizer)))
                _write_tokenizer(temporary, tokenizer, path)
                used = changes.used_tensors | set(translations)
                _write_record(temporary, path, digest, reader, used, tensors, warnings)
        except OutputExistsError:
            # Another process made the same import meanwhile; only a complete one can have this name.
            if not (directory / IMPORT_RECORD).is_file():
                raise
    return directory


def _known_sha256(path: Path, cache_dir: Path, progress: Progress) -> str:
    """Return a file's sha256, from the cache if the file has not changed since it was hashed."""
    identity, records = FileIdentity.of(path), FileRecords(cache_dir / "digests")
    known = records.find(str(path.absolute()), [identity])
    if isinstance(known, str):
        return known
    began, done = time.time_ns(), 0

    def count(block: bytes) -> None:
        nonlocal done
        done += len(block)
        progress(f"Reading {path.name}", done, identity.size)

    digest = file_sha256(path, count)
    records.keep(str(path.absolute()), [identity], digest, began)
    return digest


def _described(path: Path) -> dict[str, Any]:
    """Return the record's entry on the file: path, size and times, by which a change is found without reading it."""
    return {"file": asdict(FileIdentity.of(path.resolve()))}


def _note_place(directory: Path, path: Path) -> None:
    """Update the record if the same file now has another path or other times."""
    record = json.loads((directory / IMPORT_RECORD).read_text(encoding="utf-8"))
    if record | _described(path) != record:
        write_text(directory / IMPORT_RECORD, json.dumps(record | _described(path), indent=2) + "\n")


def _open(path: Path) -> Any:
    """Open gguf's reader over the memory-mapped file; a truncated file fails here."""
    try:
        from qlora_trainer.weights.gguf.fast_reader import FastReader
    except ImportError as error:
        raise NotInstalledError(f"{path} is a GGUF file; reading it needs a package: pip install gguf") from error
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(f"{path} is not a GGUF file: it starts with {magic!r}, not b'GGUF'. Download it again?")
    with as_model_error(
        lambda error: (
            f"{path} cannot be read as GGUF: it is damaged, or was not downloaded to its end "
            f"({path.stat().st_size:,} bytes here). Download it again. ({error})"
        )
    ):
        reader = FastReader(path)
    split = reader.get_field("split.count")
    if split is not None and split.contents() > 1:
        raise ModelError(
            f"{path} is one of {split.contents()} parts of a model. Join them first: llama-gguf-split --merge "
            f"{path.name} whole.gguf"
        )
    return reader


def _read_config(path: Path) -> "PretrainedConfig":
    with as_model_error(
        lambda error: (
            f"transformers {transformers.__version__} cannot read the model in {path}: {error}\n"
            f"From GGUF files it reads: {', '.join(readable_architectures())}. For another model, use its "
            "safetensors directory or hub name."
        )
    ):
        config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    # transformers' notes on where the config came from do not hold for the import.
    for note in ("quantization_config", "_model_name_or_path"):
        vars(config).pop(note, None)
    return config


def _build_model(config: "PretrainedConfig", path: Path) -> "PreTrainedModel":
    with as_model_error(
        lambda error: f"{path} holds a {config.model_type}, which is not a causal language model. ({error})"
    ):
        return transformers.AutoModelForCausalLM.from_config(config)


def _examine_tensors(
    file: Path, reader: Any, translations: dict[str, Translation], progress: Progress
) -> dict[str, ImportedTensor]:
    """Map each name in the checkpoint to its tensor in the file and its dtype; every value is looked at once.

    Raises:
        ModelError: a tensor has another shape than the model's, or values that are not finite.
    """
    sources = [tensor for tensor in reader.tensors if tensor.name in translations]
    done, total = 0, sum(int(source.n_elements) for source in sources)
    examined = {}
    for source in sources:
        translation = translations[source.name]
        shape = tuple(int(size) for size in reversed(source.shape))  # llama.cpp lists the fastest dimension first
        stored = StoredTensor(source.name, source.tensor_type.name, shape, int(source.data_offset))
        found = examine_values(stored, file, translation.convert)
        if found.shape != translation.shape:
            raise ModelError(
                f"Tensor {source.name} has shape {found.shape}, but the model's {translation.name} has "
                f"{translation.shape}. The file's metadata and tensors disagree."
            )
        if not (math.isfinite(found.lowest) and math.isfinite(found.highest)):
            raise ModelError(f"Tensor {source.name} holds NaN or infinite values; the file is damaged.")
        # A float tensor keeps its dtype; a quantized one becomes float16, or float32 where that would overflow.
        dtype = FLOAT_TYPES.get(stored.type, torch.float16)
        if dtype == torch.float16 and max(-found.lowest, found.highest) >= FLOAT16_OVERFLOW:
            dtype = torch.float32
        examined[translation.name] = ImportedTensor(stored, dtype, found.shape, found.rows)
        done += int(source.n_elements)
        progress("Examining the GGUF file", done, total)
    return examined


def _write_config(
    directory: Path,
    config: "PretrainedConfig",
    model: "PreTrainedModel",
    tensors: dict[str, ImportedTensor],
    stops: int | list[int] | None,
) -> None:
    """Write generation_config.json, and config.json with the model's class and the dtype of most of its values."""
    config.architectures = [type(model).__name__]
    config.dtype = _main_dtype(model, tensors)
    config.save_pretrained(directory)
    generation = transformers.GenerationConfig.from_model_config(config)
    generation.eos_token_id = stops
    generation.save_pretrained(directory)


def _main_dtype(model: "PreTrainedModel", tensors: dict[str, ImportedTensor]) -> torch.dtype:
    """Return the dtype that most of the model's elements are stored in."""
    elements: Counter[torch.dtype] = Counter()
    for name, tensor in model.state_dict().items():
        if name in tensors:
            elements[tensors[name].dtype] += tensor.numel()
    return elements.most_common(1)[0][0]


def _read_tokenizer(path: Path, config: "PretrainedConfig") -> Any:
    with as_model_error(
        lambda error: (
            f"The tokenizer in {path} cannot be read: {error}\nUse the model's safetensors directory or hub name."
        )
    ):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    tokenizer.model_max_length = getattr(config, "max_position_embeddings", tokenizer.model_max_length)
    return tokenizer


def _write_tokenizer(directory: Path, tokenizer: Any, path: Path) -> None:
    """Save the tokenizer, and check that the one read back from the files encodes the same."""
    tokenizer.save_pretrained(directory)
    settings_file = directory / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8"))
    # Every transformers release since 4.0 knows this class, which takes everything from tokenizer.json.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for note in ("is_local", "local_files_only"):
        settings.pop(note, None)
    settings_file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    # With the added tokens that were written: transformers would parse all of tokenizer.json in Python to find them.
    again = transformers.PreTrainedTokenizerFast.from_pretrained(
        directory,
        local_files_only=True,
        added_tokens_decoder=tokenizer.backend_tokenizer.get_added_tokens_decoder(),
    )
    same = (
        again(TOKENIZER_PROBE).input_ids == tokenizer(TOKENIZER_PROBE).input_ids
        and again.special_tokens_map == tokenizer.special_tokens_map
        and again.chat_template == tokenizer.chat_template
        and len(again) == len(tokenizer)
    )
    if not same:
        raise ModelError(
            f"The tokenizer in {path} changes when transformers saves and reads it. Use the model's safetensors "
            "directory or hub name."
        )


def _write_record(
    directory: Path,
    path: Path,
    digest: str,
    reader: Any,
    used: set[str],
    tensors: dict[str, ImportedTensor],
    warnings: list[str],
) -> None:
    """Write down what the directory represents, for people and for reader.py; last, so its presence means complete."""
    types = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    dtypes = Counter(dtype_name(tensor.dtype) for tensor in tensors.values())
    record = _described(path) | {
        "sha256": digest,
        "architecture": reader.get_field("general.architecture").contents(),
        "gguf_types": dict(types.most_common()),
        "unused_tensors": [tensor.name for tensor in reader.tensors if tensor.name not in used],
        "warnings": warnings,
        "storage_dtypes": dict(dtypes.most_common()),
        "transformers": transformers.__version__,
        "tensors": {name: tensor.to_json() for name, tensor in tensors.items()},
    }
    (directory / IMPORT_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def import_warnings(directory: Path) -> list[str]:
    """List what an imported checkpoint leaves out of its GGUF file.

    Args:
        directory: any model directory.

    Returns:
        Warnings for the user; none for a directory that is not an import.
    """
    record = directory / IMPORT_RECORD
    if not record.is_file():
        return []
    values = json.loads(record.read_text(encoding="utf-8"))
    unused, warnings = values["unused_tensors"], list(values["warnings"])
    if unused:
        shown = ", ".join(unused[:3])
        tensors = counted(len(unused), "tensor")
        warnings.append(f"{tensors} of the GGUF file without a place in transformers' model: {shown}.")
    return warnings
