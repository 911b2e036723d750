"""The likelihood-ratio estimate against closed forms: single layers, the smoothed loss, and its own other ways of computing the same numbers."""

import pytest
import torch
import torch.nn.functional as F
from console import elsewhere, invoke, rows  # noqa: F401  (elsewhere is a fixture)
from tolerances import tolerance
from torch import nn

from altgrad.conformance import probes
from altgrad.conformance.claim import Bench, same_tree
from altgrad.conformance.gradients import hold_mean
from altgrad.engines.likelihood_ratio import LikelihoodRatio
from altgrad.errors import CapabilityError, SettingError
from altgrad.kernels import noise
from altgrad.metrics import live_bytes
from altgrad.problem import Batch
from altgrad.problems.supervised import Supervised
from altgrad.rng import Key, tensor_id
from altgrad.world import World

KEY = Key(7, 2)
N, IN, OUT = 6, 3, 2


def drawn(label, *shape):
    return noise.draw("normal", Key(3), tensor_id(label), [0], shape)[0].double()


def single_layer(loss):
    layer = nn.Linear(IN, OUT).double()
    with torch.no_grad():
        layer.weight.copy_(drawn("weight", OUT, IN))
        layer.bias.copy_(drawn("bias", OUT))
    return Supervised(layer, loss), Batch(drawn("inputs", N, IN), drawn("targets", N, OUT))


def half_square(outputs, targets):
    return 0.5 * (outputs - targets).square().sum(-1)


def cube(outputs, targets):
    return outputs.pow(3).sum(-1)


def estimate(engine, problem, batch, key=KEY, state=None):
    params = problem.params()
    return engine.estimate(problem, params, engine.init(problem, params, key) if state is None else state, batch, key, World())


def mean_of(engine, problem, batch, *, keys=40):
    rows = [torch.cat([g.flatten() for _, g in sorted(estimate(engine, problem, batch, KEY.at(step)).grads.items())]) for step in range(keys)]
    return torch.stack(rows)


def noise_of(engine, site="weight@0"):
    return noise.draw("normal", KEY.fold("likelihood ratio"), tensor_id(site), range(engine.copies), (N, OUT), dtype=torch.float64)


def test_a_linear_layer_with_a_square_loss_follows_the_closed_form():
    problem, batch = single_layer(half_square)
    engine = LikelihoodRatio(copies=5, sigma=0.3)
    found = estimate(engine, problem, batch).grads
    epsilon = noise_of(engine)  # [copies, N, out]
    residual = (problem.model(batch.inputs) - batch.targets).detach()
    change = 0.3 * (residual * epsilon).sum(-1) + 0.5 * 0.09 * epsilon.square().sum(-1)  # L(ε) - L(0)
    delta = (change[..., None] * epsilon).mean(0) / (0.3 * N)
    torch.testing.assert_close(found["weight"], delta.T @ batch.inputs, rtol=0, atol=tolerance("rounding64"))
    torch.testing.assert_close(found["bias"], delta.sum(0), rtol=0, atol=tolerance("rounding64"))


def test_antithetic_pairs_see_no_even_term():
    problem, batch = single_layer(half_square)
    engine = LikelihoodRatio(copies=6, sigma=0.3, antithetic=True, baseline="none")
    epsilon = noise_of(LikelihoodRatio(copies=3))
    residual = (problem.model(batch.inputs) - batch.targets).detach()
    delta = ((residual * epsilon).sum(-1, keepdim=True) * epsilon).mean(0) / N
    torch.testing.assert_close(estimate(engine, problem, batch).grads["weight"], delta.T @ batch.inputs, rtol=0, atol=tolerance("rounding64"))


@pytest.mark.parametrize("settings", [{"baseline": "clean"}, {"baseline": "loo"}, {"baseline": "none"}, {"baseline": "loo", "antithetic": True}, {"qmc": True}])
def test_the_mean_is_the_gradient_of_the_smoothed_loss_on_a_cubic(settings):
    """E (y + σε)³ = y³ + 3σ² y, so the smoothed gradient is 3y² + 3σ²."""
    problem, batch = single_layer(cube)
    outputs = problem.model(batch.inputs).detach()
    delta = (3 * outputs.square() + 3 * 0.5**2) / N
    exact = torch.cat([delta.sum(0), (delta.T @ batch.inputs).flatten()])
    hold_mean(mean_of(LikelihoodRatio(copies=64, sigma=0.5, **settings), problem, batch, keys=120), exact, str(settings))


def test_the_bias_on_a_cubic_is_three_sigma_squared():
    problem, batch = single_layer(cube)
    plain = (3 * problem.model(batch.inputs).detach().square() / N).sum(0)
    bias = {}
    for sigma in (0.5, 1.0):
        found = mean_of(LikelihoodRatio(copies=4096, sigma=sigma, antithetic=True), problem, batch)[:, :OUT] - plain
        bias[sigma] = found.mean(0)
        limit = tolerance("standard_errors") * found.std(0) / len(found) ** 0.5
        assert ((bias[sigma] - 3 * sigma**2).abs() <= limit).all()
        assert (bias[sigma].abs() > limit).all()  # it is seen


def test_the_running_mean_as_baseline_leaves_the_mean_alone():
    problem, batch = single_layer(half_square)
    engine = LikelihoodRatio(copies=64, sigma=0.5, baseline="mean")
    exact = (problem.model(batch.inputs) - batch.targets).detach() / N
    state, rows = engine.init(problem, problem.params(), KEY), []
    for step in range(40):
        found = estimate(engine, problem, batch, KEY.at(step), state)
        state = found.state
        rows.append(torch.cat([found.grads["bias"], found.grads["weight"].flatten()]))
    assert abs(float(state["baseline"] / state["baseline_weight"]) / float(found.loss) - 1) < 0.2
    hold_mean(torch.stack(rows), torch.cat([exact.sum(0), (exact.T @ batch.inputs).flatten()]), "running mean")


def test_the_clean_baseline_cuts_the_variance_a_hundredfold():
    problem = probes.network(torch.float64)
    batch = problem.batch(0, World())
    spread = {name: mean_of(LikelihoodRatio(copies=1, sigma=0.05, baseline=name), problem, batch, keys=60).var(0).sum() for name in ("clean", "none")}
    assert spread["none"] > 100 * spread["clean"]


class Sequential(nn.Module):
    """A recurrent layer whose last output is read."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(x.unflatten(1, (3, 2)))[0][:, -1])


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRUCell(2, 4), nn.Linear(4, 3)

    def forward(self, x):
        state = torch.zeros(len(x), 4, dtype=x.dtype)
        for step in x.unflatten(1, (3, 2)).unbind(1):
            state = self.cell(step, state)
        return self.head(state)


class Attended(nn.Module):
    def __init__(self, *, apart):
        super().__init__()
        self.attention, self.head, self.apart = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3), apart

    def forward(self, x):
        x = torch.cat([x, x[:, :2]], 1).unflatten(1, (2, 4))
        return self.head(self.attention(x, x.tanh() if self.apart else x, x)[0].mean(1))


class Multiplied(nn.Module):
    """Plain parameters: x W, a shift that no layer takes, rows of a matrix."""

    def __init__(self):
        super().__init__()
        self.matrix, self.shift, self.rows = nn.Parameter(torch.zeros(6, 4)), nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(5, 4))

    def forward(self, x):
        return F.linear(torch.tanh(x @ self.matrix + self.shift), self.rows[1:4])


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(3, 4, padding_idx=0), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.table((x > 0).long() + (x > 0.7).long()).sum(1)))


def convolved(layer, shape, width, *after):
    return nn.Sequential(nn.Unflatten(1, shape), layer, *after, nn.Tanh(), nn.Flatten(), nn.Linear(width, 3))


MODELS = {
    "conv1d": lambda: convolved(nn.Conv1d(2, 4, 2, padding="same", groups=2), (2, 3), 12),
    "conv2d": lambda: convolved(nn.Conv2d(1, 2, 2, stride=(1, 2), padding=1), (1, 2, 3), 12),
    "conv3d": lambda: convolved(nn.Conv3d(1, 2, (1, 2, 2)), (1, 1, 2, 3), 4),
    "transposed": lambda: convolved(nn.ConvTranspose2d(2, 3, 2, stride=2, output_padding=1), (2, 1, 3), 63),
    "layer norm": lambda: nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)),
    "rms norm": lambda: nn.Sequential(nn.Linear(6, 4), nn.RMSNorm(4), nn.Tanh(), nn.Linear(4, 3)),
    "group norm": lambda: convolved(nn.Conv1d(2, 4, 1), (2, 3), 12, nn.GroupNorm(2, 4)),
    "instance norm": lambda: convolved(nn.Conv1d(2, 4, 1), (2, 3), 12, nn.InstanceNorm1d(4, affine=True)),
    "batch norm": lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)),
    "gru": lambda: Sequential(nn.GRU(2, 4, batch_first=True)),
    "lstm": lambda: Sequential(nn.LSTM(2, 2, batch_first=True, bidirectional=True)),
    "rnn": lambda: Sequential(nn.RNN(2, 4, num_layers=2, batch_first=True)),
    "cell": Cell,
    "attention": lambda: Attended(apart=False),
    "attention on two inputs": lambda: Attended(apart=True),
    "parameters outside layers": Multiplied,
    "embedding": Words,
}


def model_bench(name, engine):
    problem = probes.Probe(MODELS[name], probes.data("layers", 6), dtype=torch.float64)
    return Bench(engine, problem)


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_estimates_its_own_gradient(name):
    bench = model_bench(name, LikelihoodRatio(copies=24, sigma=1e-4, antithetic=True))
    exact = bench.exact()
    rows = torch.stack([bench.flat(dict(bench.estimate(KEY.at(step)).grads), exact) for step in range(32)])
    hold_mean(rows, bench.flat(exact, exact), name, [value.numel() for value in exact.values()])


@pytest.mark.parametrize("name", ["conv2d", "batch norm", "gru", "attention", "parameters outside layers"])
@pytest.mark.parametrize("settings", [{"copies": 1}, {"copies": 4, "antithetic": True, "chunk": 1}])
def test_store_and_replay_agree_bit_for_bit(name, settings):
    found = [model_bench(name, LikelihoodRatio(memory=memory, **settings)).estimate(KEY) for memory in ("store", "replay")]
    assert same_tree(dict(found[0].grads), dict(found[1].grads))
    assert float(found[1].metrics["forwards"]) == float(found[0].metrics["forwards"]) + settings["copies"]


@pytest.mark.parametrize("settings", [{"baseline": "clean"}, {"baseline": "loo", "antithetic": True}, {"qmc": True}, {"layerwise": True}])
def test_chunks_change_nothing_but_rounding(settings):
    whole, parts = (model_bench("conv2d", LikelihoodRatio(copies=6, chunk=chunk, **settings)).estimate(KEY).grads for chunk in (None, 2))
    for name, grad in whole.items():
        torch.testing.assert_close(parts[name], grad, rtol=tolerance("rounding64"), atol=tolerance("rounding64"))


@pytest.mark.parametrize("settings", [{"copies": 3}, {"copies": 4, "antithetic": True, "baseline": "loo"}])
def test_a_loss_that_cannot_be_batched_runs_copy_by_copy_to_the_same_numbers(settings):
    def stubborn(outputs, targets):
        return torch.tensor([float(value) for value in half_square(outputs, targets)], dtype=torch.float64)

    plain, batch = single_layer(half_square)
    found = estimate(LikelihoodRatio(**settings), plain, batch)
    other = estimate(LikelihoodRatio(**settings), single_layer(stubborn)[0], batch)
    assert int(other.metrics["fallback_copy_loop"]) == settings["copies"]
    assert int(found.metrics["fallback_copy_loop"]) == 0
    torch.testing.assert_close(other.grads["weight"], found.grads["weight"], rtol=tolerance("rounding64"), atol=tolerance("rounding64"))


def test_a_number_from_outside_pytorch_is_a_loss_too():
    problem, batch = single_layer(lambda outputs, targets: float(half_square(outputs, targets).mean()))
    found = estimate(LikelihoodRatio(copies=2), problem, batch)
    assert int(found.metrics["coefficient_per_batch"]) == 2
    assert bool(found.grads["weight"].any())


@pytest.mark.parametrize("settings", [{}, {"qmc": True}, {"antithetic": True, "memory": "replay"}])
def test_ranks_address_the_noise_of_their_own_examples(settings):
    bench = model_bench("conv2d", LikelihoodRatio(copies=4, **settings))
    whole = bench.estimate(KEY)
    parts = [bench.estimate(KEY, batch=bench.problem.batch(0, World(rank, 2)), world=World(rank, 2)) for rank in range(2)]
    for name, grad in whole.grads.items():
        torch.testing.assert_close((parts[0].grads[name] + parts[1].grads[name]) / 2, grad, rtol=tolerance("rounding64"), atol=tolerance("rounding64"))


@pytest.mark.parametrize(("name", "by_batch"), [("conv2d", 0), ("layer norm", 0), ("batch norm", 3), ("gru", 0)])
def test_examples_that_mix_share_a_coefficient_and_are_counted(name, by_batch):
    assert int(model_bench(name, LikelihoodRatio(copies=1)).estimate(KEY).metrics["coefficient_per_batch"]) == by_batch


def test_layerwise_noise_computes_the_layers_behind_it_only():
    bench = Bench(LikelihoodRatio(copies=4, layerwise=True), probes.network())
    assert float(bench.estimate(KEY).metrics["forwards"]) == pytest.approx(2 + 4 * (2 + 1 + 0) / 3)


def test_layerwise_noise_has_less_variance():
    problem = probes.network(torch.float64)
    batch = problem.batch(0, World())
    spread = [mean_of(LikelihoodRatio(copies=1, layerwise=layerwise), problem, batch, keys=80).var(0).sum() for layerwise in (True, False)]
    assert spread[0] < 0.6 * spread[1]


def test_layerwise_survives_activations_that_write():
    plain, writing = (
        probes.Probe(lambda inplace=inplace: nn.Sequential(nn.Linear(3, 5), nn.ReLU(inplace), nn.Linear(5, 3)), probes.data("network", 3), dtype=torch.float64)
        for inplace in (False, True)
    )
    found = [Bench(LikelihoodRatio(copies=2, layerwise=True), problem).estimate(KEY).grads for problem in (plain, writing)]
    assert same_tree(dict(found[0]), dict(found[1]))


def test_one_patterns_layers_alone_get_gradients():
    grads = Bench(LikelihoodRatio(layers="0,4.weight"), probes.network()).estimate(KEY).grads
    assert set(grads) == {"0.weight", "0.bias", "4.weight"}


def test_sigma_follows_its_schedule_and_scales_the_noise():
    problem, batch = single_layer(half_square)
    engine = LikelihoodRatio(copies=1, sigma_schedule="linear", sigma_steps=4, sigma=0.4, sigma_floor=0.25)
    same = LikelihoodRatio(copies=1, sigma=float(estimate(engine, problem, batch).metrics["sigma"]))
    assert same.sigma == pytest.approx(0.4 * (0.25 + 0.75 * 0.5))
    assert same_tree(dict(estimate(engine, problem, batch).grads), dict(estimate(same, problem, batch).grads))


def test_sigma_learns_by_its_own_score():
    """E ½|y + σε|² = ½|y|² + ½ n σ², whose natural gradient in log σ is σ²/2 an example."""
    problem, batch = single_layer(half_square)
    engine = LikelihoodRatio(copies=400, sigma=0.5, sigma_rate=1.0)
    start = engine.init(problem, problem.params(), KEY)
    names = list(problem.params())
    moves = torch.stack([estimate(engine, problem, batch, KEY.at(step), start).state["log_sigma"] - start["log_sigma"] for step in range(30)])
    assert not bool(moves[:, names.index("bias")].any())  # the layer's sigma is its weight's
    own = moves[:, names.index("weight")]
    assert abs(float(own.mean()) + 0.5**2 / 2) <= tolerance("standard_errors") * float(own.std()) / 30**0.5


def test_quasi_random_copies_are_stratified_in_every_unit():
    from altgrad.noisy.draws import Draws

    found = Draws(KEY, 4, 0, False, True, 8).site("layer@0", range(8), (4, 5), torch.float64, torch.device("cpu"))
    strata = torch.special.ndtr(found).mul(8).long().sort(0).values
    assert torch.equal(strata, torch.arange(8)[:, None, None].expand(8, 4, 5))


def test_quasi_random_copies_lower_the_variance_of_a_few_units():
    problem, batch = single_layer(half_square)
    spread = [mean_of(LikelihoodRatio(copies=64, sigma=0.1, qmc=qmc), problem, batch).var(0).sum() for qmc in (True, False)]
    assert spread[0] < 0.5 * spread[1]


@pytest.mark.parametrize("depth", [3, 8])
def test_a_replay_of_one_copy_stays_near_plain_inference_at_any_depth(depth):
    model = nn.Sequential(*(part for _ in range(depth) for part in (nn.Linear(256, 256), nn.ReLU())))
    problem, batch = Supervised(model, F.cross_entropy), Batch(drawn("wide", 512, 256).float(), torch.arange(512) % 256)
    with torch.no_grad(), live_bytes() as plain:
        model(batch.inputs)
    estimate(LikelihoodRatio(copies=1), problem, batch)  # what is found out once
    with live_bytes() as live:
        found = estimate(LikelihoodRatio(copies=1, memory="replay"), problem, batch)
    assert live.peak_without(found.grads.values()) <= 2.2 * plain.peak


def test_a_network_of_hard_signs_learns_a_loss_of_zeros_and_ones():
    class Sign(nn.Module):
        def forward(self, x):
            return torch.sign(x)

    inputs = drawn("points", 128, 2).float()
    targets = (inputs.prod(1) > 0).long()  # exclusive or: no linear rule does it
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.set_state(torch.Generator().get_state())
        model = nn.Sequential(nn.Linear(2, 24), Sign(), nn.Linear(24, 2))

    def wrong(outputs, targets):
        return (outputs.argmax(-1) != targets).float()

    problem = Supervised(model, wrong)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    engine = LikelihoodRatio(copies=16, sigma=0.5)
    for step in range(250):
        for name, grad in estimate(engine, problem, Batch(inputs, targets), KEY.at(step)).grads.items():
            dict(model.named_parameters())[name].grad = grad
        optimizer.step()
    assert float(wrong(model(inputs), targets).mean()) < 0.1


class Restless(nn.Module):
    """A black box that counts its calls."""

    def __init__(self):
        super().__init__()
        self.count, self.last = 0, nn.Linear(4, 3)

    def forward(self, x):
        self.count += 1
        return self.last(x + 0.1 * self.count)


def test_a_model_that_changes_between_passes_is_named():
    problem = probes.Probe(lambda: nn.Sequential(nn.Linear(6, 4), Restless()), probes.data("layers", 6))
    with pytest.raises(CapabilityError, match=r"layer '1.last.weight'.*changes from one pass to the next"):
        Bench(LikelihoodRatio(), problem).estimate(KEY)


def test_a_layer_of_integers_is_refused_by_name():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 6, dtype=torch.int64), requires_grad=False)

        def forward(self, x):
            return F.linear(x.long(), self.weight).float()

    problem = Supervised(Counting(), half_square)
    problem.params = lambda: dict(problem.model.named_parameters())
    with pytest.raises(CapabilityError, match=r"layer 'weight' puts out torch.int64"):
        estimate(LikelihoodRatio(), problem, Batch(torch.ones(4, 6), torch.ones(4, 3)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sigma": 0.0}, "sigma=0.0"),
        ({"sigma": -1.0}, "sigma=-1.0"),
        ({"copies": 0}, "copies=0"),
        ({"copies": 3, "antithetic": True}, "copies=3"),
        ({"copies": 1, "baseline": "loo"}, "at least 2"),
        ({"copies": 2, "baseline": "loo", "antithetic": True}, "at least 4"),
        ({"baseline": "cleen"}, "Did you mean 'clean'"),
        ({"baseline": "loo", "qmc": True}, "qmc=True"),
        ({"layerwise": True, "memory": "replay"}, "memory='replay'"),
        ({"sigma_rate": 0.1, "sigma_schedule": "linear", "sigma_steps": 3}, "sigma_schedule='linear'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said):
    with pytest.raises(SettingError, match=said):
        LikelihoodRatio(**settings)


def test_a_pattern_that_matches_no_layer_is_refused_with_those_there_are():
    with pytest.raises(SettingError, match=r"unknown layer '5'.*Allowed: 0, 2, 4"):
        Bench(LikelihoodRatio(layers="5"), probes.network())


def test_the_command_line_trains_by_it():
    done = invoke("train", "--engine", "likelihood-ratio", "--epochs", "1", "-s", "copies=4", "-s", "memory=replay", "--lr", "3e-3", "--quiet", "--out", "run")
    assert done.exit_code == 0, done.output
    seen = [row["loss"] for row in rows("run") if "loss" in row]
    assert seen[-1] < seen[0]
