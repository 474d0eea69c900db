"""Take the fastest candidate that fits, planning as few of them as needed.

Within a few per cent of the fastest the one with least memory is taken: the formula is not that exact, and memory left
over is never wrong. More memory never makes the choice slower: what it then takes either was there before, or is faster
than all that was within these per cent. Left out: what a candidate needs (given as functions).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.planning.speed.candidates import Candidate
from qlora_trainer.planning.variants import way_overrides

AS_FAST = 1.03  # times the fastest's seconds
SMALLER = 0.95  # times the bytes of what ran out of memory

_Plan = TypeVar("_Plan")


@dataclass(frozen=True)
class Speed:
    """Say how fast a run is by the formula, and by what it was chosen; for people and programs."""

    seconds: float  # of a step, on average
    waiting: float  # of these, the seconds in which the device waits for the host
    tokens: float  # of a step, on average
    micro_batch_tokens: int  # most tokens of a micro-batch
    device: str  # that the seconds are for
    note: str  # on the device's figures, or on what was left out; may be empty
    has_rows: bool  # the run's own rows were laid out; else rows of full length
    settings: str  # that make a run take the same again
    following: dict[str, Any] | None  # what came next: activation_checkpointing, micro_batch_tokens, seconds, settings
    faster: dict[str, Any] | None  # what would be faster than the user's settings, and fits by estimate

    @property
    def host_share(self) -> float:
        """Return the share of a step in which the device waits for the host.

        Returns:
            From 0 to 1.
        """
        return self.waiting / self.seconds

    @property
    def seconds_a_thousand_tokens(self) -> float:
        """Return the seconds of a thousand tokens.

        Returns:
            Seconds.
        """
        return 1000 * self.seconds / self.tokens


def speed_in_words(speed: Speed) -> list[tuple[str, str]]:
    """Describe how fast a run is, what came next, and what pins the choice.

    Args:
        speed: of its plan.

    Returns:
        (name, value) pairs.
    """
    rows = [
        (
            "a step, estimated",
            f"{speed.seconds:.2f} s of {speed.tokens:,.0f} tokens on {speed.device}: "
            f"{speed.seconds_a_thousand_tokens:.3g} s a thousand tokens, {speed.tokens / speed.seconds:,.0f} tokens/s"
            + ("" if speed.has_rows else ", for rows of full length"),
        ),
        ("micro-batches", f"of up to {speed.micro_batch_tokens:,} tokens"),
    ]
    named = {"next, estimated": speed.following, "faster, and fits by estimate": speed.faster}
    rows += [
        (
            name,
            f"{one['activation_checkpointing']}, micro-batches of up to {one['micro_batch_tokens']:,} tokens: "
            f"{one['seconds']:.2f} s a step, by {one['settings']}",
        )
        for name, one in named.items()
        if one
    ]
    return [*rows, ("to keep this choice", speed.settings), *([("note", speed.note)] if speed.note else [])]


@dataclass(frozen=True)
class Choice(Generic[_Plan]):
    """Hold what was chosen, its plan, and what came next."""

    chosen: Candidate
    plan: _Plan
    following: Candidate | None  # the fastest of the others that fit, by estimate; None where nothing else does


def search(
    ordered: Sequence[Candidate],
    estimated: Callable[[Candidate], int | None],
    plan: Callable[[Candidate], _Plan | None],
    also_fits: Callable[[Candidate, Candidate], bool],
) -> Choice[_Plan] | None:
    """Choose by estimates, and plan what is chosen; where its plan does not fit, choose again without it.

    Args:
        ordered: the fastest first.
        estimated: bytes of a candidate; None where it does not fit.
        plan: the plan of a candidate; None where it does not fit.
        also_fits: True if a candidate fits beyond doubt, where another does; only such a one is named as what came
            next, so that nothing is planned for its name alone.

    Returns:
        The choice; None where nothing fits.
    """
    left = list(ordered)
    while True:
        fitting: list[tuple[int, Candidate]] = []
        for candidate in left:
            if fitting and candidate.seconds > AS_FAST * fitting[0][1].seconds:
                break
            if (size := estimated(candidate)) is not None:
                fitting.append((size, candidate))
        if not fitting:
            return None
        _, chosen = min(fitting, key=lambda one: (one[0], one[1].seconds))
        found = plan(chosen)
        if found is not None:
            others = [candidate for _, candidate in fitting if candidate is not chosen]
            others += [one for one in left if one.seconds > AS_FAST * fitting[0][1].seconds and also_fits(one, chosen)]
            return Choice(chosen, found, others[0] if others else None)
        left.remove(chosen)


def next_smaller(
    ordered: Sequence[Candidate],
    estimated: Callable[[Candidate], int | None],
    needed: int,
    lays_out_smaller: Callable[[Candidate], bool],
) -> Candidate | None:
    """Find the fastest candidate to go on with where memory ran out.

    Args:
        ordered: the fastest first.
        estimated: bytes of a candidate; None where it does not fit the host.
        needed: bytes of what ran out of memory, by the same estimate.
        lays_out_smaller: True if the rows that failed take less memory under it than they did.

    Returns:
        The candidate; None where none is smaller.
    """
    for candidate in ordered:
        if lays_out_smaller(candidate) and (size := estimated(candidate)) is not None and size <= SMALLER * needed:
            return candidate
    return None


def in_json(candidate: Candidate | None, config: RunConfig) -> dict[str, Any] | None:
    """Write a candidate as JSON types.

    Args:
        candidate: or None.
        config: of the run, which the settings change.

    Returns:
        Values by name.
    """
    if candidate is None:
        return None
    return {
        "activation_checkpointing": str(candidate.policy),
        "micro_batch_tokens": candidate.micro_batch_tokens,
        "seconds": candidate.seconds,
        "settings": way_overrides(candidate.policy, candidate.micro_batch_tokens, config),
    }
