"""Promises of the background thread: calls run in order, few wait, and no failure is lost."""

import subprocess
import sys
import threading
from concurrent.futures import Future

import pytest

from qlora_trainer.common.background import Ahead, Background


def test_calls_run_in_order_in_one_other_thread() -> None:
    seen: list[tuple[int, int]] = []
    with Background() as background:
        for number in range(20):
            background.submit(lambda n: seen.append((n, threading.get_ident())), number)
    assert [number for number, _ in seen] == list(range(20))
    (thread,) = {thread for _, thread in seen}
    assert thread != threading.get_ident()


def test_no_more_than_asked_for_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the thread held up, as many calls as may wait are taken, and the next one waits for it."""
    go, settled, taken = threading.Event(), threading.Event(), []
    result = Future.result

    def wait_for_call(future: Future, timeout: float | None = None) -> object:
        settled.set()
        return result(future, timeout)

    monkeypatch.setattr(Future, "result", wait_for_call)
    with Background(most_waiting=3) as background:

        def submit_four() -> None:
            for number in range(4):
                background.submit(go.wait)
                taken.append(number)
            settled.set()

        caller = threading.Thread(target=submit_four)
        caller.start()
        settled.wait()  # for a call, or the fourth was taken
        before = list(taken)
        go.set()
        caller.join()
    assert before == [0, 1, 2]
    assert taken == [0, 1, 2, 3]


def fail() -> None:
    raise OSError("the disk is full")


def test_a_failure_surfaces_at_a_later_call_or_in_the_end() -> None:
    with pytest.raises(OSError, match="full"), Background() as background:
        background.submit(fail)
    with Background(most_waiting=1) as background:
        background.submit(fail)
        with pytest.raises(OSError, match="full"):
            background.submit(fail)


def test_what_waits_is_dropped_when_the_caller_fails() -> None:
    go = threading.Event()
    ran: list[int] = []

    def interrupted() -> None:
        with Background(most_waiting=5) as background:
            background.submit(go.wait)
            background.submit(ran.append, 1)
            threading.Timer(0.1, go.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert ran == []


def test_calls_behind_a_failed_one_still_run() -> None:
    ran = threading.Event()

    def submit_two() -> None:
        with Background(most_waiting=3) as background:
            background.submit(fail)
            background.submit(ran.set)
            assert ran.wait(600)

    with pytest.raises(OSError, match="full"):
        submit_two()


def test_a_call_ahead_runs_at_once_in_another_thread_and_gives_its_result_when_it_is_asked_for() -> None:
    began = threading.Event()

    def call(number: int) -> tuple[int, int]:
        began.set()
        return number, threading.get_ident()

    ahead = Ahead(call, 7)
    assert began.wait(600), "before anyone asks"
    number, thread = ahead.take()
    assert number == 7
    assert thread != threading.get_ident()


def test_a_call_ahead_that_failed_says_so_when_it_is_asked_for() -> None:
    ahead: Ahead[None] = Ahead(fail)
    with pytest.raises(OSError, match="full"):
        ahead.take()


def test_the_thread_of_a_call_ahead_ends_though_nobody_takes_the_result() -> None:
    threads: list[threading.Thread] = []
    go = threading.Event()

    def call() -> None:
        threads.append(threading.current_thread())
        go.wait()

    Ahead(call)
    go.set()
    while not threads:
        pass
    threads[0].join(600)
    assert not threads[0].is_alive()


@pytest.mark.parametrize("end", ["pass", "raise SystemExit(3)", "raise KeyboardInterrupt"])
def test_a_process_ends_as_it_would_without_a_call_ahead(end: str) -> None:
    """Also while the call runs, which then has its time to end."""

    def outcome(ahead: str) -> tuple[int, str]:
        program = (
            f"import time\nfrom qlora_trainer.common.background import Ahead\n"
            f"def call():\n    time.sleep(0.2)\n    print('done', flush=True)\n{ahead}\n{end}"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=600)
        return done.returncode, done.stdout

    code, _ = outcome("pass")
    assert outcome("Ahead(call)") == (code, "done\n")
