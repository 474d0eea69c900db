"""Promises of several adapters on one base: by name, one at a time, loaded again on demand, and checked."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stored_adapters import Tokens, adapted_copy, store_adapter
from tiny_models import load, make_model_directory
from torch import Tensor

import qlora_trainer
from qlora_trainer.adapters.inject import add_adapters
from qlora_trainer.common.errors import AdapterError, FileMissingError
from qlora_trainer.config.schema import AdapterConfig
from qlora_trainer.model.load import Base
from qlora_trainer.runs.adapter_set import AdapterSet
from qlora_trainer.runs.directory import BaseRecord, write_base_record
from qlora_trainer.training.patches import patch_model

IDS = torch.arange(3, 27).reshape(2, 12)


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> Base:
    return load(tiny_llama)


def tokens_of(base: Base) -> Tokens:
    return Tokens({"known": 5, "new": base.model.config.vocab_size})


@pytest.fixture(scope="module")
def stored(base: Base, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters on disk by name; each of the llama's."""
    folder = tmp_path_factory.mktemp("adapters")
    settings: dict[str, dict[str, Any]] = {
        "a": {"rank": 4},
        "b": {"rank": 2, "target_modules": ["q_proj"]},
        "c": {"kind": "ia3"},
        "d": {"kind": "bottleneck", "bottleneck_size": 8},
        "e": {"kind": "prefix", "virtual_tokens": 3},
        "f": {"rank": 2, "trainable_tokens": ["known"], "new_tokens": ["new"], "tokenizer": tokens_of(base)},
    }
    return {
        name: store_adapter(folder / name, base, place, **each) for place, (name, each) in enumerate(settings.items())
    }


@pytest.fixture
def make(base: Base, stored: dict[str, Path]) -> Iterator[Callable[..., AdapterSet]]:
    """A set with the adapters of these names loaded."""
    made: list[AdapterSet] = []

    def with_names(names: str = "", **options: Any) -> AdapterSet:
        adapters = AdapterSet(base, **options)
        made.append(adapters)
        for name in names:
            adapters.load_adapter(stored[name], name)
        return adapters

    yield with_names
    for adapters in made:
        adapters.set_adapter(None)


@torch.no_grad()
def logits(adapters: AdapterSet) -> Tensor:
    return adapters.model(input_ids=IDS).logits


def test_adapters_take_turns_and_the_base_comes_back_with_its_bits(make: Callable[..., AdapterSet]) -> None:
    adapters = make()
    before = logits(adapters)
    adapters = make("abcdef")
    assert torch.equal(logits(adapters), before), "loading puts nothing on"
    seen: dict[str, Tensor] = {}
    for name in "abcdefcba":
        adapters.set_adapter(name)
        assert adapters.active == name
        now = logits(adapters)
        assert torch.equal(seen.setdefault(name, now), now)
        known = now[..., : before.shape[-1]]  # a new token has a logit more
        assert (known - before).abs().max() > 0.01 * before.abs().max()
    assert len({tuple(values.flatten()[:8].tolist()) for values in seen.values()}) == 6
    with adapters.adapters_off():
        assert adapters.active is None
        assert torch.equal(logits(adapters), before)
    assert torch.equal(logits(adapters), seen["a"])
    adapters.drop_adapter("a")
    assert (adapters.names, adapters.active) == ([*"bcdef"], None)
    assert torch.equal(logits(adapters), before)


def test_rows_of_new_and_known_tokens_are_those_of_the_file(
    make: Callable[..., AdapterSet], base: Base, stored: dict[str, Path]
) -> None:
    """Also where the batch has the new token; stored as "f", the sixth."""
    expected = adapted_copy(base, 5, tokens_of(base), rank=2, trainable_tokens=["known"], new_tokens=["new"])
    adapters, new = make("f"), base.model.config.vocab_size
    adapters.set_adapter("f")
    ids = torch.tensor([[5, 7, new, 5, 9]])
    with torch.no_grad():
        assert torch.equal(adapters.model(input_ids=ids).logits, expected(input_ids=ids).logits)
    with pytest.raises(AdapterError, match="or rows of tokens, which all rows share"), adapters.rows(["f", None]):
        pytest.fail("rows shared the head")


def test_loading_leaves_on_what_is_on(make: Callable[..., AdapterSet], stored: dict[str, Path]) -> None:
    adapters = make("a")
    adapters.set_adapter("a")
    expected = logits(adapters)
    adapters.load_adapter(stored["d"], "d")
    assert torch.equal(logits(adapters), expected)


def test_blocks_put_back_what_was_on_before_them_also_when_they_fail(make: Callable[..., AdapterSet]) -> None:
    adapters = make("abc")
    adapters.set_adapter("c")
    expected = logits(adapters)
    with adapters.rows(["a", None]):
        of_rows = logits(adapters)
        with adapters.adapters_off():
            plain = logits(adapters)
            with adapters.rows(["b", "b"]):
                assert adapters.active == "b"
        with adapters.rows([None, "b"]):
            assert adapters.active == (None, "b")
        assert torch.equal(logits(adapters), of_rows)
    assert torch.equal(plain[1], of_rows[1])
    with pytest.raises(ZeroDivisionError), adapters.rows(["a", "b"]):
        raise ZeroDivisionError
    assert adapters.active == "c"
    assert torch.equal(logits(adapters), expected)


def test_those_not_used_for_longest_leave_memory_and_are_loaded_again_on_demand(
    make: Callable[..., AdapterSet],
) -> None:
    adapters = make("abc", most_loaded=2)
    assert (adapters.names, adapters.loaded) == (["a", "b", "c"], ["b", "c"])
    adapters.set_adapter("b")
    adapters.set_adapter("a")
    assert adapters.loaded == ["b", "a"]
    of_a = logits(adapters)
    adapters.set_adapter("c")
    assert adapters.loaded == ["a", "c"]
    adapters.set_adapter("b")
    adapters.set_adapter("a")
    assert torch.equal(logits(adapters), of_a)
    with adapters.rows(["a", "b"]):
        assert adapters.loaded == ["a", "b"]
        with adapters.rows(["c", None]):
            assert adapters.loaded == ["a", "b", "c"], "what is in use stays, and comes back when the block ends"
        assert set(adapters.loaded) == {"a", "b"}


def test_an_adapter_that_changed_on_disk_is_not_loaded_again_in_silence(
    make: Callable[..., AdapterSet], base: Base, tmp_path: Path
) -> None:
    adapters = make("a", most_loaded=1)
    path = store_adapter(tmp_path / "own", base, rank=2)
    adapters.load_adapter(path, "own")
    adapters.set_adapter("a")
    config = path / "adapter_config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(AdapterError, match=r"adapter_config\.json changed since its adapter was loaded, or is gone"):
        adapters.set_adapter("own")
    assert adapters.active == "a"
    adapters.drop_adapter("own")
    adapters.load_adapter(path, "own")
    adapters.set_adapter("own")


@pytest.mark.slow
def test_a_run_directory_gives_its_newest_adapter(make: Callable[..., AdapterSet], finished: Path) -> None:
    adapters = make()
    before = logits(adapters)
    for path in (finished, finished / "adapter", next((finished / "checkpoints").glob("step-*"))):
        adapters.load_adapter(path, path.name)
        adapters.set_adapter(path.name)
        assert not torch.equal(logits(adapters), before)
    assert adapters.warnings == []


def test_an_adapter_of_another_base_is_refused(make: Callable[..., AdapterSet], tmp_path: Path) -> None:
    adapters = make()
    other = load(make_model_directory(tmp_path / "other", seed=1))
    path = store_adapter(tmp_path / "adapter", other, rank=2)
    with pytest.raises(AdapterError, match=r"was trained on another base than .*hold other weights.*Load it on that"):
        adapters.load_adapter(path, "other")
    assert adapters.names == adapters.loaded == []


def test_an_adapter_of_another_program_for_another_base_is_a_warning(
    make: Callable[..., AdapterSet], base: Base, tmp_path: Path
) -> None:
    adapters = make()
    adapters.load_adapter(store_adapter(tmp_path / "theirs", base, rank=2, has_record=False), "theirs")
    (warning,) = adapters.warnings
    assert "was made for tiny, and the base here is" in warning


@pytest.mark.parametrize("kind", ["LOHA", "VBLORA"])
def test_a_kind_of_peft_that_we_have_not_is_refused_by_its_name(
    kind: str, make: Callable[..., AdapterSet], base: Base, tmp_path: Path
) -> None:
    path = store_adapter(tmp_path / "theirs", base, rank=2, has_record=False)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | {"peft_type": kind}))
    with pytest.raises(AdapterError, match=f"is an adapter of type '{kind}'; only LORA, .* are supported"):
        make().load_adapter(path, "theirs")


def test_names_that_are_not_loaded_or_taken_are_refused_and_change_nothing(
    make: Callable[..., AdapterSet], stored: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=r"^No adapter is called 'a'\. None is loaded\. Load it first"):
        make().set_adapter("a")
    adapters = make("ab")
    adapters.set_adapter("a")
    expected = logits(adapters)
    for use in (
        lambda: adapters.set_adapter("z"),
        lambda: adapters.drop_adapter("z"),
        lambda: adapters.rows(["a", "z"]).__enter__(),
    ):
        with pytest.raises(AdapterError, match=r"^No adapter is called 'z'\. Loaded are: a, b\. Load it first"):
            use()
    with pytest.raises(AdapterError, match=r"^An adapter is called 'a' already: .*Choose another name, or drop"):
        adapters.load_adapter(stored["c"], "a")
    with pytest.raises(AdapterError, match="needs a name"):
        adapters.load_adapter(stored["c"], "")
    with pytest.raises(FileMissingError, match=r"is not an adapter: it has no adapter_config\.json"):
        adapters.load_adapter(tmp_path, "nothing")
    assert (adapters.active, adapters.names) == ("a", ["a", "b"])
    assert torch.equal(logits(adapters), expected)


def test_what_would_be_undone_by_the_end_of_a_block_is_refused_in_it(make: Callable[..., AdapterSet]) -> None:
    adapters = make("ab")
    with adapters.adapters_off():
        for use in (adapters.set_adapter, adapters.drop_adapter):
            with pytest.raises(AdapterError, match=r"_adapter\(\) was called inside of a block of rows\(\)"):
                use("a")
    assert adapters.names == ["a", "b"]


def test_a_model_that_is_no_plain_base_is_refused(tiny_llama: Path) -> None:
    base = load(tiny_llama)
    patch_model(base.model)
    with pytest.raises(AdapterError, match="was prepared for training"):
        AdapterSet(base)
    base = load(tiny_llama)
    add_adapters(base.model, AdapterConfig(rank=2))
    with pytest.raises(AdapterError, match="has an adapter already"):
        AdapterSet(base)
    with pytest.raises(AdapterError, match="most_loaded is 0"):
        AdapterSet(load(tiny_llama), most_loaded=0)


def test_a_base_is_opened_by_its_name(tiny_llama: Path, stored: dict[str, Path], base: Base) -> None:
    adapters = qlora_trainer.AdapterSet.open(tiny_llama, most_loaded=3, device="cpu", compute_dtype="float32")
    assert (adapters.base_name, adapters.most_loaded) == (str(tiny_llama), 3)
    adapters.load_adapter(str(stored["a"]), "a")
    adapters.set_adapter("a")
    own = AdapterSet(base)
    own.load_adapter(stored["a"], "a")
    own.set_adapter("a")
    assert torch.equal(logits(adapters), logits(own))
    own.set_adapter(None)


def test_a_record_of_the_base_is_compared_when_an_adapter_is_loaded_again(
    make: Callable[..., AdapterSet], base: Base, tmp_path: Path
) -> None:
    adapters = make("a", most_loaded=1)
    path = store_adapter(tmp_path / "own", base, rank=2)
    adapters.load_adapter(path, "own")
    adapters.set_adapter("a")
    other = load(make_model_directory(tmp_path / "other", seed=1))
    write_base_record(path, BaseRecord(other.fingerprint, 1, "own", "rows"))
    with pytest.raises(AdapterError, match="was trained on another base"):
        adapters.set_adapter("own")
