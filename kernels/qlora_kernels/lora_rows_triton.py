"""Add LoRA by segments of rows on CUDA, in two launches for any number of adapters.

The first makes x A^T of each tile of tokens with the ranks of the tile's adapter, in parts of the in features: with a
token a row there are few tiles, and a card has many processors to fill. The second adds the parts, always in the same
order, and multiplies by B a block of out features at a time, onto the output. Products of 16 bits run on tensor cores
and are summed in fp32; products of fp32 are not shortened to TF32. Where a tile of tokens or of ranks is not full, what
is beyond it is neither read nor written.

Legend: N tokens, I in features, O out features, K ranks of all adapters together, W largest rank, P parts.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_kernels.lora_rows import add_lora_rows_torch, row_tiles
from qlora_kernels.nf4_matmul_triton import has_tensor_cores

TOKENS_PER_TILE = 16
RANKS_PER_TURN = 16
IN_FEATURES_PER_TURN = {2: 128, 4: 64}  # by bytes of an element
IN_FEATURES_PER_PART = 1024
OUT_FEATURES_PER_PROGRAM = {2: 128, 4: 64}
LORA_ROWS_OPTIONS = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}  # fewer roundings
TILES_KEPT = 256  # of the tables on the device, one for each layout and number of tokens


@triton.jit
def shrink_rows_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # (N, I)
    A_ptr,  # (K, I)
    parts_ptr,  # (P, N, W) fp32
    tiles_ptr,  # (tiles, 4)
    tokens,  # N
    in_features,
    width,  # W
    TOKENS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PART: tl.constexpr,
):
    """Multiply a tile of tokens with some ranks of its adapter's A, over a part of the in features."""  # noqa: DOC101, DOC103, DOC107
    tile_ptr = tiles_ptr + tl.program_id(0) * 4
    first_token, tile_tokens = tl.load(tile_ptr), tl.load(tile_ptr + 1)
    first_rank, ranks = tl.load(tile_ptr + 2), tl.load(tile_ptr + 3)
    part = tl.program_id(2)
    rank = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    if tl.program_id(1) * RANKS < ranks:
        place = tl.arange(0, TOKENS)
        token = (first_token + place).to(tl.int64)
        total = tl.zeros((TOKENS, RANKS), tl.float32)
        for start in range(0, PART, COLUMNS):
            column = part * PART + start + tl.arange(0, COLUMNS)
            known = (place < tile_tokens)[:, None] & (column < in_features)[None, :]
            x = tl.load(x_ptr + token[:, None] * in_features + column[None, :], mask=known, other=0.0)
            inside = (rank < ranks)[:, None] & (column < in_features)[None, :]
            row = (first_rank + rank).to(tl.int64)
            A = tl.load(A_ptr + row[:, None] * in_features + column[None, :], mask=inside, other=0.0)
            total = tl.dot(x, tl.trans(A), total, input_precision="ieee")
        target = (part * tokens + token)[:, None] * width + rank[None, :]
        tl.store(parts_ptr + target, total, mask=(place < tile_tokens)[:, None] & (rank < ranks)[None, :])


@triton.jit
def expand_rows_kernel(  # type: ignore[no-untyped-def]
    parts_ptr,  # (P, N, W) fp32
    B_ptr,  # (K, O)
    output_ptr,  # (N, O)
    tiles_ptr,  # (tiles, 4)
    scalings_ptr,  # (tiles,) fp32
    tokens,  # N
    out_features,
    width,  # W
    parts,  # P
    TOKENS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add the parts of a tile of tokens, multiply with its adapter's B, and add that to some out features."""  # noqa: DOC101, DOC103, DOC107
    tile_ptr = tiles_ptr + tl.program_id(0) * 4
    first_token, tile_tokens = tl.load(tile_ptr), tl.load(tile_ptr + 1)
    first_rank, ranks = tl.load(tile_ptr + 2), tl.load(tile_ptr + 3)
    scaling = tl.load(scalings_ptr + tl.program_id(0))
    place = tl.arange(0, TOKENS)
    token = (first_token + place).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for start in range(0, ranks, RANKS):
        rank = start + tl.arange(0, RANKS)
        known = (place < tile_tokens)[:, None] & (rank < ranks)[None, :]
        low_rank = tl.zeros((TOKENS, RANKS), tl.float32)
        for part in range(0, parts):
            source = (part * tokens + token)[:, None] * width + rank[None, :]
            low_rank += tl.load(parts_ptr + source, mask=known, other=0.0)
        inside = (rank < ranks)[:, None] & (column < out_features)[None, :]
        row = (first_rank + rank).to(tl.int64)
        B = tl.load(B_ptr + row[:, None] * out_features + column[None, :], mask=inside, other=0.0)
        total = tl.dot(low_rank.to(B.dtype), B, total, input_precision="ieee")
    target = token[:, None] * out_features + column[None, :]
    wanted = (place < tile_tokens)[:, None] & (column < out_features)[None, :]
    before = tl.load(output_ptr + target, mask=wanted, other=0.0).to(tl.float32)
    tl.store(output_ptr + target, (before + scaling * total).to(output_ptr.dtype.element_ty), mask=wanted)


def add_lora_rows_triton(
    output: Tensor,  # (B, T, O), contiguous
    x: Tensor,  # (B, T, I)
    A: Tensor,  # (K, I)
    B: Tensor,  # (K, O)
    rows: Sequence[int],
    adapters: Sequence[int],
    ranks: Sequence[int],
    scalings: Sequence[float],
) -> None:
    """Compute `lora_rows.add_lora_rows_torch` by two kernels.

    Left to plain torch: fp64, and 16 bits on cards before Ampere, where Triton has no tensor cores.

    Args:
        output: is added to.
        x: the input.
        A: of all adapters.
        B: of all adapters.
        rows: of each segment.
        adapters: of each segment, -1 for none.
        ranks: of each adapter.
        scalings: of each adapter.
    """
    if x.dtype == torch.float64 or (x.element_size() == 2 and not has_tensor_cores(x.device)):
        add_lora_rows_torch(output, x, A, B, rows, adapters, ranks, scalings)
        return
    row_tokens, in_features = x.shape[1:]
    tokens, out_features = len(x) * row_tokens, output.shape[2]
    layout = (tuple(rows), tuple(adapters), tuple(ranks), tuple(scalings))
    tiles, tile_scalings, width = _on_device(*layout, row_tokens, x.device)
    if not len(tiles) or not in_features or not out_features:
        return
    x, size = x.contiguous(), x.element_size()
    parts = triton.cdiv(in_features, IN_FEATURES_PER_PART)
    low_rank = x.new_empty(parts, tokens, width, dtype=torch.float32)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        shrink_rows_kernel[(len(tiles), triton.cdiv(width, RANKS_PER_TURN), parts)](
            x,
            A.contiguous(),
            low_rank,
            tiles,
            tokens,
            in_features,
            width,
            TOKENS=TOKENS_PER_TILE,
            RANKS=RANKS_PER_TURN,
            COLUMNS=IN_FEATURES_PER_TURN[size],
            PART=IN_FEATURES_PER_PART,
            **LORA_ROWS_OPTIONS,
        )
        expand_rows_kernel[(len(tiles), triton.cdiv(out_features, OUT_FEATURES_PER_PROGRAM[size]))](
            low_rank,
            B.contiguous(),
            output,
            tiles,
            tile_scalings,
            tokens,
            out_features,
            width,
            parts,
            TOKENS=TOKENS_PER_TILE,
            RANKS=RANKS_PER_TURN,
            COLUMNS=OUT_FEATURES_PER_PROGRAM[size],
            **LORA_ROWS_OPTIONS,
        )


@functools.lru_cache(TILES_KEPT)
def _on_device(
    rows: tuple[int, ...],
    adapters: tuple[int, ...],
    ranks: tuple[int, ...],
    scalings: tuple[float, ...],
    row_tokens: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, int]:
    """Return the tiles (tiles, 4) int32, their scalings (tiles,) fp32, and W; the layers of a batch share them."""
    tiles = row_tiles(rows, adapters, ranks, scalings, row_tokens, TOKENS_PER_TILE)
    table = torch.tensor([tile[:4] for tile in tiles], dtype=torch.int32, device=device)
    factors = torch.tensor([tile.scaling for tile in tiles], dtype=torch.float32, device=device)
    return table, factors, max((tile.ranks for tile in tiles), default=0)
