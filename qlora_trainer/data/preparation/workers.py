"""Batches made in several processes, given back in the order of the rows.

A worker is a fresh Python, started with the tokenizer's files and the data section of the config, that answers each
message on its standard input with one on its standard output. So nothing of the parent's is inherited: no threads of
its tokenizer, no CUDA; it is the same on every system, in a notebook, and in a script without a main guard. A worker
ends when its input does, so none outlives its parent. What a worker cannot do, the parent does itself.
"""

import contextlib
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from qlora_trainer.common.errors import DataError, first_line
from qlora_trainer.config.data_schema import DataConfig
from qlora_trainer.data.preparation.chunks import (
    Batch,
    BatchMaker,
    Job,
    batch_from_bytes,
    batch_to_bytes,
    job_from_json,
    job_to_json,
    tokenizer_identity,
)

ROWS_BEFORE_WORKERS = 4_000  # a smaller set is done before workers have started, which takes seconds
MOST_WORKERS = 8
_SIZE = struct.Struct("<Q")
_FAILED = b"!"  # first byte of an answer: an error's text follows, or
_DONE = b"="  # a batch

# Rendering needs no torch. Where that cannot be imported transformers does without, and a worker starts in a third of
# the time and memory.
_PROGRAM = "import sys; sys.modules['torch'] = None; from qlora_trainer.data.preparation.workers import serve; serve()"


class Workers:
    """So many worker processes; they start at the first call of `start`."""

    def __init__(self, count: int, config: DataConfig, tokenizer: Any, max_length: int, vocab_size: int | None) -> None:
        self.count = count
        self.failures: list[str] = []  # why workers are missing
        self._described = {"data": config.model_dump(mode="json"), "max_length": max_length, "vocab_size": vocab_size}
        self._tokenizer = tokenizer
        self._threads = ThreadPoolExecutor(max(1, count))
        self._processes: list[subprocess.Popen[bytes]] = []
        self._idle: deque[subprocess.Popen[bytes]] = deque()
        self._starting: list[Future[None]] = []
        self._files: tempfile.TemporaryDirectory[str] | None = None
        self._closing = False

    def start(self, wait: bool = False) -> None:
        """Start the processes, if they are not; with `wait`, return when they are ready."""
        if self._starting or not self.count:
            return
        self._files = tempfile.TemporaryDirectory(prefix="qlora-tokenizer-")
        self._tokenizer.save_pretrained(self._files.name)
        identity = tokenizer_identity(self._tokenizer)
        described = json.dumps({**self._described, "tokenizer": self._files.name, "identity": identity}).encode()
        self._starting = [self._threads.submit(self._start_one, described) for _ in range(self.count)]
        if wait:
            futures.wait(self._starting)

    @property
    def ready(self) -> int:
        """How many can take work; 0 until all have started or failed."""
        all_started = bool(self._starting) and all(start.done() for start in self._starting)
        return self.count - len(self.failures) if all_started else 0

    def submit(self, job: Job) -> "Future[Batch | str | None]":
        """A batch; or the text of the DataError that it gives; or None: the caller has to make it."""
        return self._threads.submit(self._ask, job)

    def _start_one(self, described: bytes) -> None:
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(str(Path(path).absolute()) for path in sys.path),
                    "TOKENIZERS_PARALLELISM": "false",
                    "OMP_NUM_THREADS": "1",
                    "HF_HUB_OFFLINE": "1",
                },
            )
            self._processes.append(process)
            if self._closing:  # all others have been ended while this one was being made
                process.kill()
            answer = _exchange(process, described)
        except OSError as error:
            answer = _FAILED + first_line(error).encode()
        if answer == _DONE:
            self._idle.append(process)
        else:
            self.failures.append((answer or b"").removeprefix(_FAILED).decode() or "it ended at once")

    def _ask(self, job: Job) -> Batch | str | None:
        message = job_to_json(job)
        try:
            process = self._idle.pop() if message is not None else None
        except IndexError:  # there are as many threads as processes: one of these has failed
            process = None
        if message is None or process is None:
            return None
        answer = _exchange(process, message)
        if answer is None:
            if not self._closing:
                self.failures.append(f"it ended with exit code {process.wait()}")
            return None
        self._idle.append(process)
        return answer[1:].decode(errors="surrogatepass") if answer[:1] == _FAILED else batch_from_bytes(answer[1:])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.kill()
        self._threads.shutdown(wait=True)
        for process in self._processes:
            process.wait()
            for stream in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # what was not sent yet
                    if stream:
                        stream.close()
        if self._files:
            self._files.cleanup()


def make_batches(jobs: Iterable[Job], maker: BatchMaker, workers: Workers) -> Iterator[tuple[Job, Batch]]:
    """Each job with its batch, in order, at most a few of them in memory.

    The first rows are done here; meanwhile the workers start, where the set is large enough to pay for that.

    Raises:
        DataError: of the first bad row, whichever process found it.
    """
    pending: deque[tuple[Job, Future[Batch | str | None]]] = deque()
    rows = 0
    failure: DataError | None = None
    for job in _until_failure(jobs):
        if isinstance(job, DataError):
            failure = job
            break
        rows += len(job[2])
        if rows > ROWS_BEFORE_WORKERS:
            workers.start()
        if workers.ready:
            pending.append((job, workers.submit(job)))
            if len(pending) > 2 * workers.count:
                yield _finished(*pending.popleft(), maker)
            continue
        while pending:
            yield _finished(*pending.popleft(), maker)
        yield job, maker.make(*job)
    while pending:
        yield _finished(*pending.popleft(), maker)
    if failure:
        raise failure


def _until_failure(jobs: Iterable[Job]) -> Iterator[Job | DataError]:
    """Jobs, and at the end why there are no more, so that rows under way are looked at first."""
    try:
        yield from jobs
    except DataError as error:
        yield error


def _finished(job: Job, future: "Future[Batch | str | None]", maker: BatchMaker) -> tuple[Job, Batch]:
    result = future.result()
    if isinstance(result, str):
        raise DataError(result)
    return job, result or maker.make(*job)


def _exchange(process: subprocess.Popen[bytes], message: bytes) -> bytes | None:
    """A worker's answer, or None where it has ended."""
    assert process.stdin
    assert process.stdout
    try:
        _send(process.stdin, message)
        return _receive(process.stdout)
    except OSError:
        return None


def _send(stream: IO[bytes], message: bytes) -> None:
    stream.write(_SIZE.pack(len(message)))
    stream.write(message)
    stream.flush()


def _receive(stream: IO[bytes]) -> bytes | None:
    size = stream.read(_SIZE.size)
    if len(size) < _SIZE.size:
        return None
    message = stream.read(_SIZE.unpack(size)[0])
    return message if len(message) == _SIZE.unpack(size)[0] else None


def serve() -> None:
    """A worker's life."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    described = _receive(requests)
    if described is None:
        return
    try:
        maker = _maker(json.loads(described))
    except Exception as error:  # whatever it is, the parent has it reported, and does the work itself
        _send(answers, _FAILED + first_line(error).encode())
        return
    _send(answers, _DONE)
    while (message := _receive(requests)) is not None:
        try:
            answer = _DONE + batch_to_bytes(maker.make(*job_from_json(message)))
        except DataError as error:
            answer = _FAILED + str(error).encode(errors="surrogatepass")
        _send(answers, answer)


def _maker(described: Mapping[str, Any]) -> BatchMaker:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(described["tokenizer"], trust_remote_code=False, local_files_only=True)
    if tokenizer_identity(tokenizer) != described["identity"]:
        raise ValueError("the tokenizer, saved and loaded again, is another one")
    config = DataConfig.model_validate(described["data"])
    return BatchMaker(config, tokenizer, described["max_length"], described["vocab_size"])
