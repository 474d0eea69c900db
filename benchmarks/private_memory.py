"""Measure the peak of a process's private memory while something runs: what no file backs, sampled in a thread.

The system keeps a high-water mark of all that is resident only, mapped files included, and a merge maps its whole
source. So the private part is read every few milliseconds; what lives shorter than that is not seen.
"""

import threading
from types import TracebackType
from typing import Self

from qlora_trainer.common.process_memory import private_bytes

INTERVAL = 0.005  # seconds


class PrivatePeak:
    """Record private bytes in a block: `before` is what there was when it was entered, `peak` the most since."""

    def __enter__(self) -> Self:
        self.before = self.peak = private_bytes() or 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._end.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._end.wait(INTERVAL):
            self.peak = max(self.peak, private_bytes() or 0)
