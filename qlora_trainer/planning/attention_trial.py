"""Say whether a base's attention keeps packed rows apart, from the user's cache where the same config was tried before.

The trial itself is in empty_run.py: it imports torch, transformers' models and bitsandbytes, and builds the model.
"""

import hashlib
import json
import time
from importlib import metadata
from pathlib import Path

from qlora_trainer.common.file_identity import FileRecords
from qlora_trainer.weights.model_directory import ModelDirectory

_DECIDING = ("torch", "transformers", "qlora-trainer")  # another version may attend otherwise


def known_to_keep_apart(directory: ModelDirectory, cache_dir: Path) -> bool | None:
    """Return what `keeps_apart` finds, which is tried once for each config.

    Args:
        directory: holds the base's config.json.
        cache_dir: the user's cache, as `user_cache` finds it.

    Returns:
        None where the base cannot be tried; a run says why.
    """
    config = json.dumps(dict(directory.config_json), sort_keys=True)
    versions = [f"{package} {metadata.version(package)}" for package in _DECIDING]
    subject = f"rows kept apart by {hashlib.sha256(config.encode()).hexdigest()} under {', '.join(versions)}"
    records, began = FileRecords(cache_dir / "attention"), time.time_ns()
    known = records.find(subject, [])
    if isinstance(known, bool):
        return known
    from qlora_trainer.planning.empty_run import keeps_apart

    found = keeps_apart(directory)
    if found is not None:
        records.keep(subject, [], found, began)
    return found
