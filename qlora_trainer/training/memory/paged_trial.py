"""Try bitsandbytes' paged memory on one CUDA device: the program of the child process of managed_memory.py.

    python -P paged_trial.py INDEX

The last line printed is SUCCESS where a paged buffer was filled on the device and read on the host. Anything else, an
exit inside bitsandbytes included, is a refusal, and its last line is the reason.
"""

import ctypes
import sys

SUCCESS = "managed memory works"
ELEMENTS = 1 << 18  # 1 MiB of fp32: some pages of every size
VALUE = 3.0
CONCURRENT_MANAGED_ACCESS = 89  # CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS of cuda.h


def has_concurrent_access(index: int) -> bool:
    """Ask the driver whether host and device may use managed memory at the same time.

    Args:
        index: of the device.

    Returns:
        False if the driver says that they may not.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return True  # then the trial itself answers
    device, value = ctypes.c_int(), ctypes.c_int(1)
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), index)
        or driver.cuDeviceGetAttribute(ctypes.byref(value), CONCURRENT_MANAGED_ACCESS, device)
    )
    return bool(failed) or value.value != 0


def try_paging(index: int) -> None:
    """Fill a paged buffer on the device and read it on the host; exits with a reason where that fails.

    Args:
        index: of the device.
    """
    if not has_concurrent_access(index):
        sys.exit("the card's concurrentManagedAccess is 0: host and card may not use managed memory at the same time")
    sys.modules["kernels"] = None  # type: ignore[assignment]  # through that package bitsandbytes would download
    import bitsandbytes.functional as F
    import torch

    torch.cuda.set_device(index)
    buffer = F.get_paged(ELEMENTS, dtype=torch.float32, device=torch.device("cuda", index))
    F.fill(buffer, VALUE)
    torch.cuda.synchronize()
    if not bool((buffer == VALUE).all()):
        sys.exit("managed memory that was filled on the card reads differently on the host")
    print(SUCCESS, flush=True)


if __name__ == "__main__":
    try_paging(int(sys.argv[1]))
