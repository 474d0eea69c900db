"""Build a run before its first step, and its longest micro-batch, on fake tensors, by the functions that a run calls.

Left out: taking the steps (step_memory.py).
"""

import dataclasses

import torch

from qlora_kernels.card import Card
from qlora_kernels.torch_internals import FakeTensorMode
from qlora_kernels.varlen_attention import flash_backward_bytes
from qlora_trainer.adapters.inject import add_adapters
from qlora_trainer.adapters.trainable import leading_ids
from qlora_trainer.common.boundary import as_model_error
from qlora_trainer.common.errors import ModelError
from qlora_trainer.config.schema import AdapterConfig, RunConfig
from qlora_trainer.data.batching.loader import micro_batch_tokens
from qlora_trainer.data.batching.packing import Example, Pack, make_packs
from qlora_trainer.model.device import compute_dtype_of, current_card, refuse_unknown_kernels
from qlora_trainer.model.modules.packed_attention import attends_apart, cannot_be_trained, head_sizes
from qlora_trainer.model.modules.prefix_cache import positions_before
from qlora_trainer.planning.fake_tensors import FakeRun
from qlora_trainer.planning.skeleton import build_skeleton, fill_skeleton, make_empty
from qlora_trainer.training.determinism import workers_for
from qlora_trainer.training.memory.activations import Policy
from qlora_trainer.training.state import TrainState, build_state
from qlora_trainer.weights.model_directory import ModelDirectory

ASSUMED_CARD = Card((8, 0), processors=128)  # where there is no GPU: sm_80, first with fast bf16; an RTX 4090's size


def planned_card(config: RunConfig) -> Card | None:
    """Return the card that a plan is for: the one here, else an assumed one.

    Args:
        config: of the run.

    Returns:
        The card; None for a plan of host memory.

    Raises:
        ConfigError: QLORA_KERNELS holds an unknown word.
    """
    refuse_unknown_kernels()
    if config.model.device == "cpu":
        return None
    return dataclasses.replace(card_here(), is_deterministic=config.training.deterministic)


def card_here() -> Card:
    """Return the CUDA card that a run would use, or the one that is assumed where there is none.

    Returns:
        The card.
    """
    return Card.of(current_card()) if torch.cuda.is_available() else ASSUMED_CARD


def planned_dtype(config: RunConfig, card: Card | None) -> torch.dtype:
    """Return what a run computes in.

    Args:
        config: of the run.
        card: that it runs on; None: a CPU.

    Returns:
        The dtype.
    """
    return compute_dtype_of(config.model.compute_dtype, card.capability if card else None)


def longest_row(directory: ModelDirectory, config: RunConfig) -> int:
    """Return the length of the longest row that the run can meet.

    Args:
        directory: holds the base's config.json.
        config: of the run.

    Returns:
        Tokens.
    """
    positions = config.adapter.positions_of_rows(directory.facts.positions)
    return min(config.data.max_length, positions or config.data.max_length)


def empty_run(
    directory: ModelDirectory,
    config: RunConfig,
    dtype: torch.dtype,
    policy: Policy,
    layers: int | None = None,
    card: Card | None = None,
) -> tuple[TrainState, Pack, FakeRun]:
    """Build a run before its first step, and its longest micro-batch, on fake tensors.

    Args:
        directory: holds the base's config.json.
        config: of the run.
        dtype: of computation.
        policy: what backward keeps.
        layers: build only so many; None: all.
        card: within the FakeRun, attention goes as on this card; None: as on a CPU.

    Returns:
        The state, the micro-batch, and the FakeRun to run them in.
    """
    fake = FakeRun(card)
    model = build_skeleton(directory, layers, dtype)
    with fake:
        fill_skeleton(model, config.model, dtype)
        add_adapters(model, config.adapter, config.training.seed, _AnyTokenizer(config.adapter, directory))
        rows = [Example([1], [1]).after(leading_ids(model))] * config.training.global_batch_size
        workers = workers_for(config.training, on_cpu=card is None)
        state = build_state(model, config, rows, dtype, policy, workers=workers)
    state.total_steps = max(state.total_steps, 2)  # the plan takes two
    heads = head_sizes(model.config.get_text_config())
    documents = _most_costly_documents(heads, positions_before(model), directory, config, dtype, card)
    pack = longest_pack(directory, config, state.loader.packing, documents)
    return state, as_fake(pack, fake.mode), fake


def keeps_apart(directory: ModelDirectory) -> bool | None:
    """Say whether the attention of a base keeps packed rows apart, as far as fake tensors show.

    They show that it goes through our function, not that it computes the same, which a run tries on the real model.

    Args:
        directory: holds the base's config.json.

    Returns:
        None where the base cannot be tried; a run says why.
    """
    try:
        model = build_skeleton(directory)
        with FakeRun(), as_model_error(cannot_be_trained(model)):
            make_empty(model)
            return attends_apart(model, model.config.get_text_config().vocab_size)
    except ModelError:
        return None  # a run says why


def longest_pack(directory: ModelDirectory, config: RunConfig, packing: bool, documents: int = 2) -> Pack:
    """Make the largest micro-batch: rows of full length, every token trained.

    Args:
        directory: holds the base's config.json.
        config: of the run.
        packing: rows are packed; else padded.
        documents: where rows are packed and a step has so many, the last row leaves a token to each of the others. By
            default to one, as attention takes more for two documents than for one, and no more for three.

    Returns:
        The micro-batch.
    """
    length = longest_row(directory, config)
    limit = min(max(micro_batch_tokens(config), length), length * config.training.global_batch_size)
    lengths = [length] * (limit // length)
    if packing:  # padded rows all take as much as the longest
        lengths += [limit % length] * (limit % length > 0)
        others = max(min(documents, config.training.global_batch_size) - len(lengths), 0)
        others = min(others, lengths[-1] - 1)
        lengths[-1] -= others
        lengths += [1] * others
    (pack,) = make_packs([Example([1] * n, [1] * n) for n in lengths], limit, packing)
    return dataclasses.replace(pack, labels=pack.input_ids.clone(), label_tokens=pack.tokens)


def as_fake(pack: Pack, mode: FakeTensorMode) -> Pack:
    """Make a pack without memory; the documents' bounds, which the host reads, are kept next to those without.

    Args:
        pack: with values.
        mode: of the fake tensors.

    Returns:
        The pack.
    """
    ids, labels, positions = (mode.from_tensor(tensor) for tensor in (pack.input_ids, pack.labels, pack.position_ids))
    bounds = None if pack.cu_seqlens is None else mode.from_tensor(pack.cu_seqlens)
    return dataclasses.replace(pack, input_ids=ids, labels=labels, position_ids=positions, bounds_on_device=bounds)


class _AnyTokenizer:
    """Take the place of a tokenizer: a plan depends on no values.

    All new tokens are behind the embedding's rows. A run first takes rows that the embedding has beyond its tokenizer,
    so its matrices are lower than planned, by a row for each new token at most; the same number of rows trains.

    Args:
        settings: the config's section `adapter`, whose tokens it has.
        directory: of the model.
    """

    def __init__(self, settings: AdapterConfig, directory: ModelDirectory) -> None:
        after = directory.facts.vocabulary or 0
        self.ids = {token: index for index, token in enumerate(settings.trainable_tokens)}
        self.ids |= {token: after + index for index, token in enumerate(settings.new_tokens)}

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [0]}

    def get_vocab(self) -> dict[str, int]:
        return self.ids


def _most_costly_documents(
    heads: tuple[int, int, int] | None,  # as head_sizes gives them
    before: int,  # keys of a prefix, which attention has for each document
    directory: ModelDirectory,
    config: RunConfig,
    dtype: torch.dtype,
    card: Card | None,
) -> int:
    """Find in how many documents the longest pack takes most memory, of those it can have: at most a step's rows.

    Flash attention's backward pads each, and where it is deterministic has fewer sums the more there are; a prefix is
    before each.
    """
    most = config.training.global_batch_size
    if card is None or heads is None or card.flash_refusal(dtype, heads[2]) is not None:
        return most if before else 2
    query_heads, key_heads, head_dim = heads
    length, processors = longest_row(directory, config), card.processors_summed_over(dtype)
    tokens = min(max(micro_batch_tokens(config), length), length * config.training.global_batch_size)

    def inside(documents: int) -> int:
        rows = tokens + before * documents
        return flash_backward_bytes(rows, query_heads, key_heads, head_dim, dtype.itemsize, documents, processors)

    return max(-(-tokens // length), most, key=inside)
