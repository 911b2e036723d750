"""The only list of engines with settings that the conformance tests run."""

from dataclasses import dataclass, field
from typing import Any

from altgrad import registry
from altgrad.engine import Engine


@dataclass(frozen=True)
class Case:
    """An engine with settings; `refuses`: claims whose probe it cannot drive and says so; `departs`: claims it breaks on purpose, with the reason."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    refuses: tuple[str, ...] = ()
    departs: dict[str, str] = field(default_factory=dict)

    @property
    def engine(self) -> Engine:
        return registry.engine(self.name, self.settings)

    @property
    def id(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.settings.items())])


def weights(**settings: Any) -> Case:
    return Case("forward", {"space": "weights", "tangents": 4, **settings})


def activations(*, refuses: tuple[str, ...] = (), **settings: Any) -> Case:
    return Case("forward", {"space": "activations", "tangents": 4, **settings}, refuses=refuses)


def likelihood(**settings: Any) -> Case:
    return Case("likelihood-ratio", {"copies": 4, **settings})


STAGELESS = ("is_exact_on_quadratic",)  # no stages to run again
HEADLESS = ("quadratic", "tied_weights")  # no layers; one that runs twice
PARTS = "the batch is normalised in parts, as whenever gradients are accumulated in PyTorch"

CASES = [
    Case("backprop"),
    Case("backprop", {"checkpointing": True}, refuses=STAGELESS),
    Case("backprop", {"accumulation": 3}, departs={"running_statistics_move_once_a_step_as_in_plain_pytorch": PARTS, "is_exact_on_batch_norm": PARTS}),
    weights(),
    weights(noise="sign"),
    weights(rank=1),
    weights(rank=2),
    weights(chunk=3),
    weights(combine="orthogonal"),
    weights(combine="orthogonal", rescale=True),
    weights(guess="momentum", tangents=2),
    activations(),
    activations(memory="replay"),
    activations(chunk=3),
    activations(noise="sign"),
    activations(guess="local", tangents=0, refuses=tuple(f"is_not_reversed_on_{probe}" for probe in HEADLESS)),
    activations(guess="local", chunk=1, refuses=tuple(f"is_unbiased_on_{probe}" for probe in HEADLESS)),
    activations(guess="local", refuses=tuple(f"is_unbiased_on_{probe}" for probe in HEADLESS)),
    likelihood(),
    likelihood(memory="replay"),
    likelihood(copies=8, antithetic=True, chunk=1),
    likelihood(layerwise=True),
    likelihood(baseline="loo", sigma=0.02),
    likelihood(copies=8, baseline="loo", antithetic=True, sigma=0.02, memory="replay"),
    likelihood(qmc=True),
    likelihood(sigma_rate=0.1),
    Case("es", {"population": 8}),
    Case("es", {"population": 8, "shaping": "raw", "noise": "sign"}),
    Case("eggroll", {"population": 8}),
    Case("eggroll", {"population": 8, "shaping": "raw", "rank": 2, "chunk": 3}),
    Case("eggroll", {"population": 8, "shaping": "nes", "adapt": "nes", "noise": "uniform"}),
    Case("eggroll", {"population": 16, "shaping": "raw", "antithetic": False}),
    Case("eggroll", {"population": 16, "shaping": "group-z-score", "groups": 2}),
    Case("eggroll", {"population": 8, "shaping": "baseline-pair"}),
    Case("eggroll", {"population": 8, "shaping": "centred-rank", "sigma_schedule": "cosine", "sigma_steps": 9, "noise_reuse": 2}),
    Case("spsa"),
    Case("spsa", {"population": 8, "antithetic": False, "noise": "sign", "shaping": "z-score", "sigma": 0.05}),
    Case("spsa", {"population": 8, "shaping": "sign"}),
    Case("random-subspace", {"dimension": 6, "inner": "eggroll", "inner_settings": "population=8,shaping=raw"}),
    Case("random-subspace", {"dimension": 6, "inner": "forward", "inner_settings": "tangents=4,space=weights"}),
    Case("random-subspace", {"dimension": 6, "inner": "backprop"}),
    Case("random-subspace", {"dimension": 6, "inner": "es", "inner_settings": "population=8,shaping=nes,adapt=nes-per-tensor"}),
    Case("ask-tell", {"population": 8}),
    Case("ask-tell", {"strategy": "cma-es", "population": 8, "chunk": 3}),
    Case("ask-tell", {"strategy": "snes", "population": 8, "dimension": 5}),
    Case("ask-tell", {"strategy": "openes", "population": 8, "lower": -5.0, "upper": 5.0}),
]
