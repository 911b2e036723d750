"""The estimators against closed forms, and against each other."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import tolerance
from torch import nn

from altgrad.alignment import alignment, exact_gradient, expected_cosine
from altgrad.conformance import probes
from altgrad.conformance.claim import Bench
from altgrad.conformance.gradients import hold_mean, samples
from altgrad.engine import Bias
from altgrad.engines.backprop import Backprop
from altgrad.engines.forward import Forward
from altgrad.errors import CapabilityError, SettingError, UsageError
from altgrad.forward_mode import Dual, Trace
from altgrad.perturb import LowRank
from altgrad.problems.quadratic import Quadratic
from altgrad.rng import Key
from altgrad.world import World

DIMENSION, TANGENTS = 50, 64
ROUNDING, CLOSED = tolerance("rounding64"), tolerance("closed_form")


def quadratic_bench(dimension=DIMENSION, **settings):
    problem = Quadratic(dimension=dimension, batch_size=4).build(Key(2))
    problem.x.data = problem.x.data.double()
    return Bench(Forward(space="weights", **settings), problem)


def network_bench(problem=None, **settings):
    return Bench(Forward(**settings), problem or probes.network(torch.float64))


def relative_variance(bench, count):
    exact = bench.exact()
    target = bench.flat(exact, exact)
    drawn = samples(bench, exact, count)
    return float((drawn - target).square().sum(1).mean() / target.square().sum())


def apart(one, other):
    """The relative distance of two trees."""
    names = set(one) | set(other)
    square = sum(float((one[name] - other[name]).double().square().sum()) for name in names)
    return (square / sum(float(value.double().square().sum()) for value in other.values())) ** 0.5


def twice(one, other):
    return one.estimate().grads, other.estimate().grads


def test_relative_variance_of_normal_directions_is_d_plus_1_over_k():
    assert relative_variance(quadratic_bench(tangents=TANGENTS), 40) == pytest.approx((DIMENSION + 1) / TANGENTS, rel=CLOSED)


def test_relative_variance_of_signs_is_d_minus_1_over_k():
    assert relative_variance(quadratic_bench(tangents=TANGENTS, noise="sign"), 40) == pytest.approx((DIMENSION - 1) / TANGENTS, rel=CLOSED)


def test_relative_error_of_the_projection_is_1_minus_k_over_d():
    assert relative_variance(quadratic_bench(tangents=10, combine="orthogonal"), 40) == pytest.approx(1 - 10 / DIMENSION, rel=CLOSED)


def test_relative_variance_of_the_rescaled_projection_is_d_over_k_minus_1():
    assert relative_variance(quadratic_bench(tangents=10, combine="orthogonal", rescale=True), 80) == pytest.approx(DIMENSION / 10 - 1, rel=CLOSED)


@pytest.mark.parametrize("law", ["normal", "sign"])
def test_rank_1_directions_have_the_variance_of_dense_ones(law):
    rows, columns, draws = 200, 180, 40_000
    a, b = LowRank(Key(3), "weight", torch.empty(rows, columns), range(draws), law, 1).factors()  # [draws, rows, 1], [draws, columns, 1]
    gradient = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    a, b = a[..., 0].double(), b[..., 0].double()
    slope = ((a @ gradient.double()) * b).sum(1)  # ⟨G, a bᵀ⟩
    measured = float((slope**2 * a.square().sum(1) * b.square().sum(1)).mean() / gradient.double().square().sum()) - 1
    assert measured == pytest.approx(rows * columns + (1 if law == "normal" else -1), rel=tolerance("low_rank"))


def test_variance_in_activation_space_is_that_of_units_over_examples():
    bench = network_bench(tangents=TANGENTS)
    model, batch = bench.problem.model, bench.batch
    held = []
    hooks = [layer.register_forward_hook(lambda _, given, output: held.append((given[0].detach(), output))) for layer in model if isinstance(layer, nn.Linear)]
    F.cross_entropy(model(batch.inputs), batch.targets, reduction="sum").backward(inputs=None, retain_graph=True)
    deltas = torch.autograd.grad(F.cross_entropy(model(batch.inputs), batch.targets, reduction="sum"), [output for _, output in held[3:]])
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    whole = sum(delta.square().sum(1) for delta in deltas)  # [N]: ‖δ_n‖² over all perturbed units
    trace = 0.0
    for (x, output), delta in zip(held[3:], deltas, strict=True):
        inputs = x.square().sum(1) + 1  # the bias sees 1
        trace += float(((output.shape[1] * whole + delta.square().sum(1)) * inputs).sum()) / len(x) ** 2
    exact = bench.exact()
    expected = trace / TANGENTS / float(bench.flat(exact, exact).square().sum())
    assert relative_variance(bench, 40) == pytest.approx(expected, rel=CLOSED)


def test_tangents_along_a_basis_give_the_gradient():
    problem = Quadratic(dimension=12, batch_size=4).build(Key(2))
    params = {"x": problem.x.detach().double()}
    basis = torch.eye(12, dtype=torch.float64)
    with torch.enable_grad():
        slopes = problem.loss({"x": Dual(params["x"], basis, Trace(12))}, problem.batch(0, World()), {}).tangent
    assert apart({"x": slopes @ basis}, problem.gradient(params)) <= ROUNDING


@pytest.mark.parametrize("problem", [probes.quadratic, probes.network], ids=["quadratic", "network"])
def test_projection_on_as_many_tangents_as_dimensions_is_backprop(problem):
    size = sum(value.numel() for value in problem().params().values())
    bench = Bench(Forward(space="weights", tangents=size, combine="orthogonal"), problem(torch.float64))
    assert apart(bench.estimate().grads, bench.exact()) <= tolerance("oracle64")


@pytest.mark.parametrize(
    "settings",
    [
        {"space": "weights"},
        {"space": "weights", "rank": 2},
        {"space": "weights", "combine": "orthogonal"},
        {"space": "activations"},
        {"space": "activations", "memory": "replay"},
        {"space": "activations", "guess": "local"},
    ],
    ids=str,
)
def test_chunks_do_not_change_the_result(settings):
    assert apart(*twice(network_bench(tangents=8, chunk=3, **settings), network_bench(tangents=8, **settings))) <= ROUNDING


def test_chunks_beside_a_momentum_guide_do_not_change_the_result():
    whole, parts = (network_bench(space="weights", guess="momentum", tangents=8, chunk=chunk).warm() for chunk in (None, 3))
    parts.state = whole.state
    assert apart(*twice(parts, whole)) <= ROUNDING


@pytest.mark.parametrize(
    "build", [probes.network, probes.convolution, probes.normalised, probes.tied, probes.dropout, probes.quadratic], ids=lambda build: build.__name__
)
@pytest.mark.parametrize("guess", ["random", "local"])
def test_replay_gives_what_store_gives(build, guess):
    if guess == "local" and build in {probes.tied, probes.quadratic}:
        with pytest.raises(CapabilityError, match="guess='random'"):
            network_bench(build(), guess="local", memory="replay").estimate()
        return
    store, replay = twice(*(network_bench(build(torch.float64), tangents=4, guess=guess, memory=memory) for memory in ("store", "replay")))
    assert apart(store, replay) <= ROUNDING


def test_expected_cosine_after_k_directions():
    bench = quadratic_bench(tangents=16)
    keys = [Key(5, step) for step in range(100)]
    found = alignment(bench.engine, bench.problem, bench.params, bench.batch, keys)
    assert found["cosine"] == pytest.approx(expected_cosine(16, DIMENSION), abs=tolerance("cosine"))


@pytest.mark.parametrize("space", ["weights", "activations"])
def test_k_tangents_at_once_are_the_mean_of_k_single_ones(space):
    class Only(Forward):
        """One tangent: the member of that number."""

        def chunks(self):
            yield [self.number]

    together = network_bench(space=space, tangents=4)
    total = None
    for number in range(4):
        Only.number = number
        grads = Bench(Only(space=space, tangents=1), probes.network(torch.float64)).estimate().grads
        total = grads if total is None else {name: total[name] + grad for name, grad in grads.items()}
    assert apart({name: value / 4 for name, value in total.items()}, together.estimate().grads) <= ROUNDING


@pytest.mark.parametrize("tangents", [0, 3])
def test_a_guess_along_the_gradient_gives_the_gradient(tangents):
    bench = network_bench(space="weights", guess="momentum", tangents=tangents)
    exact = bench.exact()
    bench.state = {f"guide.{name}": 7 * grad for name, grad in exact.items()}
    assert apart(bench.estimate().grads, exact) <= ROUNDING


def test_momentum_is_the_decayed_mean_of_estimates():
    bench = network_bench(space="weights", guess="momentum", decay=0.75).warm()
    found = bench.estimate()
    for name, grad in found.grads.items():
        assert torch.allclose(found.state[f"guide.{name}"], 0.75 * bench.state[f"guide.{name}"] + 0.25 * grad)


def one_example(problem):
    batch = problem.batch(0, World())
    return batch._replace(inputs=batch.inputs[:1], targets=batch.targets[:1])


def test_local_guess_is_applied_with_its_true_slope():
    # With one example a layer's bias gradient is δ itself: δ̂ = ⟨δ, u⟩ u with ‖u‖ = 1, so ⟨δ, δ̂⟩ = ‖δ̂‖².
    bench = network_bench(guess="local", tangents=0)
    bench.batch = one_example(bench.problem)
    exact, found = bench.exact(), bench.estimate().grads
    for name in ("0.bias", "2.bias", "4.bias"):
        assert float(found[name].norm()) > 0
        assert float(exact[name] @ found[name]) == pytest.approx(float(found[name] @ found[name]), rel=ROUNDING)


def test_local_guess_at_the_last_layer_is_the_gradient():
    bench = network_bench(guess="local", tangents=0)
    exact, found = bench.exact(), bench.estimate().grads
    assert apart({"w": found["4.weight"]}, {"w": exact["4.weight"]}) <= ROUNDING


def test_local_heads_get_the_gradient_of_their_local_loss():
    bench = network_bench(guess="local", tangents=0)
    head = bench.params["guess.0.weight"].detach().requires_grad_()
    hidden = torch.relu(bench.problem.model[0](bench.batch.inputs)).detach()
    (expected,) = torch.autograd.grad(F.cross_entropy(hidden @ head.T, bench.batch.targets), [head])
    assert apart({"head": bench.estimate().grads["guess.0.weight"]}, {"head": expected}) <= ROUNDING


def with_loss(loss):
    return probes.Probe(probes.network_model, probes.data("network", 3), loss=loss, dtype=torch.float64)


@pytest.mark.parametrize("settings", [{"space": "weights"}, {"space": "activations"}, {"guess": "local"}], ids=str)
def test_a_scalar_loss_is_taken_apart_into_the_examples_own(settings):
    def mean(outputs, targets):
        return F.cross_entropy(outputs, targets)

    def each(outputs, targets):
        return F.cross_entropy(outputs, targets, reduction="none")

    whole, parts = network_bench(with_loss(mean), **settings), network_bench(with_loss(each), **settings)
    assert apart(*twice(whole, parts)) <= ROUNDING
    assert int(whole.estimate().metrics.get("coefficient_per_batch", torch.tensor(0))) == 0


@pytest.mark.parametrize("settings", [{"space": "weights"}, {"space": "activations"}], ids=str)
def test_a_summed_loss_gives_n_times_the_estimate(settings):
    def mean(outputs, targets):
        return F.cross_entropy(outputs, targets)

    def total(outputs, targets):
        return F.cross_entropy(outputs, targets, reduction="sum")

    one, other = twice(network_bench(with_loss(mean), **settings), network_bench(with_loss(total), **settings))
    assert apart({name: probes.EXAMPLES * grad for name, grad in one.items()}, other) <= ROUNDING


def contrastive(outputs, targets):
    unit = F.normalize(outputs, dim=1)
    return F.cross_entropy(unit @ unit.T, torch.arange(len(unit)).roll(1))


def test_a_loss_that_mixes_examples_gets_one_coefficient_a_batch_counted():
    bench = network_bench(with_loss(contrastive), tangents=8)
    assert int(bench.estimate().metrics["coefficient_per_batch"]) == 3  # layers


def test_a_loss_that_mixes_examples_is_still_estimated_without_bias():
    bench = network_bench(with_loss(contrastive), tangents=16)
    exact = bench.exact()
    hold_mean(samples(bench, exact, 100), bench.flat(exact, exact), "contrastive", [value.numel() for value in exact.values()])


def test_a_loss_that_mixes_examples_refuses_local_guesses():
    with pytest.raises(CapabilityError, match="sees the batch as a whole"):
        network_bench(with_loss(contrastive), guess="local").estimate()


class Raw(nn.Module):
    """A weight used by its layer and raw, and a parameter that belongs to no layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.head(torch.tanh(self.second(h) + torch.einsum("nd,ed->ne", h, self.second.weight) * self.scale))


@pytest.mark.parametrize("settings", [{}, {"memory": "replay"}, {"guess": "local"}, {"space": "weights", "rank": 1}], ids=str)
def test_parameters_used_outside_layers_fall_back_to_weight_tangents_without_bias(settings):
    bench = network_bench(probes.Probe(Raw, probes.data("network", 3), dtype=torch.float64), tangents=16, **settings)
    exact = bench.exact()
    hold_mean(samples(bench, exact, 50), bench.flat(exact, exact), "raw", [value.numel() for value in exact.values()])
    if "space" not in settings:
        assert int(bench.estimate().metrics["fallback_weight_tangents"]) == 2  # the weight and the scale


class Tokens(nn.Module):
    """Three classes for each of three tokens."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(1, 4), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.norm(torch.tanh(self.embed(x[..., None]))))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("space", ["weights", "activations"])
def test_losses_of_tokens_are_estimated_without_bias(space, reduction):
    def loss(outputs, targets):
        value = F.cross_entropy(outputs.flatten(0, 1), targets.repeat_interleave(3), reduction=reduction)
        return value.reshape(-1, 3) if reduction == "none" else value

    bench = network_bench(probes.Probe(Tokens, probes.data("network", 3), loss=loss, dtype=torch.float64), space=space, tangents=16)
    exact = bench.exact()
    hold_mean(samples(bench, exact, 50), bench.flat(exact, exact), reduction, [value.numel() for value in exact.values()])
    assert int(bench.estimate().metrics.get("coefficient_per_batch", torch.tensor(0))) == 0


def test_batch_norm_in_training_gets_one_coefficient_a_batch_counted():
    bench = network_bench(probes.normalised())
    counted = int(bench.estimate().metrics["coefficient_per_batch"])
    bench.problem.model.eval()
    assert counted > 0
    assert int(bench.estimate().metrics["coefficient_per_batch"]) == 0


def test_a_loss_on_a_dict_of_outputs_refuses_local_guesses():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = probes.network_model()

        def forward(self, x):
            return {"logits": self.body(x)}

    problem = probes.Probe(Named, probes.data("network", 3), loss=lambda outputs, targets: F.cross_entropy(outputs["logits"], targets))
    with pytest.raises(CapabilityError, match="guess='random'"):
        network_bench(problem, guess="local").estimate()


def test_guesses_alone_and_projections_are_declared_guided():
    assert Forward(guess="local", tangents=0).bias is Bias.GUIDED
    assert Forward(space="weights", combine="orthogonal").bias is Bias.GUIDED
    assert Forward(space="weights", combine="orthogonal", rescale=True).bias is Bias.UNBIASED


def test_accumulated_backprop_is_the_whole_batchs_gradient_with_uneven_parts():
    whole, parts = (Bench(Backprop(accumulation=count), probes.network(torch.float64)) for count in (1, 4))
    assert apart(*twice(parts, whole)) <= ROUNDING


def test_backprop_is_aligned_with_itself():
    bench = Bench(Backprop(), probes.network(torch.float64))
    found = alignment(bench.engine, bench.problem, bench.params, bench.batch, [Key(0), Key(1)])
    assert found["cosine"] == pytest.approx(1)
    assert found["norm_ratio"] == pytest.approx(1)
    assert found["relative_variance"] == pytest.approx(0, abs=ROUNDING)
    assert set(found["layers"]) == set(bench.problem.params())


def test_alignment_is_taken_over_all_parameters_and_for_each():
    bench = network_bench(tangents=4)
    _, exact = exact_gradient(bench.problem, bench.params, bench.batch, Key(4))
    grads = bench.engine.estimate(bench.problem, bench.params, {}, bench.batch, Key(4), None).grads
    found = alignment(bench.engine, bench.problem, bench.params, bench.batch, [Key(4)])
    one, other = bench.flat(dict(grads), exact), bench.flat(exact, exact)
    assert found["cosine"] == pytest.approx(float(F.cosine_similarity(one, other, dim=0)))
    assert found["relative_variance"] == pytest.approx(float((one - other).square().sum() / other.square().sum()))
    layer = F.cosine_similarity(grads["2.weight"].flatten(), exact["2.weight"].flatten(), dim=0)
    assert found["layers"]["2.weight"]["cosine"] == pytest.approx(float(layer))


def test_alignment_under_dropout_compares_under_the_same_mask():
    bench = Bench(Backprop(), probes.dropout(torch.float64))
    assert alignment(bench.engine, bench.problem, bench.params, bench.batch, [Key(9)])["cosine"] == pytest.approx(1)


def test_alignment_without_keys_is_refused():
    bench = network_bench()
    with pytest.raises(UsageError, match="at least one"):
        alignment(bench.engine, bench.problem, bench.params, bench.batch, [])


def test_expected_cosine_needs_a_tangent():
    with pytest.raises(SettingError, match="tangents=0"):
        expected_cosine(0, 10)
