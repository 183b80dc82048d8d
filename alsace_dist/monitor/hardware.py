"""What this rank's hardware holds and could do."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

GIGABYTE = 1e9
# Dense bf16 peaks of the makers' data sheets, FLOP/s.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "A10G": 70e12}


def peak_flops(device_name: str) -> float | None:
    """Peak of a GPU by its name; None if it is not in the table."""
    return next((value for key, value in PEAK_FLOPS.items() if key in device_name), None)


def peak_of(device: "torch.device") -> float | None:
    """Peak of a device; None for a CPU and for a GPU that the table lacks."""
    if device.type != "cuda":
        return None
    import torch

    return peak_flops(torch.cuda.get_device_name(device))


def memory_of(device: "torch.device") -> dict[str, float]:
    """Gigabytes by the name of their scalar: of this process, and of its device since the last call."""
    found = {"host_memory_gb": resident_bytes() / GIGABYTE}
    if device.type == "cuda":
        import torch

        found["device_allocated_gb"] = torch.cuda.memory_allocated(device) / GIGABYTE
        found["device_reserved_gb"] = torch.cuda.memory_reserved(device) / GIGABYTE
        found["device_peak_gb"] = torch.cuda.max_memory_allocated(device) / GIGABYTE
        torch.cuda.reset_peak_memory_stats(device)
    return found


def resident_bytes() -> int:
    """Memory of this process that is in RAM now; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    import resource

    return pages * resource.getpagesize()
