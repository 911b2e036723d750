"""A model, a loss and (optionally) a data set."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from altgrad.blocks import Block, cut_model
from altgrad.calling import called
from altgrad.credit import Influence, mapped
from altgrad.credit import check as check_influence
from altgrad.engine import Tree
from altgrad.errors import CapabilityError, DataError, NumericsError, ShapeError, require
from altgrad.forward_mode import apply, primal_of
from altgrad.local.labels import joins_labels, marks_of, with_marks
from altgrad.problem import Batch, Problem, first_tensor, not_finite
from altgrad.rng import Key, permutation
from altgrad.samplers import AddressedSamplers
from altgrad.world import World

Loss = Callable[[Any, Any], Tensor]
IGNORED = -100  # the label that PyTorch's losses leave out by default


class Supervised(Problem):
    """`loss(model(inputs), targets)`, averaged over examples.

    Args:
        model: any nn.Module, unmodified; trained are its parameters with requires_grad.
        loss: (outputs, targets) -> a scalar, or losses [N] or [N, ...] per example (averaged).
        dataset: train and test tensors (altgrad.data.Dataset), where the problem serves its own batches.
        batch_size: examples a step.
        key: the order of the data.
        influence: where `loss` returns [N, ...], P local losses an example: which of them a parameter touches, by its name; an altgrad.credit.Influence, or
            a bool mask, [P] for the whole tensor or [units, P] for the units of its first axis.

    Inputs may be a tensor, a tuple (positional arguments) or a dict (keyword arguments, as Hugging Face models take them).
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        dataset: Any = None,
        batch_size: int = 64,
        key: Key | None = None,
        name: str = "supervised",
        influence: Mapping[str, Influence | Tensor] | None = None,
    ):
        self.model, self.loss_function, self.dataset, self.batch_size, self.name = model, loss, dataset, batch_size, name
        self.key = key or Key(0)
        self.split_loss: str | None = None  # "mean", "sum" or "none": how a scalar loss relates to the examples' own, found once
        self.orders: dict[int, Any] = {}
        self.example_inputs: Any = None
        self.map = {name: mapped(name, own, self.params()) for name, own in (influence or {}).items()}
        if dataset is not None:
            self.steps_per_epoch = max(1, len(dataset.train_inputs) // batch_size)

    def params(self) -> Tree:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def influence(self, params: Tree, batch: Batch) -> Mapping[str, Influence]:
        return self.map

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
        require(count >= world.size, "batch_size", count, f"at least the number of processes, {world.size}")
        share = world.share(count)
        index = self.orders[epoch][place * count + share.start : place * count + share.stop]
        return Batch(self.dataset.train_inputs[index], self.dataset.train_targets[index], share.start, index)

    def blocks(self, cut: str = "") -> list[Block]:
        return self.recall(("blocks", cut, self.model.training), lambda: cut_model(self.model, cut, inputs=self.known_example()))

    def with_label(self, x: Any, y: Tensor) -> Any:
        """`x` with marks [N, classes], or labels [N] where the classes are known: over its first numbers, or by the model's LabelInput.

        Raises:
            CapabilityError: there is no room for them. DataError: labels, but no data that say how many classes there are.
        """
        if y.ndim == 1 and self.classes is None:
            raise DataError("the number of classes is not known without a data set; hand in marks [N, classes].")
        return with_marks(self.model, x, y if y.ndim > 1 else marks_of(y, self.classes or 0, first_tensor(x)))

    def known_example(self) -> Any:
        """Inputs of the data, else `example_inputs`, else the model's own `example_inputs`, else None."""
        if self.dataset is not None or type(self).batch is not Supervised.batch:
            return self.batch(0, World()).inputs
        found = getattr(self.model, "example_inputs", None) if self.example_inputs is None else self.example_inputs
        return found() if callable(found) and not isinstance(found, Tensor) else found

    def example(self) -> Any:
        """What is known, or zeros where the model begins with a linear layer and takes them."""
        found = self.known_example()
        if found is not None:
            return found
        layer = next((module for module in self.model.modules() if next(module.parameters(recurse=False), None) is not None), None)
        refused = ""
        if isinstance(layer, nn.Linear) and not joins_labels(self.model):  # which may widen the inputs
            zeros = layer.weight.new_zeros(2, layer.in_features)
            try:
                with torch.no_grad(), AddressedSamplers(self.key.fold("check"), examples=2):
                    self.forward(self.params(), zeros, self.fresh_buffers())
                return zeros
            except Exception as error:  # whatever the model's own code makes of them
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                refused = f" (it does not take zeros of {shapes_of(zeros)}: {reason})"
        raise CapabilityError(
            f"the shapes inside {type(self.model).__name__} must be known before the first batch{refused}: hand in some inputs, Learner(..., example=x[:2]), "
            "or give the model an attribute `example_inputs`."
        )

    def forward(self, params: Tree, inputs: Any, buffers: Tree) -> Any:
        own = self.params()
        return called(self.model, {name: value for name, value in params.items() if name in own}, buffers, inputs)

    def check_batch(self, batch: Batch) -> None:
        """Run the model (its buffers stay as they are) and the loss on `batch` once; look at the whole training set (the test set is for `evaluate`).

        Settles `split_loss`, so that a batch met later, or first after resuming, cannot find another answer.
        """
        size, given = self.batch_size_of(batch), batch.targets
        if self.dataset is not None and (wrong := not_finite(self.dataset.train_inputs)):
            raise NumericsError(f"{self.name}, training set: {wrong}")
        with torch.no_grad(), AddressedSamplers(self.key.fold("check"), examples=size):
            with fitting(f"the model does not take inputs of {shapes_of(batch.inputs)}"):
                outputs = self.forward(self.params(), batch.inputs, self.fresh_buffers())
            if self.dataset is not None:
                check_outputs(outputs, size, self.classes)
                check_labels(outputs, self.dataset.train_targets)
            elif isinstance(outputs, Tensor) and outputs.ndim == 2 and isinstance(given, Tensor) and given.ndim == 1 and given.dtype == torch.int64:
                if len(outputs) != len(given):
                    raise ShapeError(f"the model returned {shapes_of(outputs)} for {len(given)} labels; it must return [{len(given)}, classes].")
                check_labels(outputs, given)
            with fitting(f"the loss does not take outputs of {shapes_of(outputs)} with targets of {shapes_of(given)}"):
                value = self.loss_function(outputs, given)
            if isinstance(value, (int, float)):  # an objective outside PyTorch: rules that need no more than its value take it as it is
                self.split_loss = "none"
                return
            self.check(value, batch)
            if self.split_loss is None:
                self.split_loss = self.find_split(outputs, given, size)
            if self.map:
                local = self.local(outputs, given)
                check_influence(self.map, self.params(), local)
                if not torch.isclose(local.mean(), value.mean().to(local.dtype), rtol=1e-4, equal_nan=True):
                    raise ShapeError(
                        f"the loss is {float(value.mean()):.6g}, but its local losses average {float(local.mean()):.6g}; with influence maps a loss must be "
                        "the mean of its local losses: return them themselves."
                    )

    def loss(self, params: Tree, batch: Batch, buffers: Tree) -> Tensor:
        outputs = self.forward(params, batch.inputs, buffers)
        value = self.loss_function(outputs, batch.targets)
        self.check(value, batch)
        return value.mean() if value.ndim else value

    def objective(self, params: Tree, batch: Batch, buffers: Tree) -> Tensor:
        return self.judge(self.forward(params, batch.inputs, buffers), batch)

    def judge(self, outputs: Any, batch: Batch) -> Tensor:
        """The mean loss of outputs, which are widened to float32 first: members differ by less than a short float can tell."""
        value = self.loss_function(tree_map(widened, outputs), batch.targets)
        if isinstance(value, (int, float)):  # a metric in plain Python; NumPy's floats are floats too
            value = torch.tensor(float(value), dtype=torch.float64)
        self.check(value, batch)
        return value.mean() if value.ndim else value

    def losses(self, params: Tree, batch: Batch, buffers: Tree) -> Tensor:
        outputs = self.forward(params, batch.inputs, buffers)
        if self.split_loss is None:
            plain = tree_map(primal_of, outputs)
            self.check(self.loss_function(plain, batch.targets), batch)
            self.split_loss = self.find_split(plain, batch.targets, self.batch_size_of(batch))
        return self.local(outputs, batch.targets) if self.map else self.score(outputs, batch.targets)

    def score(self, outputs: Any, targets: Any) -> Tensor:
        """The losses [N] of outputs, or [1] where the loss sees the batch as a whole."""
        if self.split_loss is None and isinstance(outputs, Tensor):  # a head's logits, scored before the model's own outputs are known
            plain = torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype, device=outputs.device).reshape(outputs.shape)
            self.split_loss = self.find_split(plain, targets, outputs.shape[0])
        if self.split_loss in {None, "none", "each"}:
            value = self.loss_function(outputs, targets)
            require_tensor(value)
            return value.flatten(1).mean(1) if value.ndim > 1 else value.reshape(-1)
        lifted = unreduced(self.loss_function) is None
        value = apply(self.loss_of_each, outputs, targets) if lifted else self.loss_of_each(outputs, targets)
        return value * value.shape[0] if self.split_loss == "sum" else value

    def local(self, outputs: Any, targets: Any) -> Tensor:
        """The local losses [N, P] of outputs, which are widened to float32 first.

        Raises:
            ShapeError: the loss does not say what each output loses.
        """
        known, outputs = unreduced(self.loss_function), tree_map(widened, outputs)
        value = self.loss_function(outputs, targets) if known is None else known(outputs, targets, reduction="none")
        require_tensor(value)
        if value.ndim < 2:
            raise ShapeError(
                f"the loss returned shape {tuple(value.shape)}, but there are influence maps of {', '.join(self.map)}; with them it must return local losses "
                "[N, P], as PyTorch's do with reduction='none'."
            )
        return value.flatten(1)

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
        require_tensor(value)
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
                    check_outputs(outputs, len(y), self.classes)
                    check_labels(outputs, y)
                    right += float((outputs.argmax(1) == y).sum())
                    total += float(self.loss_function(outputs, y).mean()) * len(y)
        finally:
            self.model.train(mode)
        if not math.isfinite(total) and (wrong := not_finite(inputs)):
            raise NumericsError(f"{self.name}, {split} set: {wrong}")
        return {"accuracy": right / len(inputs), "loss": total / len(inputs)}


def require_tensor(value: Any) -> None:
    """Raise ShapeError unless the loss returned a float tensor."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        seen = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ShapeError(f"the loss returned {seen}; it must return a float tensor: a scalar, or one loss an example.")


def widened(leaf: Any) -> Any:
    """A half-precision tensor in float32; anything else as it is."""
    return leaf.float() if isinstance(leaf, Tensor) and leaf.dtype in {torch.bfloat16, torch.float16} else leaf


UNREDUCED: dict[type[nn.Module], Loss] = {
    nn.CrossEntropyLoss: F.cross_entropy,
    nn.MSELoss: F.mse_loss,
    nn.L1Loss: F.l1_loss,
    nn.BCEWithLogitsLoss: F.binary_cross_entropy_with_logits,
}


def unreduced(loss: Loss) -> Callable[..., Tensor] | None:
    """PyTorch's function behind `loss`, where it is one with a `reduction` and is used with its defaults."""
    if loss in UNREDUCED.values():
        return loss
    found = UNREDUCED.get(type(loss)) if isinstance(loss, nn.Module) else None
    plain = found is not None and getattr(loss, "weight", None) is None and getattr(loss, "pos_weight", None) is None
    return found if plain and not getattr(loss, "label_smoothing", 0.0) and getattr(loss, "ignore_index", -100) == -100 else None


def check_outputs(outputs: Any, count: int, classes: int | None) -> None:
    """A classifier's outputs must be [N, classes].

    Raises:
        ShapeError: they are not.
    """
    if not isinstance(outputs, Tensor) or outputs.ndim < 2 or outputs.shape[0] != count:
        raise ShapeError(f"the model returned {shapes_of(outputs)} for {count} inputs; a classifier must return [{count}, {classes or 'classes'}].")


def check_labels(outputs: Tensor, targets: Tensor) -> None:
    """Integer labels must index the outputs' classes; one output is no classifier's, and PyTorch's losses leave out IGNORED.

    Raises:
        DataError: a label is out of range.
    """
    if targets.dtype != torch.int64 or not outputs.is_floating_point() or outputs.shape[1] == 1:
        return
    labels = targets[targets != IGNORED]
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
    if low < 0 or high >= outputs.shape[1]:
        raise DataError(f"labels run from {low} to {high}, but the model has {outputs.shape[1]} outputs; labels must be in [0, {outputs.shape[1] - 1}].")


@contextmanager
def fitting(complaint: str) -> Iterator[None]:
    """Turn PyTorch's errors about shapes into a ShapeError that starts with `complaint`; somebody's own errors pass."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError) as error:
        if isinstance(error, torch.OutOfMemoryError) or not re.search(r"shape|size|dimension|channels|out of bounds|out of range|\dD", str(error)):
            raise
        raise ShapeError(f"{complaint}: {str(error).strip().rstrip('.')}.") from error


def shapes_of(tree: Any) -> str:
    """`shape (64, 10)`, or of several tensors `shapes (64, 10), (64,)`; a type where there is no tensor."""
    found = [str(tuple(leaf.shape)) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return f"shape{'s' if len(found) > 1 else ''} {', '.join(found)}" if found else f"type {type(tree).__name__}"


__all__ = ["Supervised", "check_labels"]
