"""Compare the logits of two models, over a block of the vocabulary at a time.

With a large vocabulary the logits of a few hundred tokens take a gigabyte. So what is kept of a model is the hidden
states that its LM head takes, and logits are made again from these, a block of columns after the other; norms, softmax
and the first choice are gathered as the blocks go by. Sums are in fp64.

Legend: N tokens, H hidden size, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from qlora_kernels.head_rows import BLOCK_ELEMENTS, HeadRows

BLOCK_LOGITS = 2**18  # compared at a time: 2 MiB in fp64, and a few such tensors


@dataclass(frozen=True)
class LogitDifference:
    """Report how the logits of two models differ over some tokens."""

    relative_error: float  # norm of the difference over the norm of the reference
    kl: float  # KL(reference || merged) in nats, mean over tokens
    top1_agreement: float  # share of tokens with the same most likely successor
    tokens: int


class Logits(Protocol):
    """Give a model's logits at some tokens."""

    @property
    def shape(self) -> tuple[int, int]:
        """Return (N, V)."""
        ...

    def at(self, tokens: Tensor) -> "Logits":
        """Keep the logits of some tokens.

        Args:
            tokens: (n,), their numbers, below N.

        Returns:
            The logits, in that order.
        """
        ...

    def columns(self, vocabulary: slice) -> Tensor:  # (N, columns), on the CPU
        """Return the logits of a part of the vocabulary.

        Args:
            vocabulary: which columns, with a start and a stop.

        Returns:
            (N, columns), on the CPU.
        """
        ...


@dataclass(frozen=True, eq=False)
class HeadLogits:
    """Compute logits when they are asked for: softcap(scale * (hidden @ head^T + bias))."""

    hidden: Tensor  # (N, H), on the head's device
    head: HeadRows
    bias: Tensor | None = None  # (V,)
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Return (N, V)."""
        return self.hidden.shape[0], self.head.shape[0]

    def at(self, tokens: Tensor) -> Self:
        """Keep the logits of some tokens.

        Args:
            tokens: (n,), their numbers, below N.

        Returns:
            The logits, in that order, not made yet.
        """
        return replace(self, hidden=self.hidden[tokens.to(self.hidden.device)])

    def columns(self, vocabulary: slice) -> Tensor:
        """Make the logits of a part of the vocabulary, with few rows of the head at a time.

        Args:
            vocabulary: which columns, with a start and a stop.

        Returns:
            (N, columns), on the CPU.
        """
        first, last = vocabulary.start, vocabulary.stop
        found = self.hidden.new_empty((self.hidden.shape[0], last - first))
        step = max(BLOCK_ELEMENTS // self.head.shape[1], 1)  # rows of the head that are made at a time
        for start in range(first, last, step):
            stop = min(start + step, last)
            rows = self.head.rows(start, stop, self.hidden.dtype)
            torch.mm(self.hidden, rows.T, out=found[:, start - first : stop - first])
        if self.bias is not None:
            found += self.bias[vocabulary]
        if self.logit_scale != 1.0:
            found *= self.logit_scale
        if self.softcap is not None:
            found.div_(self.softcap).tanh_().mul_(self.softcap)
        return found.cpu()


@dataclass(frozen=True, eq=False)
class WholeLogits:
    """Hold logits that a model gave whole; they take N x V."""

    values: Tensor  # (N, V), on the CPU

    @classmethod
    def of_rows(cls, rows: Sequence[Tensor]) -> Self:  # each (1, T, V) or (T, V)
        """Join the logits of several rows.

        Args:
            rows: each (1, T, V) or (T, V).

        Returns:
            The logits of all their tokens, on the CPU.
        """
        return cls(torch.cat([row.reshape(-1, row.shape[-1]).cpu() for row in rows]))

    @property
    def shape(self) -> tuple[int, int]:
        """Return (N, V)."""
        return self.values.shape[0], self.values.shape[1]

    def at(self, tokens: Tensor) -> Self:
        """Keep the logits of some tokens.

        Args:
            tokens: (n,), their numbers, below N.

        Returns:
            The logits, in that order.
        """
        return replace(self, values=self.values[tokens])

    def columns(self, vocabulary: slice) -> Tensor:
        """Return the logits of a part of the vocabulary.

        Args:
            vocabulary: which columns.

        Returns:
            (N, columns), a view.
        """
        return self.values[:, vocabulary]


class _Softmax:
    """Keep the largest logit of each token so far, where it is, and the sum of exp(logit - largest).

    Args:
        tokens: N.
    """

    def __init__(self, tokens: int) -> None:
        self.largest = torch.full((tokens,), -math.inf, dtype=torch.float64)
        self.choice = torch.zeros(tokens, dtype=torch.int64)
        self.total = torch.zeros(tokens, dtype=torch.float64)

    def take(
        self,
        logits: Tensor,  # (N, block) fp64
        first: int,  # column of the first
    ) -> tuple[Tensor, Tensor]:  # (N, block), (N,)
        """Take the next block of the vocabulary.

        Args:
            logits: of the block.
            first: number of its first column in the vocabulary.

        Returns:
            exp(logit - largest) of the block, and the factor that brings earlier sums to the new largest.
        """
        largest, choice = logits.max(dim=1)
        self.choice = torch.where(largest > self.largest, choice + first, self.choice)
        largest = torch.maximum(largest, self.largest)  # NaN where one is
        earlier = (self.largest - largest).exp()
        weights = (logits - largest[:, None]).exp()
        self.largest, self.total = largest, self.total * earlier + weights.sum(dim=1)
        return weights, earlier

    @property
    def log_normalizer(self) -> Tensor:  # (N,)
        return self.largest + self.total.log()


def compare_logits(reference: Logits, merged: Logits) -> LogitDifference:
    """Compare over all tokens, in the memory of BLOCK_LOGITS logits and of a few of the heads' rows.

    Args:
        reference: what is right, (N, V).
        merged: what is compared with it, (N, V).

    Returns:
        The difference; not finite where a logit is not.
    """
    return compare_pairs([(reference, merged)])[0]


@torch.no_grad()
def compare_pairs(pairs: Sequence[tuple[Logits, Logits]]) -> list[LogitDifference]:
    """Compare each pair as `compare_logits` does; what is in several pairs is made once.

    Args:
        pairs: what is right, and what is compared with it; all (N, V).

    Returns:
        The difference of each pair.
    """
    models = list({id(logits): logits for pair in pairs for logits in pair}.values())
    assert len({logits.shape for logits in models}) == 1, f"shapes: {[logits.shape for logits in models]}"
    tokens, vocabulary = models[0].shape
    softmaxes = {id(logits): _Softmax(tokens) for logits in models}
    errors, norms = [0.0] * len(pairs), [0.0] * len(pairs)  # squared
    # Of each pair, the sum of exp(expected - its largest) * (expected - found).
    excesses = [torch.zeros(tokens, dtype=torch.float64) for _ in pairs]
    width = max(BLOCK_LOGITS // tokens, 1)
    for start in range(0, vocabulary, width):
        part = slice(start, min(start + width, vocabulary))
        blocks = {id(logits): logits.columns(part).double() for logits in models}
        taken = {key: softmaxes[key].take(block, start) for key, block in blocks.items()}
        for index, (reference, merged) in enumerate(pairs):
            expected = blocks[id(reference)]
            difference = expected - blocks[id(merged)]
            errors[index] += float(difference.square().sum())
            norms[index] += float(expected.square().sum())
            weights, earlier = taken[id(reference)]
            excesses[index] = excesses[index] * earlier + (weights * difference).sum(dim=1)
    found = []
    for (reference, merged), error, norm, excess in zip(pairs, errors, norms, excesses, strict=True):
        ours, theirs = softmaxes[id(reference)], softmaxes[id(merged)]
        # KL = sum p (log p - log q), with log p = expected - its log normalizer, and log q likewise.
        kl = excess / ours.total - ours.log_normalizer + theirs.log_normalizer
        found.append(
            LogitDifference(
                relative_error=math.sqrt(error / norm) if norm else math.nan,
                kl=float(kl.mean()),
                top1_agreement=float((ours.choice == theirs.choice).double().mean()),
                tokens=tokens,
            )
        )
    return found


@torch.no_grad()
def first_choices(
    found: Logits,
    tokens: Tensor | None = None,  # (N,)
) -> tuple[Tensor, Tensor]:  # (N,), (N,) fp64
    """Find the most likely successor of each token, and how much less likely others are.

    Args:
        found: (N, V).
        tokens: those others; None: the successors themselves.

    Returns:
        (the most likely ones; nats that `tokens` are below these: 0 where they are the same, NaN where a logit is).
    """
    count, vocabulary = found.shape
    seen, of_tokens = _Softmax(count), torch.full((count,), math.nan, dtype=torch.float64)
    width = max(BLOCK_LOGITS // max(count, 1), 1)
    for start in range(0, vocabulary, width):
        block = found.columns(slice(start, min(start + width, vocabulary))).double()
        seen.take(block, start)
        if tokens is not None:
            here = ((tokens >= start) & (tokens < start + block.shape[1])).nonzero()[:, 0]
            of_tokens[here] = block[here, tokens[here] - start]
    return seen.choice, seen.largest - (seen.largest if tokens is None else of_tokens)
