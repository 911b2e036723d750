"""Which parameters belong to which pattern: the first that matches a parameter's name, or that of a module above it."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from altgrad.errors import CapabilityError, SettingError, near_miss


class UnmatchedError(SettingError, CapabilityError):
    """Patterns that do not fit the parameters of this problem: the setting is wrong, or it is another problem's."""


def shared_out(names: Sequence[str], patterns: Sequence[str]) -> list[tuple[str, ...]]:
    """The names that each pattern takes, and last those that none does.

    Raises:
        UnmatchedError: a pattern that matches nothing, a pattern all of whose names an earlier one takes, or nothing left over.
    """
    left = list(names)
    found: list[tuple[str, ...]] = []
    for pattern in patterns:
        matched = [name for name in names if matches(name, pattern)]
        own = tuple(name for name in matched if name in left)
        if not matched:
            modules = {place for name in names for place in above(name) or [name]}
            raise UnmatchedError("the mix has an " + near_miss("parameter or module", pattern, modules))
        if not own:
            earlier = next(other for other, share in zip(patterns, found, strict=False) if matched[0] in share)
            raise UnmatchedError(f"the part {pattern!r} of the mix gets no parameters: {earlier!r} before it takes them. Put the narrower pattern first.")
        left = [name for name in left if name not in own]
        found.append(own)
    if not left:
        raise UnmatchedError(
            f"the rest of the mix gets no parameters: {', '.join(map(repr, patterns))} take them all. Leave a part out, or make its engine that of the rest."
        )
    return [*found, tuple(left)]


def above(name: str) -> list[str]:
    """The modules that a parameter lies in: body.0.weight -> [body, body.0]."""
    steps = name.split(".")[:-1]
    return [".".join(steps[: count + 1]) for count in range(len(steps))]


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern matches a parameter, or a module above it."""
    return any(fnmatchcase(place, pattern) for place in (name, *above(name)))
