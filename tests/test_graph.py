"""Graph convolutions: Â against its formula, two ways of computing one network, and what engines make of it."""

import pytest
import torch
import torch.nn.functional as F
from console import elsewhere, invoke  # noqa: F401  (elsewhere is a fixture)
from tolerances import tolerance

from altgrad import data, registry
from altgrad.conformance.gradients import hold_mean
from altgrad.engines.likelihood_ratio import LikelihoodRatio
from altgrad.errors import SettingError, ShapeError, UsageError
from altgrad.graphs import GraphNetwork, nearest_neighbours, normalised
from altgrad.kernels import noise
from altgrad.problem import Batch
from altgrad.problems.digits_graph import DigitsGraph
from altgrad.problems.supervised import Supervised
from altgrad.rng import Key, tensor_id
from altgrad.trainer import fit
from altgrad.training import TrainSettings, build
from altgrad.world import World

KEY = Key(5)
NODES, FEATURES, CLASSES = 9, 3, 2


def drawn(label, *shape):
    return noise.draw("normal", Key(3), tensor_id(label), [0], shape)[0].double()


POINTS = drawn("points", NODES, FEATURES)
LABELLED = Batch(torch.tensor([4, 0, 7, 2]), torch.tensor([1, 0, 0, 1]))


@pytest.fixture(scope="module")
def problem():
    return DigitsGraph().build(Key(0))


def small(*, whole):
    """The same two-layer network on nine nodes, in one of its two forms."""
    with torch.random.fork_rng(devices=[]):
        model = GraphNetwork(POINTS, normalised(nearest_neighbours(POINTS, 2)), hidden=4, classes=CLASSES, whole=whole).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(drawn(name, *parameter.shape))
    return Supervised(model, F.cross_entropy)


def estimates(problem, engine, keys=48):
    params = problem.params()
    found = [engine.estimate(problem, params, {}, LABELLED, KEY.at(step), World()).grads for step in range(keys)]
    return torch.stack([torch.cat([grads[name].flatten() for name in params]) for grads in found])


def exact(problem):
    loss = F.cross_entropy(problem.model(LABELLED.inputs), LABELLED.targets)
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(problem.params().values()))])


def test_two_points_are_joined_where_either_is_near_the_other():
    line = torch.tensor([[0.0], [1.0], [2.5], [9.0]])
    joined = nearest_neighbours(line, 1)  # 9 is nearest to nobody, but its own nearest is 2.5
    assert joined.nonzero().tolist() == [[0, 1], [1, 0], [1, 2], [2, 1], [2, 3], [3, 2]]


def test_of_equally_near_points_the_lower_number_is_taken():
    assert nearest_neighbours(torch.tensor([[0.0], [1.0], [-1.0], [-9.0]]), 1)[0].tolist() == [False, True, True, False]
    corners = torch.tensor([[0.0, 0.0], [0.1, 0.3], [0.3, 0.1], [-0.3, 0.1]])
    assert torch.equal(nearest_neighbours(corners, 1), nearest_neighbours(corners + 1e-12 * drawn("rounding", 4, 2), 1))


def test_the_lists_of_a_graph_are_the_normalised_adjacency():
    edges = nearest_neighbours(POINTS, 2)
    joined = edges.double() + torch.eye(NODES)
    scale = joined.sum(1).rsqrt().diag()
    torch.testing.assert_close(normalised(edges).dense().double(), scale @ joined @ scale, rtol=0, atol=tolerance("rounding32"))


def test_a_graph_without_edges_leaves_values_as_they_are():
    graph = normalised(torch.zeros(NODES, NODES, dtype=torch.bool))
    assert torch.equal(graph.mix(POINTS), POINTS)


@pytest.mark.parametrize("whole", [False, True])
def test_the_network_is_two_graph_convolutions(whole):
    model = small(whole=whole).model
    mixing = model.graph.dense().double()
    hidden = torch.relu(mixing @ POINTS @ model.first.weight.T + model.first.bias)
    expected = mixing @ hidden @ model.second.weight.T + model.second.bias
    torch.testing.assert_close(model(LABELLED.inputs), expected[LABELLED.inputs], rtol=0, atol=tolerance("rounding64"))


def test_both_forms_have_one_gradient():
    torch.testing.assert_close(exact(small(whole=True)), exact(small(whole=False)), rtol=0, atol=tolerance("rounding64"))


@pytest.mark.parametrize("whole", [False, True])
def test_noise_on_aggregated_activities_gives_the_gradient(whole):
    problem = small(whole=whole)
    engine = LikelihoodRatio(copies=128, sigma=1e-4, antithetic=True)
    hold_mean(estimates(problem, engine), exact(problem), f"whole={whole}", [value.numel() for value in problem.params().values()])


@pytest.mark.parametrize(("whole", "by_batch"), [(False, 0), (True, 2)])
def test_examples_have_coefficients_of_their_own_node_by_node_only(whole, by_batch):
    problem = small(whole=whole)
    found = LikelihoodRatio(copies=2).estimate(problem, problem.params(), {}, LABELLED, KEY, World())
    assert int(found.metrics["coefficient_per_batch"]) == by_batch
    assert int(found.metrics["fallback_weight_noise"]) == 0


def test_a_batch_of_all_nodes_in_another_order_is_not_taken_for_rows_of_examples():
    problem = small(whole=True)
    batch = Batch(torch.arange(NODES).roll(3), torch.zeros(NODES, dtype=torch.int64))
    found = LikelihoodRatio(copies=2).estimate(problem, problem.params(), {}, batch, KEY, World())
    assert int(found.metrics["coefficient_per_batch"]) == 2


def test_node_by_node_the_estimate_varies_less():
    spread = {whole: float(estimates(small(whole=whole), LikelihoodRatio(copies=8, sigma=1e-3)).var(0).sum()) for whole in (False, True)}
    assert spread[False] < 0.75 * spread[True]


def test_labels_are_a_share_of_the_training_nodes_and_test_nodes_have_none(problem):
    nodes = problem.dataset
    assert len(nodes.train_inputs) == round(0.1 * 1437)
    assert int(nodes.train_inputs.max()) < 1437
    assert nodes.test_inputs.tolist() == list(range(1437, 1797))
    assert torch.equal(nodes.train_targets, problem.labels[nodes.train_inputs])
    assert sorted([*nodes.train_inputs.tolist(), *problem.unlabelled.tolist()]) == list(range(1437))


def test_another_seed_labels_other_nodes(problem):
    other = DigitsGraph().build(Key(1))
    assert set(other.dataset.train_inputs.tolist()) != set(problem.dataset.train_inputs.tolist())


def test_no_constant_of_the_graph_is_trained_or_saved(problem):
    assert set(problem.params()) == {"first.weight", "first.bias", "second.weight", "second.bias"}
    assert problem.buffers() == {}


@pytest.mark.parametrize(
    ("engine", "settings"), [("backprop", {}), ("forward", {"tangents": 8}), ("likelihood-ratio", {"copies": 8}), ("es", {"population": 32})]
)
def test_engines_train_it(engine, settings):
    training = build(TrainSettings(problem="digits-graph", engine=engine, engine_settings=settings, lr=3e-2, steps=60))
    fit(training)
    assert training.figures["test_accuracy"] > 0.85


def test_labels_alone_do_worse_than_labels_and_neighbours():
    """The same network, length and labels with Â = I: what the unlabelled images are worth."""
    accuracy, images = {}, data.load("digits")
    for lonely in (False, True):
        training = build(TrainSettings(problem="digits-graph", engine="backprop", lr=3e-2, steps=60))
        if lonely:
            model = training.problem.model
            model.graph = normalised(torch.zeros(1797, 1797, dtype=torch.bool))
            model.mixed = torch.cat([images.train_inputs, images.test_inputs])
        fit(training)
        accuracy[lonely] = training.figures["test_accuracy"]
    assert accuracy[False] > accuracy[True] + 0.02


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"k": 0}, "k=0"),
        ({"k": 1.5}, "k=1.5"),
        ({"labelled": 0.0}, "labelled=0.0"),
        ({"labelled": 1.5}, "labelled=1.5"),
        ({"labelled": 1e-4}, "labelled=0.0001"),
        ({"hidden": 0}, "hidden=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"k": 1797}, r"k=1797 .*\[1, 1796\]"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said):
    with pytest.raises(SettingError, match=said):
        DigitsGraph(**settings).build(Key(0))


def test_a_model_of_ones_own_is_refused():
    with pytest.raises(UsageError, match="digits-graph has its own model, but model='mlp'"):
        DigitsGraph().build(Key(0), model="mlp")


def test_edges_must_be_symmetric():
    with pytest.raises(ShapeError, match="symmetric"):
        normalised(torch.tensor([[False, True], [False, False]]))
    with pytest.raises(ShapeError, match=r"\(3,\)"):
        nearest_neighbours(torch.zeros(3), 1)


def test_the_command_line_names_the_setting_at_fault():
    done = invoke("train", "--problem", "digits-graph", "--problem-setting", "labelled=2", "--steps", "1")
    assert done.exit_code == 2
    assert "labelled=2" in done.output
    assert registry.problem("digits-graph", {"k": "3"}).k == 3
