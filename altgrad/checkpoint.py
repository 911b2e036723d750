"""Checkpoints: tensors as safetensors beside a JSON manifest with their sha256; no pickle is ever written or read.

    FOLDER/step-00000040/tensors.safetensors   manifest.json
    FOLDER/latest                              the name of the newest verified one

A checkpoint is written under a temporary name in the same folder, synced, read back and compared, then renamed; only then does
`latest` move. So a crash at any moment leaves the previous one loadable. Equal views of one storage (tied weights) are stored once
and come back as one tensor. The sha256 is needed: safetensors loads a flipped bit without a word.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from altgrad import durable
from altgrad.engine import Tree
from altgrad.errors import AltgradError, CheckpointError, MissingExtraError, require

FORMAT = "altgrad-checkpoint"
VERSION = 1
TENSORS, MANIFEST, LATEST = "tensors.safetensors", "manifest.json", "latest"
STEP_FOLDER = re.compile(r"step-(\d{8,})")
PICKLE = (b"\x80", b"PK\x03\x04")  # a bare pickle, and the zip that torch.save writes


class Checkpoint(NamedTuple):
    """What was saved: the step it was taken after, the tensors (on the CPU), and a JSON value."""

    step: int
    tensors: Tree
    meta: dict[str, Any]


def save(folder: str | Path, *, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], keep: int = 3) -> Path:
    """Write `folder`/step-XXXXXXXX, verify it, point `latest` at it, and delete all but the `keep` newest up to it.

    Args:
        folder: holds the checkpoints of one run; made if missing.
        step: the step the tensors were taken after, 0 or more.
        tensors: by name; any device, dtype or shape.
        meta: a JSON value (dict with string keys).
        keep: how many to keep, 1 or more; 3 leaves two to fall back to.

    Raises:
        AltgradError: the disk is full or the folder cannot be written; the temporary files are removed, earlier checkpoints stay.
        CheckpointError: what was written does not read back as it was; earlier checkpoints stay.
    """
    require(step >= 0, "step", step, "0 or more")
    require(keep >= 1, "keep", keep, "1 or more")
    folder = Path(folder)
    final = folder / f"step-{step:08d}"
    aside = folder / f"{final.name}.old"
    temporary = folder / f".tmp-{final.name}-{os.getpid()}"
    raw, described = encode(tensors)
    body = {"format": FORMAT, "version": VERSION, "step": step, "tensors": described, "meta": dict(meta)}
    body["file"] = {"name": TENSORS, "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    with durable.explained(final, losing="Checkpoints written before stay."):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            durable.write(temporary / TENSORS, raw)
            durable.write(temporary / MANIFEST, durable.to_json({**body, "sha256": digest(body)}, indent=1))
            durable.sync_folder(temporary)
            load(temporary)
            if final.exists():  # a folder cannot be renamed onto another; `latest` knows the name in between
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(final, aside)
            os.rename(temporary, final)
            durable.sync_folder(folder)
            durable.replace(folder / LATEST, f"{final.name}\n".encode())
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        clean(folder, step=step, keep=keep)
    return final


def load(path: str | Path) -> Checkpoint:
    """The checkpoint in the folder `path`.

    Raises:
        CheckpointError: missing, unfinished, truncated, damaged, foreign, or of a newer format; names the file, what was found, what to do.
    """
    path = Path(path)
    manifest = read_manifest(path)
    file, described = path / TENSORS, manifest["tensors"]
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}), though the manifest beside it lists it. {ADVICE}") from error
    expected = manifest["file"]
    if len(raw) != expected["bytes"]:
        raise CheckpointError(f"{file} has {len(raw)} bytes where its manifest says {expected['bytes']}: it was cut off or replaced. {ADVICE}")
    if hashlib.sha256(raw).hexdigest() != expected["sha256"]:
        raise CheckpointError(f"{file} is damaged: the sha256 of its {len(raw)} bytes is not the one in the manifest. {ADVICE}")
    return Checkpoint(manifest["step"], decode(raw, described, file), manifest["meta"])


def latest(folder: str | Path) -> Path:
    """The folder that `latest` names.

    Raises:
        CheckpointError: there is no checkpoint, or the pointer is damaged or names one that is gone.
    """
    folder = Path(folder)
    pointer, there = folder / LATEST, [path.name for path in available(folder)]
    found = f"Found there: {', '.join(there)}." if there else "There is no checkpoint in it."
    try:
        name = pointer.read_text(encoding="ascii").strip()
    except OSError as error:
        raise CheckpointError(f"{pointer} cannot be read ({error.strerror}). {found} Give the run folder of `altgrad train`.") from error
    except UnicodeDecodeError:
        name = ""
    if not STEP_FOLDER.fullmatch(name):
        raise CheckpointError(f"{pointer} is damaged: it does not name a checkpoint. {found} {ADVICE}")
    for path in (folder / name, folder / f"{name}.old"):  # .old: a crash between the two renames of `save`
        if path.is_dir():
            return path
    raise CheckpointError(f"{pointer} names {name}, which is gone. {found} {ADVICE}")


def load_latest(folder: str | Path, *, fallback: bool = False) -> Checkpoint:
    """The newest checkpoint of `folder`; with `fallback`, the newest good one before it if it is damaged, with a warning that says so."""
    folder = Path(folder)
    newest: Path | None = None
    try:
        newest = latest(folder)
        return load(newest)
    except CheckpointError as error:
        before = [path for path in available(folder) if newest is None or step_of(path) < step_of(newest)]
        if not fallback:
            hint = "" if not before else " Take the newest good one of them with --fallback."
            if before and newest is not None:
                hint = f" Earlier ones: {', '.join(path.name for path in before)}; take the newest good one with --fallback."
            raise CheckpointError(f"{error}{hint}") from error
        for path in reversed(before):
            try:
                found = load(path)
            except CheckpointError:
                continue
            warnings.warn(f"{error} Falling back to {path}, step {found.step}.", stacklevel=2)
            return found
        raise CheckpointError(f"{error} There is no {'earlier ' if newest is not None else ''}good one to fall back to.") from error


def available(folder: Path) -> list[Path]:
    """The checkpoints in `folder` by step, unverified."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if STEP_FOLDER.fullmatch(path.name)), key=step_of)


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(path.name.removeprefix("step-").removesuffix(".old"))


def clean(folder: Path, *, step: int, keep: int) -> None:
    """Delete what crashes left behind and all but the `keep` newest up to `step`; later ones belong to an abandoned future and go when reached."""
    for path in folder.iterdir():
        if path.name.startswith(".tmp-step-") or path.name.endswith(".old"):
            shutil.rmtree(path, ignore_errors=True)
    for path in [path for path in available(folder) if step_of(path) <= step][:-keep]:
        shutil.rmtree(path, ignore_errors=True)


def encode(tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, dict[str, Any]]]:
    """The safetensors bytes of `tensors` and, by name, shape, dtype, order of the axes in memory (where it is not the usual one) and the name it is tied to."""
    safetensors = import_safetensors()
    stored: Tree = {}
    described: dict[str, dict[str, Any]] = {}
    owners: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided:
            raise AltgradError(f"tensor {name!r} has layout {tensor.layout}, which a checkpoint cannot hold; make it dense.")
        view = (tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.stride(), tensor.shape, tensor.dtype)
        owner = owners.setdefault(view, name) if tensor.numel() else name
        described[name] = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        if owner != name:
            described[name]["same_as"] = owner
            continue
        order = sorted(range(tensor.ndim), key=[-stride for stride in tensor.stride()].__getitem__)
        plain = tensor.detach().resolve_conj().resolve_neg()
        if not plain.is_contiguous() and plain.permute(order).is_contiguous():  # kept, because a product in another layout rounds differently
            plain, described[name]["order"] = plain.permute(order), order
        plain = torch.view_as_real(plain) if plain.is_complex() else plain
        stored[name] = plain.cpu().clone(memory_format=torch.contiguous_format)  # overlapping views part here
    return safetensors.save(stored), described


def decode(raw: bytes, described: Mapping[str, Mapping[str, Any]], file: Path) -> Tree:
    """The tensors of `encode`, checked against their description."""
    try:
        stored = import_safetensors().load(raw)
    except Exception as error:  # safetensors raises its own class, and others for malformed headers
        raise CheckpointError(f"{file} is not a safetensors file ({error}). {ADVICE}") from error
    tensors: Tree = {}
    for name, wanted in described.items():
        if "same_as" in wanted:
            continue
        if name not in stored:
            raise CheckpointError(f"{file} lacks the tensor {name!r} that its manifest lists. {ADVICE}")
        tensor = torch.view_as_complex(stored[name]) if wanted["dtype"].startswith("complex") else stored[name]
        order = wanted.get("order", range(tensor.ndim))
        tensor = tensor.permute([order.index(axis) for axis in range(tensor.ndim)])
        found = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        if any(wanted[key] != value for key, value in found.items()):
            raise CheckpointError(f"{file}: tensor {name!r} is {found} where its manifest says {dict(wanted)}. {ADVICE}")
        tensors[name] = tensor
    return {name: tensors[wanted.get("same_as", name)] for name, wanted in described.items()}


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint `path`, its own sha256 checked; everything foreign is refused unread."""
    file = path / MANIFEST
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint at {path}. Give a folder named step-XXXXXXXX, or the run folder of `altgrad train`.")
    if not path.is_dir():
        with open(path, "rb") as opened:
            kind = "a pickle (.pt, .pth), which can run code when loaded" if opened.read(4).startswith(PICKLE) else "a file"
        raise CheckpointError(f"{path} is {kind}; an altgrad checkpoint is a folder with {MANIFEST} and {TENSORS}. It was not opened. {ADVICE}")
    try:
        manifest = json.loads(file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}): {path} is no altgrad checkpoint, or was never finished. {ADVICE}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: it is not JSON ({error}). {ADVICE}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f'{file} is not altgrad\'s: it lacks "format": "{FORMAT}". {ADVICE}')
    version = manifest.get("version")
    if isinstance(version, int) and version > VERSION:
        raise CheckpointError(f"{file} has format version {version}; this altgrad reads up to {VERSION}. Upgrade altgrad: pip install -U altgrad.")
    if digest({name: value for name, value in manifest.items() if name != "sha256"}) != manifest.get("sha256"):
        raise CheckpointError(f"{file} is damaged: its contents do not have the sha256 it states. {ADVICE}")
    return manifest


def digest(body: Mapping[str, Any]) -> str:
    """sha256 of `body` as JSON reads it back."""
    return hashlib.sha256(durable.to_json(json.loads(durable.to_json(body)))).hexdigest()


def import_safetensors() -> Any:
    """safetensors.torch, which only checkpoints need."""
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise MissingExtraError("safetensors", "torch", "saving and loading checkpoints") from error
    return safetensors.torch


ADVICE = "Nothing was overwritten; resume from another checkpoint, or start again."
