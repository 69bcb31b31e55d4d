"""A limit on the CPU time of a run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Watchdog:
    """A thread that calls `stop` when the thread that armed it has used its time. Unicorn's own timeout costs 140 us a
    call, and its instruction count does not count translated code. CPU time of that thread is what counts: a machine
    that stands still for a while, as virtual ones do, must not end a call that was about to return."""

    POLL = 0.02  # seconds; how late a stop can be

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop
        self._lock = threading.Lock()
        self._deadline: float | None = None
        self._clock = 0  # of the thread that armed it
        self._fired = False
        self._thread: threading.Thread | None = None

    def arm(self, seconds: float | None) -> None:
        """Starts the clock; None: no deadline."""
        self._fired = False
        if seconds is None:
            return
        with self._lock:
            self._clock = time.pthread_getcpuclockid(threading.get_ident())
            self._deadline = time.clock_gettime(self._clock) + seconds
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
                self._thread.start()

    @property
    def fired(self) -> bool:
        """The deadline has passed."""
        return self._fired

    def disarm(self) -> bool:
        """Stops the clock; True if the deadline had passed."""
        with self._lock:
            self._deadline = None
            return self._fired

    def _watch(self) -> None:
        idle_since = time.monotonic()
        while True:
            time.sleep(self.POLL)
            with self._lock:
                if self._deadline is None:
                    if time.monotonic() - idle_since > 1:  # nobody has needed it for a second
                        self._thread = None
                        return
                    continue
                idle_since = time.monotonic()
                if time.clock_gettime(self._clock) >= self._deadline:
                    self._fired = True
                    self._stop()  # at every poll: one before the CPU had started is lost
