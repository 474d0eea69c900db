"""Prepare data files: read, render and tokenize them once, keep the result on disk, and account for every row.

The cache key is the content of the files, the tokenizer with its template, and the settings that change tokens; the
eval share, the mixture and the seed only choose among prepared rows, so changing them costs nothing. Every row read is
used, or counted in the report with the reason, or skipped, counted and listed. Left out: how rows become examples
(chunks.py), which rows an epoch takes (batching/mixing.py), and clearing the cache.
"""

import contextlib
import datetime
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

from qlora_trainer.common.errors import DataError, OutputExistsError
from qlora_trainer.common.progress import Progress, silent
from qlora_trainer.common.units import counted
from qlora_trainer.config.data_schema import DataConfig, DataFormat, SourceFile
from qlora_trainer.data.batching.mixing import Mixture, SourceAmount, epoch_quotas, eval_counts, is_mixed, shuffled
from qlora_trainer.data.preparation.chunks import (
    ChunkMaker,
    Job,
    make_chunks,
    tokenizer_identity,
)
from qlora_trainer.data.preparation.record_groups import in_chunks
from qlora_trainer.data.preparation.reports import (
    PreparationReport,
    SourceReport,
    add_place,
    count_reasons,
    date_warnings,
    eval_repeats,
    repeat_warnings,
    set_report,
    skipped_warning,
    source_warnings,
    train_repeats,
)
from qlora_trainer.data.preparation.row_reading import first_format
from qlora_trainer.data.preparation.source_checks import check_skipped, check_usable
from qlora_trainer.data.preparation.source_keys import open_sources
from qlora_trainer.data.preparation.store import SKIPPED_NAME, ExampleSet, ExampleStore, existing_store
from qlora_trainer.data.preparation.store_writer import StoreWriter, new_store
from qlora_trainer.data.reading.digests import FileDigests
from qlora_trainer.data.reading.files import RecordSource
from qlora_trainer.data.rendering.encoding import Tokenizer
from qlora_trainer.data.rendering.own_ids import OwnIds

PREPARATION_VERSION = 8  # raise it whenever the same files would give other tokens or another layout
RENDERING_PACKAGES = ("jinja2", "tokenizers", "transformers")  # another version may give other tokens


@dataclass(frozen=True)
class Prepared:
    """Hold the training and eval examples of a run, and what became of the rows.

    `key` is a hash of the examples of both sets, in order, and of the mixture: equal keys, equal epochs. `mixture` is
    None where an epoch takes every training row once.
    """

    train: ExampleSet
    eval: ExampleSet
    report: PreparationReport
    key: str
    mixture: Mixture | None = None

    def write_skipped_rows(self, directory: Path) -> None:
        """List the skipped rows, where there are any, in a file.

        Args:
            directory: gets the file.
        """
        if self.report.skipped_rows:
            (directory / SKIPPED_NAME).write_bytes(Path(self.report.skipped_rows).read_bytes())


@dataclass(frozen=True)
class _Input:
    """Hold one source, and what is known of it before it is read."""

    settings: SourceFile
    source: RecordSource
    part: SourceAmount | None  # how much of it an epoch takes; None: it is kept for evaluation

    @property
    def for_eval(self) -> bool:
        return self.part is None


def prepare(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    max_positions: int | None,
    seed: int,
    cache_dir: Path,
    vocab_size: int | None = None,
    own_ids: Callable[[], OwnIds | None] = lambda: None,
    leading_ids: Sequence[int] = (),
    progress: Progress = silent,
) -> Prepared:
    """Read, render and tokenize the data of a run, or take it from the cache.

    A FileMissingError or DataError says that a file or row cannot be used, or that nothing is left to train on; a
    DiskError, that the cache cannot be written.

    Args:
        config: what is read, and how.
        tokenizer: the model's.
        max_positions: the model's longest context, which caps `config.max_length`; None: nothing does.
        seed: chooses the eval rows.
        cache_dir: where prepared sets are kept, each in a directory of its own.
        vocab_size: rows of the model's embedding; a token beyond is an error.
        own_ids: returns what gives ids by the tokenizer's own file; called where rows are prepared, to compare some.
        leading_ids: of virtual tokens, which each example begins with; `max_length` counts them.
        progress: is called with rows read.

    Returns:
        Both sets, and the report.

    Raises:
        DataError: the virtual tokens leave no space for a row.
    """
    max_length = min(config.max_length, max_positions or config.max_length)
    if len(leading_ids) >= max_length:
        raise DataError(
            f"Rows may have {counted(max_length, 'token')}, and {len(leading_ids)} virtual tokens are before each, so "
            "nothing is left for the rows. Raise data.max_length as far as the model has positions, or lower "
            "adapter.virtual_tokens."
        )
    maker = ChunkMaker(config, tokenizer, max_length, vocab_size, len(leading_ids))
    date = maker.renderer.template_date
    digests = FileDigests(cache_dir / "digests")
    inputs = _inputs(config, digests)
    directory = cache_dir / _cache_key(inputs, config, max_length - len(leading_ids), vocab_size, tokenizer, date)
    warnings = date_warnings(config.template_date, date)
    cached = True
    while (store := existing_store(directory)) is None:
        cached = False
        control = tokenizer.added_tokens_decoder
        # Suppressed where another process was as quick.
        with contextlib.suppress(OutputExistsError), new_store(directory, control) as writer:
            maker.own_ids = own_ids()
            _write(writer, inputs, maker, progress)
            _check_unchanged(digests)
    sources = [SourceReport(**source) for source in store.summary["sources"]]
    check_skipped(sources, config.max_skipped)
    parts = [item.part for item in inputs if item.part]
    check_usable(sources, [item.for_eval for item in inputs], is_mixed(parts), max_length)
    train, eval_set, mixture = _split(store, inputs, config.eval, seed, leading_ids)
    _count_parts(sources, inputs, train, eval_set, mixture)
    key = hashlib.sha256(train.digests.tobytes() + b"eval" + eval_set.digests.tobytes())
    if mixture:
        key.update(json.dumps([[len(rows) for rows in mixture.rows], mixture.quotas]).encode())
    warnings += [item.source.summary for item in inputs if item.source.summary]
    report = _report(config, store, sources, train, eval_set, max_length, cached, warnings)
    return Prepared(train, eval_set, report, key.hexdigest()[:32], mixture)


def _inputs(config: DataConfig, digests: FileDigests) -> list[_Input]:
    if not config.train:
        raise DataError("data.train is an empty list: name at least one file.")
    parts = (
        [SourceAmount()]
        if isinstance(config.train, str)
        else [SourceAmount(file.weight, file.count) for file in config.train]
    )
    opened = open_sources(config, digests.content)
    return [
        _Input(file, source, parts[index] if index < len(parts) else None)
        for index, (file, source) in enumerate(opened)
    ]


def _cache_key(
    inputs: Sequence[_Input],
    config: DataConfig,
    row_length: int,
    vocab_size: int | None,
    tokenizer: Tokenizer,
    date: datetime.date | None,
) -> str:
    sources = [
        [i.source.name, i.source.digest, i.settings.model_dump(exclude={"path", "weight", "count"}), i.for_eval]
        for i in inputs
    ]
    parts = {
        "version": PREPARATION_VERSION,
        "packages": [metadata.version(name) for name in RENDERING_PACKAGES],
        "tokenizer": tokenizer_identity(tokenizer),
        "sources": sources,
        "settings": [config.train_on, config.too_long, config.on_bad_row, row_length, vocab_size, str(date)],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _write(writer: StoreWriter, inputs: Sequence[_Input], maker: ChunkMaker, progress: Progress) -> None:
    reports = [SourceReport(item.source.name) for item in inputs]
    names = ("dropped", "skipped", "unused_columns", "warnings", "spelled")
    counts = [{name: Counter[str]() for name in names} for _ in inputs]
    first_row = 1
    for (index, _, _), chunk in make_chunks(_jobs(inputs), maker):
        report, counted = reports[index], counts[index]
        writer.append(chunk.block, source=index, first_row=first_row)
        writer.skip(chunk.skipped)
        first_row += chunk.rows
        report.rows += chunk.rows
        report.truncated += chunk.truncated
        report.split += chunk.split
        report.examples += len(chunk.block)
        for name in ("unused_columns", "warnings", "spelled"):
            counted[name].update(getattr(chunk, name))
        for where, reason in chunk.dropped:
            counted["dropped"][reason] += 1
            add_place(report.places, reason, where)
        count_reasons(counted["skipped"], chunk.skipped, report.places)
        lines = inputs[index].source.lines
        progress(f"reading {report.name}", report.rows, max(lines, report.rows) if lines else None)
    for item, report, counted in zip(inputs, reports, counts, strict=True):
        for name, counter in counted.items():
            setattr(report, name, dict(counter))
        report.notes = list(item.source.notes)
        if report.rows == sum(report.skipped.values()):
            raise DataError(
                f"{item.source.name}: {'the only row is' if report.rows == 1 else f'all {report.rows:,} rows are'} "
                "bad, so none can be skipped: "
                f"{'; '.join(f'{count} {reason}' for reason, count in counted['skipped'].most_common(3))}."
            )
    writer.finish({"sources": [asdict(report) for report in reports], "control_tokens": writer.control_tokens()})


def _jobs(inputs: Sequence[_Input]) -> Iterator[Job]:
    """Cut all sources into chunks; the first rows of a source show how all of it is read."""
    for index, item in enumerate(inputs):
        format: DataFormat = "auto"
        for records in in_chunks(item.source.records()):
            if format == "auto":
                format = first_format(item.settings, records)
            yield index, format, records


def _check_unchanged(digests: FileDigests) -> None:
    if changed := digests.changed():
        raise DataError(
            f"{', '.join(str(path) for path in changed)} changed while being read, so what was read is of no one "
            "version. Try again when nothing writes to it."
        )


def _split(
    store: ExampleStore, inputs: Sequence[_Input], eval_set: object, seed: int, leading_ids: Sequence[int]
) -> tuple[ExampleSet, ExampleSet, Mixture | None]:
    """Choose training and eval examples, and how the former are mixed."""
    sources = store.column("source")
    parts = [item.part for item in inputs if item.part]
    is_eval = sources >= len(parts)
    if isinstance(eval_set, float) and eval_set > 0:
        is_eval = _eval_share(store, parts, eval_set, seed)
    train = np.flatnonzero(~is_eval)
    mixture = None
    if is_mixed(parts):
        rows = tuple(np.flatnonzero(sources[train] == source) for source in range(len(parts)))
        mixture = Mixture(rows, tuple(epoch_quotas([len(mine) for mine in rows], parts)))
    chosen, kept = (ExampleSet(store, indices, leading_ids) for indices in (train, np.flatnonzero(is_eval)))
    return chosen, kept, mixture


def _eval_share(store: ExampleStore, parts: Sequence[SourceAmount], share: float, seed: int) -> np.ndarray:
    """Choose the examples that are kept for evaluation, (E,) bool.

    Whole rows are, so that parts of one document stay together; of a source that is a single document, parts are.
    """
    sources = store.column("source")
    numbers = store.column("row_number").astype(np.float64)
    for source in range(len(parts)):
        mine = np.flatnonzero(sources == source)
        is_one_row = len(mine) > 0 and numbers[mine[0]] == numbers[mine[-1]]
        if is_one_row:  # its parts get numbers between it and the next
            numbers[mine] = numbers[mine[0]] + np.arange(len(mine)) / len(mine)
    first = np.flatnonzero(np.diff(numbers, prepend=0))  # of each of R rows, which are in order; they count from 1
    row_of = np.repeat(np.arange(len(first)), np.diff(first, append=len(numbers)))
    if len(first) < 2:
        return np.zeros(len(numbers), dtype=np.bool_)
    source_of = sources[first]
    available = np.bincount(source_of, minlength=len(parts)).tolist()
    order = shuffled(len(first), [seed, len(first)])
    is_chosen = np.zeros(len(first), dtype=np.bool_)
    for source, count in enumerate(eval_counts(available, parts, share)):
        is_chosen[order[source_of[order] == source][:count]] = True
    return is_chosen[row_of]


def _count_parts(
    sources: Sequence[SourceReport],
    inputs: Sequence[_Input],
    train: ExampleSet,
    eval_set: ExampleSet,
    mixture: Mixture | None,
) -> None:
    in_train, in_eval = (np.bincount(part.sources, minlength=len(inputs)).tolist() for part in (train, eval_set))
    for index, report in enumerate(sources):
        report.train, report.eval = in_train[index], in_eval[index]
        report.epoch = report.train if mixture is None or inputs[index].for_eval else mixture.quotas[index]


def _report(
    config: DataConfig,
    store: ExampleStore,
    sources: list[SourceReport],
    train: ExampleSet,
    eval_set: ExampleSet,
    max_length: int,
    cached: bool,
    warnings: Sequence[str],
) -> PreparationReport:
    train_twice, eval_twice = train_repeats(train), eval_repeats(eval_set, train)
    capped = (
        f"data.max_length is {config.max_length}, but the model has {counted(max_length, 'position')}: rows end there"
    )
    return PreparationReport(
        sources=sources,
        train=set_report(train),
        eval=set_report(eval_set),
        epoch_examples=sum(source.epoch for source in sources),
        train_duplicates=train_twice[0],
        eval_duplicates=eval_twice[0],
        train_other_answers=train_twice[1],
        eval_other_answers=eval_twice[1],
        max_length=max_length,
        warnings=[
            *skipped_warning(sources, str(store.skipped_rows)),
            *([] if max_length == config.max_length else [capped]),
            *source_warnings(sources),
            *repeat_warnings(train_twice[0], eval_twice[0], len(eval_set)),
            *warnings,
        ],
        skipped_rows=str(store.skipped_rows) if any(source.skipped for source in sources) else None,
        cached=cached,
    )
