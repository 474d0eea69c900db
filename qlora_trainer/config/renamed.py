"""List the config keys and values of versions before 0.2, so that an old config is refused with what to write instead.

No aliases: a key has one name. Left out: keys that never existed (load.py suggests the nearest).
"""

from typing import Any

KEYS = {
    "model.output_head": "model.lm_head",
    "model.minimum_4bit_share": "model.min_quantized_fraction",
    "model.keep_quantized": "model.cache_quantized",
    "adapter.targets": "adapter.target_modules",
    "data.heldout": "data.eval",
    "data.learn": "data.train_on",
    "training.batch_size": "training.global_batch_size",
    "training.activations": "training.activation_checkpointing",
    "training.kept_layers": "training.uncheckpointed_layers",
    "training.offload_every": "training.offload_every_n_layers",
}
REMOVED = {
    "data.workers": "was removed: rows are prepared by one process, which uses all cores. Delete it",
}
VALUES = {
    "model.embeddings": {"host": "cpu"},
    "training.activation_checkpointing": {"keep": "none", "recompute": "full", "tile": "tiled"},
}


def old_key(key: str, value: Any) -> str | None:
    """Look up what became of an old key, and of its value.

    Args:
        key: `section.key` as the user wrote it.
        value: as the user wrote it.

    Returns:
        The sentence that refuses the key; None if it is not an old one.
    """
    if key in REMOVED:
        return f"{key} {REMOVED[key]}"
    if key not in KEYS:
        return None
    new = renamed_value(KEYS[key], value)
    return f"{key} was renamed to {KEYS[key]}" + (f", and {new}" if new else "")


def renamed_value(key: str, value: Any) -> str | None:
    """Look up the new name of an old value.

    Args:
        key: `section.key`, by its present name.
        value: as the user wrote it.

    Returns:
        "its value X was renamed to Y"; None if it is not an old value of this key.
    """
    new = VALUES.get(key, {}).get(value) if isinstance(value, str) else None
    return f"its value {value} was renamed to {new}" if new else None
