"""Native kernels as loaded libraries: built once a machine by its own C++ compiler, kept in the user's cache.

Sources lie beside this file, depend on nothing but the C++ standard library and OpenMP, and are compiled for the
processor at hand in a second or two; no header of PyTorch is read, which would take twenty. They share PyTorch's OpenMP
runtime, and with it its threads. Where there is no compiler, or what it builds does not compute attention's formula,
``missing()`` says why, and PyTorch's own kernels run.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from regraft.ir.device import cache_folder

_LOG = logging.getLogger("regraft")
_FOLDER = Path(__file__).parent
_HEADERS = ("vector.h", "activation.h", "product.h", "few_rows.h", "attention_site.h", "attention_rows.h")
_FAST = ("-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic")  # -O3 takes half as long again, and gains nothing here
_FLAGS = ("-std=c++17", *_FAST, "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-fPIC")
_COMPILERS = ("g++", "clang++", "c++")
_RUNTIMES = re.compile(r"/lib(?:gomp|iomp5|omp)[^/]*\.so[^/]*$")
_SECONDS = 120


class Unavailable(RuntimeError):
    """Why there are no native kernels here."""


class NativeLibrary:
    """Some ``sources``, their build under way or done. ``start`` returns at once; the first ``library`` waits for it.

    ``check`` says what is wrong with a loaded library, or nothing. ``base`` is the library whose functions the sources
    call, if any: it is loaded first.
    """

    def __init__(
        self, sources: Sequence[str], check: Callable[[ctypes.CDLL], str], base: NativeLibrary | None = None
    ) -> None:
        self._sources = tuple(sources)
        self._check = check
        self._base = base
        self._future: Future[ctypes.CDLL] | None = None
        self._library: ctypes.CDLL | None = None

    def start(self) -> None:
        """Build or load in the background."""
        if self._future is None:
            pool = ThreadPoolExecutor(1, "regraft-native")
            self._future = pool.submit(self._load)
            pool.shutdown(wait=False)

    def library(self) -> ctypes.CDLL:
        """The library; raises ``Unavailable`` where there is none."""
        if self._library is None:
            self._library = self._done().result()
        return self._library

    def missing(self) -> str:
        """Empty where the library is there, else why not."""
        error = None if self._library is not None else self._done().exception()
        return "" if error is None else str(error)

    def _done(self) -> Future[ctypes.CDLL]:
        self.start()
        assert self._future is not None
        return self._future

    def _load(self) -> ctypes.CDLL:
        if os.environ.get("REGRAFT_NATIVE") == "0":
            raise Unavailable("the environment has REGRAFT_NATIVE=0")
        try:
            if self._base is not None:
                self._base.library()
            return self._load_or_build()
        except Unavailable as reason:
            _LOG.warning("PyTorch's slower kernels run, because there are no native ones: %s", reason)
            raise

    def _load_or_build(self) -> ctypes.CDLL:
        runtime = _openmp_runtime()
        reasons = []
        for compiler in _compilers():
            try:
                return self._with(compiler, runtime)
            except Unavailable as reason:
                reasons.append(str(reason))
        raise Unavailable("; ".join(reasons) or f"no C++ compiler was found ({', '.join(_COMPILERS)})")

    def _with(self, compiler: Path, runtime: Path) -> ctypes.CDLL:
        with _private_folder() as folder:
            path = folder / f"native-{_key(self._sources, compiler, runtime)}.so"
            if path.is_file():
                with contextlib.suppress(Unavailable):  # whatever lies there, a new build may be right
                    return self._opened(path)
            _build(self._sources, compiler, runtime, path)
            return self._opened(path)

    def _opened(self, path: Path) -> ctypes.CDLL:
        try:
            loaded = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)  # other libraries call its functions
        except OSError as error:
            raise Unavailable(f"what was built cannot be loaded ({error})") from error
        wrong = self._check(loaded)
        if wrong:
            raise Unavailable(f"what was built is wrong: {wrong}")
        return loaded


def _compilers() -> Iterator[Path]:
    """What ``CXX`` names, if anything, then the usual ones."""
    for name in dict.fromkeys((os.environ.get("CXX") or _COMPILERS[0], *_COMPILERS)):
        found = shutil.which(name)
        if found is not None:
            yield Path(found)


def _openmp_runtime() -> Path:
    """The OpenMP runtime that PyTorch has loaded: a second one would bring a second pool of threads."""
    torch.get_num_threads()
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        raise Unavailable(f"native kernels are built on Linux only, and this is {platform.system()}") from None
    for line in maps.splitlines():
        path = line.split(maxsplit=5)[-1]
        if _RUNTIMES.search(path):
            return Path(path)
    raise Unavailable("PyTorch runs without OpenMP here")


@contextlib.contextmanager
def _private_folder() -> Iterator[Path]:
    """The cache folder if nobody else may write there, as code is loaded from it; else one that is gone at once."""
    folder = cache_folder()
    if _is_private(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="regraft-") as own:
        yield Path(own)


def _is_private(folder: Path) -> bool:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        held = folder.stat()
    except OSError:
        return False
    return held.st_uid == os.getuid() and not held.st_mode & 0o022 and os.access(folder, os.W_OK)


def _key(sources: Sequence[str], compiler: Path, runtime: Path) -> str:
    """What a build depends on: sources, flags, compiler, OpenMP runtime and processor."""
    digest = hashlib.sha256()
    for name in (*sources, *_HEADERS):
        digest.update((_FOLDER / name).read_bytes())
    held = compiler.resolve().stat()
    parts = (*_FLAGS, str(compiler.resolve()), str(held.st_size), str(held.st_mtime_ns), str(runtime), _processor())
    digest.update("\0".join(parts).encode())
    return digest.hexdigest()[:20]


def _processor() -> str:
    """Name and instruction sets: ``-march=native`` means these."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


def _build(sources: Sequence[str], compiler: Path, runtime: Path, path: Path) -> None:
    """Compile the sources side by side and link them; the library appears at ``path`` whole or not at all."""
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder:
        objects = [Path(folder) / f"{name}.o" for name in sources]
        commands = [
            [str(compiler), *_FLAGS, native, "-c", str(_FOLDER / name), "-o", str(made)]
            for name, made in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(_run, commands))
        linked = Path(folder) / path.name
        _run([str(compiler), "-shared", *map(str, objects), str(runtime), "-o", str(linked)])
        linked.replace(path)


def _aside() -> list[str]:
    """Lets a command give way: the capture goes on meanwhile, and does not wait for it yet. Threads of PyTorch's that
    share a processor with it would all wait for the one that does."""
    nice = shutil.which("nice")
    return [] if nice is None else [nice, "-n", "10"]


def _run(command: list[str]) -> None:
    name = Path(command[0]).name
    try:
        done = subprocess.run([*_aside(), *command], capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{name} could not be run ({type(error).__name__})") from error
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
        raise Unavailable(f"{name} failed: {said.strip()}")
