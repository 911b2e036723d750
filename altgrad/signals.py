"""Ctrl-C and termination: the first signal asks for a stop after the step at hand, the second interrupts at once."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from altgrad.errors import Interrupted

WATCHED = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """`with StopSignals() as stop:` sets `stop.received` at the first signal; the handlers that were there come back at the end.

    Python lets only the main thread install handlers; elsewhere this watches nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self.handle) for number in WATCHED}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: installed outside Python

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        if self.received is not None:
            raise Interrupted(f"{name(number)} arrived twice: stopped at once, in mid-step. Checkpoints written before stay.", exit_code(number))
        self.received = number


def name(number: int) -> str:
    """`SIGINT`."""
    return signal.Signals(number).name


def exit_code(number: int) -> int:
    """What a shell reports for a process that ended on this signal: 130 or 143."""
    return 128 + number
