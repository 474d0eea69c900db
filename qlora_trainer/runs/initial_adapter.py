"""May a run start from this adapter? Its settings and its base are compared before it is taken for what it is not.

An adapter of ours, a final one or a checkpoint, says which base it was trained on, to the last weight. Another's only
names a base, which may be the same under another name: that is reported, not refused.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_trainer.adapters.peft_format import StoredAdapter, setting_differences
from qlora_trainer.adapters.targets import find_targets
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.model.empty import empty_model
from qlora_trainer.model.fingerprint import BaseFingerprint
from qlora_trainer.runs.directory import read_base_record
from qlora_trainer.weights.model_directory import ModelDirectory


def check_settings(initial: StoredAdapter, config: RunConfig, directory: ModelDirectory) -> None:
    """Compare rank, alpha, scaling rule, bias mode and layers; takes seconds, as an empty model has the same layers.

    Raises:
        AdapterError: they differ; the message has the settings to set.
    """
    changes = [
        f"{key}={str(found).lower()}" for key, (found, _) in setting_differences(initial.config, config.adapter).items()
    ]
    model = empty_model(directory)
    if set(initial.paths) != set(find_targets(model, config.adapter.target_modules)):
        changes.append(f"adapter.target_modules=[{','.join(target_names(model, initial.paths))}]")
    if changes:
        raise AdapterError(
            f"The adapter {config.adapter.init_from} was made with other settings than this config has. To start from "
            f"it, set {' '.join(changes)}."
        )


def check_base(initial: StoredAdapter, config: RunConfig, base: BaseFingerprint) -> list[str]:
    """Compare the base an adapter was trained on with the run's; returns warnings.

    Raises:
        AdapterError: the adapter is ours and was trained on another base.
        CheckpointError: what it says of its base cannot be read.
    """
    source = Path(str(config.adapter.init_from))
    record = read_base_record(source)
    if record:
        if difference := record.fingerprint.difference(base):
            raise AdapterError(
                f"The adapter {source} was trained on another base than {config.model.name}: {difference}. Name its "
                "own base as model.name. (To try it on this base all the same, copy the adapter's two files alone.)"
            )
        return []
    named = initial.config.base_model_name_or_path
    if not named or Path(named).name.lower() == Path(config.model.name).name.lower():
        return []
    return [
        f"The adapter {source} was made for {named}, and the base of this run is {config.model.name}. If these are "
        "different weights, it will not do what it was trained for."
    ]


def target_names(model: Any, adapted: Sequence[str]) -> list[str]:
    """The shortest names that PEFT resolves to exactly the adapted layers: the ends of their paths, or the paths."""
    ends = {path.rsplit(".", 1)[-1] for path in adapted}
    matched = [path for path, _ in model.named_modules() if path.rsplit(".", 1)[-1] in ends]
    return sorted(ends) if sorted(matched) == sorted(adapted) else sorted(adapted)
