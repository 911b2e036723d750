"""Evolution strategies on NumPy alone: ask and tell, or `minimize`. Nothing here imports torch.

from altgrad.es import minimize
minimize(f, x0, strategy="cma-es", sigma=0.5, max_evaluations=10_000, target=1e-9)
"""

from altgrad.es.base import State, Strategy
from altgrad.es.bounds import Bounds
from altgrad.es.cma import CMAES
from altgrad.es.gradient import ARS, GuidedES, OpenES
from altgrad.es.limited_memory import LMMAES
from altgrad.es.loop import Result, minimize
from altgrad.es.natural import SNES, XNES
from altgrad.es.pgpe import PGPE
from altgrad.es.sampling import CEM, RandomSearch
from altgrad.es.separable import SepCMAES
from altgrad.es.stopping import Stopping
from altgrad.es.storage import load, save
from altgrad.es.table import STRATEGIES, build
from altgrad.rng import Key

__all__ = [
    "ARS",
    "CEM",
    "CMAES",
    "LMMAES",
    "PGPE",
    "SNES",
    "STRATEGIES",
    "XNES",
    "Bounds",
    "GuidedES",
    "Key",
    "OpenES",
    "RandomSearch",
    "Result",
    "SepCMAES",
    "State",
    "Stopping",
    "Strategy",
    "build",
    "load",
    "minimize",
    "save",
]
