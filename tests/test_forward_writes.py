"""Writes in place, views, and where tangents end: as in autograd, or refused."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from derivatives import EXACT, along, build, directions, error, forward, generator, score
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from altgrad.errors import CapabilityError
from altgrad.forward_mode import Dual, Trace, primal_of, tangent_of
from altgrad.forward_mode.custom import following_custom_functions
from altgrad.perturb import Dense
from altgrad.probes import PROBES, ready
from altgrad.rng import Key


class Program(nn.Module):
    """A few statements on the output of a linear layer."""

    def __init__(self, body: Any, *, bias_only: bool = False):
        super().__init__()
        self.linear, self.body = nn.Linear(4, 4), body
        self.linear.weight.requires_grad_(not bias_only)

    def forward(self, x: Tensor) -> Any:
        return self.body(self.linear(x), x)


def shifted_then_cut(y: Tensor, x: Tensor) -> Any:
    z = y + 1
    z.relu_()
    return y * z


def reversed_shift(y: Tensor, x: Tensor) -> Any:
    z = x - y
    w = 1 - z
    w.mul_(2)
    return w * z


def view_then_write(y: Tensor, x: Tensor) -> Any:
    y.view(-1)[3:9].mul_(2.5)
    return y


def write_then_view(y: Tensor, x: Tensor) -> Any:
    z = y.t()
    y[:, 1] = x[:, 0]
    y[2] += y[0]
    return z * z


def augmented(y: Tensor, x: Tensor) -> Any:
    z = y
    z += y.exp()
    z -= 0.5
    z *= x
    z /= 2 + x * x
    return y


def inside_no_grad(y: Tensor, x: Tensor) -> Any:
    with torch.no_grad():
        size = y.abs().max()
    return y / size


def masked(y: Tensor, x: Tensor) -> Any:
    y.masked_fill_(x > 0, 0.0)
    y.clamp_(max=0.4)
    return torch.where(x < -0.5, y.exp(), y)


PROGRAMS = {
    "relu in place": lambda y, x: F.relu(y, inplace=True) * y,
    "module in place": lambda y, x: nn.ELU(inplace=True)(y) * y,
    "leaky relu in place": lambda y, x: F.leaky_relu(y, 0.1, True) * y,
    "hardtanh in place": lambda y, x: F.hardtanh(y, -0.3, 0.3, True) * y,
    "shifted, then cut": shifted_then_cut,
    "reversed shift": reversed_shift,
    "view, then write": view_then_write,
    "write, then view": write_then_view,
    "augmented": augmented,
    "inside no_grad": inside_no_grad,
    "masked": masked,
    "detached": lambda y, x: y * y.detach() + y.data,
    "view": lambda y, x: y.view(-1).view(2, -1) * 2,
    "attributes": lambda y, x: y.T @ y.mT.T + y.size(0),
    "norms and powers": lambda y, x: (y.norm() * F.normalize(y, dim=1) ** 2 + 2**y + torch.einsum("ij,kj->ik", y, x)) / y.var(),
    "sorted": lambda y, x: (y.sort(1).values, y.topk(2).values, y.max(0).values, torch.maximum(y, x), y.cumsum(0), y.amax(1)),
    "gathered": lambda y, x: (y[x > 0], y[[0, 2]], y[:, None].expand(-1, 2, -1), y.gather(1, torch.tensor([[0], [1], [3], [2]])), y.roll(1, 0)),
}


@pytest.mark.parametrize("bias_only", [False, True], ids=["all", "bias only"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_follow_autograd(name, bias_only):
    module = ready(lambda: Program(PROGRAMS[name], bias_only=bias_only), generator(4)).double()
    x = torch.randn(4, 4, generator=generator(6), dtype=torch.float64)
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    leaves = {n: p.detach().clone().requires_grad_() for n, p in trained.items()}
    grads = torch.autograd.grad(score(torch.func.functional_call(module, leaves, (x.clone(),))), list(leaves.values()))
    drawn, trace = generator(5), Trace(3)
    moves = {n: torch.randn(3, *p.shape, generator=drawn, dtype=p.dtype) for n, p in trained.items()}
    frozen = {n: p.detach() for n, p in module.named_parameters() if not p.requires_grad}
    found = score(torch.func.functional_call(module, {**frozen, **{n: Dual(p.detach().clone(), moves[n], trace) for n, p in trained.items()}}, (x.clone(),)))
    expected = along(dict(zip(leaves, grads, strict=True)), moves)
    assert error(found.tangent, expected) <= EXACT


def test_in_place_writes_leave_the_callers_directions_alone():
    weight, moves = torch.ones(3), torch.ones(2, 3)
    result = Dual(weight, moves, Trace(2)) + 1
    result.mul_(5)
    assert torch.equal(moves, torch.ones(2, 3))
    assert torch.equal(weight, torch.ones(3))


def test_detach_carries_no_tangent():
    assert tangent_of(Dual(torch.ones(3), torch.ones(2, 3), Trace(2)).detach()) is None


def test_no_grad_ends_tangents():
    with torch.no_grad():
        assert tangent_of(Dual(torch.ones(3), torch.ones(2, 3), Trace(2)) * 2) is None


def test_writing_a_tangent_into_a_plain_tensor_is_refused():
    out = torch.zeros(3)
    with pytest.raises(CapabilityError, match="out of place"):
        out[:2] = Dual(torch.ones(2), torch.ones(1, 2), Trace(1))
    with pytest.raises(CapabilityError, match="x = x \\+ y"):
        out += Dual(torch.ones(3), torch.ones(1, 3), Trace(1))


def test_a_parameter_changed_in_place_is_refused():
    weight = torch.ones(3)
    with pytest.raises(CapabilityError, match="parameter"):
        Dual(weight, None, Trace(1), Dense(Key(0), "w", weight, range(1), "normal")).mul_(2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_carry_tangents(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            return checkpoint(lambda y: self.second(y).tanh(), self.first(x), use_reentrant=reentrant)

    module = ready(Checkpointed, generator(4)).double()
    x = torch.randn(4, 4, generator=generator(6), dtype=torch.float64)
    moves = directions(module, 3)
    leaves = {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters()}
    middle = F.linear(x, leaves["first.weight"], leaves["first.bias"])
    value = score(torch.tanh(F.linear(middle, leaves["second.weight"], leaves["second.bias"])))
    grads = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))
    assert error(forward(module, (x,), moves, 3)[0].tangent, along(grads, moves)) <= EXACT


def test_following_custom_functions_restores_apply():
    before = torch.autograd.Function.__dict__["apply"]
    with pytest.raises(ZeroDivisionError), following_custom_functions():
        raise ZeroDivisionError
    assert torch.autograd.Function.__dict__["apply"] is before


def test_values_are_the_models_own():
    module, inputs = build(PROBES[0])
    value, _, _ = forward(module, inputs, directions(module, 2), 2)
    assert torch.equal(primal_of(value), score(module(*inputs)).detach())
