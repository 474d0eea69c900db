"""Make a checkpoint with Llama-3.1-8B's config and random bf16 weights on the card, and rows to train on.

Drawn on the card and written by several threads, 16 GB take the time of writing them. The tokenizer is a tiny one of
the tests: its ids are valid for the model, time and memory do not depend on which rows of the embedding are looked up,
and the loss is over the whole vocabulary. What random weights cannot show: a loss that means something, and answers.
"""

import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tiny_tokenizers import tiny_tokenizer

from benchmarks.first_gpu.cases import CASES
from benchmarks.first_gpu.kit import ROOT, Kit
from benchmarks.llama_checkpoint import SPREAD, LlamaShape

SHARD_BYTES = 2 * 10**9
STAGING_BYTES = 2**26  # of pinned memory, a thread
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "good", "wizards")
STEPS_OF_TEXT = 12  # rows of the longest length in the text
Shapes = Mapping[str, tuple[int, ...]]


def make_checkpoint(kit: Kit, device: str) -> None:
    """Make the model's directory, which appears when it is whole, and rows."""
    if (kit.model / "config.json").is_file():
        if not kit.rows.is_file():  # the model may be in memory that outlives the folder of the rows
            write_rows(kit, tiny_tokenizer("llama3_1"))
        size = sum(path.stat().st_size for path in kit.model.glob("*.safetensors"))
        kit.verdict(f"make: {size / 1e9:.1f} GB are there, {kit.model}")
        return
    started = time.perf_counter()
    shape = LlamaShape(128, 256, 2, 4, 2, 1024) if kit.is_dry else LlamaShape(vocabulary=128256)
    partial = kit.model.with_name(kit.model.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    shapes = shape.tensors()
    shards = _shards(shapes)
    names = [f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors" for index in range(len(shards))]
    seeds = {name: index for index, name in enumerate(shapes)}

    def write(name: str, tensors: Sequence[str]) -> None:
        _write_shard(partial / name, {tensor: shapes[tensor] for tensor in tensors}, seeds, device)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, names, shards))
    total = sum(map(_bytes, shapes.values()))
    weight_map = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (partial / "model.safetensors.index.json").write_text(json.dumps(index))
    tokenizer = tiny_tokenizer("llama3_1")
    tokenizer.save_pretrained(partial)
    (partial / "config.json").write_text(json.dumps(_config(shape, kit.is_dry), indent=1))
    write_rows(kit, tokenizer)
    partial.rename(kit.model)
    seconds = time.perf_counter() - started
    kit.result("make", seconds=seconds, bytes=total, directory=str(kit.model))
    kit.verdict(f"make: {total / 1e9:.1f} GB of random weights in {seconds:.1f} s, {kit.model}")


def write_rows(kit: Kit, tokenizer: Any) -> None:
    """Write long text that is cut into rows of full length, and chat rows of uneven length."""
    drawn = random.Random(0)
    longest = max(kit.tokens(case.tokens) for case in CASES)
    sample = _words(drawn, 2000)
    characters = int(longest * STEPS_OF_TEXT * 1.1 * len(sample) / len(tokenizer(sample)["input_ids"]))
    parts: list[str] = []
    while sum(map(len, parts)) < characters:
        parts.append(_words(drawn, 5000))
    kit.rows.write_text(json.dumps({"text": " ".join(parts)}) + "\n")
    most_asked, most_answered = (60, 20) if kit.is_dry else (250, 120)
    with (kit.work / "chat.jsonl").open("w") as file:
        for _ in range(400):
            asked = {"role": "user", "content": _words(drawn, drawn.randint(10, most_asked))}
            answer = {"role": "assistant", "content": _words(drawn, drawn.randint(5, most_answered))}
            file.write(json.dumps({"messages": [asked, answer]}) + "\n")


def _shards(shapes: Shapes) -> list[list[str]]:
    """List the names of each file's tensors."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        if filled and filled + _bytes(shape) > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += _bytes(shape)
    return shards


def _write_shard(path: Path, shapes: Shapes, seeds: Mapping[str, int], device: str) -> None:
    """Write a file of safetensors whose weights depend on their seeds alone."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + _bytes(shape)]}
        end += _bytes(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    staging = torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=device == "cuda")
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            generator = torch.Generator(device).manual_seed(seeds[name])
            mean = 1.0 if len(shape) == 1 else 0.0
            values = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(mean, SPREAD, generator=generator)
            for piece in values.view(-1).view(torch.uint8).split(STAGING_BYTES):
                host = staging[: piece.numel()].copy_(piece)
                view = memoryview(host.numpy())  # type: ignore[arg-type]
                while len(view):
                    view = view[file.write(view) :]


def _config(shape: LlamaShape, is_dry: bool) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((ROOT / "benchmarks/models/llama-3.1-8b/config.json").read_text())
    if is_dry:
        config |= {
            "vocab_size": shape.vocabulary,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.key_value_heads,
            "head_dim": shape.hidden // shape.heads,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
    return config


def _words(drawn: random.Random, count: int) -> str:
    return " ".join(drawn.choice(WORDS) for _ in range(count))


def _bytes(shape: tuple[int, ...]) -> int:
    return 2 * math.prod(shape)
