"""LoRA by segments of rows: each row has what its own adapter alone gives it, whatever rows are around it."""

import pytest
import torch
from random_tensors import normal, normal64

from qlora_kernels.lora_linear import add_lora
from qlora_kernels.lora_rows import LoraStack, RowAdapter, RowSegments, add_lora_rows_, row_tiles
from qlora_kernels.torch_internals import FakeTensorMode

RANKS = (3, 1, 0, 8)  # one adapter has no LoRA on this layer
SCALINGS = (2.0, 0.25, 1.0, 0.5)
IN, OUT = 10, 7


@pytest.fixture(params=["reference", "auto"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every promise here is one of each implementation."""
    monkeypatch.setenv("QLORA_KERNELS", request.param)


def adapters(dtype: torch.dtype = torch.float64) -> list[RowAdapter | None]:
    return [
        RowAdapter(normal64(rank, IN, seed=rank, dtype=dtype), normal64(OUT, rank, seed=9 + rank, dtype=dtype), scaling)
        if rank
        else None
        for rank, scaling in zip(RANKS, SCALINGS, strict=True)
    ]


@pytest.mark.parametrize(
    "places",
    [[0], [-1, -1], [0, 0, 0], [2, 0, 1], [0, 1, 0, 1], [2, 2, -1, 3, 0, 0, -1], [3, 3]],
    ids=lambda places: ",".join(map(str, places)),
)
@pytest.mark.parametrize("tokens", [1, 5])
def test_each_row_has_the_output_of_its_adapter_alone(places: list[int], tokens: int) -> None:
    x, before = normal64(len(places), tokens, IN), normal64(len(places), tokens, OUT, seed=1)
    choices = adapters()
    stack = LoraStack.of(choices, torch.float64)
    assert stack is not None
    output = before.clone()
    assert add_lora_rows_(output, x, stack, RowSegments.of(places)) is output
    for row, place in enumerate(places):
        one = choices[place] if place >= 0 else None
        expected = before[row]
        if one is not None:
            assert one.lora_A is not None
            assert one.lora_B is not None
            expected = add_lora(before[row], x[row], one.lora_A, one.lora_B, one.scaling)
        torch.testing.assert_close(output[row], expected, rtol=1e-13, atol=1e-13)


def test_rows_that_take_no_lora_are_not_written() -> None:
    stack = LoraStack.of(adapters(torch.float32), torch.float32)
    assert stack is not None
    output = torch.zeros(3, 2, OUT)
    add_lora_rows_(output, normal(3, 2, IN), stack, RowSegments.of([-1, 3, 2]))
    assert [bool(row.any()) for row in output] == [False, True, False]


def test_what_is_not_finite_in_a_row_stays_there() -> None:
    stack = LoraStack.of(adapters(torch.float32), torch.float32)
    assert stack is not None
    x, output = normal(4, 1, IN), torch.zeros(4, 1, OUT)
    x[0], x[2] = torch.inf, torch.nan
    add_lora_rows_(output, x, stack, RowSegments.of([-1, 0, 3, 1]))
    assert [bool(row.isfinite().all()) for row in output] == [True, True, False, True]


def test_rows_next_to_each_other_with_one_adapter_are_one_segment() -> None:
    segments = RowSegments.of([2, 2, -1, 0, 2])
    assert (segments.rows, segments.adapters, segments.batch) == ((2, 1, 1, 1), (2, -1, 0, 2), 5)
    assert segments.slices == [(slice(0, 2), 2), (slice(2, 3), -1), (slice(3, 4), 0), (slice(4, 5), 2)]
    assert RowSegments.of([]).batch == 0


def test_a_batch_of_other_rows_than_the_segments_is_a_fault() -> None:
    stack = LoraStack.of(adapters(torch.float32), torch.float32)
    assert stack is not None
    with pytest.raises(AssertionError, match="each row is in one segment"):
        add_lora_rows_(normal(3, 2, OUT), normal(3, 2, IN), stack, RowSegments.of([0, 1]))


def test_a_stack_holds_the_adapters_below_each_other_in_the_dtype_of_the_products() -> None:
    choices = adapters(torch.float32)
    stack = LoraStack.of(choices, torch.bfloat16)
    assert stack is not None
    assert stack.A.shape == (sum(RANKS), IN)
    assert stack.B.shape == (sum(RANKS), OUT)
    assert stack.A.dtype == stack.B.dtype == torch.bfloat16
    assert (stack.ranks, stack.scalings) == (RANKS, SCALINGS)
    second = choices[1]
    assert second is not None
    assert second.lora_B is not None
    assert torch.equal(stack.B[3:4], second.lora_B.T.bfloat16())
    assert LoraStack.of([None, RowAdapter(input_scale=torch.ones(IN))], torch.float32) is None


@pytest.mark.parametrize("row_tokens", [1, 3, 20])
def test_tiles_hold_each_token_that_has_lora_once_and_no_other(row_tokens: int) -> None:
    places = [2, 2, 2, -1, 0, 3, 1, 1]
    segments = RowSegments.of(places)
    tiles = row_tiles(segments.rows, segments.adapters, RANKS, SCALINGS, row_tokens, 16)
    found: dict[int, tuple[int, int, float]] = {}
    for tile in tiles:
        assert 0 < tile.tokens <= 16
        for token in range(tile.token, tile.token + tile.tokens):
            assert token not in found
            found[token] = tile.rank, tile.ranks, tile.scaling
    firsts = (0, 3, 4, 4)
    expected = {
        row * row_tokens + token: (firsts[place], RANKS[place], SCALINGS[place])
        for row, place in enumerate(places)
        if place >= 0 and RANKS[place]
        for token in range(row_tokens)
    }
    assert found == expected


def test_fake_tensors_of_a_card_pass_through() -> None:
    with FakeTensorMode():
        x, output = torch.empty(4, 3, IN, device="cuda"), torch.empty(4, 3, OUT, device="cuda")
        A, B = torch.empty(12, IN, device="cuda"), torch.empty(12, OUT, device="cuda")
        stack = LoraStack(A, B, RANKS, SCALINGS)
        assert add_lora_rows_(output, x, stack, RowSegments.of([0, 0, 2, -1])).device.type == "cuda"
