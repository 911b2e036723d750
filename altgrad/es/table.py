"""Names of strategies, and strategies from names."""

from collections.abc import Mapping
from typing import Any

from altgrad.errors import UsageError, near_miss
from altgrad.es.base import Strategy
from altgrad.es.cma import CMAES
from altgrad.es.gradient import ARS, GuidedES, OpenES
from altgrad.es.limited_memory import LMMAES
from altgrad.es.natural import SNES, XNES
from altgrad.es.pgpe import PGPE
from altgrad.es.sampling import CEM, RandomSearch
from altgrad.es.separable import SepCMAES

STRATEGIES: dict[str, type[Strategy[Any]]] = {
    found.name: found for found in (OpenES, PGPE, SNES, XNES, CMAES, SepCMAES, LMMAES, ARS, GuidedES, CEM, RandomSearch)
}


def find(name: str) -> type[Strategy[Any]]:
    """The class of the strategy `name`.

    Raises:
        UsageError: no such strategy; the nearest one is suggested.
    """
    if name not in STRATEGIES:
        raise UsageError(near_miss("strategy", name, STRATEGIES))
    return STRATEGIES[name]


def build(name: str, settings: Mapping[str, Any]) -> Strategy[Any]:
    """The strategy `name` with `settings`: values, or strings to be parsed by the field they set.

    Raises:
        UsageError: no such strategy. SettingError: no such setting, or a value out of its range; sigma has no default.
    """
    from altgrad import registry  # only where settings come by name: it looks through the installed packages

    return registry.build(find(name), settings, f"strategy {name}")
