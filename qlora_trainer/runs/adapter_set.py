"""Keep one base in memory with any number of named adapters on it, of any kind: one at a time, or several in a batch.

    adapters = AdapterSet.open("Qwen/Qwen3-8B")
    adapters.load_adapter("runs/sort", "sort")
    adapters.load_adapter("runs/reply", "reply")
    adapters.set_adapter("sort")
    with adapters.rows(["sort", "reply", None]):  # the batch's rows take these, None the base alone
        adapters.model.generate(...)

An adapter is put on by replacing some modules of the base, and taken off by putting back what was there, so a base
without its adapters has the bits that it had before. Each is checked when it is loaded: an adapter of this trainer
belongs to the base that it was trained on. Nothing here trains. Left out: weighted sums of adapters; and several
threads, which would share what is on.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from torch import nn

from qlora_trainer.adapters.joint import JointForward
from qlora_trainer.adapters.several.changes import Change, apply, undo
from qlora_trainer.adapters.several.files import AdapterFiles
from qlora_trainer.adapters.several.loaded import LoadedAdapter, loaded_adapter
from qlora_trainer.adapters.several.mixed import MixedAdapters, check_mixable, mixed_adapters
from qlora_trainer.adapters.trainable import adapter_modules
from qlora_trainer.common.cache import user_cache
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.common.progress import Progress, silent
from qlora_trainer.config.schema import ModelConfig
from qlora_trainer.data.types import PromptTokens
from qlora_trainer.model.load import Base
from qlora_trainer.model.modules.nf4_linear import share_workspaces
from qlora_trainer.model.quantized_copy import load_base
from qlora_trainer.model.source import resolve_model
from qlora_trainer.runs.directory import RUN_CONFIG_NAME
from qlora_trainer.runs.initial_adapter import compare_base
from qlora_trainer.runs.trained import newest_adapter
from qlora_trainer.training.generation import generate_answers
from qlora_trainer.training.patches import GatedMLP

_On = str | tuple[str | None, ...] | None
"""One adapter for all rows, the adapter of each row, or none."""


class AdapterSet:
    """Hold a base and adapters by name.

    Args:
        base: as loaded. Its model is put into evaluation mode, and its layers share the memory that they are
            dequantized into, as in training.
        base_name: for messages; by default its directory.
        most_loaded: adapters that stay in memory. Of more, those not used for longest are dropped, and loaded again
            from their files when they are used; what is in use always stays. None: all stay.

    Raises:
        AdapterError: the model has adapters already, or was prepared for training; or `most_loaded` is below 1.
    """

    def __init__(self, base: Base, base_name: str | None = None, most_loaded: int | None = None) -> None:
        _refuse_prepared(base.model)
        if most_loaded is not None and most_loaded < 1:
            raise AdapterError(f"most_loaded is {most_loaded}; it must be 1 or more, or None for no limit.")
        self.base = base
        self.base_name = base_name or str(base.directory)
        self.most_loaded = most_loaded
        self.warnings: list[str] = []  # of adapters that other programs made
        self._sources: dict[str, AdapterFiles] = {}
        self._loaded: dict[str, LoadedAdapter] = {}  # the one used last is last
        self._mixed: MixedAdapters | None = None  # those that rows took last
        self._on: _On = None
        self._changes: list[Change] = []  # that put it on
        self._outside: list[_On] = []  # what is put on again when the blocks end
        base.model.eval()
        share_workspaces(base.model, base.compute_dtype)

    @classmethod
    def open(
        cls,
        model: str | Path,
        *,
        most_loaded: int | None = None,
        progress: Progress = silent,
        **settings: Any,
    ) -> Self:
        """Load a base in 4 bits, as a run does.

        Args:
            model: a directory, a GGUF file, or a hub name.
            most_loaded: as of the class.
            progress: is called as files are fetched and loaded.
            **settings: of the config's section `model`, such as compute_dtype="float32".

        Returns:
            The base without adapters.
        """
        config = ModelConfig(name=str(model), **settings)
        directory = resolve_model(config.name, config.revision, user_cache(), progress)
        return cls(load_base(directory, config, user_cache(), progress), config.name, most_loaded)

    @property
    def model(self) -> Any:
        """Return the model, with the adapter on it that is set."""
        return self.base.model

    @property
    def names(self) -> list[str]:
        """Return the names of all adapters, in memory or not, in the order in which they were loaded first."""
        return list(self._sources)

    @property
    def loaded(self) -> list[str]:
        """Return the names of the adapters in memory, the one used last at the end."""
        return list(self._loaded)

    @property
    def active(self) -> str | tuple[str | None, ...] | None:
        """Return what is on: a name, the name of each row, or None."""
        return self._on

    def load_adapter(self, path: str | Path, name: str) -> None:
        """Load an adapter from its files. What is on stays on.

        A directory without an adapter raises FileMissingError, a damaged record of its base CheckpointError.

        Args:
            path: a run directory, which has its newest adapter, or a directory of PEFT's two files.
            name: for the other methods.

        Raises:
            AdapterError: the name is taken; the adapter was trained on another base, is of a kind that is not known
                here, or does not fit.
        """
        if not name or not isinstance(name, str):
            raise AdapterError(f"An adapter needs a name, and was given {name!r}. Choose a text that is not empty.")
        if name in self._sources:
            raise AdapterError(
                f"An adapter is called {name!r} already: {self._sources[name].directory}. Choose another name, or drop "
                f"that one before: drop_adapter({name!r})."
            )
        path = Path(path)
        directory = newest_adapter(path) if (path / RUN_CONFIG_NAME).is_file() else path
        source = AdapterFiles.of(directory)
        with self._bare():
            self._loaded[name] = self._read(source)
        self._sources[name] = source
        self._drop_unused()

    def set_adapter(self, name: str | None) -> None:
        """Put on one adapter for all rows, in the place of what is on.

        A name that is not loaded raises AdapterError.

        Args:
            name: of the adapter; None for the base alone.
        """
        self._refuse_in_block("set_adapter")
        self._put_on(name)

    def drop_adapter(self, name: str) -> None:
        """Forget an adapter; if it is on, the base is alone after that. A name that is not loaded raises AdapterError.

        Args:
            name: of the adapter.
        """
        self._source(name)
        self._refuse_in_block("drop_adapter")
        if self._on == name:
            self._put_on(None)
        del self._sources[name]
        self._forget(name)

    @contextlib.contextmanager
    def adapters_off(self) -> Iterator[None]:
        """Take adapters off within the block, so that the model is the plain base; then put back what was on."""
        with self._block(None):
            yield

    @contextlib.contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Let each row of the batches in the block take an adapter of its own; then put back what was on.

        The base's product is made once for all rows. Where names differ, a batch with another number of rows raises
        AdapterError, and so does one that needs gradients.

        Args:
            names: the adapter of each row, from the first; None for the base alone. If one adapter is all rows', it may
                be of any kind; different ones must be of kinds that can share a batch.

        Raises:
            AdapterError: a name is not loaded, an adapter cannot share a batch, or there are no names.
        """
        if isinstance(names, str):
            raise AdapterError(f"rows() was given the text {names!r}; give a list, with a name or None for each row.")
        if not names:
            raise AdapterError("rows() was given no names; give a name or None for each row.")
        different = dict.fromkeys(names)
        with self._block(next(iter(different)) if len(different) == 1 else tuple(names)):
            yield

    def answers(
        self,
        prompts: Sequence[PromptTokens],
        names: Sequence[str | None],
        tokenizer: Any,
        *,
        max_new_tokens: int,
        progress: Progress = silent,
    ) -> list[str]:
        """Answer each prompt greedily with an adapter of its own, several in a batch.

        Adapters that cannot share a batch raise AdapterError.

        Args:
            prompts: of `Renderer.render_prompt`.
            names: the adapter of each prompt; None for the base alone.
            tokenizer: turns what is generated into text.
            max_new_tokens: length of the longest answer, in tokens.
            progress: is called before each batch.

        Returns:
            The answers in the order of the prompts.

        Raises:
            AdapterError: there are not as many names as prompts.
        """
        if len(prompts) != len(names):
            raise AdapterError(f"There are {len(prompts)} prompts and {len(names)} names; give each prompt one.")
        if not prompts:
            return []
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "progress": progress}
        if len(set(names)) == 1:
            with self._block(names[0]):
                return generate_answers(self.model, tokenizer, prompts, **options)
        with self._block(None):
            for name in {*names} - {None}:  # before any answer, and also those whose prompts would share no batch
                check_mixable(str(name), self._adapter(str(name)))
                self._drop_unused()
            return generate_answers(
                self.model,
                tokenizer,
                prompts,
                around_batch=lambda places: self.rows([names[place] for place in places]),
                **options,
            )

    @contextlib.contextmanager
    def _block(self, on: _On) -> Iterator[None]:
        """Put something on within the block."""
        self._outside.append(self._on)
        try:
            self._put_on(on)
            yield
        finally:
            self._put_on(self._outside.pop())

    @contextlib.contextmanager
    def _bare(self) -> Iterator[None]:
        """Take off what is on, as a base can be read only without it; then put it back."""
        undo(self._changes)
        try:
            yield
        finally:
            apply(self._changes)

    def _put_on(self, on: _On) -> None:
        """Replace what is on; where that raises, it stays on."""
        if on == self._on and not isinstance(on, tuple):
            return
        with self._bare():
            changes = self._changes_of(on)  # loads what is not in memory
            self._changes, self._on = changes, on
        self._drop_unused()

    def _changes_of(self, on: _On) -> list[Change]:
        if on is None:
            return []
        if isinstance(on, str):
            return self._adapter(on).changes
        mixed = self._mix(on)
        mixed.take(on)
        return mixed.changes

    def _mix(self, names: tuple[str | None, ...]) -> MixedAdapters:
        """Return what lets rows choose from these; the one made last, where it has them all."""
        wanted = [name for name in dict.fromkeys(names) if name is not None]
        adapters = {name: self._adapter(name) for name in wanted}
        if self._mixed is None or not adapters.keys() <= self._mixed.places.keys():
            self._mixed = None  # frees its memory first
            self._mixed = mixed_adapters(adapters)
        return self._mixed

    def _adapter(self, name: str) -> LoadedAdapter:
        """Return an adapter, loaded again if it was dropped from memory, as the one used last."""
        source = self._source(name)
        adapter = self._loaded.pop(name, None) or self._read(source)
        self._loaded[name] = adapter
        return adapter

    def _source(self, name: str) -> AdapterFiles:
        if name not in self._sources:
            known = f"Loaded are: {', '.join(self._sources)}." if self._sources else "None is loaded."
            raise AdapterError(f"No adapter is called {name!r}. {known} Load it first, by load_adapter().")
        return self._sources[name]

    def _read(self, source: AdapterFiles) -> LoadedAdapter:
        """Read an adapter and check that it belongs to the base, which is without adapters."""
        stored, base = source.read(), self.base.fingerprint
        warnings = compare_base(stored, source.directory, self.base_name, base, "Load it on that base.")
        self.warnings += [warning for warning in warnings if warning not in self.warnings]
        return loaded_adapter(self.base.model, stored, f"The adapter {source.directory}")

    def _drop_unused(self) -> None:
        """Drop from memory what was not used for longest, beyond `most_loaded`; not what is in use."""
        used = {name for on in (self._on, *self._outside) for name in (on if isinstance(on, tuple) else (on,))}
        for name in [name for name in self._loaded if name not in used]:
            if self.most_loaded is None or len(self._loaded) <= self.most_loaded:
                return
            self._forget(name)

    def _forget(self, name: str) -> None:
        self._loaded.pop(name, None)
        if self._mixed is not None and name in self._mixed.places:
            self._mixed = None

    def _refuse_in_block(self, method: str) -> None:
        if self._outside:
            raise AdapterError(
                f"{method}() was called inside of a block of rows() or adapters_off(), which puts back what was on "
                "before it. Call it outside."
            )


def _refuse_prepared(model: nn.Module) -> None:
    """Refuse a model on which replaced modules would have no effect, or be something else than the base."""
    if adapter_modules(model):
        raise AdapterError(
            f"This {type(model).__name__} has an adapter already, which would be taken for the base. Load a base of "
            "its own: AdapterSet.open()."
        )
    if any(isinstance(vars(module).get("forward"), JointForward | GatedMLP) for module in model.modules()):
        raise AdapterError(
            f"This {type(model).__name__} was prepared for training: some of its modules hold on to others, which "
            "could not be replaced. Load a base of its own: AdapterSet.open()."
        )
