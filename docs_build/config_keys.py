"""Make docs/reference/config.md: every config key with its type, default and description, from the schema."""

import datetime
import json
import types
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from qlora_trainer.config.data_schema import Scalar, Source, SourceFile
from qlora_trainer.config.schema import RunConfig

INTRODUCTION = """\
# Config

<!-- Made from the code by `make docs`: change the descriptions in qlora_trainer/config. -->

A config is a YAML file with the sections below. It needs `model.name` and `data.train`; all else has a default. Any key
can be set on the command line, where it comes before the file: `qlora train config.yaml adapter.rank=8`. A list is
written as in YAML: `'data.train=[a.jsonl, b.jsonl]'`. Relative paths are taken from the current directory. An unknown
key is an error that suggests the nearest one, and all problems are reported at once.
"""
SUBJECTS = {
    "model": "The frozen base.",
    "adapter": "The part that trains.",
    "data": "What is trained. [Data formats](../guides/data.md) has an example of each.",
    "optimizer": "How the adapter is updated. [Rank, learning rate, epochs](../guides/settings.md) helps to choose.",
    "training": "The run: its length, its batches and its memory.",
    "evaluation": "What is measured besides the eval loss.",
    "checkpoint": "What is kept.",
}


def config_page() -> str:
    """Make the page.

    Returns:
        Markdown.
    """
    parts = [INTRODUCTION]
    for section, info in RunConfig.model_fields.items():
        assert isinstance(info.annotation, type)
        assert issubclass(info.annotation, BaseModel)
        parts.append(f"## {section}\n\n{SUBJECTS[section]}\n\n{_table(info.annotation, f'{section}.')}")
        if section == "data":
            parts.append(
                "### Keys of a source\n\nOf each source in a list of `data.train`, and, but for `weight` and `count`, "
                f"of `data.eval`.\n\n{_table(Source)}"
            )
    return "\n".join(parts)


def _table(model: type[BaseModel], prefix: str = "") -> str:
    rows = ["| key | meaning |", "|---|---|"]
    for name, field in model.model_fields.items():
        default = "required" if field.is_required() else f"default `{json.dumps(field.get_default())}`"
        rows.append(f"| `{prefix}{name}` | {field.description}<br>*{_words(field.annotation)}*, {default} |")
    return "\n".join(rows) + "\n"


def _words(annotation: Any) -> str:
    """Describe a type as YAML has it."""
    parts, origin = get_args(annotation), get_origin(annotation)
    if annotation == Scalar:
        return "value"
    if annotation == Scalar | list[Scalar]:
        return r"value \| list"
    if origin is Literal:
        return r" \| ".join(map(str, parts))
    if origin in (Union, types.UnionType):
        described = [_words(part) for part in parts]
        return r" \| ".join(dict.fromkeys(described))
    if origin is list:
        return f"list of {_words(parts[0])}"
    if origin is dict:
        return f"mapping of {_words(parts[0])} to {_words(parts[1])}"
    if hasattr(annotation, "__metadata__"):
        return _words(parts[0])
    if annotation in (Source, SourceFile):
        return "source"
    return {str: "text", int: "whole number", float: "number", bool: "true or false", datetime.date: "date"}.get(
        annotation, "null"
    )
