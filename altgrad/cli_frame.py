"""What every command shares: errors as one line with an exit code, near misses, --debug, tables and JSON on stdout, messages on stderr."""

import errno
import json
import signal
import traceback
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click

from altgrad.errors import AltgradError, Interrupted, missing_extra, near_miss

DEBUG = "altgrad.debug"  # a key of click's context


def debug_option() -> click.Option:
    """--debug, which every command takes so that it can be added to the end of a line."""

    def remember(context: click.Context, option: click.Parameter, value: bool) -> None:
        if value:
            context.meta[DEBUG] = True

    return click.Option(["--debug"], is_flag=True, expose_value=False, callback=remember, help="Show the traceback of an error.")


class Command(click.Command):
    """A command that takes --debug."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(debug_option())


class Group(click.Group):
    """A group that names the nearest command where it does not know the one given."""

    command_class = Command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None and not ctx.resilient_parsing:
            ctx.fail(near_miss("command", args[0], self.list_commands(ctx)))
        return super().resolve_command(ctx, args)


class Root(Group):
    """The outermost group: what goes wrong inside becomes one line on stderr and an exit code."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(debug_option())

    def invoke(self, ctx: click.Context) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning  # type: ignore[assignment]
            try:
                return super().invoke(ctx)
            except (click.ClickException, click.exceptions.Exit, click.Abort):
                raise
            except KeyboardInterrupt:
                fail(ctx, Interrupted("stopped before there was anything to keep.", 128 + signal.SIGINT))
            except Exception as error:
                if isinstance(error, OSError) and error.errno == errno.EPIPE:  # click leaves quietly when the reader of a pipe has gone
                    raise
                fail(ctx, error)


def fail(context: click.Context, error: BaseException) -> None:
    """Leave with the error's line on stderr and its exit code; with --debug the traceback comes first."""
    debug = bool(context.meta.get(DEBUG))
    if debug:
        note("".join(traceback.format_exception(error)).rstrip())
    if isinstance(error, ModuleNotFoundError):
        error = missing_extra(error, f"altgrad {context.invoked_subcommand or ''}".strip()) or error
    text = one_line(str(error)) or "no message"
    if isinstance(error, Interrupted):
        note(f"Interrupted: {text}")
    elif isinstance(error, AltgradError):
        note(f"Error: {text}")
    else:
        note(f"Error: {type(error).__name__}: {text}" + ("" if debug else " (--debug shows where)"))
    context.exit(error.exit_code if isinstance(error, AltgradError) else 1)


def show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: str | None = None) -> None:
    """A warning as one line on stderr."""
    note(f"Warning: {one_line(str(message))}")


def one_line(text: str) -> str:
    """`text` with every run of white space as one space."""
    return " ".join(text.split())


def note(text: str) -> None:
    """A message: stderr."""
    click.echo(text, err=True)


def emit(value: Any) -> None:
    """One JSON value on one line of stdout; numbers that JSON cannot hold become null."""
    from altgrad.runs import finite

    click.echo(json.dumps(finite(value), default=str))


def columns(rows: Iterable[Sequence[Any]], headings: Sequence[str]) -> str:
    """Rows under headings as aligned text, figures to the right; the last column runs free."""
    cells = [[str(heading) for heading in headings], *([text_of(cell) for cell in row] for row in rows)]
    width = [max(len(row[place]) for row in cells) for place in range(len(headings))]
    right = [len(cells) > 1 and all(is_figure(row[place]) for row in cells[1:]) for place in range(len(headings))]

    def line(row: list[str]) -> str:
        return "  ".join(cell.rjust(size) if flush else cell.ljust(size) for cell, size, flush in zip(row, width, right, strict=True)).rstrip()

    return "\n".join(map(line, cells))


def text_of(cell: Any) -> str:
    """A cell as text: nothing as "-", a float in four digits."""
    if cell is None or cell == "":
        return "-"
    return f"{cell:.4g}" if isinstance(cell, float) else one_line(str(cell))


def is_figure(cell: str) -> bool:
    """Whether a cell is a number, a percentage, or absent."""
    try:
        float(cell.removesuffix(" %"))
    except ValueError:
        return cell == "-"
    return True


def percent(share: float | None) -> str:
    """0.9639 -> "96.39 %"; nothing -> "-"."""
    return "-" if share is None else f"{100 * share:.2f} %"


def tested(found: Mapping[str, Any]) -> list[str]:
    """Held-out figures as words: test accuracy 96.39 %, test loss 0.12, and whatever else the problem measures."""
    names = sorted((name for name in found if name.startswith("test_")), key=lambda name: {"test_accuracy": 0, "test_loss": 1}.get(name, 2))
    return [f"{name.replace('_', ' ')} {percent(found[name]) if name.startswith('test_accuracy') else format(found[name], '.4g')}" for name in names]


def figures(result: Mapping[str, Any]) -> str:
    """What a run came to, in a line."""
    parts = tested({name: result[name] for name in ("test_accuracy", "test_loss") if result[name] is not None} | result.get("figures", {}))
    parts += [f"{result[name]} {name}" for name in ("steps", "forwards", "backwards")]
    return ", ".join([*parts, f"{result['seconds']:.1f} s in steps", f"peak memory {result['peak_memory_bytes'] / 1e6:.0f} MB"])
