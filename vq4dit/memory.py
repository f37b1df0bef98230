"""How much memory there is for us, asked before the work: a process that takes more is killed without a word, or fails late.

What the machine has free is not all: a container or a service may be held to less (`cgroup`, `ulimit -v`). And how much was
taken in the end.
"""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from pathlib import Path

import psutil
import torch

from vq4dit.errors import VQ4DiTError, brief

CGROUPS = Path("/sys/fs/cgroup")
OUT_OF_MEMORY = ("can't allocate memory", "Cannot allocate memory", "not enough memory", "Unable to allocate", "out of memory")


def available_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that this process may still take on a device."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return max(0, min(psutil.virtual_memory().available, *_limits()))


def check_memory(needed: int, what: str, device: torch.device | str = "cpu") -> None:
    """Raise `VQ4DiTError` if a device has not so much memory left.

    Args:
        what: needs it, for the message: "quantizing this model".
    """
    if needed > (free := available_memory(device)):
        place = "" if torch.device(device).type == "cpu" else f" on {device}"
        raise VQ4DiTError(
            f"{what} takes about {gigabytes(needed)} of memory, and {gigabytes(free)} are free here{place}: close other "
            "programs, or take a machine with more memory or a smaller model"
        )


def gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def give_back() -> None:
    """Let the system have what is not used any more: Python's circles, and what the C library keeps for the next time."""
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # glibc has it, musl has not
        trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator refused: Python's, torch's, of the CPU or a GPU, or that of the files in memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(words in str(error) for words in OUT_OF_MEMORY)


def out_of_memory(error: BaseException) -> str:
    """The allocator's refusal in a sentence."""
    if isinstance(error, torch.OutOfMemoryError):
        return f"the GPU's memory is used up ({brief(error)}): close what else uses it, or work on the CPU (--device cpu)"
    return (
        f"the memory is used up ({brief(error)}), {gigabytes(available_memory())} are free: close other programs, or take a "
        "machine with more memory or a smaller model"
    )


def _limits() -> list[int]:
    """What is left of the limits that this process was given."""
    left = [*_left_of_cgroups()]
    if sys.platform == "linux":
        limit = psutil.Process().rlimit(psutil.RLIMIT_AS)[0]
        if limit != psutil.RLIM_INFINITY:
            left.append(limit - psutil.Process().memory_info().vms)
    return left or [sys.maxsize]


def _left_of_cgroups() -> list[int]:
    """Limit minus use of our group and those around it; files that are only cached do not count as used."""
    try:
        groups = [
            line.rpartition(":")[2].strip("/") for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        ]
    except OSError:  # no Linux
        return []
    left = []
    for group in {*groups, ""}:
        for folder in (CGROUPS / group, *(CGROUPS / group).parents):
            if folder == CGROUPS or CGROUPS in folder.parents:
                left += _left(folder, "memory.max", "memory.current", "inactive_file")
        left += _left(CGROUPS / "memory" / group, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    return left


def _left(folder: Path, limit: str, used: str, cached: str) -> list[int]:
    try:
        most, taken = int((folder / limit).read_text(encoding="utf-8")), int((folder / used).read_text(encoding="utf-8"))
        lines = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError):  # not there, or "max"
        return []
    return [most - taken + int(lines.get(cached, 0))]


def peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return high_water_mark("self") or _peak_elsewhere()


def _peak_elsewhere() -> int:
    """The largest resident memory of this process where there is no /proc, in bytes; what it is now if nobody tells more."""
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return memory.peak_wset
    try:
        import resource
    except ModuleNotFoundError:
        return memory.rss
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit  # it also counts whoever started this process


def high_water_mark(process: int | str) -> int:
    """The largest resident memory of a process so far (Linux's VmHWM), in bytes; 0 if it has ended, or nobody tells."""
    status = Path(f"/proc/{process}/status")
    found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8"), re.MULTILINE) if status.exists() else None
    return int(found[1]) * 1024 if found else 0
