r"""LSTM, GRU and simple recurrent networks, step by step: two linear layers and one elementwise cell a step.

lstm   c' = σ(f) c + σ(i) tanh(g),  h' = σ(o) tanh(c'),  (i, f, g, o) = W x + U h + b
gru    n = tanh(W_n x + r (U_n h + b)),  h' = n + z (h - n)
rnn    h' = tanh or relu (W x + U h + b)

The linear layers see one step of the whole batch, [N, features], so that their outputs can be perturbed example by example.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from altgrad import samplers
from altgrad.forward_mode.dual import Dual, Trace, primal_of, tangent_of
from altgrad.forward_mode.rules import rule

State = tuple[Any, ...]  # (h,) or (h, c)
Cell = Callable[[Any, State, Sequence[Any]], State]  # (x, state, weights) -> state


def lstm_step(x: Any, state: State, weights: Sequence[Any]) -> State:
    h, c = state
    gates = F.linear(x, weights[0], weights[2]) + F.linear(h, weights[1], weights[3])
    h, c = lstm_cell_point(gates, c)
    return (h if len(weights) == 4 else F.linear(h, weights[4])), c


def lstm_cell_point(gates: Any, c: Any) -> tuple[Any, Any]:
    """(h', c') from the gates' inputs [N, 4·hidden], and their tangents in closed form."""
    before = primal_of(c)
    i, f, g, o = primal_of(gates).chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    after = f * before + i * g
    top = after.tanh()
    trace = trace_of(gates, c)
    if trace is None:
        return o * top, after
    moved = torch.zeros((), dtype=after.dtype, device=after.device)
    tail = moved
    if isinstance(gates, Dual):
        di, df, dg, do = gates.tangent.chunk(4, -1)
        moved = di * (g * i * (1 - i)) + df * (before * f * (1 - f)) + dg * (i * (1 - g * g))
        tail = do * (top * o * (1 - o))
    if isinstance(c, Dual):
        moved = moved + c.tangent * f
    return Dual(o * top, tail + moved * (o * (1 - top * top)), trace), Dual(after, moved, trace)


def gru_step(x: Any, state: State, weights: Sequence[Any]) -> State:
    (h,) = state
    return (gru_cell_point(F.linear(x, weights[0], weights[2]), F.linear(h, weights[1], weights[3]), h),)


def gru_cell_point(inner: Any, outer: Any, h: Any) -> Any:
    """h' from W x + b and U h + b, both [N, 3·hidden], and its tangents in closed form."""
    a, b, before = primal_of(inner).chunk(3, -1), primal_of(outer).chunk(3, -1), primal_of(h)
    r, z = (a[0] + b[0]).sigmoid(), (a[1] + b[1]).sigmoid()
    n = (a[2] + r * b[2]).tanh()
    value = n + z * (before - n)
    trace = trace_of(inner, outer, h)
    if trace is None:
        return value
    da, db, dh = (tangent_of(v) for v in (inner, outer, h))
    zero = value.new_zeros(())
    ar, az, an = da.chunk(3, -1) if da is not None else (zero, zero, zero)
    br, bz, bn = db.chunk(3, -1) if db is not None else (zero, zero, zero)
    moved_n = (an + (ar + br) * (b[2] * r * (1 - r)) + r * bn) * (1 - n * n)
    moved = moved_n * (1 - z) + (az + bz) * ((before - n) * z * (1 - z))
    return Dual(value, moved if dh is None else moved + dh * z, trace)


def simple_step(activation: Callable[[Any], Any]) -> Cell:
    def step(x: Any, state: State, weights: Sequence[Any]) -> State:
        return (activation(F.linear(x, weights[0], weights[2]) + F.linear(state[0], weights[1], weights[3])),)

    return step


def trace_of(*values: Any) -> Trace | None:
    return next((v.taken_on for v in values if isinstance(v, Dual)), None)


CELLS: dict[Any, Cell] = {torch.lstm: lstm_step, torch.gru: gru_step, torch.rnn_tanh: simple_step(torch.tanh), torch.rnn_relu: simple_step(torch.relu)}
SINGLE = {torch.lstm_cell: torch.lstm, torch.gru_cell: torch.gru, torch.rnn_tanh_cell: torch.rnn_tanh, torch.rnn_relu_cell: torch.rnn_relu}


class Call:
    """The arguments of torch.lstm and its kin, padded or packed, read once."""

    def __init__(self, func: Any, args: tuple[Any, ...]):
        self.func, self.sizes, self.batch_first = func, None, False
        if isinstance(args[3], (list, tuple)):
            self.input, sizes, hidden, weights, biased, self.layers, self.dropout, self.training, bidirectional = args
            self.sizes = sizes.tolist()
        else:
            self.input, hidden, weights, biased, self.layers, self.dropout, self.training, bidirectional, self.batch_first = args
        self.hidden: State = tuple(hidden) if func is torch.lstm else (hidden,)
        self.weights, self.biased, self.directions = list(weights), biased, 2 if bidirectional else 1

    def weights_of(self, layer: int) -> list[Any]:
        """The weights of one layer as torch lays them out, all directions."""
        size = len(self.weights) // self.layers
        return self.weights[layer * size : (layer + 1) * size]

    def run(self, run_layer: Callable[[Any, State, list[Any]], tuple[Any, State]]) -> Any:
        """The layers one after the other, with dropout between them: (output, h_n[, c_n])."""
        x, finals = self.input.transpose(0, 1) if self.batch_first else self.input, []
        for layer in range(self.layers):
            low = layer * self.directions
            x, final = run_layer(x, tuple(part[low : low + self.directions] for part in self.hidden), self.weights_of(layer))
            finals.append(final)
            if self.dropout and self.training and layer < self.layers - 1:
                x = samplers.dropout(x, self.dropout)
        joined = (torch.cat(parts, 0) for parts in zip(*finals, strict=True))
        return (x.transpose(0, 1) if self.batch_first else x, *joined)

    def by_steps(self, x: Any, hidden: State, weights: list[Any]) -> tuple[Any, State]:
        """One layer, both directions, from cells."""
        outputs, finals = [], []
        size = len(weights) // self.directions
        for direction in range(self.directions):
            own = weights[direction * size : (direction + 1) * size]
            own = own if self.biased else [*own[:2], None, None, *own[2:]]
            start = tuple(part[direction] for part in hidden)
            walk = self.packed if self.sizes is not None else self.padded
            output, final = walk(x, start, own, direction == 1)
            outputs.append(output)
            finals.append(final)
        states = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1), states

    def padded(self, x: Any, state: State, weights: list[Any], backwards: bool) -> tuple[Any, State]:
        steps, outputs = x.unbind(0), []
        for step in reversed(steps) if backwards else steps:
            state = CELLS[self.func](step, state, weights)
            outputs.append(state[0])
        return torch.stack(outputs[::-1] if backwards else outputs), state

    def packed(self, x: Any, state: State, weights: list[Any], backwards: bool) -> tuple[Any, State]:
        """Rows are examples sorted by length: those that end drop out at the end, or join in backwards.

        A leading axis of one keeps a layer's perturbation from taking the sorted rows for the batch's examples.
        """
        assert self.sizes is not None
        steps, outputs, ended, first = list(x.split(self.sizes, 0)), [], [], state
        state = tuple(part[: self.sizes[-1] if backwards else self.sizes[0]] for part in state)
        for step in reversed(steps) if backwards else steps:
            rows, have = step.shape[0], state[0].shape[0]
            if rows < have:
                ended.append(tuple(part[rows:] for part in state))
                state = tuple(part[:rows] for part in state)
            elif rows > have:
                state = tuple(torch.cat([part, begin[have:rows]], 0) for part, begin in zip(state, first, strict=True))
            moved = CELLS[self.func](step.unsqueeze(0), tuple(part.unsqueeze(0) for part in state), weights)
            state = tuple(part.squeeze(0) for part in moved)
            outputs.append(state[0])
        return torch.cat(outputs[::-1] if backwards else outputs, 0), join_ended(state, ended)

    def fused(self, x: Any, hidden: State, weights: list[Any]) -> tuple[Any, State]:
        """One layer by PyTorch's own kernel."""
        state = list(hidden) if self.func is torch.lstm else hidden[0]
        shared = (weights, self.biased, 1, 0.0, self.training, self.directions == 2)
        if self.sizes is None:
            output, *final = self.func(x, state, *shared, False)
        else:
            output, *final = self.func(x, torch.tensor(self.sizes), state, *shared)
        return output, tuple(final)


def join_ended(state: State, ended: list[State]) -> State:
    """The final state of every row: the longest rows ran to the end, the shorter ones stopped before, last to stop first."""
    return tuple(torch.cat([part, *(stop[place] for stop in reversed(ended))], 0) for place, part in enumerate(state))


def register(func: Any) -> None:
    @rule(func, decomposed=True, layer=True)
    def decomposed(trace: Trace, *args: Any) -> Any:
        call = Call(func, args)
        return call.run(call.by_steps)

    def serve(*args: Any) -> Any:
        """Dropout between layers, in training, from the addressed sampler: in every engine, backprop too."""
        if any(isinstance(leaf, Dual) for leaf in tree_leaves(args)):
            return NotImplemented
        call = Call(func, args)
        if not (call.dropout and call.training and call.layers > 1):
            return NotImplemented
        return call.run(call.fused)

    samplers.SERVED[func] = serve


def register_cell(func: Any, kin: Any) -> None:
    @rule(func, decomposed=True, layer=True)
    def decomposed(trace: Trace, input: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Any:
        state = CELLS[kin](input, tuple(hx) if kin is torch.lstm else (hx,), (w_ih, w_hh, b_ih, b_hh))
        return state if kin is torch.lstm else state[0]


for function in CELLS:
    register(function)
for function, whole in SINGLE.items():
    register_cell(function, whole)
