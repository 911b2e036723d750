r"""Files of quantised models: every weight as its codes, b bits each, with the scale that turns them into numbers again.

    sign      w = (2 c - 1) α            1 bit           steps     w = s (c + low) + β      b bits
    ternary   w = (c - 1) α              2 bits          levels    w = (low + Δ c) m        b bits

n weights take ⌈n b / 8⌉ bytes. Everything else of the model's state is stored as it is. A file is a safetensors file; its metadata say how to read it
and hold a sha256 over all tensors. What `load_packed` gives predicts, bit for bit, what the quantised model did.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from altgrad import durable
from altgrad.checkpoint import PICKLE, import_safetensors
from altgrad.engine import Tree
from altgrad.errors import AltgradError, CheckpointError, UsageError
from altgrad.quantisation import inputs as hooked
from altgrad.quantisation.applying import bare
from altgrad.quantisation.layers import INPUT, WEIGHT, named, own_part, quantised
from altgrad.quantisation.quantisers import Learned, Levels, TernaryWeight, Uniform
from altgrad.quantisation.specs import parsed
from altgrad.surrogates.modules import BinaryWeight

FORMAT, VERSION = "altgrad-packed", 1
ADVICE = "Pack the model again: altgrad export RUN --packed."
Model = TypeVar("Model", bound=nn.Module)


class Packed(NamedTuple):
    """Tensors by name, and a JSON value that says what they are."""

    tensors: Tree  # "codes/<weight>" uint8, "constants/<weight>/<name>", and the rest of the state as "plain/<name>"
    meta: dict[str, Any]

    def content(self) -> bytes:
        """The file."""
        text = json.dumps(self.meta, sort_keys=True)
        metadata = {"format": FORMAT, "version": str(VERSION), "meta": text, "sha256": digest(self.tensors, text)}
        return bytes(import_safetensors().save(self.tensors, metadata=metadata))


class Codes(NamedTuple):
    """A quantised weight: whole numbers in [0, 2^bits), and what makes values of them."""

    form: str
    bits: int
    codes: Tensor
    constants: Tree
    numbers: Mapping[str, float] = MappingProxyType({})


def coded(part: nn.Module, w: Tensor) -> Codes:
    """The codes of what the quantiser `part` makes of `w`."""
    if isinstance(part, BinaryWeight):
        over = list(range(1 if part.scale == "channel" else 0, w.ndim))
        constants = {} if part.scale == "none" else {"scale": w.abs().mean(over, keepdim=True)}
        return Codes("sign", 1, (part.estimator.value(w) > 0).to(torch.uint8), constants)
    if isinstance(part, TernaryWeight):
        t, scale = part.parts(w)
        return Codes("ternary", 2, (t + 1).to(torch.uint8), {"scale": scale})
    if isinstance(part, Levels):
        scale, estimator = part.scale(w), part.estimator
        codes = ((estimator.value((w / scale).clamp(-1, 1)) - estimator.low) / estimator.interval).round().to(torch.uint8)
        return Codes("levels", estimator.bits, codes, {"scale": scale}, {"low": estimator.low, "interval": estimator.interval})
    if isinstance(part, Learned):
        low, high = part.estimator.range
        step, offset = part.grid()
        whole = ((w - offset) / step).clamp(low, high).round()
        return Codes("steps", part.estimator.bits, (whole - low).to(torch.uint8), {"step": step, "offset": offset}, {"low": low})
    if not isinstance(part, Uniform):
        raise AltgradError(f"{type(part).__name__} cannot be packed.")
    step, least = part.grid(w)
    low = 0 if part.affine else -(2 ** (part.bits - 1))
    whole = ((w if least is None else w - least) / step).round()
    return Codes("steps", part.bits, (whole - low).to(torch.uint8), {"step": step, **({} if least is None else {"offset": least})}, {"low": low})


def value(form: str, codes: Tensor, constants: Tree, numbers: Mapping[str, float]) -> Tensor:
    """The weight, by the operations of its quantiser in their order: the same bits. `codes` in the weight's type."""
    if form == "sign":
        return (2 * codes - 1) * constants["scale"] if "scale" in constants else 2 * codes - 1
    if form == "ternary":
        return (codes - 1) * constants["scale"]
    if form == "levels":
        return (numbers["low"] + numbers["interval"] * codes) * constants["scale"]
    stepped = constants["step"] * (codes + numbers["low"])
    return stepped + constants["offset"] if "offset" in constants else stepped


@torch.no_grad()
def pack(model: nn.Module) -> Packed:
    """The state of a quantised model, each quantised weight as codes.

    Raises:
        UsageError: no weight of the model is quantised.
    """
    layers = {name: layer for name, layer in named(model).items() if own_part(layer) is not None}
    if not layers:
        raise UsageError(f"{type(model).__name__} has no quantised weights to pack; quantise it first: altgrad.quantize(model, weights='sign:reste').")
    tensors: Tree = {}
    weights: dict[str, Any] = {}
    parts = set()
    for name, layer in layers.items():
        label, part, w = dotted(name, WEIGHT), own_part(layer), layer.parametrizations[WEIGHT].original  # type: ignore[index,union-attr]
        found = coded(part, w)  # type: ignore[arg-type]
        again = value(found.form, found.codes.to(w.dtype), found.constants, found.numbers)
        if not torch.equal(again, layer.weight):  # type: ignore[arg-type]
            raise AltgradError(f"the codes of {label!r} do not give its value back; its quantiser {part} cannot be packed.")
        weights[label] = {"form": found.form, "bits": found.bits, "shape": list(w.shape), "dtype": str(w.dtype).removeprefix("torch."), **found.numbers}
        tensors[f"codes/{label}"] = to_bits(found.codes, found.bits)
        tensors |= {f"constants/{label}/{constant}": tensor for constant, tensor in found.constants.items()}
        parts.add(dotted(name, "parametrizations") + ".")
    for name, tensor in model.state_dict().items():
        if not any(name.startswith(prefix) for prefix in parts):
            tensors[f"plain/{name}"] = tensor
    inputs = {name: getattr(layer, INPUT).spec for name, layer in named(model).items() if hasattr(layer, INPUT)}
    silent = [name for name, module in model.named_modules() if hooked.is_silent(module)]
    plain = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    return Packed(plain, {"weights": weights, "inputs": inputs, "silent": silent})


def save_packed(model: nn.Module, path: str | Path) -> int:
    """Write `pack(model)` to a file, whole or not at all; its bytes.

    Raises:
        UsageError: no weight of the model is quantised. AltgradError: the file cannot be written.
    """
    content = pack(model).content()
    with durable.explained(Path(path)):
        durable.replace(Path(path), content)
    return len(content)


def unpack(path: str | Path) -> Tree:
    """The state in a packed file, weights as the numbers that their codes stand for.

    Raises:
        CheckpointError: the file is missing, damaged, foreign or of a newer format.
    """
    return state_of(opened(path), Path(path))


def load_packed(path: str | Path, model: Model) -> Model:
    """Make of `model`, quantised or not, the one that was packed, in place: its weights final, its inputs quantised as they were.

    Args:
        model: of the architecture that was packed.

    Raises:
        CheckpointError: the file cannot be used, or is of another model; `model` is then as it was.
    """
    path = Path(path)
    packed = opened(path)
    state, layers = state_of(packed, path), named(model)
    modules, own = dict(model.named_modules()), dict(model.state_dict())
    extra = tuple(dotted(name, INPUT) + "." for name in packed.meta["inputs"])
    made = tuple(dotted(name, "parametrizations") + "." for name, layer in layers.items() if own_part(layer) is not None)
    here = {name: tuple(tensor.shape) for name, tensor in own.items() if not name.startswith((*made, *extra))}
    here |= {dotted(name, WEIGHT): tuple(layer.weight.shape) for name, layer in layers.items()}  # type: ignore[union-attr,arg-type]
    there = {name: tuple(tensor.shape) for name, tensor in state.items() if not name.startswith(extra)}
    wrong = sorted(name for name in {*here, *there} if here.get(name) != there.get(name))
    wrong += [name for name in [*packed.meta["inputs"], *packed.meta["silent"]] if name not in modules]
    if wrong:
        raise CheckpointError(f"{path} is of another model than {type(model).__name__}: {', '.join(map(repr, wrong[:5]))} does not fit. Give that model.")
    for layer in quantised(model).values():
        if own_part(layer) is not None:
            bare(layer)
        if hasattr(layer, INPUT):
            hooked.take_off(layer)
    for name, text in packed.meta["inputs"].items():
        spec = parsed(text, "activation")
        if spec is not None:
            hooked.put(layers[name], spec)
    for name in packed.meta["silent"]:
        if not hooked.is_silent(modules[name]):
            hooked.silence(modules[name])
    model.load_state_dict(state)
    return model


def state_of(packed: Packed, path: Path) -> Tree:
    """The state dict."""
    state = {name.removeprefix("plain/"): tensor for name, tensor in packed.tensors.items() if name.startswith("plain/")}
    for label, entry in packed.meta["weights"].items():
        prefix = f"constants/{label}/"
        constants = {name.removeprefix(prefix): tensor for name, tensor in packed.tensors.items() if name.startswith(prefix)}
        dtype = getattr(torch, entry["dtype"])
        codes = from_bits(packed.tensors[f"codes/{label}"], entry["bits"], tuple(entry["shape"])).to(dtype)
        state[label] = value(entry["form"], codes, constants, entry)
    return state


def opened(path: str | Path) -> Packed:
    """The contents of a packed file, verified; a pickle is not opened."""
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}). Give the file that `altgrad export RUN --packed` wrote.") from error
    try:
        tensors = import_safetensors().load(raw)
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]).get("__metadata__", {})
    except Exception as error:  # safetensors raises its own class, and others for malformed headers
        if raw.startswith(PICKLE):
            raise CheckpointError(f"{path} is a pickle (.pt, .pth), which can run code when loaded; it was not opened. {ADVICE}") from error
        raise CheckpointError(f"{path} is damaged, or no safetensors file ({error}). {ADVICE}") from error
    if header.get("format") != FORMAT:
        raise CheckpointError(f"{path} holds no packed model (its format is {header.get('format')!r}, not {FORMAT!r}). {ADVICE}")
    if not {"version", "meta", "sha256"} <= set(header) or not header["version"].isdecimal():
        raise CheckpointError(f"{path} is damaged: its metadata are not what they were. {ADVICE}")
    if int(header["version"]) > VERSION:
        raise CheckpointError(f"{path} has format version {header['version']}; this altgrad reads up to {VERSION}. Upgrade altgrad: pip install -U altgrad.")
    if digest(tensors, header["meta"]) != header["sha256"]:
        raise CheckpointError(f"{path} is damaged: its contents do not have the sha256 it states. {ADVICE}")
    return Packed(tensors, json.loads(header["meta"]))


def digest(tensors: Tree, text: str) -> str:
    """sha256 over names, types, shapes and bytes of the tensors, and over the text."""
    total = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        total.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def to_bits(codes: Tensor, bits: int) -> Tensor:
    """Whole numbers in [0, 2^bits), `bits` bits each, highest first, one after another: uint8 [⌈n bits / 8⌉]."""
    flat = codes.detach().cpu().reshape(-1, 1).numpy()
    return torch.from_numpy(np.packbits((flat >> np.arange(bits - 1, -1, -1, dtype=np.uint8)) & 1))


def from_bits(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """What `to_bits` was given."""
    count = int(np.prod(shape, dtype=np.int64))
    each = np.unpackbits(packed.numpy(), count=count * bits).reshape(count, bits)
    return torch.from_numpy(each @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))).reshape(shape)


def dotted(name: str, rest: str) -> str:
    """`name.rest`; `rest` alone for the model itself."""
    return f"{name}.{rest}" if name else rest


__all__ = ["Packed", "load_packed", "pack", "save_packed", "unpack"]
