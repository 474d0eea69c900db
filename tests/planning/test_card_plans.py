"""What a plan takes from the card: how attention goes there, what its backward needs inside, and cuBLAS' share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cards import a_card_is_here

from qlora_kernels import card, dropout, varlen_attention
from qlora_kernels.card import Card
from qlora_kernels.torch_internals import flash_attention_operations
from qlora_trainer.cli.plan import describe
from qlora_trainer.config.load import make_config
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.planning import memory_plan as planning
from qlora_trainer.planning import workspaces
from qlora_trainer.planning.empty_run import empty_run, planned_card, planned_dtype
from qlora_trainer.planning.live_bytes import LiveBytes
from qlora_trainer.planning.memory_plan import plan_memory
from qlora_trainer.planning.step_memory import PAGED
from qlora_trainer.training.memory.activations import choose_policy
from qlora_trainer.weights.model_directory import ModelDirectory

Config = Callable[..., RunConfig]
MIB = 2**20
TOKENS = 1024


@pytest.fixture(autouse=True)
def every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where plans are for the fast ones; and no setting of cuBLAS but the plan's own."""
    monkeypatch.delenv("QLORA_KERNELS", raising=False)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)


def config_of(directory: Path, tokens: int = TOKENS, **training: Any) -> Any:
    return make_config(
        {
            "model": {"name": str(directory)},
            "data": {"train": "rows.jsonl", "max_length": tokens},
            "optimizer": {"name": "adamw"},  # whose state is on the card, whether or not that pages
            "training": {"global_batch_size": 1, "activation_checkpointing": "none", **training},
        }
    )


def bytes_of_a_layer(directory: Path, config: RunConfig) -> int:
    fewer, more = (plan_memory(ModelDirectory.open(directory), config, layers).allocated for layers in (2, 3))
    return more - fewer


@pytest.mark.slow
@pytest.mark.parametrize("refused", ["Turing", "reference", "no window"])
def test_where_flash_attention_is_refused_keys_and_values_are_counted_for_every_query_head(
    llama_8b: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    """Under keep, of an 8B: 24 more heads of 128 numbers, for keys and for values."""
    flash = bytes_of_a_layer(llama_8b, config_of(llama_8b))
    if refused == "Turing":
        a_card_is_here(monkeypatch, (7, 5))
    elif refused == "reference":
        monkeypatch.setenv("QLORA_KERNELS", "reference")
    else:
        monkeypatch.setattr(card, "varlen_attention_arguments", lambda: frozenset({"scale"}))
    loop = bytes_of_a_layer(llama_8b, config_of(llama_8b))
    assert 2 * (32 - 8) * 128 * 2 == 12_288
    assert abs(loop - flash - TOKENS * 12_288) <= 64, "but for bounds and random states"


@pytest.mark.slow
def test_a_card_older_than_ampere_is_planned_in_float16(llama_8b: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert planned_dtype(config_of(llama_8b), Card((8, 0), 128)) == torch.bfloat16
    a_card_is_here(monkeypatch, (7, 5))
    config = config_of(llama_8b)
    card = planned_card(config)
    assert card == Card((7, 5), 40)
    assert planned_dtype(config, card) == torch.float16
    plan = plan_memory(ModelDirectory.open(llama_8b), config, layers=1)
    assert "8.0 (Ampere) or higher, and this one has 7.5" in plan.attention
    assert plan.card == "compute capability 7.5, 40 multiprocessors"


def test_without_a_card_a_plan_says_which_it_assumes(
    tiny_config: Config, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan = plan_memory(ModelDirectory.open(tiny_llama), tiny_config(model={"device": "auto"}))
    version = torch.__version__.split("+")[0]
    assumed = f"assumed, as there is none here: compute capability 8.0, 128 multiprocessors, torch {version}"
    assert plan.to_json()["card"] == f"{assumed} built for CUDA"
    assert plan.to_json()["attention"] == "flash attention over packed documents"
    rows = dict(describe(plan, None))
    assert rows["GPU"] == plan.card
    assert rows["attention"] == plan.attention
    cpu = plan_memory(ModelDirectory.open(tiny_llama), tiny_config(model={"device": "cpu"}))
    assert cpu.card == ""
    assert "GPU" not in dict(describe(cpu, None))


@pytest.mark.parametrize(
    ("tokens", "documents", "processors", "expected"),
    [
        # 32 query and 8 key heads of 128 numbers: fp32 sums and one number a query, and both gradients of all heads.
        (2_048, 1, 0, 4 * 32 * (2_048 + 128) * 129 + 2 * 2_048 * 32 * 128 * 2),
        (16_384, 256, 0, 4 * 32 * (16_384 + 128 * 256) * 129 + 2 * 16_384 * 32 * 128 * 2),
        (2_048, 1, 128, 4 * 32 * (2_048 + 128) * (4 * 128 + 1) + 2 * 2_048 * 32 * 128 * 2),
        (2_048, 1, 132, 4 * 32 * (2_048 + 128) * (5 * 128 + 1) + 2 * 2_048 * 32 * 128 * 2),
        (2_048, 4, 128, 4 * 32 * (2_048 + 512) * 129 + 2 * 2_048 * 32 * 128 * 2),
    ],
)
def test_flash_attentions_backward_is_counted_by_documents_and_processors(
    tokens: int, documents: int, processors: int, expected: int
) -> None:
    card = Card((8, 0), processors, is_deterministic=processors > 0)
    query, key = (torch.empty(tokens, heads, 128, dtype=torch.bfloat16, device="meta") for heads in (32, 8))
    bounds = torch.empty(documents + 1, dtype=torch.int32, device="meta")
    assert workspaces.varlen_backward_bytes((query, query, key, key, query, None, bounds, bounds), card) == expected


@pytest.mark.parametrize("documents", [1, 16, 256, 2_048])
def test_what_attention_uses_inside_keeps_its_bound_however_short_the_documents(documents: int) -> None:
    query, key = (torch.empty(1, heads, 16_384, 128, dtype=torch.bfloat16, device="meta") for heads in (32, 8))
    count = varlen_attention.key_heads_at_a_time(query, key, documents)
    padded = 16_384 + 128 * documents

    def inside(key_heads: int) -> int:
        return 4 * 4 * key_heads * padded * 129 + 2 * 16_384 * 4 * key_heads * 128 * 2

    assert inside(count) <= 256 * MIB or count == 1
    assert count == 8 or inside(count + 1) > 256 * MIB


def test_deterministic_attention_takes_fewest_sums_where_its_bound_cannot_be_kept() -> None:
    """Half the heads have twice the sums each, so to split them saves nothing but what is kept for key heads."""

    def heads_at_a_time(tokens: int) -> int:
        query, key = (torch.empty(1, heads, tokens, 128, dtype=torch.bfloat16, device="meta") for heads in (32, 8))
        return varlen_attention.key_heads_at_a_time(query, key, 1, 128)

    assert heads_at_a_time(2_048) == 8
    assert heads_at_a_time(32_768) == 1, "of which each has 32 sums: 2.0 GiB, where all heads at once have 2.4"


@pytest.mark.parametrize(("global_batch_size", "documents"), [(1, 1), (3, 3), (16, 16)])
def test_a_plan_is_for_as_many_documents_as_a_step_has_rows(
    tiny_config: Config, tiny_llama: Path, global_batch_size: int, documents: int
) -> None:
    """Short rows pack into a micro-batch as full as one long row, and flash attention pads each."""
    config = tiny_config(model={"compute_dtype": "bfloat16"}, training={"global_batch_size": global_batch_size})
    card = Card((8, 0), 128)
    policy = choose_policy(config.training, torch.device("cuda"))
    _, pack, _ = empty_run(ModelDirectory.open(tiny_llama), config, torch.bfloat16, policy, card=card)
    assert pack.tokens == 128
    assert len(pack.row_lengths) == documents


@pytest.mark.slow
def test_a_deterministic_plan_counts_the_sums_that_its_processors_keep_apart(llama_8b: Path) -> None:
    """Beyond that, nothing: 4 x 32 heads' sums for 128 multiprocessors, in an attention that is the fullest moment."""
    plain, ordered = (
        plan_memory(ModelDirectory.open(llama_8b), config_of(llama_8b, deterministic=deterministic), layers=2)
        for deterministic in (False, True)
    )
    cublas = 2 * 32 * MIB - 2 * (8_192 + 128) * 1024
    assert ordered.components[planning.CUBLAS] - plain.components[planning.CUBLAS] == cublas
    query, key = (torch.empty(TOKENS, heads, 128, dtype=torch.bfloat16, device="meta") for heads in (32, 8))
    assert ordered.allocated >= plain.allocated + cublas
    more = 4 * 32 * (TOKENS + 128) * 3 * 128
    bounds = torch.empty(2, dtype=torch.int32, device="meta")
    _, backward = flash_attention_operations()
    found = [
        workspaces.workspaces_on_cuda(Card((8, 0), 128, is_deterministic=deterministic))[backward](
            (query, query, key, key, query, None, bounds, bounds)
        )
        for deterministic in (False, True)
    ]
    assert found[1] - found[0] == more


@pytest.mark.parametrize(
    ("capability", "setting", "kibibytes"),
    [
        ((7, 5), None, 8_320),
        ((8, 6), None, 8_320),
        ((8, 9), None, 8_320),
        ((9, 0), None, 32_768),
        ((10, 0), None, 32_768),
        ((8, 6), ":4096:8", 32_768),
        ((9, 0), ":16:8", 128),
        ((8, 6), ":4096:2:16:8", 8_320),
        ((8, 6), "nothing of sizes", 8_320),
    ],
)
def test_cublas_has_a_workspace_for_each_of_two_threads(
    capability: tuple[int, int], setting: str | None, kibibytes: int
) -> None:
    assert workspaces.cublas_bytes(Card(capability, 100), setting) == 2 * kibibytes * 1024


@pytest.mark.slow
def test_cublas_workspaces_are_part_of_what_torch_reserves(
    tiny_config: Config, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = plan_memory(ModelDirectory.open(tiny_llama), tiny_config(model={"device": "auto"}))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    large = plan_memory(ModelDirectory.open(tiny_llama), tiny_config(model={"device": "auto"}))
    more = 2 * (32_768 - 8_320) * 1024
    for name in ("allocated", "reserved", "total"):
        assert getattr(large, name) - getattr(small, name) == more, name
    assert large.total == large.reserved + large.components[PAGED] + planning.CUDA_CONTEXT_BYTES


@pytest.mark.parametrize(("rows", "features"), [(64, 48), (7, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_dropouts_mask_is_made_of_is_counted(rows: int, features: int, dtype: torch.dtype) -> None:
    like, seed = torch.empty(rows, 5, dtype=dtype), torch.tensor(7)
    with LiveBytes() as live:
        mask = dropout._keep_mask(like, features, 0.1, seed)
    inside = workspaces.keep_mask_bytes((like, features, 0.1, seed))
    assert abs(live.peak.bytes - mask.nbytes - inside) <= 8, "but for a number or two"
    for by_operation in (workspaces.workspaces_on_cpu(), workspaces.workspaces_on_cuda(Card((8, 0), 128))):
        assert by_operation[torch.ops.qlora_kernels.keep_mask.default] is workspaces.keep_mask_bytes
