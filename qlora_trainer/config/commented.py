"""Write a config as YAML for people: the keys that one changes first, each under what it means.

Left out: the resolved config with every key (load.py), and choosing the values.
"""

import textwrap
from collections.abc import Sequence

import yaml

from qlora_trainer.config.adapter_schema import settings_of_others
from qlora_trainer.config.schema import RunConfig

FIRST_KEYS = (
    "model.name",
    "model.embeddings",
    "model.lm_head",
    "adapter.rank",
    "adapter.alpha",
    "adapter.dtype",
    "data.train",
    "data.eval",
    "data.max_length",
    "optimizer.name",
    "optimizer.learning_rate",
    "training.output_dir",
    "training.epochs",
    "training.global_batch_size",
    "training.activation_checkpointing",
)
WIDTH = 100  # of the comments


def commented_yaml(config: RunConfig, heading: Sequence[str]) -> str:
    """Write a config's first keys, and all others that have not their defaults, each under its description.

    Args:
        config: to write.
        heading: paragraphs that come first, as comments.

    Returns:
        The YAML text, which is read as the same config.
    """
    lines = [line for paragraph in heading for line in _comment(paragraph, "")]
    for section, values in config.model_dump().items():
        fields = type(getattr(config, section)).model_fields
        defaults = {name: field.get_default() for name, field in fields.items()}
        others = settings_of_others(config.adapter.kind) if section == "adapter" else set()
        first = [name for name in fields if f"{section}.{name}" in FIRST_KEYS and name not in others]
        shown = [name for name in fields if name in first or values[name] != defaults[name]]
        if shown:
            lines += ["", f"{section}:"]
        for name in shown:
            lines += _comment(str(fields[name].description), "  ")
            written = yaml.safe_dump({name: values[name]}, sort_keys=False, allow_unicode=True)
            lines += textwrap.indent(written, "  ").splitlines()
    return "\n".join(lines) + "\n"


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=f"{indent}# ",
        subsequent_indent=f"{indent}# ",
        break_long_words=False,
        break_on_hyphens=False,
    )
