r"""A bilevel problem: min_θ mean f(w*(θ))  with  w*(θ) = argmin_w g(θ, w): hyper-parameters θ, inner weights w, a training and a validation loss."""

from typing import Any, NamedTuple

from torch import Tensor

from altgrad.engine import Tree


class Parts(NamedTuple):
    """The examples of the outer loss and of the last figures; those of the inner loss are the task's own business."""

    validation_inputs: Tensor
    validation_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor


class Task:
    """Base of tasks: override all but `figures`.

    `inner` and `predict` must be made of differentiable tensor operations; g should be strongly convex in w, or the minimum that is found isolated.
    """

    parts: Parts

    def params(self) -> Tree:
        """θ where training begins."""
        raise NotImplementedError

    def weights(self) -> Tree:
        """w where the first inner solve begins."""
        raise NotImplementedError

    def inner(self, params: Tree, weights: Tree) -> Tensor:
        """g(θ, w), a scalar."""
        raise NotImplementedError

    def curvature(self, params: Tree) -> Tensor:
        """An upper bound, 0-d, of the largest eigenvalue of d²g/dw²: 1 / curvature is a step under which gradient descent on g contracts."""
        raise NotImplementedError

    def predict(self, weights: Tree, inputs: Any) -> Any:
        """The outputs of weights on inputs."""
        raise NotImplementedError

    def losses(self, outputs: Any, targets: Any) -> Tensor:
        """f of every example [N]."""
        raise NotImplementedError

    def figures(self, params: Tree, outputs: Any, targets: Any) -> dict[str, float]:
        """What to report of θ and of held-out outputs, beside the loss."""
        return {}
