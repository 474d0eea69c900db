"""A setting of a combination has an effect, or is refused; all problems at once."""

import pytest

from qlora_trainer.adapters.arithmetic.methods import COMBINE_METHODS, CombineSettings
from qlora_trainer.common.errors import ConfigError


@pytest.mark.parametrize("method", COMBINE_METHODS)
def test_a_method_takes_what_it_needs_and_nothing_else(method: str) -> None:
    rank = 4 if "svd" in method else None
    density = 0.5 if method.startswith(("ties", "dare")) else None
    seed = 3 if method.startswith("dare") else None
    CombineSettings(method, rank, density, seed).check()  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as refused:
        CombineSettings(method, None if rank else 4, None if density else 0.5).check()  # type: ignore[arg-type]
    verdicts = [("needs --rank" if rank else "--rank has no effect"), ("needs --density" if density else "--density")]
    assert all(verdict in str(refused.value) for verdict in verdicts)
    if not seed:
        with pytest.raises(ConfigError, match="--seed has no effect"):
            CombineSettings(method, rank, density, 1).check()  # type: ignore[arg-type]


@pytest.mark.parametrize("density", [0.0, -0.5, 1.5])
def test_a_density_is_a_share(density: float) -> None:
    with pytest.raises(ConfigError, match="over 0 and at most 1"):
        CombineSettings("ties", density=density).check()


def test_a_rank_is_one_at_least_and_a_method_is_known() -> None:
    with pytest.raises(ConfigError, match="--rank is 0"):
        CombineSettings("svd", rank=0).check()
    with pytest.raises(ConfigError, match=r"There is no method sum\. There are: cat, svd"):
        CombineSettings("sum").check()  # type: ignore[arg-type]
