"""A batch of records becomes a block of examples and what there is to say of it: the part that is done in parallel.

What a batch gives depends on nothing but the batch and the settings, so it is the same whichever process makes it, and
the prepared set is the same, byte by byte, whatever the number of processes. Records travel as JSON, batches as arrays
with a JSON header: nothing is pickled. Leaves out: reading files, and the processes themselves (workers.py).
"""

import contextlib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from qlora_trainer.common.errors import DataError
from qlora_trainer.config.data_schema import DataConfig, DataFormat, SourceFile
from qlora_trainer.data.formats.detect import resolve_format
from qlora_trainer.data.formats.parse import RecordReader
from qlora_trainer.data.preparation.store_writer import Block, make_block
from qlora_trainer.data.reading.json_rows import Record
from qlora_trainer.data.reading.values import MOST_LEVELS
from qlora_trainer.data.rendering.encoding import Tokenizer
from qlora_trainer.data.rendering.renderer import Renderer
from qlora_trainer.data.types import Example, Row

MAX_REASONS = 100  # different reasons counted apart; what comes after counts as OTHER_REASONS
OTHER_REASONS = "other reasons"
_BATCH_ROWS = 256
_BATCH_CHARACTERS = 1 << 20  # a batch of long documents has fewer rows, so that memory stays bounded


Records = Sequence[tuple[str, Record | DataError]]
Job = tuple[int, DataFormat, Records]  # a source's index, how it is read, and some of its records


@dataclass
class Batch:
    """What a batch of rows became, in the order of the rows."""

    block: Block
    rows: int = 0
    truncated: int = 0
    split: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    unused_columns: Counter[str] = field(default_factory=Counter)
    warnings: Counter[str] = field(default_factory=Counter)
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (where, reason)


class BatchMaker:
    """Makes batches under one config: parses, renders and tokenizes.

    Raises:
        DataError: the tokenizer cannot be used.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, max_length: int, vocab_size: int | None) -> None:
        self.sources = source_files(config)
        self.skips_bad_rows = config.on_bad_row == "skip"
        self.vocab_size = vocab_size
        self.renderer = Renderer(tokenizer, config.train_on, max_length, config.too_long, config.template_date)

    def format_of(self, source: int, records: Records) -> DataFormat:
        """How these rows of a source are read: as its settings say, or as the first shows that can be recognized."""
        named = self.sources[source]
        for where, record in records:
            if named.format != "auto":
                break
            with contextlib.suppress(DataError):  # reported when the row is read
                if not isinstance(record, DataError):
                    return resolve_format(record, named.format, named.columns, where, named.template)
        return named.format

    def make(self, source: int, format: DataFormat, records: Records) -> Batch:
        """One batch.

        Args:
            source: index in `source_files`.
            format: what `format_of` says of the source's first rows; "auto" where it cannot say.

        Raises:
            DataError: a row is bad and is not to be skipped (the first such row's), or a token is beyond the model's
                vocabulary.
        """
        reader = RecordReader(format, self.sources[source].columns, self.sources[source].template)
        parsed = [_parsed(reader, where, record) for where, record in records]
        rendered = iter(self.renderer.render_batch([row for row in parsed if not isinstance(row, DataError)]))
        examples: list[tuple[int, str, Example, Row]] = []
        batch = Batch(make_block([]), rows=len(records), unused_columns=reader.unused, warnings=reader.warnings)
        for number, ((where, _), row) in enumerate(zip(records, parsed, strict=True)):
            found = row if isinstance(row, DataError) else next(rendered)
            if isinstance(found, DataError):
                if not self.skips_bad_rows:
                    raise found
                batch.skipped.append((where, str(found)))
                continue
            batch.truncated += found.truncated
            batch.split += len(found.examples) > 1
            batch.warnings.update(found.warnings)
            if found.dropped:
                batch.dropped[found.dropped] += 1
            for example, shown in zip(found.examples, found.rows, strict=True):
                _check_vocabulary(example, self.vocab_size, where)
                examples.append((number, where, example, shown))
        batch.block = make_block(examples)
        return batch


def tokenizer_identity(tokenizer: Tokenizer) -> str:
    """A hash of what decides tokens: vocabulary, merges, added tokens, template."""
    tokenizer("a", padding=False, truncation=False)  # the definition also holds the last call's padding
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    others = [tokenizer.chat_template, dict(tokenizer.special_tokens_map)]
    digest.update(json.dumps(others, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def source_files(config: DataConfig) -> list[SourceFile]:
    """All sources of a config, those of training, then those kept for evaluation; what one does not say, the config
    says."""
    files: list[SourceFile] = [SourceFile(path=config.train)] if isinstance(config.train, str) else [*config.train]
    if not isinstance(config.eval, float):
        files.append(SourceFile(path=config.eval) if isinstance(config.eval, str) else config.eval)
    return [_with_defaults(file, config) for file in files]


def _with_defaults(file: SourceFile, config: DataConfig) -> SourceFile:
    made = file if file.columns or file.template else config  # the two belong together
    return file.model_copy(
        update={
            "format": config.format if file.format == "auto" else file.format,
            "columns": made.columns,
            "template": made.template,
            "header": file.header or config.header,
            "encoding": file.encoding or config.encoding,
        }
    )


def _parsed(reader: RecordReader, where: str, record: Record | DataError) -> tuple[str, Row] | DataError:
    if isinstance(record, DataError):
        return record
    try:
        return where, reader.read(record, where)
    except DataError as error:
        return error


def in_batches(records: Iterable[tuple[str, Record | DataError]]) -> Iterator[Records]:
    """Records in batches of bounded size: a bound on rows, and one on their text.

    Where reading fails, what was read before comes first: a bad row there is reported rather than what follows.
    """
    batch: list[tuple[str, Record | DataError]] = []
    characters = 0
    try:
        for where, record in records:
            if not isinstance(record, DataError):
                try:
                    characters += _characters(record)
                except RecursionError:
                    message = (
                        f"{where}: its objects and lists lie in each other more than {MOST_LEVELS} deep. Flatten it."
                    )
                    record = DataError(message)
            batch.append((where, record))
            if len(batch) == _BATCH_ROWS or characters >= _BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    except DataError:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def count_reasons(counts: Counter[str], skipped: Iterable[tuple[str, str]]) -> None:
    """Count skipped rows by what is wrong, without what differs from row to row: place, numbers, what is quoted."""
    for where, reason in skipped:
        text = reason.removeprefix(where)
        text = text.partition(": ")[2] if text[:1] in (",", ":") else text
        text = re.sub(r"'[^']*'|\"[^\"]*\"", "…", text.partition(". ")[0].removesuffix("."))
        kind = re.sub(r"\b(0x[0-9a-f]+|\d+)\b", "N", text)[:200]
        counts[kind if kind in counts or len(counts) < MAX_REASONS else OTHER_REASONS] += 1


def job_to_json(job: Job) -> bytes | None:
    """A job for another process, or None where a value is no plain JSON, such as a date."""
    source, format, records = job
    rows: list[tuple[str, Record | None, str | None]] = []
    for where, record in records:
        if isinstance(record, DataError):
            rows.append((where, None, str(record)))
        elif _is_plain(record):
            rows.append((where, record, None))
        else:
            return None
    return json.dumps([source, format, rows]).encode()


def job_from_json(message: bytes) -> Job:
    """The inverse of `job_to_json`."""
    source, format, rows = json.loads(message)
    return source, format, [(where, record if error is None else DataError(error)) for where, record, error in rows]


_ARRAYS = [f.name for f in fields(Block) if f.name != "texts"]
_COUNTS = [f.name for f in fields(Batch) if f.name != "block"]


def batch_to_bytes(batch: Batch) -> bytes:
    """A batch for another process: a line of JSON, then the arrays and the rows."""
    arrays = {name: getattr(batch.block, name) for name in _ARRAYS}
    header = {
        "arrays": [[name, array.dtype.str, len(array)] for name, array in arrays.items()],
        "counts": {name: getattr(batch, name) for name in _COUNTS},
    }
    return b"".join([json.dumps(header).encode(), b"\n", *(a.tobytes() for a in arrays.values()), batch.block.texts])


def batch_from_bytes(message: bytes) -> Batch:
    """The inverse of `batch_to_bytes`."""
    position = message.index(b"\n") + 1
    header = json.loads(message[:position])
    arrays = {}
    for name, dtype, length in header["arrays"]:
        arrays[name] = np.frombuffer(message, dtype, length, position)
        position += arrays[name].nbytes
    counts: dict[str, Any] = {
        name: Counter(value) if isinstance(value, dict) else value for name, value in header["counts"].items()
    }
    counts["skipped"] = [(where, reason) for where, reason in counts["skipped"]]
    return Batch(Block(**arrays, texts=message[position:]), **counts)


def _check_vocabulary(example: Example, vocab_size: int | None, where: str) -> None:
    if vocab_size is not None and max(example.input_ids) >= vocab_size:
        raise DataError(
            f"{where}: the tokenizer gives token {max(example.input_ids)}, but the model has only {vocab_size} "
            "embeddings. Use the tokenizer that belongs to the model."
        )


def _characters(value: Any, depth: int = 0) -> int:
    if isinstance(value, str):
        return len(value)
    if depth > MOST_LEVELS:
        raise RecursionError
    if isinstance(value, dict):
        return sum(_characters(inner, depth + 1) for inner in value.values())
    return sum(_characters(inner, depth + 1) for inner in value) if isinstance(value, list) else 0


def _is_plain(value: Any) -> bool:
    """Whether JSON gives back exactly this."""
    if isinstance(value, dict):
        return all(type(name) is str and _is_plain(inner) for name, inner in value.items())
    if isinstance(value, list):
        return all(_is_plain(inner) for inner in value)
    return value is None or type(value) in (str, int, float, bool)
