"""Write what training taught about turns: the tokens that end an answer, and the chat template where the base has none.

Without these a model that was taught turns never stops elsewhere, or is asked in another format. They are in
generation_config.json and chat_template.jinja, of a merged model and next to an adapter. All else that a base has in
these files stays, and what needs no change is copied byte for byte (side_files.py).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qlora_trainer.common.atomic import write_text
from qlora_trainer.weights.listing import read_json_object
from qlora_trainer.weights.model_directory import GENERATION_CONFIG, ModelDirectory

CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
MORE_TEMPLATES = "additional_chat_templates"


@dataclass(frozen=True)
class TaughtTurns:
    """Hold what training taught about turns."""

    stop_tokens: Mapping[int, str] = field(default_factory=dict)  # that end an answer: id and text
    templates: Mapping[str, str] = field(default_factory=dict)  # by name, "default" for the one that is always there
    is_new_template: bool = False  # the base has none
    not_written: str = ""  # what no file can say of it, as a sentence


def base_stop_ids(directory: ModelDirectory) -> list[int]:
    """Read which tokens end a text by a model's own settings, as transformers does.

    Args:
        directory: of the model.

    Returns:
        Of generation_config.json, or of config.json where there is none.
    """
    found = directory.generation_json.get("eos_token_id")
    return [token for token in (found if isinstance(found, list) else [found]) if isinstance(token, int)]


def turn_files(directory: ModelDirectory, taught: TaughtTurns) -> tuple[dict[str, str], list[str]]:
    """Make the files of a base that training changed.

    Args:
        directory: of the base.
        taught: what training taught.

    Returns:
        (text by file name, a sentence for each file on what was changed); both empty where nothing was.
    """
    files, changes = {}, []
    had = base_stop_ids(directory)
    if new := [token for token in taught.stop_tokens if token not in had]:
        values = {key: value for key, value in directory.generation_json.items() if key != "_from_model_config"}
        values["eos_token_id"] = stops = [*had, *new] if had or len(new) > 1 else new[0]
        files[GENERATION_CONFIG] = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        names = " and ".join(f"{taught.stop_tokens[token]} ({token})" for token in new)
        changes.append(
            f"{GENERATION_CONFIG}: eos_token_id is {stops}, with {names}, which ended the answers in training"
        )
    if taught.is_new_template:
        files |= _template_files(taught)
        settings = directory.path / TOKENIZER_CONFIG
        found = read_json_object(settings) if settings.is_file() else {}
        if "chat_template" in found:  # empty, and llama.cpp would take it before the file
            del found["chat_template"]
            files[TOKENIZER_CONFIG] = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
            changes.append(f"{TOKENIZER_CONFIG}: without its empty chat_template, which some programs take first")
        changes.append(f"{CHAT_TEMPLATE}: the plain format of the rows, as the base has no template")
    return files, [*changes, *([taught.not_written] if taught.not_written else [])]


def write_turn_files(directory: ModelDirectory, taught: TaughtTurns, work: Path) -> list[str]:
    """Write the tokens that end an answer and the chat template next to an adapter, changed or not.

    Args:
        directory: of the base.
        taught: what training taught.
        work: gets the files.

    Returns:
        A sentence for each file on what was changed.
    """
    files = _template_files(taught)
    if values := directory.generation_json:
        files[GENERATION_CONFIG] = json.dumps(dict(values), indent=2, ensure_ascii=False) + "\n"
    changed, changes = turn_files(directory, taught)
    files |= {name: text for name, text in changed.items() if name != TOKENIZER_CONFIG}  # it has no tokenizer
    for name, text in files.items():
        (work / name).parent.mkdir(exist_ok=True)
        write_text(work / name, text)
    return changes


def _template_files(taught: TaughtTurns) -> dict[str, str]:
    places = {"default": CHAT_TEMPLATE}
    return {places.get(name, f"{MORE_TEMPLATES}/{name}.jinja"): text for name, text in taught.templates.items()}
