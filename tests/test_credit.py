"""Credit: coefficients that sum what a group of parameters touches; closed forms, identities, variance, ranks, and what is refused."""

import pytest
import torch
from tolerances import tolerance
from torch import nn

from altgrad import Influence, Learner, registry
from altgrad.conformance.claim import same_bits, same_tree
from altgrad.conformance.gradients import hold_mean
from altgrad.conformance.populations import on_ranks
from altgrad.credit import per_example
from altgrad.engines.evolution import ES, SPSA, Eggroll
from altgrad.engines.likelihood_ratio import LikelihoodRatio
from altgrad.errors import CapabilityError, SettingError, ShapeError
from altgrad.kernels import noise
from altgrad.problem import Batch, Problem
from altgrad.problems.supervised import Supervised
from altgrad.rng import Key, tensor_id
from altgrad.world import World

KEY = Key(7, 2)
ROUNDING = tolerance("rounding64")
N, IN, OUT = 6, 3, 2
LEFT, RIGHT = torch.tensor([True, True, False]), torch.tensor([False, False, True])


def drawn(label, *shape):
    return noise.draw("normal", Key(3), tensor_id(label), [0], shape)[0].double()


class Two(nn.Module):
    """Two networks that share their inputs only: outputs 0 and 1 are the left one's, output 2 the right one's."""

    def __init__(self):
        super().__init__()
        self.left = nn.Sequential(nn.Linear(IN, 4), nn.Tanh(), nn.Linear(4, 2))
        self.right = nn.Sequential(nn.Linear(IN, 3), nn.Tanh(), nn.Linear(3, 1))
        self.gain = nn.Parameter(torch.ones(IN))  # of the right one's inputs; no layer takes it

    def forward(self, x):
        return torch.cat([self.left(x), self.right(x * self.gain)], 1)


def squares(outputs, targets):
    return (outputs - targets).square()


def model():
    found = Two().double()
    with torch.no_grad():
        for name, value in found.named_parameters():
            value.copy_(0.6 * drawn(name, *value.shape))
    return found


def two(influence=None, loss=squares):
    return Supervised(model(), loss, influence=influence)


def batch():
    return Batch(drawn("inputs", N, IN), drawn("targets", N, 3))


def sides():
    return {name: LEFT if name.startswith("left") else RIGHT for name, _ in Two().named_parameters()}


def everything(engine):
    """Maps in which everything touches everything, as fine as the engine takes them."""
    maps = {}
    for name, value in Two().named_parameters():
        if isinstance(engine, ES | SPSA):
            maps[name] = Influence.grouped(torch.arange(value.numel()).reshape(value.shape), torch.ones(value.numel(), 3, dtype=torch.bool))
        elif isinstance(engine, LikelihoodRatio) and "gain" not in name:
            maps[name] = torch.ones(len(value), 3, dtype=torch.bool)
        else:
            maps[name] = torch.ones(3, dtype=torch.bool)
    return maps


def look(engine, problem, key=KEY, world=None, given=None):
    params = problem.params()
    found = engine.estimate(problem, params, engine.init(problem, params, key), given or batch(), key, world or World())
    return found._replace(grads=dict(found.grads))


def flat(found):
    return torch.cat([grad.flatten() for _, grad in sorted(found.grads.items())])


def many(engine, problem, keys, given=None):
    return torch.stack([flat(look(engine, problem, KEY.at(step), given=given)) for step in range(keys)])


def exact(problem):
    problem.loss(problem.params(), batch(), {}).backward()
    return torch.cat([value.grad.flatten() for _, value in sorted(problem.params().items())])


# -- sums -------------------------------------------------------------------------------------------------------------------------


def test_sums_are_those_of_the_outputs_in_the_pairs():
    index, mask = torch.tensor([[0, 1], [2, 1]]), drawn("mask", 3, 2 * 5) > 0
    groups, outputs = mask.nonzero(as_tuple=True)
    order = drawn("order", len(groups)).argsort()
    losses = drawn("losses", 6, 2, 5)
    expected = torch.einsum("ko,go->kg", losses.flatten(1), mask.double()) / 10
    torch.testing.assert_close(Influence.pairs(index, groups[order], outputs[order]).sums(losses), expected)
    unsorted = Influence.pairs(index, groups[order], outputs[order], distinct=True)
    torch.testing.assert_close(unsorted.sums(losses[:2]), expected[:2])
    torch.testing.assert_close(unsorted.sums(losses), expected)


def test_a_mask_holds_for_every_example():
    mask = torch.tensor([[True, False, True], [False, True, False]])
    losses = drawn("losses", 4, 5, 3)
    expected = torch.einsum("knp,gp->kg", losses, mask.double()) / 15
    torch.testing.assert_close(Influence.grouped(torch.tensor([0, 1]), mask).sums(losses), expected)


def test_an_output_named_twice_counts_once():
    twice = Influence.pairs(torch.tensor([0, 1]), torch.tensor([1, 0, 1]), torch.tensor([2, 0, 2]))
    assert twice.sums(torch.ones(1, 3)).tolist() == pytest.approx([1 / 3, 1 / 3])


def test_what_is_not_finite_reaches_the_groups_that_touch_it_and_no_other():
    losses = torch.tensor([[1.0, torch.nan, 2.0]])
    found = Influence.pairs(torch.arange(3), torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 2])).sums(losses)
    assert found.isnan().tolist() == [False, True, False]


def test_the_loss_of_an_example_is_the_mean_of_its_local_ones():
    losses = drawn("losses", 4, 3)
    torch.testing.assert_close(per_example(losses), losses.mean(1))
    assert torch.equal(per_example(losses[:, 0]), losses[:, 0])


def test_means_are_over_what_a_group_touches():
    losses = drawn("losses", 4, 2, 3)
    found = Influence.grouped(torch.tensor([0, 1, 2]), torch.tensor([[True, False, True], [False, True, False], [False, False, False]])).means(losses)
    torch.testing.assert_close(found, torch.stack([losses[..., [0, 2]].mean((1, 2)), losses[..., 1].mean(1), torch.zeros(4).double()], 1))
    pairs = Influence.pairs(torch.tensor([0, 1]), torch.tensor([0, 0, 1]), torch.tensor([1, 5, 3]))
    torch.testing.assert_close(pairs.means(losses), torch.stack([losses.flatten(1)[:, [1, 5]].mean(1), losses.flatten(1)[:, 3]], 1))


# -- identities -------------------------------------------------------------------------------------------------------------------

RULES = [
    ES(population=8, shaping="raw", sigma=0.1),
    ES(population=8),
    ES(population=8, shaping="centred-rank", noise="sign"),
    ES(population=8, shaping="nes"),
    ES(population=6, shaping="raw", antithetic=False),
    ES(population=8, shaping="baseline-pair", chunk=3),
    ES(population=8, shaping="raw", maximize=True),
    SPSA(),
    SPSA(population=8, shaping="sign"),
    Eggroll(population=8),
    LikelihoodRatio(copies=4),
    LikelihoodRatio(copies=4, memory="replay"),
    LikelihoodRatio(copies=6, antithetic=True, baseline="loo"),
    LikelihoodRatio(copies=4, baseline="none", sigma_rate=0.1, chunk=1),
    LikelihoodRatio(copies=4, layerwise=True),
]


@pytest.mark.parametrize("engine", RULES, ids=str)
def test_where_everything_touches_everything_the_estimate_is_the_one_without_maps(engine):
    plain, mapped = look(engine, two()), look(engine, two(everything(engine)))
    scale = float(flat(plain).abs().max())
    torch.testing.assert_close(flat(mapped), flat(plain), rtol=0, atol=1e3 * ROUNDING * scale)  # differences of losses, divided by sigma
    torch.testing.assert_close(mapped.loss, plain.loss, rtol=ROUNDING, atol=0)
    assert float(mapped.metrics["forwards"]) == float(plain.metrics["forwards"])
    for name, value in plain.state.items():
        torch.testing.assert_close(mapped.state[name], value, rtol=1e3 * ROUNDING, atol=0)


class Local(Supervised):
    def losses(self, params, batch, buffers):
        return squares(self.forward(params, batch.inputs, buffers), batch.targets)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("backprop", {}),
        ("forward", {"tangents": 3}),
        ("forward", {"space": "activations", "tangents": 3, "memory": "replay"}),
        ("likelihood-ratio", {"copies": 3}),
        ("spsa", {}),
        ("ask-tell", {"population": 6}),
    ],
)
def test_local_losses_without_maps_are_the_loss_of_their_mean(name, settings):
    engine = registry.engine(name, settings)
    local, whole = (look(engine, kind(model(), squares)) for kind in (Local, Supervised))
    torch.testing.assert_close(flat(local), flat(whole), rtol=1e-6, atol=1e3 * ROUNDING)
    torch.testing.assert_close(local.loss, whole.loss, rtol=ROUNDING, atol=0)


# -- mean and variance ------------------------------------------------------------------------------------------------------------

SMALL = 1e-3  # noise scale at which smoothing is not to be seen


@pytest.mark.parametrize(
    "engine",
    [
        ES(population=8, shaping="raw", sigma=SMALL),
        SPSA(population=8, noise="sign", antithetic=False),
        Eggroll(population=8, shaping="raw", sigma=SMALL),
        LikelihoodRatio(copies=4, sigma=SMALL),
        LikelihoodRatio(copies=4, sigma=SMALL, memory="replay", antithetic=True),
    ],
    ids=str,
)
def test_the_masked_estimate_has_the_gradient_as_its_mean(engine):
    problem = two(sides())
    target, rows = exact(two()), many(engine, problem, 96)
    hold_mean(rows, target, "96 keys", [value.numel() for _, value in sorted(problem.params().items())])


class Bundle(Problem):
    """P linear local losses, each of parameters of its own: ℓ_p = ⟨a_p, θ_p⟩."""

    def __init__(self, places, each, *, mapped):
        self.places, self.each, self.mapped = places, each, mapped
        self.slopes, self.theta = drawn("slopes", places, each), drawn("theta", places, each)

    def params(self):
        return {"theta": self.theta}

    def losses(self, params, batch, buffers):
        return (self.slopes * params["theta"]).sum(1)[None]

    def influence(self, params, batch):
        if not self.mapped:
            return {}
        index = torch.arange(self.places)[:, None].expand(self.places, self.each)
        return {"theta": Influence.pairs(index, torch.arange(self.places), torch.arange(self.places))}


@pytest.mark.parametrize("engine", [SPSA(noise="sign"), ES(population=2, noise="sign", shaping="raw")], ids=str)
def test_variance_falls_from_all_parameters_to_those_that_share_an_output(engine):
    places, each, keys = 8, 4, 320
    given = Batch(torch.zeros(1, 1), torch.zeros(1))
    spread = {}
    for mapped in (False, True):
        problem = Bundle(places, each, mapped=mapped)
        rows = many(engine, problem, keys, given=given)
        gradient = problem.slopes.flatten() / places
        spread[mapped] = float((rows - gradient).square().sum(1).mean() / gradient.square().sum())
    assert spread[False] == pytest.approx(places * each - 1, rel=tolerance("closed_form"))
    assert spread[True] == pytest.approx(each - 1, rel=tolerance("closed_form"))


def test_a_scale_free_shaping_does_not_feel_how_few_outputs_a_group_touches():
    given = Batch(torch.zeros(1, 1), torch.zeros(1))
    engine = ES(population=32, noise="sign")
    few, one = Bundle(200, 4, mapped=True), Bundle(200, 4, mapped=True)
    one.places, one.slopes, one.theta = 1, few.slopes[:1], few.theta[:1]
    found, alone = (look(engine, problem, given=given).grads["theta"] for problem in (few, one))
    assert float(found.norm()) / 200**0.5 == pytest.approx(float(alone.norm()), rel=0.5)


def test_what_touches_nothing_gets_no_gradient():
    found = look(SPSA(), two({"gain": torch.zeros(3, dtype=torch.bool)}))
    assert not bool(found.grads["gain"].any())
    assert bool(found.grads["right.0.weight"].any())


# -- populations ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", [ES(population=8, shaping="raw"), Eggroll(population=6), ES(population=5, antithetic=False), SPSA()], ids=str)
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_have_the_same_bits_and_those_of_one_process(engine, size):
    alone = look(engine, two(sides()))
    found = on_ranks(lambda world: look(engine, two(sides()), world=world), size)
    for other in found[1:]:
        assert same_bits(other.loss, found[0].loss)
        assert same_tree(other.grads, found[0].grads)
    torch.testing.assert_close(flat(found[0]), flat(alone), rtol=0, atol=1e3 * ROUNDING * float(flat(alone).abs().max()))


@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_change_nothing_but_rounding(chunk):
    one, other = (look(ES(population=8, shaping="raw", chunk=size), two(everything(ES()) | sides())) for size in (None, chunk))
    torch.testing.assert_close(flat(one), flat(other), rtol=0, atol=1e3 * ROUNDING * float(flat(one).abs().max()))


class Sometimes(Bundle):
    """Loss 0 is NaN where θ_00 is above its centre."""

    def losses(self, params, batch, buffers):
        found = super().losses(params, batch, buffers)
        return torch.where((torch.arange(self.places) == 0) & (params["theta"][0, 0] > self.theta[0, 0]), torch.nan, found)


def test_a_local_loss_that_is_not_finite_is_the_worst_of_its_groups_and_counted():
    given = Batch(torch.zeros(1, 1), torch.zeros(1))
    engine = ES(population=8, shaping="raw")
    whole, found = (look(engine, kind(3, 4, mapped=True), given=given) for kind in (Bundle, Sometimes))
    assert int(found.metrics["members_not_finite"]) == 4  # one of each pair
    assert bool(found.grads["theta"].isfinite().all())
    torch.testing.assert_close(found.grads["theta"][1:], whole.grads["theta"][1:], rtol=0, atol=1e3 * ROUNDING)
    assert not torch.allclose(found.grads["theta"][0], whole.grads["theta"][0])


def test_losses_that_no_vmap_can_batch_are_taken_member_by_member_and_counted():
    def loss(outputs, targets):
        float(outputs.sum())
        return squares(outputs, targets)

    plain, looped = look(SPSA(population=4), two(sides())), look(SPSA(population=4), two(sides(), loss=loss))
    assert int(looped.metrics["fallback_member_loop"]) == 4
    torch.testing.assert_close(flat(looped), flat(plain), rtol=0, atol=1e6 * ROUNDING)


def test_eggroll_refuses_groups_in_a_matrix_and_names_es():
    with pytest.raises(CapabilityError, match=r"'left.0.weight' has 4 groups.*rank 1.*engine es"):
        look(Eggroll(population=4), two({"left.0.weight": torch.ones(4, 3, dtype=torch.bool)}))


@pytest.mark.parametrize("settings", [{"groups": 2}, {"adapt": "nes"}], ids=str)
def test_settings_that_need_one_loss_a_member_are_refused(settings):
    with pytest.raises(SettingError, match="influence maps"):
        look(ES(population=8, **settings), two(sides()))


# -- what a user gives ------------------------------------------------------------------------------------------------------------

WRONG = {
    "another number of losses": ({"gain": torch.ones(2, dtype=torch.bool)}, squares, r"'gain' is for 2 local losses an example; there are 3, losses \[6, 3\]"),
    "another number of units": ({"gain": torch.ones(2, 3, dtype=torch.bool)}, squares, r"'gain' has 2 rows, but the parameter \(3,\) has 3 units"),
    "no mask": ({"gain": torch.ones(3)}, squares, r"'gain' is torch.float32 of shape \(3,\); it must be .* bool mask, \[P\] or \[units, P\]"),
    "no parameter": ({"gian": RIGHT}, squares, "Did you mean 'gain'"),
    "another index": ({"gain": Influence.whole(RIGHT, (4,))}, squares, r"'gain' has an index of shape \(4,\); the parameter's is \(3,\)"),
    "outputs beyond the losses": (
        {"gain": Influence.pairs(torch.zeros(3, dtype=torch.int64), torch.tensor([0]), torch.tensor([18]))},
        squares,
        r"'gain' run from 18 to 18; they must be in \[0, 18\)",
    ),
    "losses of examples": ({"gain": RIGHT}, lambda o, t: squares(o, t).mean(1), r"shape \(6,\).*\[N, P\].*reduction='none'"),
    "a sum": ({"gain": RIGHT}, nn.MSELoss(reduction="sum"), "must be the mean of its local losses"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_map_of_the_wrong_shape_is_named(kind):
    influence, loss, message = WRONG[kind]
    with pytest.raises(ShapeError, match=message):
        Learner(model(), loss, engine="spsa", influence=influence).backward(batch().inputs, batch().targets)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (([0, 2], [0], [0]), r"index run from 0 to 2; they must be in \[0, 2\)"),
        (([0, 1], [0, 1], [0]), r"pairs have the shapes \(2,\) and \(1,\)"),
        (([0, 1], [-1], [0]), "groups run from -1"),
        (([0, 1], [0], [-1]), "outputs run from -1"),
    ],
)
def test_parts_that_do_not_fit_together_are_named(parts, message):
    index, groups, outputs = (torch.tensor(part) for part in parts)
    with pytest.raises(ShapeError, match=message):
        Influence.pairs(index, groups, outputs, count=2)


@pytest.mark.parametrize("engine", ["es", "eggroll", "spsa", "likelihood-ratio", "backprop", "forward"])
def test_a_learner_trains_with_maps(engine):
    learner = Learner(model(), nn.MSELoss(), engine=engine, influence=sides())
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.03)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        losses.append(float(learner.backward(batch().inputs, batch().targets).loss))
        optimizer.step()
    assert losses[-1] < losses[0]
