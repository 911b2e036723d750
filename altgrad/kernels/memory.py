"""How much memory is free on a device."""

from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
LIMITS = ((Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),)


def available(device: torch.device) -> int | None:
    """Free bytes, or None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    if MEMINFO.exists():
        found += [int(line.split()[1]) * 1024 for line in MEMINFO.read_text().splitlines() if line.startswith("MemAvailable:")]
    for limit, used in LIMITS:  # a container's own limit
        if limit.exists() and used.exists() and limit.read_text().strip() != "max":
            found.append(int(limit.read_text()) - int(used.read_text()))
    return min(found) if found else None


def human(count: float) -> str:
    """Bytes as a person reads them: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
