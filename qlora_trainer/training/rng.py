"""Save and restore every random number generator that training uses: Python's, numpy's, torch's, CUDA's.

No pickle: states are uint8 tensors and JSON.
"""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the state of the global generators of torch (CPU and each CUDA device), Python and numpy.

    Returns:
        uint8 tensors by name, and JSON, for `restore_rng`.
    """
    tensors = {"rng.torch.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"rng.torch.cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return tensors, {
        "python": {"version": version, "words": list(words), "gauss": gauss},
        "numpy": {
            "keys": [int(key) for key in keys],
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
    }


def restore_rng(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Put back what `rng_state` returned, on the CUDA devices that exist here.

    Args:
        tensors: of `rng_state`; others among them are ignored.
        state: its JSON.
    """
    torch.set_rng_state(tensors["rng.torch.cpu"])
    for index in range(torch.cuda.device_count()):
        if (saved := tensors.get(f"rng.torch.cuda.{index}")) is not None:
            torch.cuda.set_rng_state(saved, index)
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
    keys = np.array(numpy["keys"], dtype=np.uint32)
    np.random.set_state(("MT19937", keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
