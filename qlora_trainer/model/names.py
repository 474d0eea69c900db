"""Which tensor of a checkpoint becomes which parameter of the model, by transformers' own rules.

On disk a tensor may be called otherwise than in the model: with or without the model's prefix, or by an older name that
transformers translates. Its renaming is asked here, name by name, so there is no second scheme of ours. Where it makes
one parameter of several tensors, or the other way round, the names are distinguished and left to its own loader, unless
the model has a parameter for each tensor (model/modules/experts.py).
"""

from dataclasses import dataclass
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from qlora_trainer.common.errors import ModelError
from qlora_trainer.weights.model_directory import ModelDirectory


@dataclass(frozen=True)
class NameMatch:
    """The names of a checkpoint next to those of the model."""

    found: dict[str, str]  # model's name -> the checkpoint's
    converted: dict[str, str]  # checkpoint's name -> model's name of what it is merged into or split from
    unused: list[str]  # checkpoint's names that no parameter takes


def match_names(model: Any, directory: ModelDirectory) -> NameMatch:
    """Match the tensors of a checkpoint with the parameters and stored buffers of `model`, which may be on meta.

    Statistics of prequantized weights go with their weights, and are in no list.

    Raises:
        ModelError: one parameter is stored under two names, such as with and without the model's prefix.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    statistics = {info.name for found in directory.quant_states.values() for info in found.values()}

    match = NameMatch({}, {}, [])
    for name in directory.tensors:
        if name in statistics:
            continue
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state:  # what would be merged has a place of its own
            renamed, pattern = rename_source_key(name, renamings, [], prefix, state)
        if renamed not in state and name in state:  # a rule that was meant for older checkpoints
            renamed, pattern = name, None
        if renamed in match.found:
            raise ModelError(
                f"{directory} stores {renamed} twice, as {match.found[renamed]} and as {name}; which "
                "one counts is left to chance. Fetch the checkpoint again, or remove the stale tensor."
            )
        if renamed not in state:
            match.unused.append(name)
        elif pattern is not None:
            match.converted[name] = renamed
        else:
            match.found[renamed] = name
    return match
