"""How far a long command has come, on stderr: a bar on a terminal, now and then a plain line elsewhere."""

import os
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from altgrad.cli_frame import note, tested

if TYPE_CHECKING:
    from rich.progress import Progress

PAUSE = 2.0  # seconds between plain lines at least, so that logs stay short
LONG = 30.0  # seconds of a run without an evaluation after which a plain line comes anyway


class Display:
    """`with Display(quiet=False) as display:` shows what goes on inside; `watch` starts a run, `on_step` and `on_evaluate` are for trainer.fit."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self.bar: Progress | None = None
        self.task: Any = None
        self.title, self.tested, self.last = "", "", time.monotonic()

    def __enter__(self) -> "Display":
        if not self.quiet and is_terminal():
            self.bar = make_bar()
            self.bar.start()
            self.task = self.bar.add_task("preparing", total=None, figures="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def say(self, text: str) -> None:
        """A line, above the bar if there is one."""
        if self.quiet:
            return
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            note(text)

    def show(self, title: str, done: float, total: float, *, figures: str = "") -> None:
        """Where things are: moves the bar; elsewhere a line, unless the last one was just now."""
        if self.bar is not None:
            if title != self.title:
                self.bar.remove_task(self.task)
                self.task = self.bar.add_task(title, total=total, figures="")
            self.bar.update(self.task, completed=done, figures=figures)
        elif not self.quiet and time.monotonic() - self.last > PAUSE:
            self.last = time.monotonic()
            note(f"{title}: {round(done, 1):.12g} of {total:.12g}{', ' if figures else ''}{figures}")
        self.title = title

    def watch(self, training: Any) -> None:
        """Show a run from where it stands."""
        self.tested, self.last = "", time.monotonic()
        if self.bar is not None:
            self.show(name_of(training), training.step, training.total_steps)

    def on_step(self, training: Any, row: dict[str, Any]) -> None:
        """Move the bar; elsewhere a line where nothing has been said for long."""
        if self.bar is not None or time.monotonic() - self.last > LONG:
            self.show(name_of(training), row["step"], training.total_steps, figures=f"loss {row['loss']:.4g}{self.tested}")

    def on_evaluate(self, training: Any, row: dict[str, Any]) -> None:
        """Held-out figures: beside the bar, or on a line."""
        parts = tested(row)
        self.tested = f", {parts[0]}" if parts else ""
        if self.bar is None:
            self.show(name_of(training), row["step"], training.total_steps, figures=", ".join(parts))


def name_of(training: Any) -> str:
    """What is trained, and by which rule."""
    return f"{training.settings.problem}, {training.settings.engine}: step"


def is_terminal() -> bool:
    """Whether stderr can show a bar."""
    return sys.stderr.isatty() and os.environ.get("TERM", "") != "dumb"


def make_bar() -> "Progress":
    """Title, bar, steps, figures, time left; gone when it is done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"), TimeRemainingColumn())
    return Progress(*bar, console=Console(stderr=True), transient=True)
