"""Make chunks: some hundred records at a time become a block of examples and the counts of what was found in them.

What a chunk gives depends on nothing but its records and the settings. A chunk is rendered in the calling thread while
another thread tokenizes the one before it: the tokenizer lets go of Python's lock and uses all cores. Left out: reading
files, and writing what is made (store_writer.py).
"""

import hashlib
import json
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as arrow

from qlora_trainer.common.errors import DataError
from qlora_trainer.config.data_schema import DataConfig, DataFormat
from qlora_trainer.data.formats.parse import LeftOutError, RecordReader
from qlora_trainer.data.preparation.record_groups import Records
from qlora_trainer.data.preparation.rendered_rows import RenderedRows
from qlora_trainer.data.preparation.row_reading import FoundRow, SourceReader, bad_row_error
from qlora_trainer.data.preparation.source_keys import source_files
from qlora_trainer.data.preparation.store_writer import make_block
from qlora_trainer.data.rendering.encoding import Encoded, Tokenizer
from qlora_trainer.data.rendering.own_ids import OwnIds, refuse_other_ids
from qlora_trainer.data.rendering.renderer import Renderer
from qlora_trainer.data.rendering.spans import Rendering
from qlora_trainer.data.types import Example, Row

_CHUNKS_AHEAD = 2  # rendered, and waiting to be tokenized or finished

Job = tuple[int, DataFormat, Records]  # a source's index, how it is read, and some of its records


@dataclass
class Chunk:
    """Hold what some rows became, in the order of the rows."""

    block: arrow.RecordBatch  # the examples
    rows: int = 0
    truncated: int = 0
    split: int = 0
    dropped: list[tuple[str, str]] = field(default_factory=list)  # (where, reason)
    unused_columns: Counter[str] = field(default_factory=Counter)
    warnings: Counter[str] = field(default_factory=Counter)
    spelled: Counter[str] = field(default_factory=Counter)  # rows whose own text spells a control token, by token
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (where, reason)


@dataclass(frozen=True)
class RenderedChunk:
    """Hold records on their way to a Chunk: read as rows, and as text."""

    records: Records
    rows: Sequence[FoundRow]  # one a record: the row with its place, or why there is none
    texts: Sequence[Rendering | DataError]  # one for each row that is no error
    reader: RecordReader  # has counted what it did not use


class ChunkMaker:
    """Make chunks under one config: `render`, then `encode`, then `finish`.

    A DataError says that the tokenizer cannot be used.

    Args:
        config: what is read, and how.
        tokenizer: a fast one of transformers.
        max_length: longest example, in tokens.
        vocab_size: rows of the model's embedding; None: any token may be.
        leading_tokens: virtual tokens before each row, which `max_length` counts.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        max_length: int,
        vocab_size: int | None,
        leading_tokens: int = 0,
    ) -> None:
        self.own_ids: OwnIds | None = None  # by the tokenizer's own file; the first chunk is compared with it
        self.sources = source_files(config)
        self.skips_bad_rows = config.on_bad_row == "skip"
        self.max_skipped = config.max_skipped
        self._has_examples = False  # of any chunk so far
        self.vocab_size = vocab_size
        self.renderer = Renderer(
            tokenizer,
            config.train_on,
            max_length,
            config.too_long,
            config.template_date,
            leading_tokens=leading_tokens,
        )
        self.rendered_rows = RenderedRows(tokenizer, self.renderer)

    def render(self, source: int, format: DataFormat, records: Records) -> RenderedChunk:
        """Read records as rows, and write these as the tokenizer's template does.

        Args:
            source: index in `source_files`.
            format: what `first_format` says of the source's first rows.
            records: each with its place.

        Returns:
            Rows and texts, with the error of a bad one in its place.
        """
        reader = SourceReader(self.sources[source], format, self.rendered_rows)
        rows = [reader.read(where, record) for where, record in records]
        return RenderedChunk(records, rows, self.renderer.texts(_sound(rows)), reader.reader)

    def encode(self, rendered: RenderedChunk) -> list[Encoded | DataError]:
        """Tokenize a chunk's texts; may be called in another thread than the others.

        A ModelError says that the tokenizer gives other ids than its own file does.

        Args:
            rendered: from `render`.

        Returns:
            Tokens of each text that is no error.
        """
        encoded = self.renderer.encode(rendered.texts)
        if self.own_ids is not None:
            refuse_other_ids(rendered.texts, self.renderer.tokenizer.backend_tokenizer, self.own_ids)
            self.own_ids = None
        return encoded

    def finish(self, rendered: RenderedChunk, encoded: Sequence[Encoded | DataError]) -> Chunk:
        """Make examples of a chunk's rows, and count what became of them.

        A DataError is that of the first bad row, where bad rows are not skipped, or says that a token is beyond the
        model's vocabulary.

        Args:
            rendered: from `render`.
            encoded: what `encode` made of it.

        Returns:
            The examples and counts.
        """
        made = iter(self.renderer.examples(_sound(rendered.rows), rendered.texts, encoded))
        reader = rendered.reader
        examples: list[tuple[int, str, Example, Row]] = []
        chunk = Chunk(
            make_block([]), rows=len(rendered.records), unused_columns=reader.unused, warnings=reader.warnings
        )
        for text in rendered.texts:
            if isinstance(text, Rendering):
                chunk.spelled.update(list(dict.fromkeys(span.text for span in text.spans if span.ordinary)))
        for number, ((where, _), row) in enumerate(zip(rendered.records, rendered.rows, strict=True)):
            if isinstance(row, LeftOutError):
                chunk.dropped.append((where, str(row)))
                continue
            found = row if isinstance(row, DataError) else next(made)
            if isinstance(found, DataError):
                self._skip(chunk, where, found, rendered)
                continue
            chunk.truncated += found.truncated
            chunk.split += len(found.examples) > 1
            chunk.warnings.update(found.warnings)
            if found.dropped:
                chunk.dropped.append((where, found.dropped))
            for example, shown in zip(found.examples, found.rows, strict=True):
                _check_vocabulary(example, self.vocab_size, where)
                examples.append((number, where, example, shown))
        chunk.block = make_block(examples)
        self._has_examples |= bool(examples)
        return chunk

    def _skip(self, chunk: Chunk, where: str, error: DataError, rendered: RenderedChunk) -> None:
        if self.skips_bad_rows:
            chunk.skipped.append((where, str(error)))
            return
        others = [place for place in _bad_places(rendered) if place != where]
        raise bad_row_error(error, others, len(rendered.rows), self.max_skipped, self._has_examples)


def _bad_places(rendered: RenderedChunk) -> list[str]:
    """List the places of the rows that could not be read or rendered, of those that were read together."""
    texts = iter(rendered.texts)
    pairs = zip(rendered.records, rendered.rows, strict=True)
    found = [(place, row if isinstance(row, DataError) else next(texts)) for (place, _), row in pairs]
    return [place for place, error in found if isinstance(error, DataError) and not isinstance(error, LeftOutError)]


def make_chunks(jobs: Iterable[Job], maker: ChunkMaker) -> Generator[tuple[Job, Chunk], None, None]:
    """Make each job's chunk, in order, at most a few of them in memory.

    A DataError is that of the first bad row, or says why there are no more jobs, once what was read before is made.

    Args:
        jobs: records in chunks.
        maker: its `render` and `finish` run in this thread, its `encode` in another.

    Yields:
        Each job with its chunk.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="tokenizing") as other_thread:
        yield from _in_order(jobs, maker, other_thread)


def _in_order(jobs: Iterable[Job], maker: ChunkMaker, other_thread: ThreadPoolExecutor) -> Iterator[tuple[Job, Chunk]]:
    waiting: deque[tuple[Job, RenderedChunk, Future[list[Encoded | DataError]]]] = deque()
    failure: DataError | None = None
    for found in _until_failure(jobs, maker):
        if isinstance(found, DataError):
            failure = found
            break
        job, rendered = found
        waiting.append((job, rendered, other_thread.submit(maker.encode, rendered)))
        if len(waiting) > _CHUNKS_AHEAD:
            job, rendered, encoded = waiting.popleft()
            yield job, maker.finish(rendered, encoded.result())
    for job, rendered, encoded in waiting:
        yield job, maker.finish(rendered, encoded.result())
    if failure:
        raise failure


def _until_failure(jobs: Iterable[Job], maker: ChunkMaker) -> Iterator[tuple[Job, RenderedChunk] | DataError]:
    """Render jobs; yield at the end why there are no more, so that rows under way are looked at first."""
    try:
        for job in jobs:
            yield job, maker.render(*job)
    except DataError as error:
        yield error


def _sound(rows: Sequence[FoundRow]) -> list[tuple[str, Row]]:
    return [row for row in rows if isinstance(row, tuple)]


def tokenizer_identity(tokenizer: Tokenizer) -> str:
    """Hash what decides tokens: vocabulary, merges, added tokens, template.

    Args:
        tokenizer: of the run.

    Returns:
        The sha256 in hexadecimal.
    """
    tokenizer("a", padding=False, truncation=False)  # the definition also holds the last call's padding
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    others = [tokenizer.chat_template, dict(tokenizer.special_tokens_map)]
    digest.update(json.dumps(others, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _check_vocabulary(example: Example, vocab_size: int | None, where: str) -> None:
    if vocab_size is not None and max(example.input_ids) >= vocab_size:
        raise DataError(
            f"{where}: the tokenizer gives token {max(example.input_ids)}, but the model has only {vocab_size} "
            "embeddings. Use the tokenizer that belongs to the model."
        )
