"""The process in which plain transformers answers ends with the one that asks, without a word of its own."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from marks import PATIENCE

from qlora_trainer.merging import plain_check
from qlora_trainer.merging.plain_verification import run_job

STUB = """\
#!{python}
import os, pathlib, time
place = pathlib.Path({place!r})
place.with_suffix(".new").write_text(f"{{os.getpid()}} {{os.getpgrp()}}")
place.with_suffix(".new").rename(place)
time.sleep({patience})
"""


def interrupt_when_there(place: Path) -> None:
    while not place.exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.fresh_process
def test_ctrl_c_reaches_the_check_only_by_the_process_that_asks_which_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, stub = tmp_path / "there", tmp_path / "python"
    stub.write_text(STUB.format(python=sys.executable, place=str(place), patience=PATIENCE))
    stub.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stub))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt_when_there, args=[place], daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            run_job({"with_weights": True})
    finally:
        signal.signal(signal.SIGINT, before)
    process, group = map(int, place.read_text().split())
    assert group != os.getpgrp()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_the_check_ends_when_the_process_that_asks_has_ended() -> None:
    """As at a second Ctrl-C, after which nothing is cleaned up."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.close(writing)
            os.dup2(reading, 0)
            plain_check.end_with_standard_input()
            time.sleep(PATIENCE)
        finally:
            os._exit(0)
    os.close(reading)
    os.close(writing)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 1
