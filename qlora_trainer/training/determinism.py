"""Make training on CUDA repeat bit for bit, where a run asks for it, and find what threads of a CPU cannot repeat.

On a CPU a run repeats anyway, as long as threads that run at once do nothing in an order of their own. On CUDA torch's
attention sums the gradients of the queries, and operations that add at indices their sums, in whatever order the
threads come; torch has an ordered version of each, taken while deterministic
algorithms are asked for. cuBLAS repeats its results only under one of two sizes of its workspace, which it reads from
the environment when it is first used. docs/decisions/0024 says what was examined. Left out: runs on another card, or
under other versions, which add in other orders.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qlora_trainer.adapters.trainable import adapter_modules, trainable_parameters
from qlora_trainer.common.errors import ConfigError, TrainingError
from qlora_trainer.config.schema import TrainingConfig
from qlora_trainer.model.modules.nf4_linear import NF4Linear
from qlora_trainer.model.modules.row_positions import longest_with_own_positions

CUBLAS_SETTING = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_DETERMINISTIC = ":4096:8"  # of the two settings under which cuBLAS repeats its results, the faster one

MOST_WORKERS = 8  # each takes a workspace of its own; more than two were not measured

# In the names of settings by which a language model draws random numbers; other heads have dropout of their own.
_RANDOM = re.compile("^(?!summary|classifier).*(drop|jitter|noise)")

REPEATING = (CUBLAS_DETERMINISTIC, ":16:8")  # torch takes no others


def set_up_cublas(device: str) -> None:
    """Set the environment variable under which cuBLAS repeats its results. Call it before CUDA is first used.

    Args:
        device: model.device; on a CPU nothing is set.

    Raises:
        ConfigError: it is too late, or the user has another setting.
    """
    if device == "cpu" or not torch.cuda.is_available():
        return
    found = os.environ.get(CUBLAS_SETTING)
    if found in REPEATING:
        return
    if found is not None:
        raise ConfigError(
            f"training.deterministic is true and the environment variable {CUBLAS_SETTING} is {found!r}, under which "
            f"cuBLAS does not repeat its results. Unset it, or set it to {' or '.join(REPEATING)}."
        )
    if torch.cuda.is_initialized():
        raise ConfigError(
            f"training.deterministic is true, and cuBLAS repeats its results only where the environment variable "
            f"{CUBLAS_SETTING} was set before CUDA is first used; this process has used it. Set it to "
            f"{CUBLAS_DETERMINISTIC} before, or start the run in a process of its own."
        )
    os.environ[CUBLAS_SETTING] = CUBLAS_DETERMINISTIC


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Make torch use deterministic algorithms in the block, and afterward what it used before.

    Memory that a tensor begins with is not filled, as torch would do besides: no operation here reads what nothing has
    written (a test fills it with NaN and compares), and filling costs time at every allocation.

    Args:
        wanted: False: nothing changes.

    Yields:
        None.

    Raises:
        TrainingError: the model has an operation that has no deterministic version.
    """
    if not wanted:
        yield
        return
    is_enabled, only_warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False
    try:
        yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        raise TrainingError(
            f"training.deterministic is true, but {str(error).split(',')[0]}, and this model needs it. Set "
            "training.deterministic=false; a run that has started can be resumed with it."
        ) from error
    finally:
        torch.use_deterministic_algorithms(is_enabled, warn_only=only_warns)
        memory.fill_uninitialized_memory = fills


def workers_for(settings: TrainingConfig, *, on_cpu: bool) -> int:
    """Return into how many parts a micro-batch is divided on this machine, where model and rows allow it.

    Args:
        settings: the config's section `training`.
        on_cpu: the run is on a CPU; a card takes micro-batches whole.

    Returns:
        The number of parts.
    """
    if not on_cpu:
        return 1
    return min(torch.get_num_threads(), MOST_WORKERS) if settings.cpu_workers == "auto" else settings.cpu_workers


def repeats_side_by_side(model: Any) -> bool:
    """Return True if several threads may train a model at once, and compute the same again.

    They do not where the model draws random numbers, which go to whichever thread comes first (adapters draw from a
    generator of each thread); where a module keeps what depends on a row's length; or where autograd adds up gradients
    of a parameter that is the same one for all threads.

    Args:
        model: of transformers, with its adapters.

    Returns:
        True if they may.
    """
    config = model.config.get_text_config()
    settings = config.to_dict().items()
    draws = any(_RANDOM.match(name) and isinstance(value, int | float) and value > 0 for name, value in settings)
    draws |= any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    ours = [
        module
        for module in adapter_modules(model).values()
        if isinstance(module.base, NF4Linear) and module.runs_at_once
    ]
    added_by_us = {id(p) for module in ours for _, p in module.own_parameters()}
    all_by_us = all(id(p) in added_by_us for _, p in trainable_parameters(model))
    return all_by_us and not draws and longest_with_own_positions(config) is None
