"""Check that a run may start from an adapter: compare the adapter's settings and base with the run's.

An adapter of ours, a final one or a checkpoint, has a fingerprint of the base it was trained on. An adapter made by
another program only names a base, which may be the same under another name: a difference is a warning, not an error.
"""

from pathlib import Path

from qlora_trainer.adapters.kinds.table import adapter_kind
from qlora_trainer.adapters.peft_format import StoredAdapter
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.common.units import counted
from qlora_trainer.config.override import override
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.model.empty import empty_model
from qlora_trainer.model.fingerprint import BaseFingerprint
from qlora_trainer.runs.directory import read_base_record
from qlora_trainer.weights.model_directory import ModelDirectory


def check_settings(initial: StoredAdapter, source: Path, config: RunConfig, directory: ModelDirectory) -> None:
    """Compare rank, alpha, scaling rule, bias mode and layers; takes seconds, as an empty model has the same layers.

    Args:
        initial: the adapter to start from.
        source: its directory.
        config: of the run.
        directory: of the run's model.

    Raises:
        AdapterError: they differ; the message lists the settings to change.
    """
    differences = initial.differences(config.adapter)
    changes = {key: found for key, (found, _) in differences.items()}
    kind = adapter_kind(config.adapter)
    if initial.config.kind == kind.name:
        model = empty_model(directory)
        targets = kind.target_paths(model, config.adapter)
        if set(initial.paths) != set(targets):
            changes |= kind.targets_as_settings(model, config.adapter, initial.paths)
            if not changes:
                raise AdapterError(
                    f"The adapter {source} has {counted(len(initial.paths), 'adapted module')}, such "
                    f"as {initial.paths[0]}, and this model would have {len(targets)}, such as {targets[0]}: it was "
                    "made for another architecture. Take the base that it was trained on."
                )
    if changes:
        raise AdapterError(
            f"The adapter {source} was made with other settings than this config has. To start from "
            f"it, set {' '.join(override(*change) for change in changes.items())}."
        )


def check_base(initial: StoredAdapter, source: Path, config: RunConfig, base: BaseFingerprint) -> list[str]:
    """Compare the base that an adapter was trained on with the run's.

    Errors are those of `compare_base`.

    Args:
        initial: the adapter to start from.
        source: its directory.
        config: of the run.
        base: the fingerprint of the run's base.

    Returns:
        Warnings: one if the adapter was made by another program and names another base.
    """
    return compare_base(initial, source, config.model.name, base, "Set model.name to that base.")


def compare_base(adapter: StoredAdapter, source: Path, base_name: str, base: BaseFingerprint, advice: str) -> list[str]:
    """Compare the base that an adapter was trained on with the one it is to be put on.

    A record of the base that cannot be read raises CheckpointError.

    Args:
        adapter: as read.
        source: its directory.
        base_name: of the base that it is to be put on.
        base: the fingerprint of that base.
        advice: a sentence that says what to do where they differ.

    Returns:
        Warnings: one if the adapter was made by another program and names another base.

    Raises:
        AdapterError: the adapter is ours and was trained on another base.
    """
    record = read_base_record(source)
    if record:
        if difference := record.fingerprint.difference(base):
            raise AdapterError(
                f"The adapter {source} was trained on another base than {base_name}: {difference}. {advice} (To try "
                "the adapter on this base anyway, copy only adapter_config.json and adapter_model.safetensors to "
                "another directory.)"
            )
        return []
    named = adapter.config.base_model_name_or_path
    if not named or Path(named).name.lower() == Path(base_name).name.lower():
        return []
    return [
        f"The adapter {source} was made for {named}, and the base here is {base_name}. If these are different weights, "
        "it will not do what it was trained for."
    ]
