"""Lay rows of tokens out as packs: the tensors of one forward pass. Labels are shifted here and nowhere else.

With packing, rows are laid end to end without any padding and `cu_seqlens` says where each begins, so that attention
keeps them apart. Without it, rows of like length are padded on the right. Both hold the same labels, so a step's
summed loss is the same either way. Left out: which rows make a step (loader.py), and attention.

B rows of the batch, T tokens, N documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlora_trainer.data.types import IGNORED_LABEL, Example

EVEN = 0.8
"""Of the time of parts, the least share in which all threads work. Where it is less, all threads work on each product
instead: two are then 1.6 times as fast as one (`python -m benchmarks.cpu_training --threads 1 2`)."""

FEWEST_OF_A_PART = 192
"""Tokens: each part dequantizes every weight and calls every operation, which takes as long as the products of some
100 tokens."""


@dataclass(frozen=True)
class Pack:
    """Hold the tensors of one forward pass.

    labels[t] is the token after t in the same document, or -100; it is always -100 at a document's last token.
    """

    input_ids: Tensor  # (B, T) int64
    labels: Tensor  # (B, T) int64, already shifted
    position_ids: Tensor  # (B, T) int64, from 0 in each document
    cu_seqlens: Tensor | None  # (N + 1,) int32, where documents begin and the last ends; None: padded rows
    tokens: int  # without padding
    label_tokens: int
    label_rows: Tensor | None = None  # (label_tokens,) int64, where labels.reshape(-1) has them; made by `to`
    bounds_on_device: Tensor | None = None  # (N + 1,) int32, cu_seqlens on the device; made by `to`
    ids_on_host: Tensor | None = None  # (B, T) int64, input_ids as they were before `to`
    parts: tuple["Pack", ...] = ()  # the same rows, to be run side by side; none: they are not divided

    @property
    def row_lengths(self) -> list[int]:
        """Count the tokens of each row as laid out: a padded row is as long as the longest of its pack."""
        if self.cu_seqlens is None:
            return [self.input_ids.shape[1]] * self.input_ids.shape[0]
        return self.cu_seqlens.diff().tolist()

    def to(self, device: torch.device) -> "Pack":
        """Move the pack's tensors to a device; what the host reads of them, document bounds and ids, stays there too.

        A CUDA device gets them through pinned memory, so that nobody waits for it: which tokens have a label is found
        here, as counting them on the device would make the host wait for all that the device was given before.

        Args:
            device: where to.

        Returns:
            Another pack.
        """
        bounds = self.cu_seqlens if self.bounds_on_device is None else self.bounds_on_device
        return replace(
            self,
            input_ids=_moved(self.input_ids, device),
            labels=_moved(self.labels, device),
            position_ids=_moved(self.position_ids, device),
            label_rows=_moved(self.rows_with_labels(), device),
            bounds_on_device=None if bounds is None else _moved(bounds, device),
            ids_on_host=self.input_ids if self.ids_on_host is None else self.ids_on_host,
        )

    def rows_with_labels(self) -> Tensor:  # (label_tokens,) int64
        """Return where labels.reshape(-1) has labels.

        Returns:
            As `to` found them; before it they are found here.
        """
        if self.label_rows is not None:
            return self.label_rows
        return torch.ops.qlora_kernels.label_rows(self.labels.reshape(-1))


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda" or tensor.device.type == "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def make_packs(examples: Sequence[Example], micro_batch_tokens: int, packing: bool, workers: int = 1) -> list[Pack]:
    """Lay rows out in as few packs as are found, balanced. The result depends on the arguments alone.

    Args:
        examples: the rows.
        micro_batch_tokens: the most tokens of a pack, padding counted; a longer row gets a pack of its own.
        packing: lay rows end to end; else pad them.
        workers: threads among which the rows of a pack are divided, where that goes evenly.

    Returns:
        The packs.
    """
    lay_out = _packed if packing else _padded
    lengths = [len(example.input_ids) for example in examples]
    packs = []
    for group in group_rows(lengths, micro_batch_tokens, packing):
        pack = lay_out([examples[index] for index in group])
        parts = divide_rows([lengths[index] for index in group], packing, workers)
        if len(parts) > 1:
            pack = replace(pack, parts=tuple(lay_out([examples[group[place]] for place in part]) for part in parts))
        packs.append(pack)
    return packs


def divide_rows(lengths: Sequence[int], packing: bool, workers: int) -> list[list[int]]:
    """Divide the rows of a micro-batch among threads, among as many as have about as much to do.

    Args:
        lengths: tokens of each row.
        packing: rows lie end to end; else they are padded.
        workers: threads.

    Returns:
        Indices of rows by part; one part of all where they cannot be divided evenly, or are few.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for count in range(min(workers, len(lengths)), 1, -1):
        parts = _emptiest_first(order, lengths, count)
        sizes = [laid_out_tokens([lengths[index] for index in part], packing) for part in parts]
        is_even = workers % count == 0 and sum(sizes) >= EVEN * count * max(sizes)
        if is_even and min(sizes) >= FEWEST_OF_A_PART:
            return [sorted(part) for part in parts]
    return [list(range(len(lengths)))]


def group_rows(lengths: Sequence[int], micro_batch_tokens: int, packing: bool) -> list[list[int]]:
    """Choose which rows make a pack, as `make_packs` lays them out.

    Args:
        lengths: tokens of each row.
        micro_batch_tokens: the most tokens of a pack, padding counted.
        packing: lay rows end to end; else pad them.

    Returns:
        Indices of rows by pack.
    """
    return group_for_packing(lengths, micro_batch_tokens) if packing else _group_padded(lengths, micro_batch_tokens)


def laid_out_tokens(lengths: Sequence[int], packing: bool) -> int:
    """Count the tokens of one pack, padding included.

    Args:
        lengths: tokens of each of its rows.
        packing: rows lie end to end; else they are padded to the longest.

    Returns:
        Tokens.
    """
    return sum(lengths) if packing else len(lengths) * max(lengths)


def group_for_packing(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Group rows so that each group's lengths sum to at most `limit`, or it is one longer row.

    Starts from the fewest groups that could hold the tokens. The longest row next goes to the emptiest group, which
    balances; where that overflows, one group more, up to what first-fit-decreasing needs, which always fits and is
    balanced afterward. Longer rows left out, no group exceeds the emptiest by more than its own shortest row.

    Args:
        lengths: tokens of each row.
        limit: the most tokens of a group.

    Returns:
        Indices of rows by group, in order.
    """
    oversized = [[index] for index, length in enumerate(lengths) if length > limit]
    order = sorted((index for index, length in enumerate(lengths) if length <= limit), key=lambda i: (-lengths[i], i))
    first_fit = _first_fit(order, lengths, limit)
    fewest = -(-sum(lengths[index] for index in order) // limit)
    for count in range(fewest, len(first_fit) + 1):
        groups = _emptiest_first(order, lengths, count)
        if all(sum(lengths[index] for index in group) <= limit for group in groups):
            break
    else:
        groups = _balanced(first_fit, lengths)
    return sorted(sorted(group) for group in groups + oversized if group)


def _first_fit(order: Sequence[int], lengths: Sequence[int], limit: int) -> list[list[int]]:
    groups: list[list[int]] = []
    totals: list[int] = []
    for index in order:
        place = next((g for g, total in enumerate(totals) if total + lengths[index] <= limit), None)
        if place is None:
            groups.append([index])
            totals.append(lengths[index])
        else:
            groups[place].append(index)
            totals[place] += lengths[index]
    return groups


def _emptiest_first(order: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    groups: list[list[int]] = [[] for _ in range(count)]
    totals = [0] * count
    for index in order:
        place = totals.index(min(totals))
        groups[place].append(index)
        totals[place] += lengths[index]
    return groups


def _balanced(groups: list[list[int]], lengths: Sequence[int]) -> list[list[int]]:
    """Move rows to the emptiest group as long as that leaves it less full than the group that the row comes from was.

    It ends, because each move lowers the sum of the squares, and overflows nothing.
    """
    totals = [sum(lengths[index] for index in group) for group in groups]
    while True:
        emptiest = totals.index(min(totals))
        movable = [
            (totals[place], lengths[index], place, index)
            for place, group in enumerate(groups)
            for index in group
            if totals[emptiest] + lengths[index] < totals[place]
        ]
        if not movable:
            return groups
        _, length, place, index = max(movable)  # from the fullest group, its longest
        groups[place].remove(index)
        groups[emptiest].append(index)
        totals[place] -= length
        totals[emptiest] += length


def _group_padded(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Group rows of like length, so that rows * longest is at most `limit`; the longest rows come first."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= limit:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _shifted(labels: list[int]) -> list[int]:
    return [*labels[1:], IGNORED_LABEL]


def _packed(examples: Sequence[Example]) -> Pack:
    input_ids = [token for example in examples for token in example.input_ids]
    labels = [label for example in examples for label in _shifted(example.labels)]
    positions = [position for example in examples for position in range(len(example.input_ids))]
    bounds = [0]
    for example in examples:
        bounds.append(bounds[-1] + len(example.input_ids))
    return Pack(
        input_ids=torch.tensor([input_ids]),
        labels=torch.tensor([labels]),
        position_ids=torch.tensor([positions]),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        tokens=len(input_ids),
        label_tokens=sum(example.trained_tokens for example in examples),
    )


def _padded(examples: Sequence[Example]) -> Pack:
    """Pad rows on the right with token 0, whose label is -100: what is padding goes by place, never by id."""
    longest = max(len(example.input_ids) for example in examples)
    shape = (len(examples), longest)
    input_ids = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED_LABEL, dtype=torch.int64)
    for row, example in enumerate(examples):
        input_ids[row, : len(example.input_ids)] = torch.tensor(example.input_ids)
        labels[row, : len(example.labels)] = torch.tensor(_shifted(example.labels))
    return Pack(
        input_ids=input_ids,
        labels=labels,
        position_ids=torch.arange(longest).repeat(len(examples), 1),
        cu_seqlens=None,
        tokens=sum(len(example.input_ids) for example in examples),
        label_tokens=sum(example.trained_tokens for example in examples),
    )
