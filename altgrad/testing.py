"""The conformance suite, for every engine, ours and other people's.

    for name, check in altgrad.testing.checks(MyEngine(), problem_factory=MyProblem):
        check()                    # raises Violation
    results = altgrad.testing.run(MyEngine())

Which checks there are follows from the engine's declared traits: bias, needs, split.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from altgrad.conformance import aligned, contract, credit, displacements, gradients, labelled, limits, local, models, populations, probes, settling, surrogates  # noqa: F401  (enters their claims)
from altgrad.conformance.claim import CLAIMS, Factory, Subject, Violation
from altgrad.engine import Engine, fit_check
from altgrad.errors import CapabilityError


@dataclass(frozen=True)
class Result:
    """How a check went. `refused`: the engine said with a CapabilityError that it cannot drive the probe, which is no failure."""

    name: str
    passed: bool
    detail: str = ""
    refused: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)


def checks(engine: Engine, problem_factory: Factory | None = None) -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, check) of every claim that `engine`'s traits make.

    Args:
        engine: the engine, with its settings.
        problem_factory: gives a fresh problem that the engine can be fed with. Claims that hold on any problem are checked on it. The default
            is a small network; an engine that needs more than a model and a loss must be given one.

    Raises:
        CapabilityError: the problem does not provide what the engine needs.
    """
    factory: Factory = problem_factory or probes.network
    fit_check(engine, factory())
    feeds = not engine.needs & ~probes.network().provides
    subject = Subject(engine, factory)
    for claim in CLAIMS.values():
        if claim.applies(engine) and (claim.anywhere or feeds):
            yield claim.name, partial(claim.check, subject)


def run(engine: Engine, problem_factory: Factory | None = None) -> list[Result]:
    """Every check, run; arguments and errors as in `checks`."""
    return [attempt(name, check) for name, check in checks(engine, problem_factory)]


def attempt(name: str, check: Callable[[], None]) -> Result:
    """One check, run."""
    try:
        check()
    except CapabilityError as error:
        return Result(name, True, f"refused: {error}", refused=True)
    except Violation as error:
        return Result(name, False, str(error))
    except Exception as error:  # whatever somebody's engine raises is a finding, not our crash
        return Result(name, False, f"{type(error).__name__}: {error}")
    return Result(name, True)


__all__ = ["Result", "Violation", "checks", "run"]
