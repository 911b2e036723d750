"""Factors that a solver hands over serve the adjoint, and are never trusted unchecked."""

import pytest
import torch
from torch import Tensor

from altgrad.errors import SettingError, ShapeError
from altgrad.implicit import Solved, fixed_point, root
from altgrad.linearised import Linearised

KIND = {"dtype": torch.float64}
MATRIX = torch.eye(4, **KIND) * 3 + torch.randn(4, 4, generator=torch.Generator().manual_seed(0), **KIND) * 0.4
SYMMETRIC = MATRIX + MATRIX.T
START = torch.zeros(4, **KIND)


def solved(matrix: Tensor, **factors) -> Tensor:
    """The Jacobian of x(b) for `matrix` x = b, whose solver hands over `factors`."""

    def solver(function, start, b):
        return Solved(torch.linalg.solve(matrix, b), **factors)

    return torch.autograd.functional.jacobian(lambda b: root(lambda x, b: matrix @ x - b, START, b, solver=solver), torch.ones(4, **KIND))


@pytest.fixture
def unfactored(monkeypatch):
    """An adjoint that asks for the matrix fails."""

    def refuse(self):
        raise AssertionError("the matrix was formed anew")

    monkeypatch.setattr(Linearised, "dense", refuse)


def test_lu_factors_handed_over_are_used(unfactored):
    torch.testing.assert_close(solved(MATRIX, lu=torch.linalg.lu_factor(MATRIX)), torch.linalg.inv(MATRIX), rtol=0, atol=1e-14)


def test_a_cholesky_factor_handed_over_is_used(unfactored):
    torch.testing.assert_close(solved(SYMMETRIC, cholesky=torch.linalg.cholesky(SYMMETRIC)), torch.linalg.inv(SYMMETRIC), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["lu", "cholesky"])
def test_factors_of_a_fixed_point_are_those_of_one_minus_its_jacobian(kind, unfactored):
    slope = SYMMETRIC / 20
    left = torch.eye(4, **KIND) - slope
    factors = {"lu": torch.linalg.lu_factor(left)} if kind == "lu" else {"cholesky": torch.linalg.cholesky(left)}

    def solver(function, start, b):
        return Solved(torch.linalg.solve(left, b), **factors)

    found = torch.autograd.functional.jacobian(lambda b: fixed_point(lambda x, b: slope @ x + b, START, b, solver=solver), torch.ones(4, **KIND))
    torch.testing.assert_close(found, torch.linalg.inv(left), rtol=0, atol=1e-14)


def test_factors_of_another_matrix_are_seen_and_replaced():
    torch.testing.assert_close(solved(MATRIX, lu=torch.linalg.lu_factor(MATRIX.T + 1)), torch.linalg.inv(MATRIX), rtol=0, atol=1e-13)


def test_factors_are_mapped_with_their_examples(unfactored):
    shifts = torch.tensor([0.0, 1.0, 2.0], **KIND)

    def jacobian(shift):
        def solver(function, start, b):
            matrix = MATRIX + b[4] * torch.eye(4, **KIND)
            return Solved(torch.linalg.solve(matrix, b[:4]), lu=torch.linalg.lu_factor(matrix))

        return torch.func.jacrev(lambda b: root(lambda x, b: MATRIX @ x + b[4] * x - b[:4], START, b, solver=solver))(
            torch.cat([torch.ones(4, **KIND), shift[None]])
        )

    found = torch.func.vmap(jacobian)(shifts)[..., :4]
    torch.testing.assert_close(found, torch.linalg.inv(MATRIX + shifts[:, None, None] * torch.eye(4, **KIND)), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("error", "message", "factors"),
    [
        (SettingError, "one of them", {}),
        (ShapeError, r"they must be \(4, 4\)", {"cholesky": torch.eye(3, **KIND)}),
        (ShapeError, "must have its dtype", {"cholesky": torch.eye(4)}),
    ],
)
def test_mistakes_are_named(error, message, factors):
    with pytest.raises(error, match=message):
        solved(MATRIX, **factors)
