"""Make an adapter in memory from its files: the changes that put it on its base.

The settings that make such an adapter are found by the comparison that also tells a run what to set to start from it.
Nothing of it trains, and dropout is off: it is there to compute answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from torch import nn

from qlora_trainer.adapters.file_config import FileConfig
from qlora_trainer.adapters.inject import add_adapters, load_adapter_state
from qlora_trainer.adapters.kinds.table import ADAPTER_KINDS
from qlora_trainer.adapters.peft_format import StoredAdapter
from qlora_trainer.adapters.several.changes import Change, changes_made
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.config.schema import AdapterConfig

MOST_ROUNDS = 4
"""Settings depend on each other, as alpha on rank: what differs is taken from the file, and compared again."""


@dataclass(frozen=True)
class LoadedAdapter:
    """Hold an adapter in memory, on or off its base."""

    config: FileConfig
    changes: list[Change]  # of the base, that put it on

    @property
    def kind(self) -> str:
        """Return the value of adapter.kind that it has."""
        return self.config.kind


def loaded_adapter(model: nn.Module, stored: StoredAdapter, origin: str) -> LoadedAdapter:
    """Make an adapter for a model, which is left as it is.

    Args:
        model: the base, frozen and without adapters.
        stored: the adapter as read.
        origin: of it, for messages.

    Returns:
        The adapter.

    Raises:
        AdapterError: it does not fit the model.
    """
    modules = dict(model.named_modules())
    if lost := [path for path in stored.paths if path not in modules]:
        raise AdapterError(
            f"{origin} adapts {lost[0]}, which this base has not: it was made for another architecture. Load it on the "
            "base that it was trained on."
        )
    settings = stored_settings(stored, model, origin)
    tokens = _StoredTokens(stored.config.token_ids)
    settings = settings.model_copy(update=tokens.as_settings(model))

    def put_on() -> None:
        for path in stored.config.biases(stored.tensors):  # which are written to: the base's own must stay
            module = modules.get(path)
            bias = getattr(module, "bias", None)
            if module is not None and bias is not None:
                module.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        add_adapters(model, settings, tokenizer=tokens)
        load_adapter_state(model, stored.tensors)

    changes = changes_made(model, put_on)
    for change in changes:
        if isinstance(change.after, nn.Module):
            change.after.eval()
            change.after.requires_grad_(False)
        elif isinstance(change.after, nn.Parameter):
            change.after.requires_grad_(False)
    return LoadedAdapter(stored.config, changes)


class _StoredTokens:
    """Take the place of a tokenizer, for rows of tokens that a file has by their ids.

    Args:
        ids: of the tokens.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = {str(token): token for token in ids}

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        raise AssertionError("each token is found by its name")

    def get_vocab(self) -> dict[str, int]:
        return self.ids

    def as_settings(self, model: Any) -> dict[str, list[str]]:
        """Name the tokens: those behind the base's last row are new.

        Args:
            model: the base.

        Returns:
            Settings of the section `adapter`.
        """
        if not self.ids:
            return {}
        rows = model.get_input_embeddings().weight.shape[0]
        new = [name for name, token in self.ids.items() if token >= rows]
        return {"new_tokens": new, "trainable_tokens": [name for name in self.ids if name not in new]}


def stored_settings(stored: StoredAdapter, model: nn.Module, origin: str) -> AdapterConfig:
    """Find the settings that make an adapter of the same modules and function as a file's.

    Args:
        stored: the adapter as read.
        model: the base, without adapters.
        origin: of the adapter, for the message.

    Returns:
        The section `adapter` of a config.

    Raises:
        AdapterError: there are none.
    """
    kind = ADAPTER_KINDS[stored.config.kind]
    values: dict[str, Any] = {"kind": kind.name, **stored.config.shown_settings(stored.tensors)}
    try:
        settings = AdapterConfig(**values)
        for _ in range(MOST_ROUNDS):
            differences = stored.differences(settings)
            changed = {key: found for key, (found, _) in differences.items()}
            if not changed and {*stored.paths} != {*kind.target_paths(model, settings)}:
                changed = kind.targets_as_settings(model, settings, stored.paths)
            if not changed:
                return settings
            values |= {key.removeprefix("adapter."): value for key, value in changed.items()}
            settings = AdapterConfig(**values)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise AdapterError(
            f"{origin} needs adapter.{place} to be a value that it cannot have here: {problem['msg']}. Load it with "
            "PEFT."
        ) from error
    raise AdapterError(
        f"{origin} adapts {len(stored.paths)} modules in a way that no settings describe for this base. Load it with "
        "PEFT."
    )
