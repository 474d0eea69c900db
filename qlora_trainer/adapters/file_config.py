"""Say what adapter_config.json holds for every kind of adapter, and how one is read strictly.

Each kind has a subclass with its own keys, the checks of its tensors, and what becomes of a weight (kinds/). A key that
would make the adapter another function is refused by name instead of ignored; all problems of a file are reported at
once. Left out: the files (peft_format.py).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from qlora_trainer.adapters.folds import Fold, MergedTokens
from qlora_trainer.config.schema import AdapterConfig

PEFT_PREFIX = "base_model.model."

Differences = dict[str, tuple[Any, Any]]
"""(the file's value, the config's) by config key."""


class FileConfig(BaseModel, ABC):
    """Hold the keys of adapter_config.json that we write and read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    # Keys of PEFT's config that say how an adapter came about or where it was put, which its tensors show better.
    ignored: ClassVar[frozenset[str]] = frozenset({"auto_mapping", "peft_version"})
    # Keys that change what an adapter does, and what to do about them. Neutral (null, false, empty) they pass.
    refused: ClassVar[Mapping[str, str]] = {}

    peft_type: str
    task_type: str | None = "CAUSAL_LM"
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = True

    @property
    @abstractmethod
    def kind(self) -> str:
        """Return the value of adapter.kind that such an adapter has."""

    @property
    def is_stored_transposed(self) -> bool:
        """Return True if the base stores the adapted weights (I, O), as GPT-2's Conv1D does."""
        return False

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Return the tokens whose rows of embedding and head trained, ascending; none for most kinds."""
        return ()

    @classmethod
    def from_raw(cls, raw: Mapping[str, Any]) -> tuple[Self | None, list[str]]:
        """Check the keys of a file.

        Args:
            raw: of adapter_config.json.

        Returns:
            The config, None where there are problems; and the problems, a line each.
        """
        known, problems = {}, []
        for key, value in raw.items():
            if key in cls.refused and value:
                problems.append(f"{key} is {value_in_brief(value)}: {cls.refused[key]}")
            elif key in cls.model_fields:
                known[key] = value
            elif key not in cls.ignored and value:
                unknown = "this key is not known here, and may change what the adapter does"
                problems.append(f"{key} is {value_in_brief(value)}: {unknown}")
        problems += cls.more_problems(known)
        try:
            # What is refused has been reported; here it must not be reported again.
            config = cls.model_validate({k: v for k, v in known.items() if k not in cls.refused})
        except ValidationError as error:
            problems += [_as_text(item["loc"], item["msg"]) for item in error.errors()]
        return (None if problems else config), list(dict.fromkeys(problems))

    @classmethod
    def more_problems(cls, known: Mapping[str, Any]) -> list[str]:
        """Find what else makes an adapter another function than ours.

        Args:
            known: the file's values of our keys.

        Returns:
            A line each.
        """
        return []

    @abstractmethod
    def check_tensors(self, tensors: Mapping[str, Tensor], origin: str) -> None:
        """Check that tensors are those of such an adapter, by name, shape, dtype and value.

        Args:
            tensors: by PEFT's names.
            origin: of them, for the message.

        Raises:
            AdapterError: they are not.
        """

    @abstractmethod
    def adapted_paths(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """List the paths of the adapted modules in the base model, in the order of the file.

        Args:
            tensors: by PEFT's names.

        Returns:
            The paths; none where the kind adapts no module in particular.
        """

    @abstractmethod
    def folds(self, tensors: Mapping[str, Tensor]) -> dict[str, Fold]:
        """Say what becomes of each adapted weight in a merge.

        Args:
            tensors: by PEFT's names, as `check_tensors` passed them.

        Returns:
            Folds by the path of the module.
        """

    def biases(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Find the biases of the base that were trained.

        Args:
            tensors: by PEFT's names, as `check_tensors` passed them.

        Returns:
            (O,) by the path of the module.
        """
        return {}

    def bias_folds(self, tensors: Mapping[str, Tensor]) -> dict[str, Fold]:
        """Say what becomes of the biases of adapted layers in a merge.

        Args:
            tensors: by PEFT's names, as `check_tensors` passed them.

        Returns:
            Folds by the path of the module, whether it has a bias or not.
        """
        return {}

    def shown_settings(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Find settings that only the tensors show, and that `settings_of` does not compare.

        Args:
            tensors: by PEFT's names.

        Returns:
            Values by the names of fields of AdapterConfig.
        """
        return {}

    def in_order(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put what a file has in an order of its own in ours: rows of tokens in that of the ids.

        Args:
            tensors: by PEFT's names, as `check_tensors` passed them.

        Returns:
            The tensors.
        """
        return dict(tensors)

    def token_rows(self, tensors: Mapping[str, Tensor]) -> dict[str, MergedTokens]:
        """Find the rows of tokens that were trained.

        Args:
            tensors: by PEFT's names, in the order of the ids.

        Returns:
            Rows by the path of the embedding or head; of the embedding alone where the head shares its weight.
        """
        return {}

    def differences(self, tensors: Mapping[str, Tensor], wanted: AdapterConfig) -> Differences:
        """Find settings that make an adapter's numbers another function.

        Args:
            tensors: by PEFT's names.
            wanted: the run's section `adapter`.

        Returns:
            The differences.
        """
        pairs = {"adapter.kind": (self.kind, wanted.kind), **self.settings_of(tensors, wanted)}
        return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}

    @abstractmethod
    def settings_of(self, tensors: Mapping[str, Tensor], wanted: AdapterConfig) -> Differences:
        """Put the settings that concern an adapter of this kind next to a run's.

        Args:
            tensors: by PEFT's names.
            wanted: the run's section `adapter`, of any kind.

        Returns:
            Pairs, equal or not.
        """

    def as_json(self) -> dict[str, Any]:
        """Return the config as it is written.

        Returns:
            JSON.
        """
        content = self.model_dump()
        if isinstance(content.get("target_modules"), list):
            content["target_modules"] = sorted(content["target_modules"])
        return content


def value_in_brief(value: Any) -> str:
    """Write a value of a file for a message.

    Args:
        value: any.

    Returns:
        At most 80 characters.
    """
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _as_text(place: tuple[int | str, ...], message: str) -> str:
    """Write one of pydantic's errors as text; what concerns several keys has no place."""
    return f"{place[0]}: {message.lower()}" if place else message.removeprefix("Value error, ")
