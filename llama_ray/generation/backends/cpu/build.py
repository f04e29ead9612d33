"""Compile the C++ kernels for this machine's processor on first use, and cache the library."""

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

# Torch's OpenMP runtime must be loaded before the library, which then shares its threads.
import torch  # noqa: F401

from llama_ray.generation.backends.cpu import abi

_log = logging.getLogger(__name__)

# Without -ffast-math and contraction of a * b + c, sums keep their order and every rounding is where the source has it.
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
    """The kernels could not be compiled or loaded; the message gives the reason in one line."""


@functools.cache
def load() -> ctypes.CDLL | None:
    """Return the kernels, or None without a working C++ compiler; one warning then says what that costs."""
    try:
        return open_library(build())
    except BuildError as error:
        _log.warning(
            "%s; the engine runs on plain torch, slower and without int8 and int4; install g++ (apt install g++) "
            "or name a compiler in CXX",
            error,
        )
        return None


def build(flags: Sequence[str] = FLAGS) -> Path:
    """Compile the sources, unless the cache holds the library already; return the library's path.

    The cache is `$XDG_CACHE_HOME/llama_ray` (by default `~/.cache/llama_ray`); a library's name is a hash of everything
    that it depends on. Several processes may build at the same time. Raises BuildError.
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
    """Load a library that `build` made, and declare its functions. Raises BuildError."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"the CPU kernels in {path} cannot be loaded ({error})") from error
    abi.declare_functions(library)
    return library


def _compile(compiler: str, flags: Sequence[str], sources: Sequence[Path], target: Path) -> None:
    # Written to a scratch directory and then renamed, so that other processes never see an unfinished library.
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        library = Path(scratch) / target.name
        objects, compile_all = [], []
        for i, unit in enumerate(_units(sources)):
            source, compiled = Path(scratch) / f"unit{i}.cpp", str(Path(scratch) / f"unit{i}.o")
            source.write_text("".join(f'#include "{path}"\n' for path in unit))
            compile_all.append([compiler, *flags, "-c", "-o", compiled, str(source)])
            objects.append(compiled)
        _run(compile_all)
        _run([[compiler, *flags, "-shared", "-o", str(library), *objects]])
        library.replace(target)


def _units(sources: Sequence[Path]) -> list[list[Path]]:
    """Group the sources into two translation units of about the same size, to be compiled in parallel.

    Not one unit per source, because including the header of the intrinsics takes 0.3 s in each unit. Sources therefore
    share a namespace: a name in an anonymous namespace must be unique among all files.
    """
    units: list[list[Path]] = [[], []]
    sizes = [0, 0]
    for source in sorted(sources, key=lambda path: path.stat().st_size, reverse=True):
        smaller = sizes.index(min(sizes))
        units[smaller].append(source)
        sizes[smaller] += source.stat().st_size
    return units


def _run(commands: Sequence[Sequence[str]]) -> None:
    """Run the commands in parallel. Raises BuildError with the first error message of a compiler."""
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
    raise BuildError(f"CXX is {wanted}, which is not installed" if wanted else "no C++ compiler was found")


def _version(compiler: str) -> bytes:
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"the C++ compiler {compiler} does not run ({error})") from error


def _processor() -> bytes:
    """Return what -march=native depends on: machines of different kinds may share the cache in a home directory."""
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
    except (OSError, RuntimeError):
        # There is no home directory, or it cannot be written.
        pass
    return _private_directory()


@functools.cache
def _private_directory() -> Path:
    # A new directory for each process: in one with a predictable name, another user could place a library first.
    return Path(tempfile.mkdtemp(prefix="llama_ray-"))
