"""A model, a loss and (optionally) a data set."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from altgrad.engine import Tree
from altgrad.errors import DataError, NumericsError, ShapeError
from altgrad.forward_mode import apply, primal_of
from altgrad.problem import Batch, Problem, first_tensor
from altgrad.rng import Key, permutation
from altgrad.world import World

Loss = Callable[[Any, Any], Tensor]


class Supervised(Problem):
    """`loss(model(inputs), targets)`, averaged over examples.

    Args:
        model: any nn.Module, unmodified; trained are its parameters with requires_grad.
        loss: (outputs, targets) -> a scalar, or losses [N] or [N, ...] per example (averaged).
        dataset: train and test tensors (altgrad.data.Dataset), where the problem serves its own batches.
        batch_size: examples a step.
        key: the order of the data.

    Inputs may be a tensor, a tuple (positional arguments) or a dict (keyword arguments, as Hugging Face models take them).
    """

    def __init__(self, model: nn.Module, loss: Loss, *, dataset: Any = None, batch_size: int = 64, key: Key | None = None, name: str = "supervised"):
        self.model, self.loss_function, self.dataset, self.batch_size, self.name = model, loss, dataset, batch_size, name
        self.key = key or Key(0)
        self.split_loss: str | None = None  # "mean", "sum" or "none": how a scalar loss relates to the examples' own, found once
        self.orders: dict[int, Any] = {}
        if dataset is not None:
            self.steps_per_epoch = max(1, len(dataset.train_inputs) // batch_size)

    def params(self) -> Tree:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def buffers(self) -> Tree:
        return dict(self.model.named_buffers())

    @property
    def classes(self) -> int | None:
        return None if self.dataset is None else self.dataset.classes

    def batch(self, step: int, world: World) -> Batch:
        """Examples of a step: epoch e visits the data in the order of a permutation addressed by (key, e)."""
        if self.dataset is None or self.steps_per_epoch is None:
            raise DataError(f"problem {self.name!r} has no data of its own; hand batches to Learner.backward(x, y).")
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch not in self.orders:
            self.orders = {epoch: torch.from_numpy(permutation(self.key.fold("order").at(epoch), "epoch", len(self.dataset.train_inputs)).copy())}
        count = min(self.batch_size, len(self.dataset.train_inputs))
        share = world.share(count)
        index = self.orders[epoch][place * count + share.start : place * count + share.stop]
        return Batch(self.dataset.train_inputs[index], self.dataset.train_targets[index], share.start)

    def forward(self, params: Tree, inputs: Any, buffers: Tree) -> Any:
        own = self.params()
        values = {**{name: value for name, value in params.items() if name in own}, **buffers}
        if isinstance(inputs, dict):
            return torch.func.functional_call(self.model, values, (), inputs)
        return torch.func.functional_call(self.model, values, inputs if isinstance(inputs, tuple) else (inputs,))

    def loss(self, params: Tree, batch: Batch, buffers: Tree) -> Tensor:
        outputs = self.forward(params, batch.inputs, buffers)
        value = self.loss_function(outputs, batch.targets)
        self.check(value, batch)
        return value.mean() if value.ndim else value

    def losses(self, params: Tree, batch: Batch, buffers: Tree) -> Tensor:
        outputs = self.forward(params, batch.inputs, buffers)
        if self.split_loss is None:
            plain = tree_map(primal_of, outputs)
            self.check(self.loss_function(plain, batch.targets), batch)
            self.split_loss = self.find_split(plain, batch.targets, self.batch_size_of(batch))
        return self.score(outputs, batch.targets)

    def score(self, outputs: Any, targets: Any) -> Tensor:
        """The losses [N] of outputs, or [1] where the loss sees the batch as a whole."""
        if self.split_loss is None and isinstance(outputs, Tensor):  # a head's logits, scored before the model's own outputs are known
            plain = torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype, device=outputs.device).reshape(outputs.shape)
            self.split_loss = self.find_split(plain, targets, outputs.shape[0])
        if self.split_loss in {None, "none", "each"}:
            value = self.loss_function(outputs, targets)
            return value.flatten(1).mean(1) if value.ndim > 1 else value.reshape(-1)
        lifted = unreduced(self.loss_function) is None
        value = apply(self.loss_of_each, outputs, targets) if lifted else self.loss_of_each(outputs, targets)
        return value * value.shape[0] if self.split_loss == "sum" else value

    def loss_of_each(self, outputs: Any, targets: Any) -> Tensor:
        """A scalar loss taken example by example: [N]; by `reduction="none"` where PyTorch's own loss is used with its defaults."""
        known = unreduced(self.loss_function)
        if known is not None:
            value = known(outputs, targets, reduction="none")
            return value.flatten(1).mean(1) if value.ndim > 1 else value

        def one(output: Any, target: Any) -> Tensor:
            output, target = tree_map(lambda leaf: leaf.unsqueeze(0) if isinstance(leaf, Tensor) else leaf, (output, target))
            return self.loss_function(output, target)

        return torch.func.vmap(one)(outputs, targets)

    def find_split(self, plain: Any, targets: Any, count: int) -> str:
        """Whether the loss of a batch is the mean or the sum of its examples' own losses; asked once, on outputs without tangents."""
        whole = self.loss_function(plain, targets)
        if whole.ndim:
            return "each" if whole.shape[0] == count else "none"
        try:
            each = self.loss_of_each(plain, targets)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError):
            return "none"  # the loss sees the batch as a whole: one coefficient a batch, counted in the metrics
        scale = max(float(whole.abs()), float(each.abs().max()), 1e-12)
        if each.shape == (count,) and abs(float(each.mean() - whole)) <= 1e-4 * scale:
            return "mean"
        return "sum" if each.shape == (count,) and abs(float(each.sum() - whole)) <= 1e-4 * scale * count else "none"

    def check(self, value: Any, batch: Batch) -> None:
        """The loss must be a float tensor: a scalar or one number an example."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise ShapeError(f"the loss returned {type(value).__name__}; it must return a float tensor: a scalar, or one loss an example.")
        if value.ndim and value.shape[0] != self.batch_size_of(batch):
            raise ShapeError(
                f"the loss returned shape {tuple(value.shape)} for a batch of {self.batch_size_of(batch)}; it must return a scalar or one loss an example."
            )

    def predict(self, inputs: Any) -> Any:
        """The model's outputs with its own parameters, in evaluation mode."""
        return self.forward(self.params(), inputs, self.fresh_buffers())

    def evaluate(self, predict: Any, *, split: str = "test", chunk: int = 1000) -> dict[str, float]:
        """{"accuracy", "loss"} of `predict(inputs)` on a split; the model is in evaluation mode meanwhile."""
        if self.dataset is None:
            return {}
        inputs, targets = getattr(self.dataset, f"{split}_inputs"), getattr(self.dataset, f"{split}_targets")
        mode, right, total = self.model.training, 0.0, 0.0
        self.model.eval()
        try:
            with torch.no_grad():
                for start in range(0, len(inputs), chunk):
                    outputs, y = predict(inputs[start : start + chunk]), targets[start : start + chunk]
                    if not isinstance(outputs, Tensor) or outputs.ndim < 2 or outputs.shape[0] != len(y):
                        seen = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
                        raise ShapeError(f"the model returned {seen} for {len(y)} inputs; a classifier must return [{len(y)}, {self.classes}].")
                    right += float((outputs.argmax(1) == y).sum())
                    total += float(self.loss_function(outputs, y).mean()) * len(y)
        finally:
            self.model.train(mode)
        return {"accuracy": right / len(inputs), "loss": total / len(inputs)}


UNREDUCED: dict[type[nn.Module], Loss] = {nn.CrossEntropyLoss: F.cross_entropy, nn.MSELoss: F.mse_loss, nn.L1Loss: F.l1_loss, nn.BCEWithLogitsLoss: F.binary_cross_entropy_with_logits}


def unreduced(loss: Loss) -> Callable[..., Tensor] | None:
    """PyTorch's function behind `loss`, where it is one with a `reduction` and is used with its defaults."""
    if loss in UNREDUCED.values():
        return loss
    found = UNREDUCED.get(type(loss)) if isinstance(loss, nn.Module) else None
    plain = found is not None and getattr(loss, "weight", None) is None and getattr(loss, "pos_weight", None) is None
    return found if plain and not getattr(loss, "label_smoothing", 0.0) and getattr(loss, "ignore_index", -100) == -100 else None


def check_labels(outputs: Tensor, targets: Tensor) -> None:
    """Integer labels must index the outputs' classes.

    Raises:
        ShapeError: the model's output has not one row an example.
        DataError: a label is out of range.
    """
    if outputs.ndim < 2 or outputs.shape[0] != targets.shape[0]:
        raise ShapeError(f"the model returned shape {tuple(outputs.shape)} for {targets.shape[0]} labels; it must return [{targets.shape[0]}, classes].")
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= outputs.shape[1]:
        raise DataError(f"labels run from {low} to {high}, but the model has {outputs.shape[1]} outputs; labels must be in [0, {outputs.shape[1] - 1}].")


def check_finite_inputs(inputs: Any) -> None:
    """Raise NumericsError where an input holds NaN or infinity."""
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
            raise NumericsError("the inputs of the batch hold NaN or infinite values; clean the data first.")


__all__ = ["Supervised", "check_finite_inputs", "check_labels", "first_tensor"]
