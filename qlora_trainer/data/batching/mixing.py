"""Decide how many rows each source gives to an epoch, which rows those are, and how many are kept for evaluation.

Rows an epoch: all of a source; or `count`, repeating it in whole passes and a part of one more; or by `weight`, where
the source that is scarcest for its weight is used once and sets the scale, so that no source is repeated. Where a
source has more rows than an epoch takes, epoch after epoch goes on through one shuffled circle of them: rows not seen
come before rows seen. All of it depends on seed and epoch alone, so a run resumes exactly.

S sources, n rows of one source, K rows of an epoch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_STREAM = 0x6D6978  # keeps these draws apart from the order of an epoch, which comes from (seed, epoch)


@dataclass(frozen=True)
class SourceAmount:
    """Hold what the config says of one source: a weight, a count, or neither (all its rows)."""

    weight: float | None = None
    count: int | None = None


@dataclass(frozen=True)
class Mixture:
    """Hold the rows of each source and how many of them an epoch takes."""

    rows: tuple[np.ndarray, ...]  # S arrays (n,) int64: which examples of the training set
    quotas: tuple[int, ...]  # S; their sum is K

    def __len__(self) -> int:
        """Count the rows of an epoch, the same for every one.

        Returns:
            K.
        """
        return sum(self.quotas)

    def epoch_rows(self, seed: int, epoch: int) -> np.ndarray:
        """Take the examples of an epoch.

        Args:
            seed: of the run.
            epoch: from 0.

        Returns:
            Indices of examples, source after source, (K,) int64; what is repeated appears several times.
        """
        taken = []
        for source, (rows, quota) in enumerate(zip(self.rows, self.quotas, strict=True)):
            passes, rest = divmod(quota, len(rows))
            circle = rows[shuffled(len(rows), [seed, source, _STREAM])]
            begin = epoch * rest % len(rows)
            taken += [np.tile(rows, passes), circle[np.arange(begin, begin + rest) % len(rows)]]
        return np.concatenate(taken)


def shuffled(count: int, seed: Sequence[int]) -> np.ndarray:
    """Make a permutation.

    Raw random bits are sorted: numpy promises that these stay the same from version to version, which it does not
    promise of its own `permutation`, nor torch of `randperm`.

    Args:
        count: how long it is.
        seed: integers; equal ones give equal permutations.

    Returns:
        (count,) int64.
    """
    return np.argsort(np.random.PCG64(list(seed)).random_raw(count), kind="stable")


def is_mixed(parts: Sequence[SourceAmount]) -> bool:
    """Return True unless an epoch is every row once.

    Args:
        parts: one for each source.

    Returns:
        True if any source has a weight or a count.
    """
    return any(part.weight is not None or part.count is not None for part in parts)


def epoch_quotas(available: Sequence[int], parts: Sequence[SourceAmount]) -> list[int]:
    """Count the rows of each source in an epoch.

    Args:
        available: rows that each source has, all at least 1.
        parts: all with a weight, or none.

    Returns:
        (S,); at least one of each source.
    """
    weights = [part.weight for part in parts]
    if all(weight is None for weight in weights):
        return [part.count or count for part, count in zip(parts, available, strict=True)]
    scale = min(count / weight for count, weight in zip(available, weights, strict=True) if weight)
    shares = [scale * weight for weight in weights if weight]
    return [min(max(1, round(share)), count) for share, count in zip(shares, available, strict=True)]


def eval_counts(available: Sequence[int], parts: Sequence[SourceAmount], share: float) -> list[int]:
    """Count the rows to keep for evaluation of each source: a share of an epoch's, from each as an epoch takes from it.

    So the eval loss measures the mixture that is trained. At least one row in all is kept for evaluation and at least
    one is left, and of several sources that are mixed at least one each.

    Args:
        available: rows that each source has.
        parts: what an epoch takes of each.
        share: of an epoch's rows, between 0 and 1.

    Returns:
        (S,).
    """
    usual = [min(quota, count) for quota, count in zip(epoch_quotas(available, parts), available, strict=True)]
    most = [count - 1 if is_mixed(parts) else count for count in available]
    total = min(max(1, round(sum(usual) * share)), sum(available) - 1, sum(most))
    exact = [total * quota / sum(usual) for quota in usual]
    counts = [min(int(value), limit) for value, limit in zip(exact, most, strict=True)]
    while sum(counts) < total:  # rounding down left some: to whom most is missing, of equal ones the first
        missing = [e - c if c < limit else -np.inf for e, c, limit in zip(exact, counts, most, strict=True)]
        counts[missing.index(max(missing))] += 1
    return counts
