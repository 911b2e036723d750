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


def labelled(*, departs: dict[str, str] | None = None, **settings: Any) -> Case:
    return Case("forward-forward", settings, departs={**LABELLED, **(departs or {})})


def equilibrium(*, departs: dict[str, str] | None = None, **settings: Any) -> Case:
    return Case("equilibrium", settings, refuses=(f"is_not_reversed_on_{UNMATCHED}",), departs=departs or {})  # neither an energy nor blocks


LABELLED = {
    "loss_is_the_problems_own": "the model's head sees normalised activities of inputs that carry the mark of no label",
    "running_statistics_move_once_a_step_as_in_plain_pytorch": "batch norm sees every example with its right label, a wrong one and none",
    "one_dropout_mask_serves_a_whole_estimate": "one pass over three rows an example, which share its mask: the claim looks for passes over the batch",
}
STAGELESS = ("is_exact_on_quadratic", "is_exact_on_a_net_that_settles")  # no stages to run again
HEADLESS = ("quadratic", "tied_weights")  # no layers; one that runs twice
UNMATCHED = "quadratic"  # one tensor without a module: no pattern for weights matches
TURN = "the loss is that of the block whose turn it is"
FROZEN = "blocks that stay frozen run in evaluation mode: no dropout, statistics as they are"
PAIRED = "similarities are taken between the examples of one process, as statistics of a batch are"
DEVICE = "the weights of the device are not the model's"
NORMALISED = "the model's head is given activities of mean 0 and variance 1, as every block is"
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
    Case("direct-feedback-alignment"),
    Case("direct-feedback-alignment", {"rows": 4, "scale": 0.5}),
    Case("feedback-alignment"),
    Case("feedback-alignment", {"feedback": "uniform-sign"}),
    Case("feedback-alignment", {"feedback": "fixed-magnitude-sign", "scale": 2.0}),
    Case("feedback-alignment", {"feedback": "random-magnitude-sign"}),
    Case("feedback-alignment", {"feedback": "weights"}, refuses=STAGELESS),  # no layers
    Case("mixed", {"rest": "backprop", "parts": "*.weight=backprop"}, refuses=STAGELESS),  # no names that match
    Case("mixed", {"rest": "backprop", "parts": "*.weight=forward,tangents=4"}, refuses=(f"is_unbiased_on_{UNMATCHED}",)),
    Case(
        "mixed",
        {"rest": "eggroll,population=8,shaping=raw", "parts": "*.weight=likelihood-ratio,copies=4"},
        refuses=(f"is_not_reversed_on_{UNMATCHED}",),
        departs={"members_that_are_not_finite_are_survived": "a likelihood ratio has no ranks: a copy whose loss is not finite shows in its gradient"},
    ),
    equilibrium(),
    equilibrium(nudge="one-sided"),
    equilibrium(nudge="random-sign"),
    equilibrium(nudge="holomorphic"),
    equilibrium(nudge="holomorphic", points=3, beta=0.3),
    equilibrium(correction="none"),
    equilibrium(acceleration="anderson"),
    equilibrium(nudge="holomorphic", points=4, online=6),
    equilibrium(nudge="one-sided", online=6, periods=1),
    equilibrium(
        mismatch=0.02, diagnose=1, departs=dict.fromkeys(("loss_is_the_problems_own", "running_statistics_move_once_a_step_as_in_plain_pytorch"), DEVICE)
    ),
    Case("mono-forward"),
    Case("mono-forward", {"rows": 4, "features": 3}),
    Case("mono-forward", {"schedule": "interleaved", "block_steps": 1}, departs={"loss_is_the_problems_own": TURN}),
    Case(
        "mono-forward",
        {"schedule": "sequential", "block_steps": 2},
        departs={
            "loss_is_the_problems_own": TURN,
            "running_statistics_move_once_a_step_as_in_plain_pytorch": FROZEN,
            "one_dropout_mask_serves_a_whole_estimate": FROZEN,
        },
    ),
    Case("local"),
    labelled(),
    labelled(variant="symba", rows=4),
    labelled(variant="collaboration"),
    labelled(variant="collaboration", others="before"),
    labelled(goodness="mean", rows=4, readout="probe"),
    labelled(negatives="hard"),
    labelled(goodness="mean", peer=1.0, departs={"two_ranks_average_to_the_whole_batch": "a rank holds its own units' running means to one another"}),
    labelled(schedule="sequential", block_steps=2),
    labelled(schedule="interleaved", block_steps=1),
    Case("local", {"loss": "predsim"}, departs={"two_ranks_average_to_the_whole_batch": PAIRED}),
    Case("predsim", {"similarity": 0.5, "transform": False}, departs={"two_ranks_average_to_the_whole_batch": PAIRED}),
    Case("local", {"loss": "channel-goodness"}),
    Case("local", {"loss": "channel-goodness", "loss_settings": "goodness=mean,normalise=layer"}, departs={"loss_is_the_problems_own": NORMALISED}),
    Case("local", {"loss": "prototypes"}),
    Case("implicit"),
    Case("implicit", {"solver": "broyden", "adjoint": "gmres", "tol": 1e-12, "strict": True, "compare": True}),
    Case("implicit", {"adjoint": "phantom(5,0.5)", "jacobian": 0.1, "radius": 8}),
    Case("straight-through"),
    Case("straight-through", {"estimator": "ede", "steps": 10}),
    Case(
        "straight-through",
        {"estimator": "swish-sign,beta=3", "schedule": "none", "accumulation": 2},
        departs={"running_statistics_move_once_a_step_as_in_plain_pytorch": PARTS},
    ),
    Case("straight-through", {"estimator": "reste", "real_weights": 0.5, "steps": 10, "checkpointing": True}),
    Case("straight-through", {"diagnose": 1, "diagnose_pairs": 2}),
    Case("deep-supervision", departs={"saved_bytes_do_not_grow_with_depth": "a baseline: one sweep goes through all blocks"}),
]
