"""Compare the speed and memory of preparing rows: ours with `datasets.map` with the same tokenizer and chat template.

    python -m benchmarks.data prepare MODEL ROWS [--rows N ...] [--processes N] [--without NAME ...]

The rows of a real file (conversations in any format that the trainer reads) are repeated to as many as asked for, each
with its number at its start, so that no two are equal, and written as chat messages to one JSONL file. Every contender
prepares that file in a process of its own, from the file to tokens on the disk, and must come to the same number of
tokens. Ours also finds what is trained, looks for duplicates, and keeps the rows for display; the peer does what its
documentation shows: load_dataset("json"), then map(batched=True) with apply_chat_template and the tokenizer, no labels.

Time is from the first read to the last write, without imports and loading the tokenizer. Tokens a second and core are
by the processor's time of all processes, which other work on the machine changes little. Peak private memory is the
largest sum, over the process and those it starts, of anonymous memory (shared pages in parts), looked at five times a
second; next to it what the process held at its start, nearly all of it torch. The second start is the same call again.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from benchmarks.processes import cpu_seconds, end_job, run_job
from qlora_trainer.common.cache import user_cache
from qlora_trainer.runs.resume_rules import cpu_name

MAX_LENGTH = 100_000  # nothing is cut, by any contender


@dataclasses.dataclass(frozen=True)
class PreparationJob:
    model: str  # a directory
    rows: str  # JSONL, chat messages
    work: str  # an empty directory
    processes: int


@dataclasses.dataclass(frozen=True)
class Preparation:
    tokens: int
    seconds: float
    cpu_seconds: float
    second_seconds: float
    start_bytes: int
    peak_bytes: int = 0


def ours(job: PreparationJob) -> Callable[[], int]:
    from qlora_trainer.config.data_schema import DataConfig
    from qlora_trainer.data.preparation.prepare import prepare
    from qlora_trainer.model.tokenizer import load_tokenizer
    from qlora_trainer.weights.model_directory import ModelDirectory

    tokenizer = load_tokenizer(ModelDirectory.open(Path(job.model)))
    config = DataConfig(train=job.rows, eval=0.0, max_length=MAX_LENGTH)
    cache = Path(job.work)
    return lambda: prepare(config, tokenizer, max_positions=None, seed=0, cache_dir=cache).report.train.tokens


def peer(job: PreparationJob, processes: int | None) -> Callable[[], int]:
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.model)
    datasets.disable_progress_bars()

    def tokenized(batch: Mapping[str, Any]) -> Mapping[str, Any]:
        texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in batch["messages"]]
        return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)

    def prepare() -> int:
        rows = datasets.load_dataset("json", data_files=job.rows, split="train", cache_dir=job.work)
        rows = rows.map(tokenized, batched=True, remove_columns=rows.column_names, num_proc=processes)
        lists = rows.data.column("input_ids").chunks
        return sum(len(chunk.values) - chunk.offsets[0].as_py() for chunk in lists)

    return prepare


def contenders(processes: int) -> dict[str, Callable[[PreparationJob], Callable[[], int]]]:
    """List what is compared.

    Args:
        processes: of the peer.

    Returns:
        Name to what makes, of a job, the call that is measured.
    """
    return {
        "ours": ours,
        f"datasets.map, {processes} processes": lambda job: peer(job, job.processes),
        "datasets.map": lambda job: peer(job, None),
    }


def measure_here(name: str, job: PreparationJob) -> Preparation:
    """Measure in a contender's own process.

    Args:
        name: of the contender.
        job: what it prepares.

    Returns:
        Figures without the peak, which is seen from outside.
    """
    prepare = contenders(job.processes)[name](job)
    start_bytes, cpu = private_bytes(os.getpid()), cpu_seconds(of_children=True)
    started = time.perf_counter()
    tokens = prepare()
    seconds, cpu = time.perf_counter() - started, cpu_seconds(of_children=True) - cpu
    time.sleep(2.1)  # a file written just now is not believed to be the same
    started = time.perf_counter()
    assert prepare() == tokens
    return Preparation(tokens, seconds, cpu, time.perf_counter() - started, start_bytes)


def measure(name: str, job: PreparationJob) -> Preparation | None:
    """Measure in a process of its own, whose memory is watched; its last lines are printed where it failed.

    Args:
        name: of the contender.
        job: what it prepares.

    Returns:
        Figures; None where it failed.
    """
    code = "import sys; from benchmarks.data_preparation import contender; contender(*sys.argv[1:])"
    peak = 0

    def watch(process: int) -> None:
        nonlocal peak
        peak = max(peak, private_bytes(process))

    found = run_job(name, [sys.executable, "-c", code, name], job, Path(job.work), watch=watch)
    return Preparation(**{**found, "peak_bytes": peak}) if found else None


def contender(name: str, described: str, result: str) -> None:
    end_job(described, result, lambda job: measure_here(name, PreparationJob(**job)))


def private_bytes(process_id: int) -> int:
    """Count the anonymous memory of a process and all below it; what several share counts once.

    Args:
        process_id: of the process.

    Returns:
        Bytes.
    """
    total = 0
    try:
        root = psutil.Process(process_id)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in processes:
        try:
            text = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii")
        except OSError:  # it has ended meanwhile
            continue
        total += sum(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss_Anon"))
    return total


def conversations(path: str) -> Iterator[list[dict[str, str]]]:
    """Read the real rows as chat messages.

    Args:
        path: a file of conversations.

    Yields:
        The turns of a row.

    Raises:
        SystemExit: a row is no conversation.
    """
    from qlora_trainer.common.errors import DataError
    from qlora_trainer.data.formats.parse import RecordReader
    from qlora_trainer.data.reading.files import open_source
    from qlora_trainer.data.types import Conversation

    reader = RecordReader("auto", {}, {})
    for where, record in open_source(path).records():
        row = record if isinstance(record, DataError) else reader.read(record, where)
        if not isinstance(row, Conversation):
            raise SystemExit(f"{where} is no conversation; name a file of chat, ShareGPT or Alpaca rows.")
        yield [{"role": message.role, "content": message.content} for message in row.messages]


def write_rows(path: Path, real: list[list[dict[str, str]]], count: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            first, *others = real[number % len(real)]
            messages = [{**first, "content": f"{number}. {first['content']}"}, *others]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="directory of a model, or a .gguf file; only its tokenizer is used")
    parser.add_argument("file", help="conversations in any format that the trainer reads")
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--processes", type=int, default=psutil.cpu_count() or 1, help="of the peer")
    parser.add_argument("--without", nargs="*", default=[], metavar="NAME", help="contenders whose names begin so")


def run(options: argparse.Namespace) -> None:
    from qlora_trainer.model.source import resolve_model

    model = str(resolve_model(options.model, None, user_cache()))
    real = list(conversations(options.file))
    print(f"{cpu_name()}, {psutil.cpu_count()} cores; {Path(options.file).name}: {len(real)} real rows, repeated")
    failed = False
    for count in options.rows:
        with tempfile.TemporaryDirectory() as directory:
            rows = Path(directory) / "rows.jsonl"
            write_rows(rows, real, count)
            print(f"\n{count:,} rows, {rows.stat().st_size / 2**20:,.0f} MiB")
            print(line("", "tokens", "seconds", "tokens/s", "a core", "peak memory", "at start", "second start"))
            found = set()
            for name in contenders(options.processes):
                if name.startswith(tuple(options.without)):
                    continue
                with tempfile.TemporaryDirectory(dir=directory) as work:
                    result = measure(name, PreparationJob(model, str(rows), work, options.processes))
                if result is None:
                    failed = True
                    continue
                found.add(result.tokens)
                cells = [
                    f"{result.tokens:,}",
                    f"{result.seconds:.1f}",
                    f"{result.tokens / result.seconds:,.0f}",
                    f"{result.tokens / result.cpu_seconds:,.0f}",
                    f"{result.peak_bytes / 2**20:,.0f} MiB",
                    f"{result.start_bytes / 2**20:,.0f} MiB",
                    f"{result.second_seconds:.2f} s",
                ]
                print(line(name, *cells), flush=True)
            if len(found) > 1:
                failed = True
                print(f"The contenders came to different numbers of tokens: {sorted(found)}.")
    sys.exit(1 if failed else 0)


def line(name: str, *cells: str) -> str:
    return f"{name:28}" + "".join(f"{cell:>14}" for cell in cells)
