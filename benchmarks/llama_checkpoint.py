"""Make a Llama-shaped checkpoint of random weights, which the benchmarks of a large base load and merge.

It is written as it streams, a few rows at a time, so that making one of 7.4 billion parameters takes the memory of a
block, the time of drawing the numbers, and the disk of what it holds (14.8 GB in bf16). The weights are normal with the
spread that models begin with, and depend on the seed alone. There is no tokenizer: tokens are numbers below the
vocabulary.

    python -m benchmarks.llama_checkpoint DIRECTORY [--size 7.4B] [--seed 0]
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from qlora_trainer.common.atomic import new_directory, write_text
from qlora_trainer.common.progress import Progress, silent
from qlora_trainer.common.units import dtype_name
from qlora_trainer.weights.reading import row_blocks
from qlora_trainer.weights.shard_writer import ShardWriter
from qlora_trainer.weights.tensors import TensorSpec

SPREAD = 0.02  # of the weights; norms are about one
POSITIONS = 4096


@dataclass(frozen=True)
class LlamaShape:
    """Hold the sizes of a Llama with an LM head of its own."""

    hidden: int = 4096
    intermediate: int = 14336
    layers: int = 32
    heads: int = 32
    key_value_heads: int = 8
    vocabulary: int = 51200

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """List every tensor's shape by transformers' name, in the order it is written."""
        values = self.hidden // self.heads * self.key_value_heads
        layer = {
            "input_layernorm": (self.hidden,),
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (values, self.hidden),
            "self_attn.v_proj": (values, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "post_attention_layernorm": (self.hidden,),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for index in range(self.layers):
            shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
        return shapes | {"model.norm.weight": (self.hidden,), "lm_head.weight": (self.vocabulary, self.hidden)}

    def config(self, dtype: torch.dtype) -> dict[str, object]:
        """Return what config.json holds."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": POSITIONS,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "dtype": dtype_name(dtype),
        }


SIZES = {
    "7.4B": LlamaShape(),
    "1B": LlamaShape(2048, 8192, 16, 32, 8, 32000),
    "0.3B": LlamaShape(1024, 4096, 16, 16, 8, 32000),
    "tiny": LlamaShape(128, 256, 2, 4, 2, 512),
}


def make_checkpoint(
    directory: Path,  # new or empty
    shape: LlamaShape = SIZES["7.4B"],
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = 2 * 10**9,
    progress: Progress = silent,
) -> Path:
    """Write the model's config and shards; returns the directory, which appears when it is whole."""
    specs = [TensorSpec(name, dtype, shape) for name, shape in shape.tensors().items()]
    generator = torch.Generator().manual_seed(seed)
    total, done = sum(spec.nbytes for spec in specs), 0
    with new_directory(directory) as work:
        write_text(work / "config.json", json.dumps(shape.config(dtype), indent=2) + "\n")
        with ShardWriter(work, specs, max_shard_bytes) as writer:
            for spec in specs:
                mean = 1.0 if len(spec.shape) == 1 else 0.0
                for rows in row_blocks(spec.shape):
                    assert rows is not None, "no scalars here"
                    block = torch.empty(rows.stop - rows.start, *spec.shape[1:])
                    writer.write(spec.name, block.normal_(mean, SPREAD, generator=generator).to(dtype))
                    done += block.numel() * dtype.itemsize
                    progress(f"making {directory.name}", done, total)
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size", choices=SIZES, default="7.4B")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make_checkpoint(arguments.directory, SIZES[arguments.size], arguments.seed)


if __name__ == "__main__":
    main()
