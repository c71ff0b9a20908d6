"""What of this machine matters to a memory: versions, the backend, the disk, and the traps that are known.

Nothing here needs MLX, loads a model or makes a folder, so that a machine on which nothing runs can be examined too.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from agent_memory_core.backend import WANTED_FILES, physical_memory_bytes, require_mlx
from agent_memory_core.config import EngineConfig
from agent_memory_core.environment import KEY_VARIABLE, PREFIX
from agent_memory_core.errors import AgentMemoryError, BackendMissing
from agent_memory_core.fast_blas import CPU_BACKEND, OPENBLAS_VARIABLE, load_openblas
from agent_memory_core.memory import AgentMemory
from agent_memory_core.models.profile import settings_for
from agent_memory_core.storage.folder import REMOTE, file_system

Verdict = Literal["ok", "note", "fault"]

GIB = 2**30
MIB = 2**20
LITTLE_MEMORY = 8 * GIB
"""Less memory than this holds no chat model of use beside a system."""

IN_MEMORY = frozenset({"tmpfs", "ramfs", "overlay", "overlayfs"})
"""File systems that a restart of the machine, or of its container, may leave empty."""

FRAMEWORKS = ("langchain-core", "langgraph", "llama-index-core", "fastapi", "llguidance", "cryptography")
"""Distributions that extras bring, by which one sees which extras are there."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    subject: str
    value: str
    """What was found."""
    verdict: Verdict = "ok"
    """"ok"; "note": it works, but slower or with less than it could; "fault": no model can run, or nothing is kept."""
    advice: str = ""
    """What to do about a note or a fault."""


def examine_machine(settings: Mapping[str, Any] | None = None) -> tuple[Finding, ...]:
    """Look at this machine, as a memory with these settings would use it. It never raises for what it finds.

    Args:
        settings: fields of `EngineConfig`; the others come from the environment, the profile and the defaults.
    """
    found = [*_versions(), _backend(), *_on_cpu(), _memory(), _open_files()]
    try:
        config = settings_for(settings or {})
    except AgentMemoryError as error:
        return (*found, Finding("settings", str(error), "fault", "Correct or unset what is named."))
    return (*found, _settings(), Finding("model", str(config.model)), *_disk(config))


# What is installed ------------------------------------------------------------------------------------------


def _versions() -> Iterator[Finding]:
    yield Finding("agent-memory", version("agent-memory-mlx"))
    yield _python()
    yield Finding("system", f"{platform.system()} {platform.release()}, {platform.machine()}, {_chip()}")
    found = {name: _version(name) for name in ("mlx", "mlx-lm", "transformers")}
    missing = [name for name, number in found.items() if number is None]
    told = ", ".join(f"{name} {number or 'missing'}" for name, number in found.items())
    advice = f"pip install {' '.join(missing)}" if missing else ""
    yield Finding("libraries", told, "fault" if missing else "ok", advice)
    there = [f"{name} {number}" for name in FRAMEWORKS if (number := _version(name))]
    yield Finding("extras", ", ".join(there) or "none")


def _python() -> Finding:
    told = f"{platform.python_version()}, {platform.machine()}, {sys.executable}"
    if sys.platform == "darwin" and platform.machine() != "arm64":
        advice = "Install an arm64 Python: this one is for Intel, and MLX does not run in it."
        return Finding("Python", told, "fault", advice)
    return Finding("Python", told)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _chip() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores" if name else f"{cores} cores"


# What runs models -------------------------------------------------------------------------------------------


def _backend() -> Finding:
    try:
        require_mlx()
    except BackendMissing as error:
        return Finding("backend", "none: MLX cannot be imported", "fault", str(error))
    import mlx.core as mx

    device = mx.default_device().type.name
    info = mx.device_info()
    name = str(info.get("device_name", device))
    limit = info.get("max_recommended_working_set_size")
    told = f"{device}, {name}" + (f", {int(limit) / GIB:.1f} GiB for models" if limit else "")
    if device == "cpu" and sys.platform == "darwin":
        return Finding("backend", told, "note", "MLX uses the CPU of this Mac: unset MLX_DEVICE, or see mlx.")
    return Finding("backend", told)


def _on_cpu() -> Iterator[Finding]:
    """The BLAS and the compiler, which matter where MLX runs on a Linux CPU only."""
    if platform.system() != "Linux" or _version(CPU_BACKEND) is None:
        return
    blas = load_openblas()
    slow = f"MLX's own: products in float32 are 20 times slower ({OPENBLAS_VARIABLE} names another)"
    advice = "pip install 'agent-memory-mlx[cpu]', or apt install libopenblas0"
    yield Finding("BLAS", blas) if blas else Finding("BLAS", slow, "note", advice)
    compiler = shutil.which("g++")
    slower = Finding("compiler", "no g++: MLX runs uncompiled, which is slower", "note", "apt install g++")
    yield Finding("compiler", compiler) if compiler else slower


def _memory() -> Finding:
    total = physical_memory_bytes()
    told = f"{total / GIB:.1f} GiB"
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":") for line in meminfo.read_text(encoding="utf-8").splitlines())
        told += f", {int(lines['MemAvailable'].split()[0]) / MIB:.1f} GiB of it available"
    if total < LITTLE_MEMORY:
        return Finding("memory", told, "note", "Choose a model of at most 2 billion parameters in 4 bits.")
    return Finding("memory", told)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    told = f"{_limit(soft)} (at most {_limit(hard)})"
    if hard != resource.RLIM_INFINITY and hard < WANTED_FILES:
        return Finding("open files", told, "note", f"Raise the hard limit to {WANTED_FILES}: ulimit -Hn")
    return Finding("open files", told)


def _limit(count: int) -> str:
    return "unlimited" if count == resource.RLIM_INFINITY else f"{count:,}"


# What is set, and where sessions go -------------------------------------------------------------------------


def _settings() -> Finding:
    names = sorted(name for name in os.environ if name.startswith(PREFIX))
    told = [f"{name}={'(set)' if name == KEY_VARIABLE else os.environ[name]}" for name in names]
    return Finding("variables", ", ".join(told) or "none")


def _disk(config: EngineConfig) -> Iterator[Finding]:
    folder = config.cache_dir
    if folder is None:
        yield Finding("store", "none: sessions end with the process", "note", "Set AGENT_MEMORY_CACHE_DIR.")
        return
    there = next(path for path in (folder, *folder.parents) if path.exists())
    yield _volume(there)
    yield from _traps(there)
    if there != folder:
        yield Finding("store", f"{folder} (made by the first turn)")
        return
    try:
        yield _store(config)
    except AgentMemoryError as error:
        yield Finding("store", str(folder), "fault", str(error))


def _volume(path: Path) -> Finding:
    usage = shutil.disk_usage(path)
    told = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free, {file_system(path) or 'unknown'}"
    if usage.free < GIB:
        return Finding("disk", told, "note", "Make room: turns are answered all the same, but not stored.")
    return Finding("disk", told)


def _traps(path: Path) -> Iterator[Finding]:
    name = file_system(path)
    if name in REMOTE:
        advice = "Put the store on a local disk: locks of a network file system cannot be relied on."
        yield Finding("file system", f"{path} is on {name}", "fault", advice)
    if name in IN_MEMORY:
        advice = "Mount a volume, or set AGENT_MEMORY_CACHE_DIR to a folder that stays."
        yield Finding("file system", f"{path} is on {name}, which a restart may leave empty", "note", advice)
    if not os.access(path, os.W_OK):
        advice = "Sessions are read and new ones are not stored: change the permissions, or the folder."
        yield Finding("permissions", f"{path} cannot be written", "note", advice)


def _store(config: EngineConfig) -> Finding:
    with AgentMemory(config) as memory:
        store = memory.stats().store
    told = (
        f"{config.cache_dir}: {store.sessions} session{'' if store.sessions == 1 else 's'}, "
        f"{store.bytes / MIB:.1f} MiB of at most {store.quota / GIB:.1f} GiB"
    )
    if store.quarantined or store.failed_reads:
        return Finding("store", told, "note", "Files were damaged: agent-memory check says which.")
    return Finding("store", told)
