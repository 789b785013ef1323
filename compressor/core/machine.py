"""What the machine has and what a process takes of it: memory and processor.

Everything here is asked of the system anew at each call. Memory comes from psutil, but for two things that psutil does
not tell: on Linux a process's own peak, and what its processor multiplies in hardware, both read from /proc. What a
system does not say is None: on macOS and Windows how much of a process's memory is private and how much is mapped. No
other module reads /proc.
"""

from __future__ import annotations

import sys
from pathlib import Path

if sys.platform != "win32":
    import resource

_SCARCE = 200_000_000
"""Bytes that are free, below which anything may fail."""


def available_memory() -> int:
    """Bytes that new processes may take without swapping."""
    import psutil

    return psutil.virtual_memory().available


def cores() -> int:
    """Cores that this process may use, at least one."""
    import psutil

    try:
        return len(psutil.Process().cpu_affinity() or ()) or 1
    except AttributeError:  # macOS ties no process to cores
        return psutil.cpu_count() or 1


def is_scarce(share: float = 0.5) -> bool:
    """Whether memory may have been what an odd error came of: little is left, or much of what this process may have
    is taken. A limit may be lower than what the machine has (`ulimit -v`)."""
    return _is_near_limit(share) or available_memory() < _SCARCE


def _is_near_limit(share: float) -> bool:
    """Asked first, and without an import: near its limit a process may not get through one."""
    if sys.platform == "win32":
        return False
    limits = (resource.getrlimit(each)[0] for each in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    finite = [limit for limit in limits if limit != resource.RLIM_INFINITY]
    return bool(finite) and address_space() >= share * min(finite)


def address_space() -> int:
    """Bytes that this process has had mapped at most."""
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmPeak:")), 0)
    import psutil

    return psutil.Process().memory_info().vms


def multiplies_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware, as far as Linux tells; torch is not asked."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "amx_tile" in text or "avx512_bf16" in text


def processor() -> str:
    """Its kind, name and instructions, for what was made for it; on other systems than Linux the first two alone."""
    import hashlib
    import platform

    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return f"{platform.machine()} {platform.processor()}".strip()
    lines = dict(reversed([_field(line) for line in text.splitlines()]))
    flags = lines.get("flags") or lines.get("Features") or ""
    digest = hashlib.sha256(" ".join(sorted(flags.split())).encode()).hexdigest()[:12]
    return f"{platform.machine()} {lines.get('model name', '')} {digest}".replace("  ", " ")


def _field(line: str) -> tuple[str, str]:
    key, _, value = line.partition(":")
    return key.strip(), value.strip()


def private_memory(pid: int | None = None) -> int | None:
    """Bytes of anonymous memory, which nothing else can use, of a process (None: this one).

    None where it is not known: on another system than Linux, or once the process has ended.
    """
    resident, mapped = _resident_and_mapped(pid)
    return None if resident is None or mapped is None else max(0, resident - mapped)


def memory_of(pid: int | None = None) -> dict[str, int | None]:
    """Bytes of a process (None: this one), each None where it is not known.

    Returns:
        `resident`: all that it holds in memory now. `private` and `mapped`: what of that is anonymous, and what are
        pages of files and shared memory; on Linux only. `peak_resident`: the most that was ever resident, since the
        process began; of another process on Linux only.
    """
    resident, mapped = _resident_and_mapped(pid)
    private = None if resident is None or mapped is None else max(0, resident - mapped)
    peak = None if resident is None else _peak(pid)
    return {"resident": resident, "private": private, "mapped": mapped, "peak_resident": peak}


def _resident_and_mapped(pid: int | None) -> tuple[int | None, int | None]:
    import psutil

    try:
        found = psutil.Process(pid).memory_info()
    except psutil.Error:  # it has ended, or is somebody else's
        return None, None
    return found.rss, found.shared if sys.platform == "linux" else None


def _peak(pid: int | None) -> int | None:
    """Of getrusage the figure on Linux is no use: a process begins with the peak of the one that started it."""
    if sys.platform == "linux":
        try:
            lines = Path(f"/proc/{pid or 'self'}/status").read_text(encoding="utf-8").splitlines()
        except OSError:
            return None
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
    if pid is not None:
        return None
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
