"""Measure what a batch costs whose rows take different adapters: as many adapters as rows, against one, and PEFT's way.

    python -m benchmarks.mixed_adapters [--hidden N] [--rows N] [--tokens N ...] [--rank R] [--repeats N]
                                        [--without-peft]

Two decoder layers of Llama-3.1-8B's shape (hidden size 4096, or the same proportions at --hidden), their base in NF4,
LoRA of --rank on all linear layers, forward alone in fp32 on the CPU. A batch has --rows rows of --tokens tokens: 1 as
in a step of generation, more as in prompts. Five ways take turns: no adapter, one adapter for all rows
(`set_adapter`), an adapter for each row (`rows`), and of PEFT on bitsandbytes one adapter, and an adapter for each row
(`adapter_names`). Times are the processor's over all threads, which other work on the machine changes little: medians;
ratios are medians of each turn's ratio. The last column is the largest difference of logits from PEFT's, relative to
their largest: of one adapter, and of mixed rows.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import load_peer
from benchmarks.llama_checkpoint import LlamaShape, make_checkpoint
from qlora_trainer.adapters.file_config import PEFT_PREFIX
from qlora_trainer.adapters.kinds.lora_file import LoraFileConfig
from qlora_trainer.adapters.peft_format import write_adapter
from qlora_trainer.config.schema import ModelConfig
from qlora_trainer.model.load import Base, load_base_model
from qlora_trainer.model.modules.nf4_linear import NF4Linear
from qlora_trainer.runs.adapter_set import AdapterSet
from qlora_trainer.weights.model_directory import ModelDirectory

LAYERS, VOCABULARY, HEAD = 2, 512, 128
Way = Callable[[Tensor], Tensor]


def shape_of(hidden: int) -> LlamaShape:
    """Return Llama-3.1-8B's proportions at a hidden size, which is a multiple of 512."""
    heads = hidden // HEAD
    return LlamaShape(hidden, hidden * 7 // 2, LAYERS, heads, heads // 4, VOCABULARY)


def store(directory: Path, base: Base, rank: int, seed: int) -> Path:
    """Write a LoRA adapter of random values on all linear layers."""
    generator = torch.Generator().manual_seed(seed)
    tensors, names = {}, set()
    for path, layer in base.model.named_modules():
        if isinstance(layer, NF4Linear):
            names.add(path.rsplit(".", 1)[-1])
            A = torch.randn(rank, layer.in_features, generator=generator) / layer.in_features**0.5
            tensors[f"{PEFT_PREFIX}{path}.lora_A.weight"] = A
            tensors[f"{PEFT_PREFIX}{path}.lora_B.weight"] = 0.1 * torch.randn(
                layer.out_features, rank, generator=generator
            )
    directory.mkdir()
    write_adapter(directory, tensors, LoraFileConfig(r=rank, lora_alpha=2.0 * rank, target_modules=sorted(names)))
    return directory


def our_ways(base: Base, stored: list[Path]) -> dict[str, Way]:
    """Return what runs a batch: without adapters, with one, and with one for each row."""
    adapters = AdapterSet(base)
    names = [path.name for path in stored]
    for path in stored:
        adapters.load_adapter(path, path.name)

    def plain(ids: Tensor) -> Tensor:
        with adapters.adapters_off():
            return adapters.model(input_ids=ids).logits

    def one(ids: Tensor) -> Tensor:
        with adapters.rows([names[0]] * len(ids)):  # as set_adapter
            return adapters.model(input_ids=ids).logits

    def each(ids: Tensor) -> Tensor:
        with adapters.rows(names):
            return adapters.model(input_ids=ids).logits

    return {"no adapter": plain, "one adapter": one, "one for each row": each}


def peft_ways(directory: Path, stored: list[Path]) -> dict[str, Way]:
    """Return the same of PEFT on transformers and bitsandbytes."""
    model: Any = load_peer(directory, stored[0], torch.bfloat16, checkpointing=False)
    for path in stored[1:]:
        model.load_adapter(path, adapter_name=path.name)
    model.eval()
    names = ["default", *(path.name for path in stored[1:])]

    def one(ids: Tensor) -> Tensor:
        return model(input_ids=ids, use_cache=False).logits

    def each(ids: Tensor) -> Tensor:
        return model(input_ids=ids, use_cache=False, adapter_names=names).logits

    return {"PEFT, one adapter": one, "PEFT, one for each row": each}


@torch.no_grad()
def measure(ways: dict[str, Way], ids: Tensor, repeats: int) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Run the ways in turns; returns the seconds of each turn but the first, and the logits."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    logits = {}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            began = time.process_time()
            logits[name] = way(ids)
            seconds[name].append(time.process_time() - began)
    return {name: turns[1:] for name, turns in seconds.items()}, logits


def ratio(seconds: dict[str, list[float]], name: str, of: str) -> float:
    return statistics.median(one / other for one, other in zip(seconds[name], seconds[of], strict=True))


def report(seconds: dict[str, list[float]], logits: dict[str, Tensor]) -> None:
    """Print a line for each way."""
    for name, turns in seconds.items():
        peft = name.startswith("PEFT")
        cells = [f"{statistics.median(turns) * 1e3:9.1f} ms"]
        one = "PEFT, one adapter" if peft else "one adapter"
        cells.append(f"{ratio(seconds, name, one):6.2f} of one adapter")
        theirs = f"PEFT, {name}"
        if theirs in logits:
            cells.append(f"{ratio(seconds, name, theirs):6.2f} of PEFT's")
            expected = logits[theirs].float()
            cells.append(f"{(logits[name] - expected).abs().max() / expected.abs().max():8.1e}")
        print(f"  {name:24}" + "   ".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=4096, help="a multiple of 512")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16], help="of a row")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--without-peft", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        directory = make_checkpoint(Path(work) / "model", shape_of(options.hidden))
        settings = ModelConfig(name=str(directory), device="cpu", compute_dtype="float32")
        base = load_base_model(ModelDirectory.open(directory), settings, Path(work) / "cache")
        stored = [store(Path(work) / f"adapter-{row}", base, options.rank, row) for row in range(options.rows)]
        ways = our_ways(base, stored)
        if not options.without_peft:
            ways |= peft_ways(directory, stored)
        print(
            f"{LAYERS} decoder layers of hidden size {options.hidden}, {options.rows} rows, rank {options.rank}, fp32, "
            f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)"
        )
        for tokens in options.tokens:
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(VOCABULARY, (options.rows, tokens), generator=generator)
            print(f"{tokens} token{'s' * (tokens != 1)} a row")
            seconds, logits = measure(ways, ids, options.repeats)
            each, one = logits["one for each row"], logits["one adapter"]
            assert torch.allclose(each[0], one[0], rtol=1e-3, atol=1e-3), "the first row has that adapter"
            assert not torch.isclose(each[1:], one[1:], rtol=1e-2).all(), "the others have others"
            report(seconds, logits)


if __name__ == "__main__":
    main()
