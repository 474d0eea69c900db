"""Match each tensor of a checkpoint with a parameter of the model, by transformers' own renaming rules.

On disk a tensor may have another name than in the model: with or without the model's prefix, or an older name that
transformers translates. Its renaming is called for each name, so there is no second scheme of ours. Where it makes one
parameter of several tensors, or several of one, the names are listed apart and left to its own loader, unless the model
has a parameter for each tensor (model/modules/experts.py).
"""

from dataclasses import dataclass
from typing import Any

from qlora_trainer.common.errors import ModelError
from qlora_trainer.common.transformers_internals import conversion_mapping, renamed
from qlora_trainer.weights.model_directory import ModelDirectory


@dataclass(frozen=True)
class NameMatch:
    """Hold the names of a checkpoint together with those of the model."""

    found: dict[str, str]  # model's name -> the checkpoint's
    converted: dict[str, str]  # checkpoint's name -> model's name of what it is merged into or split from
    unused: list[str]  # checkpoint's names that no parameter takes


def match_names(model: Any, directory: ModelDirectory) -> NameMatch:
    """Match the tensors of a checkpoint with the parameters and stored buffers of a model.

    The tables of prequantized weights belong to their weights, and are in no list.

    Args:
        model: of transformers, may be on meta.
        directory: the checkpoint.

    Returns:
        The names, each in one list.

    Raises:
        ModelError: one parameter is stored under two names, such as with and without the model's prefix.
    """
    renamings, converters = conversion_mapping(model)
    state, prefix = model.state_dict(), model.base_model_prefix
    statistics = {info.name for found in directory.quant_states.values() for info in found.values()}

    match = NameMatch({}, {}, [])
    for name in directory.tensors:
        if name in statistics:
            continue
        new_name, pattern = renamed(name, renamings, converters, prefix, state)
        if new_name not in state:  # a tensor to be merged may have a parameter of its own
            new_name, pattern = renamed(name, renamings, [], prefix, state)
        if new_name not in state and name in state:  # the rule was meant for older checkpoints
            new_name, pattern = name, None
        if new_name in match.found:
            raise ModelError(
                f"{directory} stores {new_name} twice, as {match.found[new_name]} and as {name}; it "
                "is undefined which one is loaded. Fetch the checkpoint again, or remove the stale tensor."
            )
        if new_name not in state:
            match.unused.append(name)
        elif pattern is not None:
            match.converted[name] = new_name
        else:
            match.found[new_name] = name
    return match
