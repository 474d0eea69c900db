"""Data files become a prepared set: read, rendered and tokenised once, kept on disk, accounted for row by row.

The cache key is the content of the files, the tokenizer with its template, and the settings that change tokens; the
held-out share and the seed only choose among prepared rows, so changing them costs nothing. Every row read is either
used, or counted in the report with the reason. Leaves out: mixing sources by weight, skipping broken rows.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from qlora_trainer.data.encoding import Tokenizer
from qlora_trainer.data.files import RecordSource, open_source
from qlora_trainer.data.formats import RecordReader
from qlora_trainer.data.json_rows import Record
from qlora_trainer.data.messages import Row
from qlora_trainer.data.packing import Example
from qlora_trainer.data.rendering import Renderer
from qlora_trainer.data.store import ExampleSet, ExampleStore, StoreWriter, new_store
from qlora_trainer.errors import DataError
from qlora_trainer.progress import Progress, silent
from qlora_trainer.settings import DataConfig, DataFormat, Source

PREPARATION_VERSION = 3  # raise it whenever the same files would give other tokens or another layout
_BATCH_ROWS = 256


@dataclass
class SourceReport:
    """What became of one source's rows. rows == rows used + the sum of `dropped`."""

    name: str
    rows: int = 0
    examples: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    truncated: int = 0
    split: int = 0
    unused_columns: dict[str, int] = field(default_factory=dict)
    notices: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SetReport:
    """One set in numbers; lengths in tokens."""

    examples: int
    tokens: int
    learned_tokens: int
    shortest: int
    median: int
    longest: int


@dataclass(frozen=True)
class PreparationReport:
    """All that preparation has to tell, JSON-able with `to_json`.

    `train_duplicates` counts examples that repeat an earlier one of training, `heldout_duplicates` held-out examples
    that training also has, token for token.
    """

    sources: list[SourceReport]
    train: SetReport
    heldout: SetReport
    train_duplicates: int
    heldout_duplicates: int
    max_length: int
    notices: list[str]
    cached: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Prepared:
    """`key` is a hash of the examples of both sets, in order: equal keys, equal tokens and labels."""

    train: ExampleSet
    heldout: ExampleSet
    report: PreparationReport
    key: str


@dataclass(frozen=True)
class _Input:
    """One source with how to read it."""

    source: RecordSource
    format: DataFormat
    columns: dict[str, str]
    template: dict[str, str]
    for_heldout: bool


def prepare(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    max_positions: int | None,
    seed: int,
    cache_dir: Path,
    vocab_size: int | None = None,
    progress: Progress = silent,
) -> Prepared:
    """Read, render and tokenise the data of a run, or take it from the cache.

    Args:
        max_positions: the model's longest context, which caps `config.max_length`.
        seed: chooses the held-out rows.
        cache_dir: where prepared sets are kept, each in a directory of its own.
        vocab_size: rows of the model's embedding; a token beyond is an error.

    Raises:
        FileMissingError, DataError: a file or row cannot be used, or nothing is left to train on.
        DiskError: the cache cannot be written.
    """
    max_length = min(config.max_length, max_positions or config.max_length)
    renderer = Renderer(tokenizer, config.learn, max_length, config.too_long, config.template_date)
    inputs = _inputs(config)
    directory = cache_dir / _cache_key(inputs, config, max_length, vocab_size, tokenizer, renderer.template_date)
    store, cached = _existing(directory), True
    if store is None:
        cached = False
        with new_store(directory) as writer:
            _write(writer, inputs, renderer, vocab_size, progress)
        store = ExampleStore(directory)
    train, heldout = _split(store, config.heldout, seed)
    sources = [SourceReport(**source) for source in store.summary["sources"]]
    _check_usable(sources, inputs, store, max_length)
    notices = (
        []
        if max_length == config.max_length
        else [f"data.max_length is {config.max_length}, but the model has {max_length} positions: rows end there"]
    )
    if renderer.template_date:
        notices.append(
            f"the chat template writes a date into every conversation: it is fixed to {renderer.template_date} "
            "(data.template_date)"
        )
    elif config.template_date:
        notices.append("data.template_date has no effect: the tokenizer's chat template writes no date")
    report = PreparationReport(
        sources=sources,
        train=_set_report(train),
        heldout=_set_report(heldout),
        train_duplicates=len(train) - len(np.unique(train.digests)),
        heldout_duplicates=int(np.isin(heldout.digests, train.digests).sum()),
        max_length=max_length,
        notices=notices + _source_notices(sources),
        cached=cached,
    )
    key = hashlib.sha256(train.digests.tobytes() + b"held out" + heldout.digests.tobytes()).hexdigest()[:32]
    return Prepared(train, heldout, report, key)


def _inputs(config: DataConfig) -> list[_Input]:
    sources = [Source(path=config.train)] if isinstance(config.train, str) else list(config.train)
    heldout = [Source(path=config.heldout)] if isinstance(config.heldout, str) else []
    if not sources:
        raise DataError("data.train is an empty list: name at least one file.")
    return [
        _Input(
            open_source(
                source.path,
                source.split,
                subset=source.subset,
                encoding=source.encoding or config.encoding,
                header=source.header or config.header,
            ),
            config.format if source.format == "auto" else source.format,
            *_columns_made(source, config),
            for_heldout,
        )
        for group, for_heldout in ((sources, False), (heldout, True))
        for source in group
    ]


def _columns_made(source: Source, config: DataConfig) -> tuple[dict[str, str], dict[str, str]]:
    """Columns and template, both of the source where it has one of them: the two belong together."""
    mine = source if source.columns or source.template else config
    return mine.columns, mine.template


def _cache_key(
    inputs: Sequence[_Input],
    config: DataConfig,
    max_length: int,
    vocab_size: int | None,
    tokenizer: Tokenizer,
    template_date: date | None,
) -> str:
    parts = {
        "version": PREPARATION_VERSION,
        "tokenizers": tokenizers.__version__,
        "tokenizer": _tokenizer_identity(tokenizer),
        "sources": [[i.source.name, i.source.digest, i.format, i.columns, i.template, i.for_heldout] for i in inputs],
        "settings": [config.learn, config.too_long, max_length, vocab_size, str(template_date)],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _tokenizer_identity(tokenizer: Tokenizer) -> str:
    """A hash of what decides tokens: vocabulary, merges, added tokens, template."""
    tokenizer("a", padding=False, truncation=False)  # the definition also holds the last call's padding
    parts = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, dict(tokenizer.special_tokens_map)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _existing(directory: Path) -> ExampleStore | None:
    """The store prepared before, or None where there is none or it is damaged: then it is made anew."""
    try:
        return ExampleStore(directory)
    except (OSError, ValueError, KeyError):
        return None


def _write(
    writer: StoreWriter, inputs: Sequence[_Input], renderer: Renderer, vocab_size: int | None, progress: Progress
) -> None:
    reports = []
    unit = 0
    for item in inputs:
        report = SourceReport(item.source.name)
        reader = RecordReader(item.format, item.columns, item.template)
        counts = {"dropped": Counter[str](), "unused_columns": reader.unused, "notices": Counter[str]()}
        records = item.source.records()
        while batch := list(islice(_parsed(records, reader), _BATCH_ROWS)):
            for (where, _), rendered in zip(batch, renderer.render_batch(batch), strict=True):
                if isinstance(rendered, DataError):
                    raise rendered
                unit += 1
                report.rows += 1
                report.truncated += rendered.truncated
                report.split += len(rendered.examples) > 1
                report.examples += len(rendered.examples)
                counts["notices"].update(rendered.notices)
                if rendered.dropped:
                    counts["dropped"][rendered.dropped] += 1
                for example, row in zip(rendered.examples, rendered.rows, strict=True):
                    _check_vocabulary(example, vocab_size, where)
                    writer.append(example, row, where=where, unit=unit, for_heldout=item.for_heldout)
            progress(f"reading {item.source.name}", report.rows, None)
        for name, counter in counts.items():
            setattr(report, name, dict(counter))
        reports.append(asdict(report))
    writer.finish({"sources": reports})


def _parsed(records: Iterator[tuple[str, Record | DataError]], reader: RecordReader) -> Iterator[tuple[str, Row]]:
    for where, record in records:
        if isinstance(record, DataError):
            raise record
        yield where, reader.read(record, where)


def _check_vocabulary(example: Example, vocab_size: int | None, where: str) -> None:
    if vocab_size is not None and max(example.input_ids) >= vocab_size:
        raise DataError(
            f"{where}: the tokenizer gives token {max(example.input_ids)}, but the model has only {vocab_size} "
            "embeddings. Use the tokenizer that belongs to the model."
        )


def _split(store: ExampleStore, heldout: float | str, seed: int) -> tuple[ExampleSet, ExampleSet]:
    """Whole rows are held out, so that parts of one document stay together; of a single document, parts are."""
    for_heldout = np.asarray(store.arrays["for_heldout"])
    if isinstance(heldout, float) and heldout > 0:
        units = np.asarray(store.arrays["units"])
        rows = np.unique(units)
        if len(rows) == 1:
            units = rows = np.arange(len(units))
        if len(rows) >= 2:
            count = min(max(1, round(len(rows) * heldout)), len(rows) - 1)
            order = np.argsort(np.random.PCG64([seed, len(rows)]).random_raw(len(rows)), kind="stable")
            for_heldout = np.isin(units, rows[order[:count]])
    return ExampleSet(store, np.flatnonzero(~for_heldout)), ExampleSet(store, np.flatnonzero(for_heldout))


def _check_usable(
    sources: Sequence[SourceReport], inputs: Sequence[_Input], store: ExampleStore, max_length: int
) -> None:
    for for_heldout, name in ((False, "train"), (True, "heldout")):
        mine = [source for source, item in zip(sources, inputs, strict=True) if item.for_heldout == for_heldout]
        if mine and not any(source.examples for source in mine):
            dropped = sum((Counter(source.dropped) for source in mine), Counter[str]())
            reasons = "; ".join(f"{count} {reason}" for reason, count in dropped.items())
            raise DataError(
                f"data.{name}: none of the {sum(source.rows for source in mine)} rows of "
                f"{', '.join(source.name for source in mine)} can be used ({reasons}; max_length is {max_length})."
            )


def _set_report(examples: ExampleSet) -> SetReport:
    if len(examples) == 0:
        return SetReport(0, 0, 0, 0, 0, 0)
    lengths = examples.lengths
    return SetReport(
        examples=len(examples),
        tokens=int(lengths.sum()),
        learned_tokens=int(examples.learned_counts.sum()),
        shortest=int(lengths.min()),
        median=int(np.median(lengths)),
        longest=int(lengths.max()),
    )


def _source_notices(sources: Sequence[SourceReport]) -> list[str]:
    lines = []
    for source in sources:
        lines += [f"{source.name}: {count} of {source.rows} rows: {text}" for text, count in source.notices.items()]
        lines += [
            f"{source.name}: column {column} ({count} rows) is not used"
            for column, count in source.unused_columns.items()
        ]
    return lines
