"""Put rows of tokens that train on a model's input embedding and LM head.

A token that exists begins as its row, so that the model computes what it did. A new one begins as the mean of the rows
of the tokens that exist, or of a text's tokens where the settings give one.

Legend: V rows of the base's matrices, R rows that train, H hidden size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_kernels.head_rows import BLOCK_ELEMENTS, HeadRows
from qlora_trainer.adapters.file_config import FileConfig
from qlora_trainer.adapters.tokens.token_choice import TextTokenizer, TokenChoice, choose_tokens
from qlora_trainer.adapters.tokens.token_modules import TokenEmbedding, TokenHead, embedding_scale, trained_token_ids
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.config.schema import AdapterConfig
from qlora_trainer.model.modules.cpu_embedding import CpuEmbedding
from qlora_trainer.model.modules.lm_head import head_weight

_MOST_NAMED = 8


def put_token_rows(model: Any, settings: AdapterConfig, tokenizer: TextTokenizer | None) -> None:
    """Let rows of the input embedding and the LM head train, if the settings name tokens; nothing is frozen by it.

    What the model cannot have is refused by an AdapterError.

    Args:
        model: of transformers, without adapters on its embedding and head.
        settings: the config's section `adapter`.
        tokenizer: of the model, with the settings' new tokens in it.
    """
    if not settings.trains_tokens:
        return
    embedding, head = _embedding_and_head(model)
    paths = {id(module): path for path, module in model.named_modules()}
    weight = embedding.weight
    choice = choose_tokens(settings, tokenizer, weight.shape[0])
    frozen = head_weight(head)
    own = getattr(head, "weight", None)
    # A quantized head has no such weight, and is of its own, whatever the base's was.
    is_tied = own is weight if own is not None else bool(model.config.get_text_config().tie_word_embeddings)
    place = embedding.device if isinstance(embedding, CpuEmbedding) else weight.device
    with torch.no_grad():
        in_embedding = TokenEmbedding(embedding, choice.ids, first_rows(weight, choice).to(place))
        rows = in_embedding if is_tied else first_rows(frozen, choice)
    model.set_submodule(paths[id(embedding)], in_embedding)
    model.set_submodule(paths[id(head)], TokenHead(head, choice.ids, choice.height, rows))


def first_rows(matrix: Tensor | HeadRows, choice: TokenChoice) -> Tensor:
    """Make the rows that tokens begin as.

    Args:
        matrix: of the embedding or of the head, (V, H).
        choice: which tokens.

    Returns:
        (R, H), fp32, on the matrix's device.
    """
    mean: Tensor | None = None
    found = []
    for token in choice.ids:
        if token not in choice.starts:
            found.append(_rows_at(matrix, [token])[0])
            continue
        text = choice.starts[token]
        if text is not None:
            found.append(_rows_at(matrix, text).double().mean(dim=0).float())
        else:
            mean = _mean_row(matrix, choice.existing) if mean is None else mean
            found.append(mean)
    return torch.stack(found)


def check_token_ids(model: nn.Module, stored: FileConfig) -> None:
    """Compare the tokens that a stored adapter has rows of with those that train on a model.

    Args:
        model: with adapters.
        stored: the config of the adapter's file.

    Raises:
        AdapterError: they are not the same.
    """
    ours, theirs = trained_token_ids(model), stored.token_ids
    if ours != theirs:
        raise AdapterError(
            f"The adapter has rows of {_in_words(theirs)}, and the settings train {_in_words(ours)}. Set "
            "adapter.trainable_tokens and adapter.new_tokens to the tokens that the adapter was trained with."
        )


def _in_words(ids: Sequence[int]) -> str:
    more = f" and {len(ids) - _MOST_NAMED} more" if len(ids) > _MOST_NAMED else ""
    noun = "the token" if len(ids) == 1 else "the tokens"
    return f"{noun} {', '.join(map(str, ids[:_MOST_NAMED]))}{more}" if ids else "no tokens"


def _embedding_and_head(model: Any) -> tuple[Any, Any]:
    embedding, head = (
        getattr(model, name, lambda: None)() for name in ("get_input_embeddings", "get_output_embeddings")
    )
    setting = "adapter.trainable_tokens and adapter.new_tokens"
    if embedding is None or head is None:
        missing = "input embedding" if embedding is None else "LM head"
        raise AdapterError(f"{type(model).__name__} has no {missing} that transformers finds, so it has not {setting}.")
    inner = embedding.embedding if isinstance(embedding, CpuEmbedding) else embedding
    if not isinstance(inner, nn.Embedding) or (
        type(inner).forward is not nn.Embedding.forward and embedding_scale(embedding) is None
    ):
        raise AdapterError(
            f"The input embedding of {type(model).__name__} is a {type(inner).__name__}, which does more than look "
            f"rows up, so it has not {setting}. Choose another model."
        )
    if not isinstance(head, nn.Linear | HeadRows):
        raise AdapterError(f"The LM head of {type(model).__name__} is no plain linear layer, so it has not {setting}.")
    if getattr(head, "bias", None) is not None:
        raise AdapterError(
            f"The LM head of {type(model).__name__} has a bias, which PEFT leaves out of heads whose rows train, so it "
            f"has not {setting}. Choose another model."
        )
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module is not inner and module.num_embeddings == inner.num_embeddings:
            raise AdapterError(
                f"{type(model).__name__} looks tokens up in {path} too, whose rows would not train, so it has not "
                f"{setting}. Choose another model."
            )
    return embedding, head


def _rows_at(matrix: Tensor | HeadRows, ids: Sequence[int]) -> Tensor:
    """Return some rows, (n, H) fp32; of a plain matrix by a lookup, which streamed ones know."""
    if isinstance(matrix, Tensor):
        return F.embedding(torch.tensor(list(ids), device=matrix.device), matrix).float()
    return torch.cat([matrix.rows(token, token + 1, torch.float32) for token in ids])


def _mean_row(matrix: Tensor | HeadRows, count: int) -> Tensor:
    """Return the mean of the first rows, (H,) fp32, summed in fp64 a block at a time."""
    step = max(BLOCK_ELEMENTS // matrix.shape[1], 1)
    total: Tensor | None = None
    for start in range(0, count, step):
        stop = min(start + step, count)
        if isinstance(matrix, Tensor):
            block = F.embedding(torch.arange(start, stop, device=matrix.device), matrix)
        else:
            block = matrix.rows(start, stop, torch.float32)
        added = block.double().sum(dim=0)
        total = added if total is None else total + added
    assert total is not None, "a tokenizer has tokens"
    return (total / count).float()
