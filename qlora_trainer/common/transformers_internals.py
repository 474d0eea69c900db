"""Gather every private name of transformers that this project uses, each behind a function or a name of its own.

Private is what has a leading underscore, and what a module offers that transformers' documentation does not describe:
it may change with any release. So it is used here and nowhere else, and tests/common/test_transformers_internals.py has
a test for each that fails by its name after an upgrade. tests/test_library_names.py finds private names elsewhere.

Most modules are imported inside a function: they import torch, which whoever renders chat templates does not need.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from types import SimpleNamespace
from typing import Any

from transformers.utils.chat_template_utils import _compile_jinja_template, _render_with_assistant_indices


def chat_template_environment() -> Any:
    """Make the Jinja environment that transformers compiles chat templates in, a new one at each call.

    Returns:
        The environment, with a method `from_string`.
    """
    return _compile_jinja_template.__wrapped__("").environment


def render_with_answer_spans(
    template: Any, messages: Sequence[Any], tools: Sequence[Any] | None, variables: Mapping[str, Any]
) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation, and find what the template itself marks with {% generation %}.

    Args:
        template: of `chat_template_environment`.
        messages: of the conversation.
        tools: that the conversation offers.
        variables: what else the template reads, by name.

    Returns:
        The text, and (start, end) of each marked part, in characters.
    """
    return _render_with_assistant_indices(template, messages, tools, None, False, **variables)


def tokenizer_class(name: str | None, model_type: str) -> type | None:
    """Find the class that transformers makes a tokenizer of.

    Args:
        name: that tokenizer_config.json has for it; None where it has none.
        model_type: of the model, whose class is taken where the name is unknown.

    Returns:
        The class; None where there is none.
    """
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

    names = [each for each in (name, TOKENIZER_MAPPING_NAMES.get(model_type)) if isinstance(each, str)]
    return next((found for each in names if (found := tokenizer_class_from_name(each)) is not None), None)


def attention_name(config: Any) -> str:
    """Return the name in transformers' registry of the attention that a model uses.

    Args:
        config: of the model.

    Returns:
        The name.
    """
    return config._attn_implementation


def set_attention_name(config: Any, name: str) -> None:
    """Make a model use another attention of the registry, without transformers' checks of the name.

    Args:
        config: of the model.
        name: in the registry.
    """
    config._attn_implementation_internal = name


@contextmanager
def masks_as_for_real_tensors() -> Iterator[None]:
    """Make transformers treat fake tensors as real ones in the block.

    It takes a fake tensor for one that is traced, whose position ids it must not read, and so builds a mask of tokens x
    tokens that a real row of one document never gets.
    """
    from transformers import masking_utils

    original = masking_utils.is_tracing
    masking_utils.is_tracing = lambda tensor=None: False
    try:
        yield
    finally:
        masking_utils.is_tracing = original


def tied_weight_names(model: Any) -> dict[str, str]:
    """Return the model's own table of tied parameters; to take a name out unties it for transformers.

    Args:
        model: any.

    Returns:
        Name -> name of the one it is tied to; empty for modules that are not of transformers.
    """
    return getattr(model, "all_tied_weights_keys", {})


def modules_kept_in_fp32(model: Any) -> set[str]:
    """Return what the model's class asks to keep in fp32.

    Args:
        model: any.

    Returns:
        Parts of paths; none for modules that are not of transformers.
    """
    return {*(getattr(model, "_keep_in_fp32_modules", None) or ())}


def patterns_of_missing(model: Any) -> set[str]:
    """Return what a checkpoint of this model may lack.

    Args:
        model: of transformers.

    Returns:
        Regular expressions for names of tensors.
    """
    return {*(model._keys_to_ignore_on_load_missing or ())}


def patterns_of_extra(model: Any) -> set[str]:
    """Return what a checkpoint may have though the model has no place for it.

    Args:
        model: of transformers.

    Returns:
        Regular expressions for names of tensors.
    """
    return {*(model._keys_to_ignore_on_load_unexpected or ())}


def conversion_mapping(model: Any) -> tuple[list[Any], list[Any]]:
    """Return how names and tensors of a checkpoint become those of the model.

    Args:
        model: of transformers.

    Returns:
        Its renamings and its converters.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    return _by_kind(get_model_conversion_mapping(model))


def _by_kind(mapping: list[Any]) -> tuple[list[Any], list[Any]]:
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    return [e for e in mapping if isinstance(e, WeightRenaming)], [e for e in mapping if isinstance(e, WeightConverter)]


def renamed(
    name: str, renamings: list[Any], converters: list[Any], prefix: str | None = None, state: Any = None
) -> tuple[str, str | None]:
    """Translate a checkpoint's name of a tensor into the model's.

    Args:
        name: the checkpoint's.
        renamings: those of the mapping.
        converters: those of the mapping.
        prefix: of the base model in the model's names.
        state: the model's state dict.

    Returns:
        The model's name, and the pattern of the converter that merges or splits the tensor, None without one.
    """
    from transformers.core_model_loading import rename_source_key

    return rename_source_key(name, renamings, converters, prefix, state)


def eager_experts_config() -> SimpleNamespace:
    """Return a config by which a module of fused experts takes its own forward.

    Returns:
        The config.
    """
    return SimpleNamespace(_experts_implementation="eager")


def rope_frequencies(kind: str, config: Any, device: Any) -> Any:
    """Compute the inverse frequencies of a kind of rotary embedding.

    Args:
        kind: such as "llama3".
        config: of the model.
        device: of the result.

    Returns:
        (head size / 2,).
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return ROPE_INIT_FUNCTIONS[kind](config, device)[0]


@contextmanager
def gguf_header_known(reader: Any) -> Iterator[None]:
    """Make transformers take the config of a GGUF file from an opened reader in the block, and translate it once.

    Args:
        reader: gguf's, of the file; of the tokenizer's long lists only the vocabulary is passed on, which has its size.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as loading

    fields = {
        name: entry
        for name, entry in reader.fields.items()
        if len(entry.data) <= 1 or not name.startswith("tokenizer.") or name == "tokenizer.ggml.tokens"
    }
    read, load = gguf.GGUFReader, loading.load_gguf_checkpoint
    translated = cache(load)

    def load_once(path: str, return_tensors: bool = False, **others: Any) -> dict[str, Any]:
        if return_tensors or others:
            return load(path, return_tensors, **others)
        return deepcopy({"config": translated(path)["config"]})

    gguf.GGUFReader = lambda path: SimpleNamespace(fields=fields, tensors=reader.tensors)
    loading.load_gguf_checkpoint = load_once
    try:
        yield
    finally:
        gguf.GGUFReader, loading.load_gguf_checkpoint = read, load


def gguf_table_architectures() -> set[str]:
    """Return the architectures whose GGUF tensors transformers translates by its older tables.

    Returns:
        Their names.
    """
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    return {*GGUF_SUPPORTED_ARCHITECTURES}


def gguf_table(architecture: str, model: Any) -> tuple[Callable[..., Any], dict[str, str]]:
    """Return how transformers' older tables translate the GGUF tensors of an architecture.

    Args:
        architecture: as the file names it.
        model: of its config.

    Returns:
        What converts a tensor's values (called with the keywords weights, name, tensor_key_mapping and
        parsed_parameters), and the model's name of each tensor by the file's.
    """
    import gguf
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    # transformers asks gguf for the names of all layers once for each module of the model, and they never differ.
    original = gguf.get_tensor_name_map
    gguf.get_tensor_name_map = cache(original)
    try:
        return processor.process, get_gguf_hf_weights_map(model, processor)
    finally:
        gguf.get_tensor_name_map = original


def gguf_conversion_architectures() -> set[str]:
    """Return the architectures that transformers translates by weight conversions rather than by tables.

    Returns:
        Their names.
    """
    from transformers.integrations.gguf import GGUF_ARCHS

    return {*GGUF_ARCHS}


def gguf_conversion_mapping(architecture: str, config: Any) -> tuple[list[Any], list[Any]]:
    """Return how GGUF tensors of an architecture among `gguf_conversion_architectures` become those of the model.

    Args:
        architecture: as the file names it.
        config: of the model.

    Returns:
        Renamings and converters.
    """
    from transformers.integrations.gguf import get_gguf_conversion_mapping

    return _by_kind(get_gguf_conversion_mapping(architecture, config))


def prepares_more_than_text(kind: str) -> bool:
    """Say whether transformers has something that prepares images, audio or several inputs for a kind of model.

    Asked by name: the mappings that transformers documents are empty stand-ins where the packages are missing that
    images and audio need.

    Args:
        kind: `model_type` of a config.

    Returns:
        True if it has.
    """
    from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    return any(
        kind in names
        for names in (PROCESSOR_MAPPING_NAMES, IMAGE_PROCESSOR_MAPPING_NAMES, FEATURE_EXTRACTOR_MAPPING_NAMES)
    )
