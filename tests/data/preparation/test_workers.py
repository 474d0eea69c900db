"""Promises of preparing in several processes: the same set, the same errors, and never worse than in one."""

import functools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizers import tiny_tokenizer

from qlora_trainer.common.errors import DataError
from qlora_trainer.config.data_schema import DataConfig
from qlora_trainer.data.preparation import workers
from qlora_trainer.data.preparation.chunks import BatchMaker, in_batches
from qlora_trainer.data.preparation.workers import Workers, make_batches

TOKENIZER = tiny_tokenizer("smollm2")
CONFIG = DataConfig(train="rows.jsonl", on_bad_row="skip", max_length=64)
RECORDS = [(f"rows.jsonl, line {n}", {"question": f"question {n}", "answer": "answer " * (n % 5)}) for n in range(700)]
BAD = ("rows.jsonl, line 701", {"question": "no answer"})


@pytest.fixture
def at_once(monkeypatch):
    """Workers take part from the first row on."""
    monkeypatch.setattr(workers, "ROWS_BEFORE_WORKERS", 0)
    monkeypatch.setattr(Workers, "start", functools.partialmethod(Workers.start, wait=True))


@pytest.fixture(scope="module")
def started():
    """Two workers for all tests of one config, as each takes seconds to start."""
    with Workers(2, CONFIG, TOKENIZER, 64, None) as two:
        two.start(wait=True)
        yield two


def made(records, two, config=CONFIG):
    jobs: Iterator[Any] = ((0, "auto", batch) for batch in in_batches(records))
    maker = BatchMaker(config, TOKENIZER, 64, None)
    return [batch for _, batch in make_batches(jobs, maker, two)]


def as_bytes(batches) -> list[bytes]:
    return [workers.batch_to_bytes(batch) for batch in batches]


def none() -> Workers:
    return Workers(0, CONFIG, TOKENIZER, 64, None)


def test_workers_make_the_same_batches_in_the_same_order(started):
    records = [*RECORDS, BAD, ("rows.jsonl, line 702", DataError("not JSON")), *RECORDS]
    expected = made(records, none())
    assert started.ready == 2
    assert as_bytes(made(records, started)) == as_bytes(expected)
    assert [skipped for batch in expected for skipped in batch.skipped] == [
        (BAD[0], expected[2].skipped[0][1]),
        ("rows.jsonl, line 702", "not JSON"),
    ]


def test_a_batch_that_is_no_plain_json_is_made_here(started):
    records = [*RECORDS, ("row", {"question": "q", "answer": "a", "day": date(2026, 1, 1), "pair": (1, 2)})]
    assert as_bytes(made(records, started)) == as_bytes(made(records, none()))


def test_the_first_bad_row_is_the_error_whichever_process_finds_it(at_once):
    config = CONFIG.model_copy(update={"on_bad_row": "error"})
    records = [*RECORDS, BAD, ("later", {"question": "no answer either"})]

    def failing():
        yield from records
        raise DataError("the file is cut off")

    with Workers(1, config, TOKENIZER, 64, None) as two, pytest.raises(DataError, match="line 701"):
        made(failing(), two, config)
    assert not two.failures


def test_a_worker_that_dies_is_replaced_by_the_work_of_others():
    expected = as_bytes(made(RECORDS, none()))
    with Workers(1, CONFIG, TOKENIZER, 64, None) as one:
        one.start(wait=True)
        for process in one._processes:
            process.kill()
            process.wait()
        assert as_bytes(made(RECORDS, one)) == expected
        assert one.failures == ["it ended with exit code -9"]


def test_a_tokenizer_that_cannot_travel_stays_here(monkeypatch):
    monkeypatch.setattr(workers, "tokenizer_identity", lambda tokenizer: "another")
    with Workers(1, CONFIG, TOKENIZER, 64, None) as one:
        one.start(wait=True)
        assert one.ready == 0
        assert "the tokenizer, saved and loaded again, is another one" in one.failures[0]
        assert as_bytes(made(RECORDS[:10], one)) == as_bytes(made(RECORDS[:10], none()))


def test_closing_while_processes_still_start_ends_them_too(monkeypatch):
    """A set may end, or a row be refused, while the system is still making the processes."""

    class Slow(subprocess.Popen):
        def __init__(self, command, **settings):
            time.sleep(0.5)
            super().__init__([sys.executable, "-c", "import time; time.sleep(20)"], **settings)

    monkeypatch.setattr(workers.subprocess, "Popen", Slow)
    began = time.monotonic()
    with Workers(2, CONFIG, TOKENIZER, 64, None) as two:
        two.start()
        time.sleep(0.1)
    assert time.monotonic() - began < 10
    assert all(process.returncode is not None for process in two._processes)


def test_a_small_set_starts_no_process():
    with Workers(2, CONFIG, TOKENIZER, 64, None) as two:
        made(RECORDS, two)
        assert two._processes == []


def test_a_script_without_a_main_guard_can_prepare_and_no_worker_outlives_it():
    """A worker is no copy of the program that starts it, and ends with its input."""
    script = (
        "import os, signal\n"
        "from tiny_tokenizers import tiny_tokenizer\n"
        "from qlora_trainer.data.preparation.workers import Workers\n"
        "from qlora_trainer.config.data_schema import DataConfig\n"
        "one = Workers(1, DataConfig(train='rows.jsonl'), tiny_tokenizer('smollm2'), 64, None)\n"
        "one.start(wait=True)\n"
        "print(one.ready, one._processes[0].pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-"],
        input=script,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=60,
    )
    ready, pid = map(int, done.stdout.split())
    assert ready == 1
    for _ in range(100):
        if not is_running(pid):
            break
        time.sleep(0.1)
    assert not is_running(pid)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
