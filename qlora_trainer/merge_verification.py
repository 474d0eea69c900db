"""Is the merged model the one that was trained? Its files are checked tensor by tensor, and its answers compared.

Loaders forgive too much: a missing tensor becomes random with a warning, NaN loads silently. So every key, shape,
dtype and value of what was written is read back. Then the merged model's logits on sample rows are compared with those
of base + adapter through the training forward: the one check that sees a wrong value in a sound file.

Both forwards compute in fp32, and so does the comparison (sums in fp64): bf16 arithmetic alone differs by more than
the bound allows.

Legend: T tokens, V vocabulary.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qlora_trainer.errors import MergeError, ModelError
from qlora_trainer.progress import Progress, silent
from qlora_trainer.tensor_io import TensorSpec, checkpoint_tensors, read_tensor, tensor_bytes

# Rounding the merged weights of SmolLM2-135M cost a KL of 2e-6 in fp16 and 1e-4 in bf16 (60 tokens, random adapter).
KL_BOUNDS = {torch.float16: 1e-5, torch.float32: 1e-5, torch.bfloat16: 1e-3}
# How much worse on held-out rows an adapter may be on the original base than on the one it was trained on: a share of
# the loss, or nats where the loss is so small that its share says nothing.
MOST_WORSE_RELATIVE, MOST_WORSE_NATS = 0.10, 0.01
_CHUNK_TOKENS = 64  # of fp64 log-probabilities at a time


@dataclass(frozen=True)
class LogitDifference:
    """How the logits of two models differ over some tokens."""

    relative_error: float  # norm of the difference over the norm of the reference
    kl: float  # KL(reference || merged) in nats, mean over tokens
    top1_agreement: float  # share of tokens with the same most likely successor
    tokens: int


@dataclass(frozen=True)
class Verification:
    """A comparison that passed; `kl_bound` is None where the difference is only reported."""

    rows: int
    difference: LogitDifference
    kl_bound: float | None


@dataclass(frozen=True)
class BaseChoice:
    """Which base `auto` took, and the held-out losses it saw."""

    base: Literal["dequantized", "original"]
    heldout_loss: dict[str, float]
    reason: str


def verify_files(
    directory: Path, expected: Sequence[TensorSpec], checksums: Mapping[str, int], progress: Progress = silent
) -> None:
    """Read back every tensor: exactly the expected keys, shapes and dtypes, and bytes of the CRC-32 they had in memory.

    Raises:
        MergeError: something is missing, unexpected, or damaged; it is named.
    """
    failed = "The merged model failed its verification"
    try:
        found = checkpoint_tensors(directory)
        wanted = {spec.name: spec for spec in expected}
        if differing := sorted(found.keys() ^ wanted.keys()):
            state = "missing" if differing[0] in wanted else "not expected"
            raise MergeError(f"{failed}: {len(differing)} tensor(s) missing or unexpected; {differing[0]} is {state}.")
        total = sum(spec.nbytes for spec in expected)
        done = 0
        for name, info in found.items():
            spec = wanted[name]
            if (info.dtype, info.shape) != (spec.dtype, spec.shape):
                raise MergeError(f"{failed}: {name} is {info.dtype} {info.shape}, not {spec.dtype} {spec.shape}.")
            tensor = read_tensor(info)
            if zlib.crc32(tensor_bytes(tensor)) != checksums[name]:
                damage = "holds values that are not finite" if _has_not_finite(tensor) else "is not what was written"
                raise MergeError(f"{failed}: {name} {damage}. The disk or the memory may be failing.")
            done += tensor.nbytes
            progress("verifying files", done, total)
    except ModelError as error:
        raise MergeError(f"{failed}: {error}") from error


def _has_not_finite(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not torch.isfinite(tensor).all()


def verify_merge(
    directory: Path,
    sample_rows: Sequence[Sequence[int]],
    trained_logits: Callable[[Tensor], Tensor] | Sequence[Tensor],
    load_merged: Callable[[Path], Any],
    kl_bound: float | None = KL_BOUNDS[torch.float16],
    progress: Progress = silent,
) -> Verification:
    """Compare the merged model's logits with those of base + adapter on token rows.

    `trained_logits` gives (1, T, V) or (T, V) for input_ids (1, T) int64, or is a list of such logits, one a row, made
    before to spare memory. `load_merged` gives a transformers model of the directory, in fp32.

    Raises:
        MergeError: the KL is above the bound, or a logit is not finite.
    """
    assert sample_rows, "no rows to compare on"
    progress("comparing answers", 0, None)
    merged = row_logits(load_merged(directory), sample_rows)
    rows = [torch.tensor([row], dtype=torch.int64) for row in sample_rows]
    reference = map(trained_logits, rows) if callable(trained_logits) else trained_logits
    with torch.no_grad():
        difference = compare_logits(reference, merged)
    limit = math.inf if kl_bound is None else kl_bound
    if not math.isfinite(difference.kl) or difference.kl > limit:
        raise MergeError(
            f"The merged model does not answer as the trained one: KL {difference.kl:.2e} (at most {limit:.0e}), "
            f"relative error {difference.relative_error:.2e}, same first choice for {difference.top1_agreement:.1%} of "
            f"{difference.tokens} tokens. Nothing was kept. Please report it with the output of `qlora doctor`."
        )
    return Verification(rows=len(rows), difference=difference, kl_bound=kl_bound)


@torch.no_grad()
def row_logits(model: Any, rows: Sequence[Sequence[int]]) -> list[Tensor]:  # (1, T, V) each, on the CPU
    """A transformers model's logits for each token row, in one pass.

    Rows are padded on the right and not masked: the tokens of a causal model do not see what is behind them.
    """
    ids = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
    device = next(model.parameters()).device
    found = model(input_ids=ids.to(device), use_cache=False).logits.float().cpu()
    return [found[index : index + 1, : len(row)] for index, row in enumerate(rows)]


def compare_logits(
    reference: Iterable[Tensor],  # each (1, T, V) or (T, V)
    merged: Iterable[Tensor],  # the same shapes
) -> LogitDifference:
    """Difference over all tokens of all rows; a row's logits are needed only while it is compared."""
    squared_error = squared_norm = kl = 0.0
    agreeing = tokens = 0
    for expected_row, found_row in zip(reference, merged, strict=True):
        assert expected_row.shape == found_row.shape, f"{expected_row.shape} against {found_row.shape}"
        vocabulary = expected_row.shape[-1]
        expected_chunks = expected_row.reshape(-1, vocabulary).split(_CHUNK_TOKENS)
        found_chunks = found_row.reshape(-1, vocabulary).split(_CHUNK_TOKENS)
        for expected_chunk, found_chunk in zip(expected_chunks, found_chunks, strict=True):
            expected = expected_chunk.double()  # (T, V)
            found = found_chunk.to(expected_chunk.device).double()
            squared_error += float((found - expected).square().sum())
            squared_norm += float(expected.square().sum())
            log_expected, log_found = expected.log_softmax(-1), found.log_softmax(-1)
            kl += float((log_expected.exp() * (log_expected - log_found)).sum())
            agreeing += int((expected.argmax(-1) == found.argmax(-1)).sum())
            tokens += len(expected)
    return LogitDifference(
        relative_error=math.sqrt(squared_error / squared_norm) if squared_norm else math.nan,
        kl=kl / tokens,
        top1_agreement=agreeing / tokens,
        tokens=tokens,
    )


def choose_base(dequantized_loss: float | None, original_loss: float | None) -> BaseChoice:
    """What `--base auto` takes: the lower held-out loss; the base trained on where they tie or were not measured."""
    losses = {
        name: loss
        for name, loss in (("dequantized", dequantized_loss), ("original", original_loss))
        if loss is not None
    }
    if dequantized_loss is None or original_loss is None:
        reason = "the two bases could not both be measured, so the one the adapter was trained on was taken"
        return BaseChoice("dequantized", losses, reason)
    better: Literal["dequantized", "original"] = "original" if original_loss < dequantized_loss else "dequantized"
    reason = f"held-out loss {dequantized_loss:.4f} on the dequantized base, {original_loss:.4f} on the original"
    return BaseChoice(better, losses, reason)


def check_original(dequantized_loss: float | None, original_loss: float | None) -> None:
    """MergeError where the adapter answers clearly worse on the original base than on the one it was trained on.

    The comparison of logits cannot say so: a merge into the original base is compared with original + adapter.
    """
    if dequantized_loss is None or original_loss is None:
        return
    most = max(dequantized_loss * (1 + MOST_WORSE_RELATIVE), dequantized_loss + MOST_WORSE_NATS)
    if not original_loss <= most:
        raise MergeError(
            f"On the original base this adapter has a held-out loss of {original_loss:.4f}, and of "
            f"{dequantized_loss:.4f} on the dequantised base it was trained on: more than {MOST_WORSE_RELATIVE:.0%} "
            "worse. Merge with --base dequantized. Nothing was written."
        )
