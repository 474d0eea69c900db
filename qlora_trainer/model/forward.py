"""Run the training forward: a pack of rows through the model, and the summed loss of its label tokens.

Most of a language model's memory in training is its logits, so the loss is computed from hidden states, for label
tokens only, in chunks. That needs the formula from hidden state to logit. `find_loss_path` reads it from the config
(logit scale, soft-capping, head bias), compares it with the model's own logits once, and where they differ takes the
model's own.

Legend: B rows, T tokens, N label tokens, H hidden size, V vocabulary.
"""

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_kernels.head_rows import HeadRows
from qlora_kernels.linear_cross_entropy import linear_cross_entropy
from qlora_trainer.common.boundary import as_model_error, is_from_library
from qlora_trainer.common.units import counted, dtype_name
from qlora_trainer.data.batching.packing import Pack
from qlora_trainer.model.evaluation_mode import evaluation_mode
from qlora_trainer.model.modules.cpu_embedding import known_ids
from qlora_trainer.model.modules.lm_head import head_weight
from qlora_trainer.model.modules.packed_attention import (
    attends_apart,
    cannot_be_trained,
    packed_documents,
)
from qlora_trainer.model.modules.prefix_cache import positions_before
from qlora_trainer.model.modules.row_positions import longest_with_own_positions


@dataclasses.dataclass(frozen=True)
class LossPath:
    """Say how a model's hidden states become logits: softcap(scale * (hidden @ head^T + bias)).

    softcap(x) = softcap * tanh(x / softcap), as in Gemma 2 (2024, arXiv:2408.00118).
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    own_logits: bool = False  # the formula does not hold for this model: take its own logits


@dataclasses.dataclass(frozen=True)
class ForwardPlan:
    """Hold what was found out about a model before training it."""

    loss_path: LossPath
    can_pack: bool
    warnings: tuple[str, ...]


def examine_forward(model: Any, max_length: int | None = None) -> ForwardPlan:
    """Try packing and the loss path in some forward passes of a few tokens; ModelError if a plain forward fails.

    Args:
        model: of transformers, with weights.
        max_length: the longest row to come, in tokens, for a warning where the model treats long rows differently.

    Returns:
        Loss path, packing, and warnings for the user.
    """
    apart = attends_apart(model, model.config.get_text_config().vocab_size)
    loss_path = find_loss_path(model)
    warnings = []
    limit = longest_with_own_positions(model.config.get_text_config())
    before = positions_before(model)
    if limit is not None and max_length is not None and max_length + before > limit:
        warnings.append(
            f"If any row of a micro-batch has more than {counted(limit, 'token')}, this model encodes the "
            f"positions of all its "
            "rows differently, so the result for a row depends on the rows next to it. To avoid that, set "
            f"data.max_length={limit - before}."
        )
    if apart is None:
        warnings.append(
            "This model's values on the tokens that were tried are not finite in "
            f"{dtype_name(model.get_input_embeddings().weight.dtype)}, so it could not be seen whether its attention "
            "keeps packed documents apart; its rows are padded on the right instead."
        )
    elif not apart:
        warnings.append(
            "This model's attention cannot keep packed documents apart; its rows are padded on the right instead."
        )
    if loss_path.own_logits:
        warnings.append(
            "This model computes its logits in a way of its own; the loss takes them whole, which needs more memory."
        )
    return ForwardPlan(loss_path, bool(apart), tuple(warnings))


@torch.no_grad()
def find_loss_path(model: Any) -> LossPath:
    """Read the logit formula from the config and check it against the model's own logits on eight tokens.

    ModelError is raised if the model gives no logits of its own either.

    Args:
        model: of transformers, with weights.

    Returns:
        The formula, or `own_logits`.

    Raises:
        Exception: the device failed, or memory ran out.
    """
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    path = LossPath(logit_scale=scale, softcap=getattr(config, "final_logit_softcapping", None))
    head = model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    if not isinstance(head, nn.Linear | HeadRows) or (bias is not None and bias.requires_grad):
        return LossPath(own_logits=True)  # the memory-efficient loss gives a head's bias no gradient
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (1, 9), generator=generator).to(next(model.parameters()).device)
    positions = torch.arange(8, device=ids.device)[None]
    pack = Pack(ids[:, :8], ids[:, 1:], positions, cu_seqlens=None, tokens=8, label_tokens=8)
    try:
        with evaluation_mode(model):
            with as_model_error(cannot_be_trained(model)):
                theirs = loss_sum(model, pack, LossPath(own_logits=True))
            ours = loss_sum(model, pack, path)
    except Exception as error:
        if not is_from_library(error):
            raise
        return LossPath(own_logits=True)  # its hidden states are not the head's input
    if not torch.isfinite(theirs):
        return path  # nothing to compare with; the first step says what is not finite
    tolerance = 1e-4 if model.get_input_embeddings().weight.dtype == torch.float32 else 2e-2
    return path if torch.isclose(ours, theirs, rtol=tolerance) else LossPath(own_logits=True)


def loss_sum(model: Any, pack: Pack, path: LossPath) -> Tensor:  # () fp32
    """Sum the cross entropy over the pack's label tokens; the caller divides by the label tokens of its whole step.

    Args:
        model: of transformers.
        pack: the rows.
        path: how logits are computed.

    Returns:
        The sum, in nats.
    """
    if path.own_logits:
        own, labels = label_logits(model, pack)
        return F.cross_entropy(own.float(), labels, reduction="sum")
    head = model.get_output_embeddings()
    hidden = hidden_states(model, pack)
    return linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        head_weight(head),
        pack.labels.reshape(-1),
        bias=head.bias,
        softcap=path.softcap,
        logit_scale=path.logit_scale,
        label_rows=pack.rows_with_labels(),
    )


def hidden_states(model: Any, pack: Pack) -> Tensor:  # (B, T, H)
    """Compute the LM head's input at every token of the pack, documents kept apart as in training.

    Args:
        model: of transformers.
        pack: the rows.

    Returns:
        The last hidden states.
    """
    with attention_for(model, pack), known_ids(pack.input_ids, pack.ids_on_host):
        return model.base_model(**_inputs(pack)).last_hidden_state


def label_logits(model: Any, pack: Pack) -> tuple[Tensor, Tensor]:
    """Compute the model's own logits at the pack's label tokens.

    Args:
        model: of transformers.
        pack: the rows.

    Returns:
        Logits (N, V), and the labels (N,).
    """
    labels = pack.labels.reshape(-1)
    rows = pack.rows_with_labels()
    return logits(model, pack).flatten(0, 1).index_select(0, rows), labels.index_select(0, rows)


def logits(model: Any, pack: Pack) -> Tensor:  # (B, T, V)
    """Compute the model's own logits at every token of the pack, documents kept apart as in training.

    Args:
        model: of transformers.
        pack: the rows.

    Returns:
        The logits.
    """
    with attention_for(model, pack), known_ids(pack.input_ids, pack.ids_on_host):
        return model(**_inputs(pack)).logits


def attention_for(model: nn.Module, pack: Pack) -> AbstractContextManager[None]:
    """Choose the attention that a pack needs, as a context manager.

    Keep it open during backward too: recomputed layers run their forward there.

    Args:
        model: of transformers.
        pack: the rows.

    Returns:
        The context manager.
    """
    # Right-padded rows need no mask: a causal row never sees the padding behind it.
    return nullcontext() if pack.cu_seqlens is None else packed_documents(model)


def _inputs(pack: Pack) -> dict[str, Any]:
    """Make the arguments of the model's forward."""
    inputs: dict[str, Any] = {"input_ids": pack.input_ids, "position_ids": pack.position_ids, "use_cache": False}
    if pack.cu_seqlens is not None:
        inputs |= {"document_bounds": pack.cu_seqlens.tolist(), "bounds_on_device": pack.bounds_on_device}
    return inputs
