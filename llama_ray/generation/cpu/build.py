"""The kernels' C++ sources -> a library for this machine's processor: compiled on first use, then cached."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch  # noqa: F401  its OpenMP runtime must be loaded before the library, which then shares its threads

_log = logging.getLogger(__name__)

# No -ffast-math, and no contraction of a * b + c: sums keep their order and every rounding is where the source has it.
FLAGS = (
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fopenmp",
    "-fPIC",
    "-std=c++17",
    "-w",
)


class BuildError(RuntimeError):
    """The kernels could not be compiled or loaded; the message says why, in one line."""


@functools.cache
def load() -> ctypes.CDLL | None:
    """The kernels, or None where there is no working C++ compiler; then one warning says so and what it costs."""
    try:
        return open_library(build())
    except BuildError as e:
        _log.warning(
            "%s; the engine runs on plain torch, slower and without int8 and int4. "
            "Install g++ (apt install g++) or name a compiler in CXX",
            e,
        )
        return None


def build(flags: Sequence[str] = FLAGS) -> Path:
    """Compile the sources, unless this machine has done it before -> the library's path.

    It lies in `$XDG_CACHE_HOME/llama_ray` (by default `~/.cache`), named by all that it depends on. Processes that
    build at the same time do not disturb each other. Raises BuildError.
    """
    compiler = _compiler()
    sources = sorted(p for p in Path(__file__).parent.iterdir() if p.suffix in (".cpp", ".h"))
    key = hashlib.sha256()
    for part in (*(p.read_bytes() for p in sources), repr(flags).encode(), _version(compiler), _processor()):
        key.update(hashlib.sha256(part).digest())
    name = f"kernels-{key.hexdigest()[:20]}.so"
    directory = _directory()
    if not (directory / name).exists():
        _compile(compiler, flags, [p for p in sources if p.suffix == ".cpp"], directory / name)
    return directory / name


def open_library(path: Path) -> ctypes.CDLL:
    """Load a library that `build` made, its functions ready to be called. Raises BuildError."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as e:
        raise BuildError(f"the CPU kernels in {path} cannot be loaded ({e})") from e
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


_pointer, _size, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES: dict[str, list[type]] = {
    "linear": [_pointer, _pointer, _size, _pointer, _int],
    "rms_norm": [_int, _pointer, _pointer, _pointer, _size, _size, _float, _int],
    "rope": [_int, _pointer, _size, _size, _size, _size, _pointer, _pointer, _size, _int],
    "paged_attention": [
        *(_pointer, _pointer, _pointer, _pointer, _size),
        *(_pointer, _size, _pointer, _size, _pointer, _size, _pointer, _float, _int),
    ],
    "blocks": [
        *(_pointer, _size, _pointer, _pointer, _pointer, _pointer),
        *(_pointer, _pointer, _size, _pointer, _pointer, _size, _float, _int),
    ],
    "draw": [_pointer, _pointer, _size, _size, _pointer, _pointer, _pointer, _int],
    "top_candidates": [_pointer, _size, _size, _size, _pointer, _pointer, _int],
}


def _compile(compiler: str, flags: Sequence[str], sources: Sequence[Path], target: Path) -> None:
    # Under a name of its own until it is whole: another process sees the finished library or none.
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        objects, compile_all = [], []
        for i, unit in enumerate(_units(sources)):
            source, to = Path(scratch) / f"unit{i}.cpp", str(Path(scratch) / f"unit{i}.o")
            source.write_text("".join(f'#include "{path}"\n' for path in unit))
            compile_all.append([compiler, *flags, "-c", "-o", to, str(source)])
            objects.append(to)
        _run(compile_all)
        _run([[compiler, *flags, "-shared", "-o", str(made), *objects]])
        made.replace(target)


def _units(sources: Sequence[Path]) -> list[list[Path]]:
    """The sources in two translation units of about one size: the header of the intrinsics costs 0.3 s in each.

    So a name in an anonymous namespace must be its file's alone.
    """
    units: list[list[Path]] = [[], []]
    sizes = [0, 0]
    for source in sorted(sources, key=lambda path: path.stat().st_size, reverse=True):
        smaller = sizes.index(min(sizes))
        units[smaller].append(source)
        sizes[smaller] += source.stat().st_size
    return units


def _run(commands: Sequence[Sequence[str]]) -> None:
    """Run the commands at once. Raises BuildError with the first error that a compiler wrote."""
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    messages = [process.communicate()[1] for process in running]
    if any(process.returncode for process in running):
        errors = [line for line in "".join(messages).splitlines() if "error" in line] or ["no message"]
        raise BuildError(f"the CPU kernels do not compile with {commands[0][0]} ({errors[0].strip()})")


def _compiler() -> str:
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["g++", "c++", "clang++"]:
        if path := shutil.which(name):
            return path
    raise BuildError(f"CXX names {wanted}, which is not there" if wanted else "no C++ compiler was found")


def _version(compiler: str) -> bytes:
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as e:
        raise BuildError(f"the C++ compiler {compiler} does not run ({e})") from e


def _processor() -> bytes:
    """What -march=native depends on: a cache may lie in a home directory that many machines share."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}".encode()
    kinds = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kinds)})).encode()


def _directory() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        directory = (Path(home) if home else Path.home() / ".cache") / "llama_ray"
        directory.mkdir(parents=True, exist_ok=True)
        if os.access(directory, os.W_OK):
            return directory
    except (OSError, RuntimeError):  # no home, or one that cannot be written
        pass
    return _private_directory()


@functools.cache
def _private_directory() -> Path:
    # Made anew for each process: a name that others could guess, and fill first, must not be loaded from.
    return Path(tempfile.mkdtemp(prefix="llama_ray-"))
