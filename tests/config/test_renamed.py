"""Promises of renamed keys: an old key is refused with its new name."""

import pytest
from minimal_config import MINIMAL, problems_of


@pytest.mark.parametrize(
    ("section", "old", "value", "refusal"),
    [
        ("model", "output_head", "4bit", "model.output_head was renamed to model.lm_head"),
        ("model", "minimum_4bit_share", 0.5, "model.minimum_4bit_share was renamed to model.min_quantized_fraction"),
        ("model", "keep_quantized", True, "model.keep_quantized was renamed to model.cache_quantized"),
        ("model", "embeddings", "host", "model.embeddings: its value host was renamed to cpu"),
        ("adapter", "targets", ["q_proj"], "adapter.targets was renamed to adapter.target_modules"),
        ("data", "heldout", 0.1, "data.heldout was renamed to data.eval"),
        ("data", "learn", "all", "data.learn was renamed to data.train_on"),
        ("data", "workers", 2, "data.workers was removed: rows are prepared by one process"),
        ("training", "batch_size", 8, "training.batch_size was renamed to training.global_batch_size"),
        ("training", "kept_layers", 2, "training.kept_layers was renamed to training.uncheckpointed_layers"),
        ("training", "offload_every", 2, "training.offload_every was renamed to training.offload_every_n_layers"),
        (
            "training",
            "activations",
            "recompute",
            "training.activations was renamed to training.activation_checkpointing, and its value recompute was "
            "renamed to full",
        ),
        (
            "training",
            "activation_checkpointing",
            "tile",
            "training.activation_checkpointing: its value tile was renamed to tiled",
        ),
    ],
)
def test_an_old_key_is_refused_with_its_new_name(section: str, old: str, value: object, refusal: str) -> None:
    raw = {**MINIMAL, section: {**MINIMAL.get(section, {}), old: value}}
    message = problems_of(raw)
    assert refusal in message
    assert message.count("renamed") == refusal.count("renamed")
    assert "unknown key" not in message
