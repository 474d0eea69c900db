"""Load a run's configuration: YAML and `section.key=value` overrides become a RunConfig, or one error.

`load_config` reports every problem at once (an unknown key with the nearest known one), and makes local paths absolute,
so that the copy in the run directory is valid from any current directory. Left out: the keys (schema.py).
"""

import difflib
import glob
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from qlora_trainer.common.command_line import command_line
from qlora_trainer.common.errors import ConfigError, FileMissingError
from qlora_trainer.common.units import counted
from qlora_trainer.config.adapter_schema import settings_of_others
from qlora_trainer.config.data_schema import Source, SourceFile
from qlora_trainer.config.override import override
from qlora_trainer.config.renamed import old_key, renamed_value
from qlora_trainer.config.schema import RunConfig


def load_config(path: Path | None, overrides: Iterable[str] = (), values: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a YAML config, set values in it, and apply `section.key=value` overrides.

    Relative local paths are taken from the current directory, and made absolute.

    Args:
        path: of the YAML file; None: there is none.
        overrides: `section.key=value`, the value as YAML.
        values: by `section.key`, as they are.

    Returns:
        The config.

    Raises:
        FileMissingError: there is no such file.
        ConfigError: not YAML, or wrong keys or values; the message lists all of them.
    """
    raw, texts = ({}, {}) if path is None else _read_yaml(path)
    for key, value in (values or {}).items():
        for mapping in (raw, texts):
            node, leaf = _node(mapping, key, key)
            node[leaf] = value
    for setting in overrides:
        _apply_override(raw, setting, _UniqueKeyLoader)
        _apply_override(texts, setting, yaml.BaseLoader)
    return make_config(raw, origin=str(path or "the command line"), texts=texts)


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the sections of a YAML file: with values, and with each value as the text that was written."""
    if not path.is_file():
        raise FileMissingError(
            f"There is no config file {path}. `{command_line('init')}` writes one, and "
            f"{Path(__file__).parents[1] / 'configs'} has examples."
        )
    try:
        with path.open(encoding="utf-8") as file:
            raw = yaml.load(file, _UniqueKeyLoader)
            file.seek(0)
            texts = yaml.load(file, yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} should hold sections such as model: and data:, but holds {type(raw).__name__}.")
    return raw, texts


def written_value(path: Path, overrides: Iterable[str], key: str) -> Any:
    """Read one value of a YAML config as it is written, though others may be wrong.

    A file or an override that cannot be read raises ConfigError, as of `load_config`.

    Args:
        path: of the YAML file.
        overrides: `section.key=value` of keys to set.
        key: `section.key`.

    Returns:
        The value; None if neither the file nor an override has it.
    """
    raw, _ = _read_yaml(path)
    for setting in overrides:
        _apply_override(raw, setting, _UniqueKeyLoader)
    node, leaf = _node(raw, key, key)
    return node.get(leaf)


def make_config(
    raw: Mapping[str, Any], origin: str = "the config", texts: Mapping[str, Any] | None = None
) -> RunConfig:
    """Check a nested mapping and make the config from it.

    Args:
        raw: values by section and key.
        origin: of the mapping, for the error message.
        texts: the same, each value as text as it was written, where that is known.

    Returns:
        The config, with absolute local paths.

    Raises:
        ConfigError: wrong keys or values; the message lists all of them.
    """
    try:
        config = RunConfig.model_validate(raw)
    except ValidationError as error:
        lines = _describe(error.errors(), raw, raw if texts is None else texts)
        raise ConfigError(
            f"{origin} has {counted(len(lines), 'problem')}:\n" + "\n".join(f"  - {line}" for line in lines)
        ) from None
    return _with_absolute_paths(config)


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved config as YAML, with every key but the settings of other kinds of adapters.

    Args:
        config: to write.
        path: of the file.
    """
    path.write_text(dump_config(config), encoding="utf-8")


def dump_config(config: RunConfig) -> str:
    """Format the resolved config as YAML, with every key but the settings of other kinds of adapters.

    Args:
        config: to format.

    Returns:
        The YAML text.
    """
    content = config.model_dump()
    for name in settings_of_others(config.adapter.kind):
        del content["adapter"][name]
    return yaml.safe_dump(content, sort_keys=False)


class _UniqueKeyLoader(yaml.SafeLoader):
    """Load YAML, but refuse a key that occurs twice in a section: PyYAML would silently take the last one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"the key {key.value} occurs twice in one section; keep one"
                    raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return node

    def construct_decimal(self, node: yaml.ScalarNode) -> int | float:
        # YAML 1.1 takes 010 for octal and 1:30 for minutes and seconds: what could mean another number is refused.
        make = self.construct_yaml_float if node.tag.endswith("float") else self.construct_yaml_int
        number = make(node)
        if re.fullmatch(r"[-+]?0[0-7_]+|.*:.*", node.value):
            problem = (
                f"{node.value} is the number {number} in YAML. Write the number you mean in plain digits, or put it in "
                f'quotes if it is text: "{node.value}"'
            )
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return number


for _tag in ("int", "float"):
    _UniqueKeyLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _UniqueKeyLoader.construct_decimal)


def _apply_override(raw: dict[str, Any], setting: str, loader: type[yaml.SafeLoader | yaml.BaseLoader]) -> None:
    """Set the value of one `section.key=value` in a nested mapping."""
    key, separator, text = setting.partition("=")
    if not separator or not key:
        raise ConfigError(f"{setting!r} is not of the form section.key=value, such as adapter.rank=8.")
    node, leaf = _node(raw, key, setting)
    try:
        node[leaf] = yaml.load(text, loader)
    except yaml.YAMLError as error:
        if text.startswith("*"):  # to YAML an alias, which one value alone cannot have: a pattern of files
            node[leaf] = text
            return
        raise ConfigError(f"{setting!r}: the value cannot be read: {error}") from error


def _node(raw: dict[str, Any], key: str, written: str) -> tuple[dict[str, Any], str]:
    """Find the section that a key is in, which is made at need, and the key's name there."""
    *parents, leaf = key.split(".")
    node = raw
    for parent in parents:
        if not node.get(parent):  # absent, or a bare section
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise ConfigError(f"{written!r}: {parent} is a value in the config, not a section.")
    return node, leaf


def _describe(problems: Sequence[Mapping[str, Any]], raw: Mapping[str, Any], texts: Mapping[str, Any]) -> list[str]:
    """Make one sentence from the errors of Pydantic at each key.

    If a key takes several types, Pydantic reports the errors of each type. Errors at deeper keys replace those above
    them (a key inside a list that could also have been a name); errors at one key are joined.
    """
    by_place: dict[str, list[Mapping[str, Any]]] = {}
    for problem in problems:
        by_place.setdefault(_place(problem), []).append(problem)
    return [
        _sentence(place, found) + _quoting(found[0], problems, raw, texts)
        for place, found in by_place.items()
        if not any(other.startswith(f"{place}.") for other in by_place)
    ]


def _sentence(place: str, problems: Sequence[Mapping[str, Any]]) -> str:
    first = problems[0]
    if first["type"] == "extra_forbidden":
        return old_key(place, first["input"]) or f"unknown key {place}{_suggestion(place)}"
    if first["type"] == "missing":
        return f"{place} is missing, and has no default"
    messages = [problem["msg"].removeprefix("Value error, ") for problem in problems]
    if not place or (first["type"] == "value_error" and "." not in place):  # of several keys, which it names
        return messages[0]
    if renamed := renamed_value(place, first["input"]):
        return f"{place}: {renamed}"
    return f"{place}: {', or '.join(m[0].lower() + m[1:] for m in messages)} (found {first['input']!r})"


def _quoting(
    problem: Mapping[str, Any], problems: Sequence[Mapping[str, Any]], raw: Mapping[str, Any], texts: Mapping[str, Any]
) -> str:
    """Return the override to write for text that YAML takes for a number, a date, or true or false; else ""."""
    if problem["type"] != "string_type" or isinstance(problem["input"], Mapping | list | None):
        return ""
    places = {tuple(p for p in each["loc"] if p != "[key]" and not _is_union_label(p)) for each in problems}
    section, key = problem["loc"][:2]

    def quoted(value: Any, text: Any, place: tuple[Any, ...]) -> Any:
        if isinstance(value, Mapping):
            by_key = text.items() if isinstance(text, Mapping) and len(text) == len(value) else value.items()
            pairs = zip(value.items(), by_key, strict=True)
            return {str(written): quoted(v, t, (*place, k)) for (k, v), (written, t) in pairs}
        if isinstance(value, list):
            in_order = text if isinstance(text, list) and len(text) == len(value) else value
            return [quoted(v, t, (*place, i)) for i, (v, t) in enumerate(zip(value, in_order, strict=True))]
        return str(text) if place in places else value

    value = quoted(raw[section][key], texts.get(section, {}).get(key), (section, key))
    return f"; if it is text, put it in quotes: {override(f'{section}.{key}', value)}"


def _place(problem: Mapping[str, Any]) -> str:
    """Return the key as the user wrote it, such as data.train.0.path."""
    *parents, leaf = problem["loc"] or ("",)
    is_users = problem["type"] == "extra_forbidden" or not _is_union_label(leaf)
    return ".".join(str(part) for part in [p for p in parents if not _is_union_label(p)] + [leaf] * is_users)


def _is_union_label(part: int | str) -> bool:
    """Return True if a part of a key is the type of a union that Pydantic tried, which no user wrote."""
    return isinstance(part, str) and (part in {"str", "float", "constrained-int", "int", "SourceFile"} or "[" in part)


def _suggestion(unknown: str) -> str:
    """Suggest the key that an unknown one may have meant, or list the known ones."""
    if unknown.startswith(("data.train.", "data.eval.")):  # inside a source
        fields = Source.model_fields if unknown.startswith("data.train.") else SourceFile.model_fields
        source, _, leaf = unknown.rpartition(".")
        close = difflib.get_close_matches(leaf, fields, n=1, cutoff=0.7)
        return f"; did you mean {source}.{close[0]}?" if close else f"; a source has {', '.join(fields)}"
    keys = _keys()
    near = _nearest_key(unknown, keys)
    return f"; did you mean {near}?" if near else f"; known: {', '.join(keys)}"


def _keys() -> list[str]:
    keys = []
    for section, info in RunConfig.model_fields.items():
        fields = getattr(info.annotation, "model_fields", {})
        keys += [f"{section}.{name}" for name in fields]
    return keys


def _nearest_key(unknown: str, keys: list[str]) -> str | None:
    leaf = unknown.rsplit(".", 1)[-1]
    by_leaf = {key.rsplit(".", 1)[-1]: key for key in reversed(keys)}
    candidates = difflib.get_close_matches(unknown, keys + list(RunConfig.model_fields), n=1, cutoff=0.75)
    if candidates:
        return candidates[0]
    close = difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.7)
    return by_leaf[close[0]] if close else None


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    """Make paths and patterns of what is on disk absolute; other names stay, as they may be names on the hub."""
    data = config.data
    train = (
        _absolute(data.train)
        if isinstance(data.train, str)
        else [source.model_copy(update={"path": _absolute(source.path)}) for source in data.train]
    )
    eval_set = _absolute_eval(data.eval)
    init_from = config.adapter.init_from and _absolute(config.adapter.init_from)
    output_dir = str(Path(config.training.output_dir).expanduser().absolute())
    return config.replace(
        {
            "model.name": _absolute(config.model.name),
            "adapter.init_from": init_from,
            "data.train": train,
            "data.eval": eval_set,
            "training.output_dir": output_dir,
        }
    )


def _absolute_eval(
    eval_set: float | str | SourceFile | list[SourceFile],
) -> float | str | SourceFile | list[SourceFile]:
    if isinstance(eval_set, list):
        return [source.model_copy(update={"path": _absolute(source.path)}) for source in eval_set]
    if isinstance(eval_set, SourceFile):
        return eval_set.model_copy(update={"path": _absolute(eval_set.path)})
    return _absolute(eval_set) if isinstance(eval_set, str) else eval_set


def _absolute(name: str) -> str:
    path = Path(name).expanduser()
    is_local = path.exists() or (glob.has_magic(name) and bool(glob.glob(str(path), recursive=True)))  # noqa: PTH207
    return str(path.absolute()) if is_local else name
