"""Reduce a matrix to a product of two thin ones, by its largest singular values.

A small matrix is decomposed exactly. A large one is multiplied by random vectors and by itself (randomized subspace
iteration, Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithm 4.4), at a cost that grows with the rank instead
of with the shorter side. A product of thin matrices is decomposed without being multiplied out.

Legend: O out features, I in features, R rank, S rank of a sum.
"""

import torch
from torch import Tensor

EXACT_SIDE = 512  # the shorter side of the largest matrix that is decomposed exactly
OVERSAMPLED = 16  # more vectors than the rank
ITERATIONS = 4  # products with the matrix and its transpose


def largest_singular(
    matrix: Tensor,  # (O, I) fp32
    rank: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the largest singular values of a matrix and their vectors.

    Args:
        matrix: of any two sizes, (O, I); not changed.
        rank: R, how many; no more than the shorter side are there.
        generator: of the CPU, for large matrices.

    Returns:
        U (O, R), s (R,) from the largest on, Vh (R, I), all fp32.
    """
    shorter = min(matrix.shape)
    count = min(rank + OVERSAMPLED, shorter)
    if shorter <= EXACT_SIDE or 2 * count >= shorter:
        U, s, Vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        drawn = torch.randn(matrix.shape[1], count, generator=generator).to(matrix.device)
        Q = torch.linalg.qr(matrix @ drawn).Q
        for _ in range(ITERATIONS):
            Q = torch.linalg.qr(matrix.T @ Q).Q
            Q = torch.linalg.qr(matrix @ Q).Q
        small, s, Vh = torch.linalg.svd(Q.T @ matrix, full_matrices=False)
        U = Q @ small
    rank = min(rank, shorter)
    return U[:, :rank], s[:rank], Vh[:rank]


def product_singular(
    lora_A: Tensor,  # (S, I)
    lora_B: Tensor,  # (O, S)
    rank: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the largest singular values of B A and their vectors, exactly, without making the matrix.

    Args:
        lora_A: any floating dtype.
        lora_B: any floating dtype.
        rank: R, how many; no more than S and the sizes are there.

    Returns:
        U (O, R), s (R,) from the largest on, Vh (R, I), all fp32.
    """
    left, upper = torch.linalg.qr(lora_B.double())
    right, lower = torch.linalg.qr(lora_A.double().T)
    U, s, Vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return (left @ U[:, :rank]).float(), s[:rank].float(), (Vh[:rank] @ right.T).float()


def balanced_factors(
    U: Tensor,  # (O, R)
    s: Tensor,  # (R,)
    Vh: Tensor,  # (R, I)
) -> tuple[Tensor, Tensor]:
    """Make an adapter's factors of singular values, the root of each in either.

    Args:
        U: left vectors.
        s: values.
        Vh: right vectors.

    Returns:
        A (R, I) and B (O, R), contiguous; B A is the matrix.
    """
    root = s.sqrt()
    return (root[:, None] * Vh).contiguous(), (U * root).contiguous()


def product_norm(
    lora_A: Tensor,  # (S, I)
    lora_B: Tensor,  # (O, S)
) -> float:
    """Compute the Frobenius norm of B A without making the matrix.

    Args:
        lora_A: any floating dtype.
        lora_B: any floating dtype.

    Returns:
        The norm, to about eight digits of the largest that the factors could make.
    """
    A, B = lora_A.double(), lora_B.double()
    squared = float(((B.T @ B) * (A @ A.T)).sum())
    return max(squared, 0.0) ** 0.5
