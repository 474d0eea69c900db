"""Name the ways in which adapters are combined, and check what each needs; nothing here imports torch.

The names are those of PEFT's `add_weighted_adapter`. Without `_svd` a way treats A and B apart, and gives factors of
the rank that the adapters have; with it, it treats B A, and cuts the result to a rank.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from qlora_trainer.common.errors import ConfigError

CombineMethod = Literal[
    "cat", "svd", "linear", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"
]
COMBINE_METHODS: tuple[str, ...] = get_args(CombineMethod)


@dataclass(frozen=True)
class CombineSettings:
    """Hold how adapters are combined; a setting that has no effect, or is missing, is refused by `check`."""

    method: CombineMethod = "cat"
    rank: int | None = None  # of the result, where the method cuts it
    density: float | None = None  # share of the values that are kept before the sum
    seed: int | None = None  # of what DARE drops; 0 where it is not given

    @property
    def truncates(self) -> bool:
        """Return True if the method cuts the result to a rank."""
        return self.method.endswith("svd")

    @property
    def prunes(self) -> bool:
        """Return True if the method leaves values out before it sums."""
        return self.method.startswith(("ties", "dare"))

    @property
    def draws(self) -> bool:
        """Return True if what the method leaves out is drawn."""
        return self.method.startswith("dare")

    def check(self) -> None:
        """Refuse settings that are missing, have no effect, or are out of their range, all at once.

        Raises:
            ConfigError: there is one.
        """
        problems = []
        if self.method not in COMBINE_METHODS:
            raise ConfigError(f"There is no method {self.method}. There are: {', '.join(COMBINE_METHODS)}.")
        needed = ((self.truncates, "rank", self.rank, "8"), (self.prunes, "density", self.density, "0.5"))
        for needs, name, value, example in needed:
            if needs and value is None:
                problems.append(f"--method {self.method} needs --{name}, such as --{name} {example}.")
            if not needs and value is not None:
                problems.append(f"--{name} has no effect with --method {self.method}; leave it out.")
        if self.seed is not None and not self.draws:
            problems.append(f"--seed has no effect with --method {self.method}; leave it out.")
        if self.rank is not None and self.rank < 1:
            problems.append(f"--rank is {self.rank}, and must be 1 at least.")
        if self.density is not None and not 0.0 < self.density <= 1.0:
            problems.append(f"--density is {self.density:g}, and must be over 0 and at most 1: the share to keep.")
        if problems:
            raise ConfigError(" ".join(problems))
