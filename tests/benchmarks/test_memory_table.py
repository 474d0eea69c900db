"""The peer of the memory table is what it says: a real step of the same libraries takes the same bytes."""

import json
from pathlib import Path

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.memory_table import MODELS, PRECISION, Figure, longest
from benchmarks.peer_memory import WORKSPACES, plan_peer
from qlora_trainer.planning.empty_run import card_here
from qlora_trainer.planning.fit import GRAIN
from qlora_trainer.planning.live_bytes import LiveBytes
from qlora_trainer.planning.workspaces import workspaces_on_cuda

TOKENS, RANK = 128, 64


@pytest.fixture
def small_llama(tmp_path: Path) -> Path:
    """Llama-3.1's config with fewer and smaller layers, and random weights."""
    raw = json.loads((MODELS / "llama-3.1-8b" / "config.json").read_text())
    raw |= {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 64}
    raw |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    raw |= {"vocab_size": 1024, "bos_token_id": 0, "eos_token_id": 1}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    return tmp_path


def real_peak(directory: Path) -> int:
    """The peak of the second step of the peer as its documentation builds it, counted on real tensors."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, device_map={"": "cpu"}, quantization_config=quantization
    )
    model.config.use_cache = False
    model.requires_grad_(False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    settings = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, settings).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    optimizer = bitsandbytes.optim.PagedAdamW32bit(trained)
    states = [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]
    statistics = [t for s in states for t in (s.absmax, s.code, s.offset, s.state2.absmax, s.state2.code)]
    live = LiveBytes(workspaces=workspaces_on_cuda(card_here()) | WORKSPACES)
    live.watch([*model.parameters(), *model.buffers(), *statistics], "model")
    input_ids = torch.ones((1, TOKENS), dtype=torch.int64)
    live.watch([input_ids], "model")
    with live:
        for _ in range(2):
            live.restart_peak()
            model(input_ids=input_ids, labels=input_ids).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return live.peak.bytes


def test_the_peer_on_fake_tensors_takes_the_bytes_of_the_real_one(small_llama: Path) -> None:
    plan = plan_peer(small_llama, TOKENS, RANK)
    assert plan.allocated + plan.paged == real_peak(small_llama)


@pytest.mark.parametrize("budget", [900, 1000, 5000, 33_333, 70_000, 200_000])
def test_the_search_finds_the_last_length_that_fits(budget: int) -> None:
    """Of needs that rise with the length, but not by a line."""

    def plan(tokens: int) -> Figure:
        total = 500 + tokens // 2 + tokens % 7 * 10
        return Figure("m", "w", tokens, 1, resident=0, allocated=0, paged=0, total=total, host=0, operation="")

    known = {tokens: plan(tokens) for tokens in (2048, 16384)}
    found = longest(plan, known, limit=131072, budget=budget)
    sizes = range(GRAIN, 131072 + 1, GRAIN)
    best = max((tokens for tokens in sizes if plan(tokens).total <= budget), default=None)
    if best is None or found is None:
        assert best is found
    else:
        assert best / (1 + PRECISION) - GRAIN <= found.tokens <= best
    assert len(known) < 12


@pytest.mark.parametrize(
    ("model", "billions"),
    [("llama-3.1-8b", 8.03), ("llama-2-7b", 6.74), ("mistral-7b-v0.3", 7.25), ("qwen2.5-7b", 7.62), ("qwen3-8b", 8.19)],
)
def test_the_models_have_the_published_number_of_parameters(model: str, billions: float) -> None:
    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MODELS / model))
    assert round(shape.num_parameters() / 1e9, 2) == billions
