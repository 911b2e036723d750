"""Deep equilibrium layers, cells with a guarantee and the graph solver: oracles are unrolled iterations and dense solves."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from deep_nets import CELLS, KIND, WIDTH, close, drawn, estimated, fixed_batch, gradients, network, pair
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

from altgrad import metrics, models, registry
from altgrad.errors import CapabilityError, NotConvergedWarning, SettingError, ShapeError, UsageError
from altgrad.graphs import nearest_neighbours, normalised
from altgrad.implicit.cells import Contracting, Plain, Subhomogeneous, bounded, norm_bound, thompson
from altgrad.implicit.layers import DEQ
from altgrad.implicit.networks import GraphSolver
from altgrad.implicit.wellposed import jacobian_penalty, spectral_radius
from altgrad.rng import Key

# -- the layer -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("adjoint", ["auto", "gmres", "bicgstab", "normal-cg"])
def test_the_layers_gradient_is_that_of_infinitely_many_steps(kind, adjoint):
    deq, unrolled = pair(CELLS[kind](), adjoint=adjoint)
    close(gradients(deq), gradients(unrolled), 1e-9)


@pytest.mark.parametrize("solver", ["anderson", "broyden", "iteration", "newton", "newton-krylov"])
def test_every_solver_gives_one_gradient(solver):
    deq, unrolled = pair(solver=solver, max_steps=500)
    close(gradients(deq), gradients(unrolled), 1e-8)


def test_a_model_without_batch_axis_in_its_solve_has_the_same_gradient():
    deq, unrolled = pair(batch_dims=0)
    close(gradients(deq), gradients(unrolled), 1e-8)


def test_layer_norm_inside_the_cell_is_differentiated():
    deq, unrolled = pair(Plain(WIDTH, nn.Tanh(), norm=True), max_steps=500)
    with torch.no_grad():
        deq[1].cell.norm.weight.mul_(0.4)  # otherwise the unrolled steps do not settle
    close(gradients(deq), gradients(unrolled), 1e-7)


def test_functional_call_sees_the_weights_it_is_given():
    deq, unrolled = pair()
    x, y = fixed_batch()
    other = {name: 0.7 * value.detach() for name, value in deq.named_parameters()}
    found = grad(lambda params: F.cross_entropy(functional_call(deq, params, (x,)), y))(other)
    wanted = grad(lambda params: F.cross_entropy(functional_call(unrolled, params, (x,)), y))(other)
    close(found.values(), wanted.values(), 1e-9)


def test_the_layer_runs_under_vmap_of_grad_and_in_forward_mode():
    deq, unrolled = pair()
    x, y = fixed_batch()
    params = {name: value.detach() for name, value in deq.named_parameters()}

    def loss(model, params, x, y):
        return F.cross_entropy(functional_call(model, params, (x[None],)), y[None])

    each, wanted = (vmap(grad(lambda p, x, y, m=model: loss(m, p, x, y)), in_dims=(None, 0, 0))(params, x, y) for model in (deq, unrolled))
    close(each.values(), wanted.values(), 1e-8)
    moves = {name: drawn(*value.shape, seed=3) for name, value in params.items()}
    found, exact = (jvp(lambda p, m=model: functional_call(m, p, (x,)), (params,), (moves,))[1] for model in (deq, unrolled))
    close([found], [exact], 1e-9)


def test_copies_and_state_dicts_are_those_of_the_cell():
    deq, _ = pair()
    gradients(deq)
    again = copy.deepcopy(deq)
    assert list(again.state_dict()) == list(deq.state_dict()) == ["0.weight", "0.bias", "1.cell.linear.weight", "2.weight", "2.bias"]
    close(gradients(again), gradients(deq), 1e-12)


def test_info_tells_of_the_solve_and_of_the_adjoint():
    deq, _ = pair(adjoint="gmres")
    gradients(deq)
    info = deq[1].info
    assert bool(info.converged.all())
    assert info.residual.shape == (5,)
    assert info.adjoint.products >= 3
    assert bool(info.adjoint.converged.all())


def test_saved_bytes_do_not_grow_with_the_iterations():
    x = drawn(32, WIDTH)
    seen = []
    for steps in (10, 1000):
        layer = DEQ(Contracting(WIDTH, "tanh", kappa=0.9999), solver="iteration", max_steps=steps, tol=1e-300).double()
        with warnings.catch_warnings(), metrics.saved_bytes() as meter:
            warnings.simplefilter("ignore", NotConvergedWarning)
            layer(x)
        seen.append(meter.total)
    assert seen[0] == seen[1] > 0


def test_dropout_inside_a_cell_draws_one_mask_a_solve_and_the_same_one_backwards():
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, z, u):
            return torch.tanh(F.dropout(self.linear(z), 0.5, self.training) + u)

    layer = DEQ(Dropped(), tol=1e-12)
    layer.cell.mask = nn.Dropout(0.5)  # so that plain PyTorch's draws are held too
    model = network(layer)
    first, second = estimated(model, key=Key(0, 1)), estimated(model, key=Key(0, 2))
    assert float(first.metrics["converged"]) == 1
    assert float(first.loss) != float(second.loss)
    step = 1e-5  # the gradient under this mask, by differences
    weight = model[1].cell.linear.weight
    with torch.no_grad():
        weight[1, 2] += step
        up = estimated(model, key=Key(0, 1)).loss
        weight[1, 2] -= 2 * step
        down = estimated(model, key=Key(0, 1)).loss
        weight[1, 2] += step
    assert float((up - down) / (2 * step)) == pytest.approx(float(first.grads["1.cell.linear.weight"][1, 2]), rel=1e-6)
    x, _ = fixed_batch()
    assert bool(layer.train()(model[0](x)).isfinite().all())
    assert bool(layer.info.converged.all())  # in plain PyTorch


def test_running_statistics_move_once_a_solve():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)

        def forward(self, z, u):
            return torch.tanh(0.5 * self.norm(self.linear(z)) + u)

    model = network(DEQ(Normed(), batch_dims=0, max_steps=300, tol=1e-10))
    model(fixed_batch()[0])
    assert int(model[1].cell.norm.num_batches_tracked) == 1
    assert int(estimated(model).buffers["1.cell.norm.num_batches_tracked"]) == 2


def test_a_cell_that_changes_the_shape_is_refused():
    with pytest.raises(ShapeError, match="there must be one equation for each unknown"):
        DEQ(nn.Bilinear(WIDTH, WIDTH, 4)).double()(drawn(3, WIDTH))


def test_parameters_swapped_back_before_the_backward_pass_are_an_error_not_a_zero():
    from altgrad.implicit import fixed_point

    layer = nn.Linear(WIDTH, WIDTH).double()
    u = drawn(3, WIDTH)

    class Naive(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, u):
            return fixed_point(lambda z: torch.tanh(0.3 * self.layer(z) + u), torch.zeros_like(u), batch_dims=1)

    model = Naive()
    params = {name: value.detach() for name, value in model.named_parameters()}
    with pytest.raises(CapabilityError, match="functional_call has put a module's own parameters back"):
        grad(lambda params: functional_call(model, params, (u,)).sum())(params)


# -- regularisers ----------------------------------------------------------------------------------------------------------------


def test_the_jacobian_penalty_averages_to_the_frobenius_norm():
    matrix = drawn(8, 8, seed=2)
    seen = torch.stack([jacobian_penalty(lambda z: z @ matrix.T, torch.zeros(400, 8, **KIND), Key(0, step)) for step in range(8)])
    assert float(seen.mean()) == pytest.approx(float(matrix.square().sum() / 8), rel=0.05)  # 3,200 probes: a standard error of 1 to 2 %


def test_the_penalty_is_in_the_gradient_through_the_solution_too():
    model = network(DEQ(Plain(WIDTH, nn.Tanh()), tol=1e-13))
    with_it, without = estimated(model, jacobian=0.5), estimated(model)
    name, place = "1.cell.linear.weight", (0, 1)
    step = 1e-5

    def penalty():
        return float(estimated(model, jacobian=0.5).metrics["jacobian"])

    with torch.no_grad():
        weight = model[1].cell.linear.weight
        weight[place] += step
        up = penalty()
        weight[place] -= 2 * step
        down = penalty()
        weight[place] += step
    assert float((with_it.grads[name] - without.grads[name])[place]) == pytest.approx(0.5 * (up - down) / (2 * step), rel=1e-5)
    assert float(with_it.loss) == float(without.loss)


def test_the_spectral_radius_is_found_for_symmetric_and_for_rotating_maps():
    basis = torch.linalg.qr(drawn(6, 6, seed=3))[0]
    symmetric = basis @ torch.diag(torch.tensor([0.9, 0.5, 0.3, -0.2, 0.1, 0.0], **KIND)) @ basis.T
    turn = torch.block_diag(0.8 * torch.tensor([[0.6, -0.8], [0.8, 0.6]], **KIND), torch.diag(torch.tensor([0.3, 0.2, 0.1, 0.0], **KIND)))
    for matrix, radius in ((symmetric, 0.9), (turn, 0.8)):
        found, error = spectral_radius(lambda z, m=matrix: z @ m.T, torch.zeros(3, 6, **KIND), Key(1), products=60)
        assert float(found) == pytest.approx(radius, abs=1e-6)
        assert float(error) <= 1e-5


def test_the_stated_error_of_the_radius_shrinks_with_the_products():
    matrix = drawn(20, 20, seed=4) / 20**0.5
    exact = float(torch.linalg.eigvals(matrix).abs().max())
    few, many = (spectral_radius(lambda z: z @ matrix.T, torch.zeros(1, 20, **KIND), Key(1), products=count) for count in (8, 400))
    assert abs(float(many[0]) - exact) < min(0.01, abs(float(few[0]) - exact))
    assert float(many[1]) < float(few[1])


# -- cells with a guarantee ------------------------------------------------------------------------------------------------------


def test_the_norm_bound_bounds_and_bounded_weights_contract():
    for seed in range(20):
        weight = 10 ** (seed / 5 - 2) * drawn(9, 9, seed=seed)
        assert float(norm_bound(weight)) >= float(torch.linalg.matrix_norm(weight, 2))
        assert float(torch.linalg.matrix_norm(bounded(weight, 0.9), 2)) <= 0.9 + 1e-12


@pytest.mark.parametrize("kind", ["contracting", "subhomogeneous"])
def test_from_every_start_there_is_one_fixed_point_however_large_the_weights(kind):
    cell = CELLS[kind]().double()
    with torch.no_grad():
        cell.linear.weight.copy_(30 * drawn(WIDTH, WIDTH, seed=5))
    u, found = drawn(4, WIDTH, seed=6), []
    for seed in range(5):
        z = 10 ** float(seed - 2) * drawn(4, WIDTH, seed=seed).abs() + 1e-9
        for _ in range(400):
            z = cell(z, u)
        found.append(z)
    assert all(torch.allclose(found[0], other, rtol=1e-12) for other in found)


@pytest.mark.parametrize(
    "settings", [{"form": "power", "mu": 0.3}, {"form": "power", "mu": 0.9}, {"form": "tanh", "shift": 0.2}, {"form": "tanh", "shift": 1.2}]
)
def test_a_subhomogeneous_step_contracts_the_thompson_metric_at_its_rate(settings):
    cell = Subhomogeneous(WIDTH, **settings).double()
    assert 0 < cell.rate < 1
    worst = 0.0
    for seed in range(30):
        with torch.no_grad():
            cell.linear.weight.copy_(5 * drawn(WIDTH, WIDTH, seed=seed))
        x, y = ((3 * drawn(50, WIDTH, seed=100 * place + seed)).exp() for place in (1, 2))
        u = 3 * drawn(50, WIDTH, seed=300 + seed)
        worst = max(worst, float((thompson(cell(x, u), cell(y, u)) / thompson(x, y)).detach().max()))
    assert worst <= cell.rate


def test_the_rate_of_a_power_is_reached():
    cell = Subhomogeneous(WIDTH, mu=0.6).double()
    z = drawn(1, WIDTH, seed=1).exp()
    u = torch.full((1, WIDTH), -60.0, **KIND)  # next to no injection: the map is homogeneous
    assert float((thompson(cell(2 * z, u), cell(z, u)) / thompson(2 * z, z)).detach()) == pytest.approx(0.6, rel=1e-9)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: Subhomogeneous(4, mu=1.0), "mu=1.0"),
        (lambda: Contracting(4, kappa=1.0), "kappa=1.0"),
        (lambda: Contracting(4, "gelu"), "unknown activation"),
        (lambda: Subhomogeneous(4, "relu"), "unknown form"),
    ],
)
def test_a_cell_refuses_what_would_cost_its_guarantee(build, match):
    with pytest.raises(SettingError, match=match):
        build()


# -- graphs ----------------------------------------------------------------------------------------------------------------------


def test_the_graph_solver_is_the_dense_solve_and_so_is_its_gradient():
    features, width, gamma = drawn(12, 5, seed=7), 3, 0.9
    graph = normalised(nearest_neighbours(features, 3))
    model = GraphSolver(features, graph, width=width, classes=2, gamma=gamma, solver="anderson", adjoint="gmres", max_steps=500).double()
    models.initialise(model, Key(2))
    model.solve.settings.update(tol=1e-13)
    nodes = torch.tensor([0, 5, 11])

    def dense():
        weight = bounded(model.solve.cell.linear.weight, gamma)
        u = model.input(features)
        system = torch.eye(12 * width, **KIND) - torch.kron(graph.dense().double(), weight)
        z = torch.linalg.solve(system, u.flatten()).reshape(12, width)
        return model.output(torch.relu(z[nodes]))

    assert torch.allclose(model(nodes), dense(), atol=1e-11)
    found, wanted = (torch.autograd.grad(outputs.square().sum(), list(model.parameters())) for outputs in (model(nodes), dense()))
    close(found, wanted, 1e-9)


def test_the_graph_solver_is_a_model_of_digits_graph_alone():
    problem = registry.problem("digits-graph").build(Key(0), model="graph-solver", model_settings={"width": 4})
    assert isinstance(problem.model, GraphSolver)
    with pytest.raises(UsageError, match="use it with the problem digits-graph"):
        models.build("graph-solver", input_shape=(64,), classes=10, key=Key(0))
    with pytest.raises(UsageError, match="or take graph-solver"):
        registry.problem("digits-graph").build(Key(0), model="mlp")
