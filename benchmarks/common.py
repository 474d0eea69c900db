"""Share what comparisons with peft + bitsandbytes need: the rows of our steps, and that peer's model and step.

The peer is what its documentation shows: transformers' 4-bit loading, prepare_model_for_kbit_training, an adapter,
rows padded on the right with an attention mask, and the model's own loss: the mean over the label tokens of the batch.
It computes in fp32, on a GPU under bf16 autocast, and starts from an adapter in PEFT's format, such as each run of ours
writes before its first step.
Nothing of ours is imported but at need: a peer's process then holds only what the peer holds.
"""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from qlora_trainer.runs.run import Run


class Row(NamedTuple):
    """Hold tokens, and labels not shifted: -100 where nothing is trained."""

    input_ids: list[int]
    labels: list[int]


def rows_of_step(run: "Run", step: int) -> list[Row]:
    """Return the rows that our loader gives the step of this 0-based index, in its order."""
    training = run.config.training
    epoch, within = divmod(step, run.state.loader.steps_per_epoch)
    chosen = run.state.loader.order(epoch)[
        within * training.global_batch_size : (within + 1) * training.global_batch_size
    ]
    return [Row(example.input_ids, example.labels) for example in (run.prepared.train[int(i)] for i in chosen)]


def plain_checkpoint(directory: Path, output: Path) -> Path:
    """Return a model directory that transformers can open: `directory`, or a copy of it where that is a GGUF import."""
    from qlora_trainer.weights.gguf.reader import IMPORT_RECORD
    from qlora_trainer.weights.model_directory import ModelDirectory
    from qlora_trainer.weights.shard_writer import ShardWriter

    if not (directory / IMPORT_RECORD).is_file():
        return directory
    if output.is_dir():  # a contender before this one made it
        return output
    shutil.copytree(directory, output, ignore=shutil.ignore_patterns(IMPORT_RECORD))
    model = ModelDirectory.open(directory)
    with ShardWriter(output, list(model.tensors.values())) as writer:
        for name in model.tensors:
            writer.write(name, model.read(name))
    return output


def load_peer(
    directory: Path,
    adapter: Path,
    dtype: torch.dtype,
    *,
    checkpointing: bool,
    device: str = "cpu",
    compute_dtype: torch.dtype = torch.float32,
) -> Any:
    """Load a base in NF4 by transformers and bitsandbytes, quantized from `dtype`, and PEFT's adapter on it."""
    from peft import PeftModel, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=dtype,
        device_map={"": device},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
        ),
    )
    # Norms, embeddings and head in fp32, as ours compute.
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    return PeftModel.from_pretrained(model, adapter, is_trainable=True).train()


def trainable_parameters(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def peer_step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[Row],
    learning_rate: float,
    max_grad_norm: float,
    device: str = "cpu",
) -> float:
    """Take one optimizer step on `rows` as one padded batch; returns the loss."""
    input_ids, labels, mask = (tensor.to(device) for tensor in padded(rows))
    with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
        loss = model(input_ids=input_ids, attention_mask=mask, labels=labels, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trainable_parameters(model), max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def padded(rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """Pad on the right: (B, T) token ids, labels and attention mask."""
    width = longest(rows)
    ids = torch.zeros((len(rows), width), dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        length = len(row.input_ids)
        ids[index, :length] = torch.tensor(row.input_ids)
        labels[index, :length] = torch.tensor(row.labels)
        mask[index, :length] = 1
    return ids, labels, mask


def longest(rows: Iterable[Row]) -> int:
    """Count the tokens of the longest row."""
    return max(len(row.input_ids) for row in rows)
