import dataclasses
import threading

import numpy as np
import pytest
import torch

from qlora_kernels.linear_cross_entropy import IGNORED
from qlora_trainer.common.errors import CheckpointError, DataError
from qlora_trainer.data.batching.loader import StepLoader, epoch_order
from qlora_trainer.data.batching.mixing import Mixture
from qlora_trainer.data.batching.packing import Pack
from qlora_trainer.data.types import IGNORED_LABEL, Example

ROWS = [Example([token, token + 100, token + 200], [-100, token + 100, token + 200]) for token in range(1, 12)]


def loader(rows=ROWS, global_batch_size=4, seed=0, **kwargs) -> StepLoader:
    return StepLoader(rows, global_batch_size, kwargs.get("micro_batch_tokens", 6), kwargs.get("packing", True), seed)


def rows_of(packs) -> list[int]:
    return [token for pack in packs for token in pack.input_ids.flatten().tolist() if 0 < token < 100]


def test_an_epoch_holds_every_row_once_and_its_last_step_may_be_short():
    steps = loader()
    assert steps.steps_per_epoch == 3
    seen = [rows_of(steps.next()) for _ in range(3)]
    assert [len(step) for step in seen] == [4, 4, 3]
    assert sorted(sum(seen, [])) == list(range(1, 12))  # noqa: RUF017
    assert (steps.epoch, steps.step) == (1, 0)


def test_order_is_a_pure_function_of_seed_and_epoch():
    assert epoch_order(100, 3, 5).tolist() == epoch_order(100, 3, 5).tolist()
    orders = {tuple(epoch_order(100, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert all(sorted(order) == list(range(100)) for order in orders)


def test_without_a_mixture_the_order_is_that_of_every_row_once():
    """Raw random bits, sorted: what runs that were begun before there were mixtures go on with."""
    for epoch in range(3):
        expected = np.argsort(np.random.PCG64([7, epoch]).random_raw(11), kind="stable")
        assert loader(seed=7).order(epoch).tolist() == expected.tolist()


@pytest.mark.parametrize("quotas", [(4, 3), (9, 20)])
def test_a_mixed_loader_takes_from_each_source_its_rows_and_resumes_exactly(quotas):
    def mixed() -> StepLoader:
        mixture = Mixture((np.arange(0, 8), np.arange(8, 11)), quotas)
        return StepLoader(ROWS, 4, 6, packing=True, seed=0, mixture=mixture)

    straight = mixed()
    assert straight.steps_per_epoch == -(-sum(quotas) // 4)
    epochs = [[rows_of(straight.next()) for _ in range(straight.steps_per_epoch)] for _ in range(3)]
    for epoch in epochs:
        taken = [row for step in epoch for row in step]
        assert (sum(row <= 8 for row in taken), sum(row > 8 for row in taken)) == quotas
    assert len({tuple(sorted(row for step in epoch for row in step)) for epoch in epochs}) > 1, "other rows"
    expected = [step for epoch in epochs for step in epoch]
    for interruption in range(len(expected)):
        first = mixed()
        for _ in range(interruption):
            first.next()
        second = mixed()
        second.load_state_dict(first.state_dict())
        assert [rows_of(second.next()) for _ in expected[interruption:]] == expected[interruption:]


def test_a_restored_loader_gives_the_steps_an_uninterrupted_one_gives():
    straight = loader()
    expected = [rows_of(straight.next()) for _ in range(8)]
    for interruption in range(8):
        first = loader()
        for _ in range(interruption):
            first.next()
        second = loader()
        second.load_state_dict(first.state_dict())
        assert [rows_of(second.next()) for _ in range(8 - interruption)] == expected[interruption:]


def test_a_step_holds_the_same_rows_and_labels_however_it_is_cut():
    cuts = [loader(), loader(packing=False), loader(micro_batch_tokens=3), loader(micro_batch_tokens=1000)]
    for _ in range(4):
        steps = [steps.next() for steps in cuts]
        assert len({tuple(sorted(rows_of(packs))) for packs in steps}) == 1
        assert len({sum(pack.label_tokens for pack in packs) for packs in steps}) == 1


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"rows": ROWS[:-1]}, "rows was 11 and is 10"),
        ({"global_batch_size": 5}, "global_batch_size was 4 and is 5"),
        ({"seed": 1}, "seed was 0 and is 1"),
    ],
)
def test_a_position_in_other_data_is_refused_by_name(changed, words):
    with pytest.raises(CheckpointError, match=words):
        loader(**changed).load_state_dict(loader().state_dict())


@pytest.mark.parametrize("broken", [{"step": 3}, {"epoch": -1}, {"step": -1}])
def test_a_position_outside_the_epoch_is_refused(broken):
    with pytest.raises(CheckpointError, match="an epoch has 3 steps"):
        loader().load_state_dict(loader().state_dict() | broken)


def test_a_position_with_missing_parts_is_refused():
    with pytest.raises(CheckpointError, match="should hold"):
        loader().load_state_dict({"epoch": 0, "step": 0})


def test_no_rows_are_refused():
    with pytest.raises(DataError, match="no rows"):
        loader(rows=[])


def test_rows_and_the_loss_agree_on_what_is_not_trained():
    assert IGNORED_LABEL == IGNORED


class Reading:
    """Rows that note which thread reads them, and of which some cannot be read."""

    def __init__(self, broken=()) -> None:
        self.broken = set(broken)
        self.threads: list[threading.Thread] = []

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, index: int) -> Example:
        self.threads.append(threading.current_thread())
        if index in self.broken:
            raise OSError(f"row {index} cannot be read")
        return ROWS[index]

    @property
    def by_caller(self) -> int:
        return sum(thread is threading.current_thread() for thread in self.threads)


def same_packs(ours, theirs) -> bool:
    names = [field.name for field in dataclasses.fields(Pack)]
    pairs = [(getattr(a, name), getattr(b, name)) for a, b in zip(ours, theirs, strict=True) for name in names]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("packing", [True, False])
def test_steps_laid_out_ahead_are_those_laid_out_when_they_are_due(packing):
    """Over two epochs and a bit; only the first is read by the caller itself."""
    rows = Reading()
    ahead, plain = loader(rows, packing=packing), loader(packing=packing)
    for step in range(8):
        packs = ahead.peek()
        before = ahead.state_dict()
        ahead.begin_step_after()
        assert ahead.state_dict() == before == plain.state_dict(), "it moves nothing"
        ahead.advance()
        assert same_packs(packs, plain.next()), step
    assert rows.by_caller == 4


def test_what_was_laid_out_ahead_is_dropped_where_the_limit_has_changed():
    rows = Reading()
    steps, plain = loader(rows, micro_batch_tokens=6), loader(micro_batch_tokens=3)
    steps.begin_step_after()
    steps.advance()
    steps.micro_batch_tokens = 3
    plain.advance()
    packs = steps.peek()
    assert rows.by_caller == 4, "it is read anew"
    assert same_packs(packs, plain.peek())
    assert len(packs) == 4


def test_a_step_that_is_laid_out_already_is_not_laid_out_twice_unless_the_limit_has_changed():
    rows = Reading()
    steps = loader(rows, micro_batch_tokens=6)
    steps.begin_step_after()
    steps.begin_step_after()
    steps.micro_batch_tokens = 3
    steps.begin_step_after()
    steps.advance()
    assert len(steps.peek()) == 4
    for thread in rows.threads:
        thread.join()
    assert len(rows.threads) == 8
    assert rows.by_caller == 0


def test_what_was_laid_out_ahead_is_dropped_where_the_position_is_another():
    steps, plain = loader(), loader()
    steps.begin_step_after()
    state = {**plain.state_dict(), "step": 2}
    steps.load_state_dict(state)
    plain.load_state_dict(state)
    assert same_packs(steps.peek(), plain.peek())


def test_a_row_that_cannot_be_read_fails_the_step_that_has_it_and_not_the_one_before():
    rows = Reading()
    steps = loader(rows)
    rows.broken = {int(steps.rows_of_step(steps.order(0), 1)[0])}
    packs = steps.peek()
    steps.begin_step_after()
    assert same_packs(packs, loader().peek())
    steps.advance()
    with pytest.raises(OSError, match="cannot be read"):
        steps.peek()
    assert rows.by_caller == 4, "the thread's failure"
    rows.broken = set()
    plain = loader()
    plain.advance()
    assert same_packs(steps.peek(), plain.peek()), "once it can be read, it is"
