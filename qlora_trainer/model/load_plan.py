"""Decide, before reading any weight, how each tensor will be loaded, and reject a checkpoint that does not match.

The model's parameters are matched with the checkpoint's tensors by name (names.py) and shape. A linear
weight becomes 4-bit, or is so already; everything else stays dense. Tied parameters are one tensor; where a checkpoint
holds several and they differ, they are not tied, as in transformers.

Left out: tensors that transformers merges or splits while loading. They are listed, and nothing is done about them.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qlora_trainer.common.dotted_names import ends_in
from qlora_trainer.common.errors import ModelError
from qlora_trainer.common.transformers_internals import patterns_of_extra, patterns_of_missing, tied_weight_names
from qlora_trainer.common.units import counted, dtype_name
from qlora_trainer.model.modules.nf4_linear import is_transposed, linear_layers
from qlora_trainer.model.names import match_names
from qlora_trainer.weights.bitsandbytes_format import source_dtype_of
from qlora_trainer.weights.listing import checkpoint_name
from qlora_trainer.weights.model_directory import ModelDirectory
from qlora_trainer.weights.reading import read_ahead, same_values
from qlora_trainer.weights.tensors import TensorInfo

RECORD_NAME = "qlora_quantize.json"  # in the directory of a 4-bit copy that this trainer made
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class DenseTensor:
    """Describe what a tensor that stays dense becomes."""

    names: list[str]  # of the parameter or buffer in the model; several where they are tied
    dtype: torch.dtype  # as the model would be loaded, before it is cast to the dtype of computation


@dataclass(frozen=True)
class LoadPlan:
    """Hold what becomes of each tensor of a checkpoint; the keys are the checkpoint's names."""

    directory: ModelDirectory
    source_dtype: torch.dtype  # what 4-bit weights are quantized from
    four_bit: dict[str, str]  # weight -> path of the layer that holds it in 4 bits
    transposed: set[str]  # those of them that the checkpoint stores as (I, O)
    dense: dict[str, DenseTensor]
    converted: list[str]  # tensors that transformers merges or splits while loading
    unused: list[str]  # tensors that the model has no place for, and does not expect
    original: dict[str, str]  # sha256 of the tensors that a 4-bit checkpoint was made of, where it says so
    untied: list[str] = dataclasses.field(default_factory=list)  # parameters that the config ties and the file does not

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Return all tensors of the checkpoint, in the order they lie on disk."""
        return self.directory.tensors

    @property
    def statistics(self) -> Mapping[str, Mapping[str, TensorInfo]]:
        """Return what is stored next to each weight that is 4-bit on disk."""
        return self.directory.quant_states

    @property
    def renamed(self) -> dict[str, str]:
        """Return the checkpoint's name of each tensor that the model names otherwise.

        A prefix, or the name of a tied parameter, is no other name.

        Returns:
            The checkpoint's names by the model's.
        """
        names = {name: [f"{path}.weight"] for name, path in self.four_bit.items()}
        names |= {name: dense.names for name, dense in self.dense.items()}
        return {
            own[0]: name
            for name, own in names.items()
            if not any(ends_in(one, name) or ends_in(name, one) for one in own)
        }

    @property
    def warnings(self) -> list[str]:
        """Return what a user should know of the checkpoint."""
        warnings = [untied_warning(self.directory, self.untied[0])] if self.untied else []
        if self.unused:
            warnings.append(
                f"{self.directory} holds {counted(len(self.unused), 'tensor')} that this model has no place "
                f"for, such as "
                f"{self.unused[0]}. Training does not use what has no place; a merged model keeps it as it is."
            )
        return warnings

    @property
    def config_corrections(self) -> dict[str, Any]:
        """Return the keys of config.json that the weights contradict, with the values to write in a copy."""
        return {"tie_word_embeddings": False} if self.untied else {}

    @property
    def used(self) -> list[str]:
        """Return the tensors that the model is made of, without the statistics of 4-bit ones."""
        return [*self.four_bit, *self.dense, *self.converted]

    @property
    def passing_bytes(self) -> int:
        """Return the most memory that tensors in transit take in addition to the model, on any device, in bytes."""
        used = [self.tensors[name] for name in self.used]
        ahead = max((info.nbytes for info in used), default=0)  # the next tensor is there already
        return ahead + max((info.nbytes + self._copied_bytes(info) for info in used), default=0)

    def _copied_bytes(self, info: TensorInfo) -> int:
        """Return the bytes of the copies made of a tensor in transit: in the dtype it is taken in, and row by row."""
        if info.name in self.statistics:
            return 0
        dtype = self.dense[info.name].dtype if info.name in self.dense else self.source_dtype
        return ((info.dtype != dtype) + (info.name in self.transposed)) * info.numel * dtype.itemsize


def widest_dtype(directory: ModelDirectory) -> torch.dtype:
    """Return the dtype that holds every float tensor of the checkpoint exactly, as it was before any was quantized.

    Weights that are quantized otherwise than to NF4 raise QuantizationError.

    Args:
        directory: of the checkpoint.

    Returns:
        The dtype of all, or fp32 where they differ.
    """
    found = set()
    described = [info for keys in directory.quant_states.values() for key, info in keys.items() if _describes(key)]
    read_ahead(described)
    for name, keys in directory.quant_states.items():
        states = {key: info.read() for key, info in keys.items() if _describes(key)}
        found.add(source_dtype_of(states, name))
    of_weights = {info.name for keys in directory.quant_states.values() for info in keys.values()}
    found |= {
        info.dtype for name, info in directory.tensors.items() if name not in of_weights and info.dtype in FLOAT_DTYPES
    }
    return found.pop() if len(found) == 1 else torch.float32


def _describes(key: str) -> bool:
    """Return True for the small tensor that says how a weight was quantized."""
    return key.startswith("quant_state.")


def plan_load(
    model: Any,  # dense, its parameters on meta in the checkpoint's widest dtype
    directory: ModelDirectory,
    source_dtype: torch.dtype,
) -> LoadPlan:
    """Match a checkpoint with its model. Tied parameters whose tensors differ become parameters of their own in it.

    Args:
        model: its tied parameters may be separated; nothing else is changed.
        directory: of the checkpoint.
        source_dtype: the checkpoint's widest dtype.

    Returns:
        The plan.

    Raises:
        ModelError: weights are missing, are stored under two names, have another shape or a dtype such as fp8, or are
            4-bit where they must stay dense.
    """
    tensors, statistics = directory.tensors, directory.quant_states
    match = match_names(model, directory)
    layers = {f"{path}.weight": path for path in linear_layers(model)}
    four_bit: dict[str, str] = {}
    dense: dict[str, list[str]] = {}
    missing: list[str] = []
    untied: list[str] = []
    for names in _names_of_tensors(model):
        stored = {match.found[name]: name for name in names if name in match.found}  # the checkpoint's -> the model's
        if not stored:
            missing += [] if match.converted or _may_be_missing(model, names[0]) else names[:1]
            continue
        first, *others = stored
        if names[0] in layers and (not statistics or first in statistics):
            four_bit[first] = layers[names[0]]
        elif all(same_values(tensors[first], tensors[other]) for other in others):
            dense[first] = names
        else:
            apart = [stored[other] for other in others]
            _untie(model, apart)
            untied += apart
            dense[first] = [name for name in names if name not in apart]
            dense |= {other: [stored[other]] for other in others}

    state = model.state_dict()
    shapes = {name: state[names[0]].shape for name, names in dense.items()}
    shapes |= {name: state[f"{path}.weight"].shape for name, path in four_bit.items() if name not in statistics}
    others = [f"{name} {tensors[name].shape}" for name, shape in shapes.items() if tensors[name].shape != shape]
    _refuse_contradicting_config(model, directory, missing, shapes)
    refuse_incomplete(directory, missing, others)
    if wrong := [name for name in statistics if name not in four_bit]:
        raise ModelError(
            f"{wrong[0]} in {directory} is 4-bit, where this trainer keeps the model dense (LM head, embedding, "
            "tied weight). Use the model's 16-bit checkpoint, or one prequantized without it."
        )
    kinds = {name: state[f"{path}.weight"].dtype for name, path in four_bit.items() if name not in statistics}
    kinds |= {name: state[names[0]].dtype for name, names in dense.items()}
    kinds |= {name: state[into].dtype for name, into in match.converted.items()}
    if strange := [
        name for name, dtype in kinds.items() if dtype.is_floating_point and not _is_readable(tensors[name])
    ]:
        info = tensors[strange[0]]
        raise ModelError(
            f"{info.name} in {info.file} is stored as {dtype_name(info.dtype)} ({len(strange)} such "
            "tensors), which cannot be trained here. Use the model's 16-bit checkpoint."
        )
    return LoadPlan(
        directory=directory,
        source_dtype=source_dtype,
        four_bit=four_bit,
        transposed={name for name, path in four_bit.items() if is_transposed(model.get_submodule(path))},
        dense={name: DenseTensor(names, state[names[0]].dtype) for name, names in dense.items()},
        converted=list(match.converted),
        unused=[name for name in match.unused if not _is_expected_extra(model, name)],
        original=_original_hashes(directory) if statistics else {},
        untied=untied,
    )


def untied_warning(directory: ModelDirectory, name: str) -> str:
    """Say that a checkpoint has a tensor of its own for a parameter that its config ties to another.

    Args:
        directory: of the checkpoint.
        name: of the parameter.

    Returns:
        A warning.
    """
    return (
        f"{directory.path / 'config.json'} says that {name} is the embedding (tie_word_embeddings), but the checkpoint "
        "has another tensor for it. Both are used as they are stored, and a merged model says "
        '"tie_word_embeddings": false. vLLM and transformers 4 would use the embedding for both: to use the adapter '
        "there, write that into the base's config.json."
    )


def _refuse_contradicting_config(
    model: Any, directory: ModelDirectory, missing: Sequence[str], shapes: Mapping[str, Sequence[int]]
) -> None:
    """Refuse a config that gives another size of the vocabulary, or an LM head of its own, than the weights have."""
    config_path, config = directory.path / "config.json", model.config.get_text_config()
    paths = {id(module): path for path, module in model.named_modules()}
    embedding, head = (
        f"{paths.get(id(module))}.weight" for module in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    if head in missing and embedding not in missing:
        raise ModelError(
            f"{directory} has no {head}, and {config_path} does not say that it is the embedding: it would be random. "
            'If the model was saved without it because the two are one, write "tie_word_embeddings": true there; '
            "else fetch the checkpoint again."
        )
    for name in (embedding, head):
        stored = checkpoint_name(name, directory.tensors)
        if stored is None or not shapes.get(stored):
            continue
        rows = directory.tensors[stored].shape[0]
        if shapes[stored][0] == getattr(config, "vocab_size", None) != rows:
            raise ModelError(
                f"{config_path} says that the model has {counted(config.vocab_size, 'token')}, and {stored} has "
                f"{counted(rows, 'row')}. If "
                f'the weights are right, as after tokens were added, write "vocab_size": {rows} there; else fetch the '
                "checkpoint again."
            )


def refuse_incomplete(directory: ModelDirectory, missing: Sequence[str], mismatched: Sequence[str]) -> None:
    """Refuse a checkpoint that lacks weights of the model, or has a tensor of another shape.

    Args:
        directory: of the checkpoint.
        missing: names of weights.
        mismatched: names of tensors, each with its shape.

    Raises:
        ModelError: there is one of either.
    """
    if missing or mismatched:
        raise ModelError(
            f"{directory} lacks {counted(len(missing), 'weight')} that the model needs and has "
            f"{len(mismatched)} of another "
            f"shape, such as {[*missing, *mismatched][0]}. What is lacking would be random; fetch the checkpoint again."
        )


def _is_readable(info: TensorInfo) -> bool:
    return info.dtype in {*FLOAT_DTYPES, torch.float64}


def _original_hashes(directory: ModelDirectory) -> dict[str, str]:
    path = directory.path / RECORD_NAME
    if not path.is_file():
        return {}
    try:
        hashes = json.loads(path.read_text(encoding="utf-8"))["sources"]
        return {str(name): str(value) for name, value in hashes.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{path} should say what this 4-bit checkpoint was made of, but cannot be read: {error!r}. Restore it, or "
            "delete it: it only serves to explain differences."
        ) from error


def _names_of_tensors(model: nn.Module) -> list[list[str]]:
    """Return the names of each parameter and stored buffer, tied ones together, in the model's order."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return list(names.values())


def _untie(model: Any, names: Sequence[str]) -> None:
    """Make parameters that share a tensor parameters of their own."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        shared = model.get_parameter(name)
        setattr(model.get_submodule(path), leaf, nn.Parameter(torch.empty_like(shared), requires_grad=False))
        tied_weight_names(model).pop(name, None)
    for config in (model.config, model.config.get_text_config()):  # transformers goes by the whole, others by the part
        config.tie_word_embeddings = False


def _may_be_missing(model: Any, name: str) -> bool:
    """Return True for a buffer that the model makes itself, and may be missing from its checkpoint."""
    is_buffer = name not in dict(model.named_parameters())
    return is_buffer and _matches(patterns_of_missing(model), name)


def _is_expected_extra(model: Any, name: str) -> bool:
    """Return True for a tensor that the model knows from older checkpoints, which stored what is computed now."""
    computed = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
    return _matches({*patterns_of_extra(model), *computed}, name)


def _matches(patterns: Iterable[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)
