"""A row as tokens: what rendering makes and packing lays out.

In a room of its own because rendering needs no torch, and a process that only renders starts faster without.
"""

from dataclasses import dataclass

IGNORED_LABEL = -100  # of a token that carries no loss; the kernels' and transformers' number


@dataclass(frozen=True)
class Example:
    """One row as tokens. labels[i] is input_ids[i] where it is learned, else -100: not shifted yet."""

    input_ids: list[int]
    labels: list[int]

    @property
    def learned_tokens(self) -> int:
        """Labels that carry loss. The first token has nothing before it to be predicted from."""
        return len(self.labels[1:]) - self.labels[1:].count(IGNORED_LABEL)
