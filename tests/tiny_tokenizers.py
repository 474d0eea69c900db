"""Small fast tokenizers made on the spot, one for each family of chat templates in tests/chat_templates."""

import json
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qlora_trainer.data.types import Example

TEMPLATES = Path(__file__).parent / "chat_templates"

_SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and then the dog sleeps for an hour.",
    "What is the capital of France? The capital of France is Paris.",
    "user assistant system model tool question answer start end header INST think turn",
    "Please answer the question with one word. Yes. No. 12 + 30 = 42.",
]


@dataclass(frozen=True)
class Family:
    """Facts of a template: its control tokens, what ends a turn, whether it trims contents and knows system turns.

    `call` is how it writes the call of lookup({"city": "Rome"}), None where it knows no tools.
    """

    bos: str | None
    eos: str
    end_of_turn: str
    control: tuple[str, ...]
    trims: bool = False
    system: bool = True
    call: str | None = None


FAMILIES = {
    "smollm2": Family("<|im_start|>", "<|im_end|>", "<|im_end|>", ("<|im_start|>", "<|im_end|>")),
    "llama3": Family(
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|eot_id|>",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        trims=True,
    ),
    **{
        name: Family(
            "<|begin_of_text|>",
            "<|eot_id|>",
            "<|eot_id|>",
            ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
            trims=True,
            call='{"name": "lookup", "parameters": {"city": "Rome"}}',
        )
        for name in ("llama3_1", "llama3_2")
    },
    **{
        name: Family(
            None,
            "<|im_end|>",
            "<|im_end|>",
            ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
            call='<tool_call>\n{"name": "lookup", "arguments": {"city": "Rome"}}\n</tool_call>',
        )
        for name in ("qwen2_5", "qwen3")
    },
    "mistral_tools": Family(
        "<s>",
        "</s>",
        "</s>",
        (
            "<s>",
            "</s>",
            *("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
            *("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        ),
        system=False,
        call='[TOOL_CALLS][{"name": "lookup", "arguments": {"city": "Rome"}, "id": "000000000"}]',
    ),
    "mistral": Family("<s>", "</s>", "</s>", ("<s>", "</s>", "[INST]", "[/INST]"), trims=True, system=False),
    "gemma": Family(
        "<bos>",
        "<eos>",
        "<end_of_turn>",
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        trims=True,
        system=False,
    ),
    "phi3": Family(
        "<s>",
        "<|endoftext|>",
        "<|end|>",
        ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
    "generation": Family(None, "<|im_end|>", "<|im_end|>", ("<|im_start|>", "<|im_end|>")),
}


@cache
def tiny_tokenizer(
    family: str, kind: str = "bytes", adds_bos: bool = False, template: str | None = None
) -> PreTrainedTokenizerFast:
    """A BPE tokenizer over bytes ("bytes") or sentencepiece-like words ("metaspace"), with the family's template.

    `template` overrides it; "" represents none.
    """
    facts = FAMILIES[family]
    backend = Tokenizer(
        models.BPE(byte_fallback=kind == "metaspace", unk_token="<unk>" if kind == "metaspace" else None)
    )
    alphabet: list[str] = []
    extra = ["<unk>"] if kind == "metaspace" else []
    if kind == "bytes":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        extra += [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=extra, initial_alphabet=alphabet, show_progress=False, max_token_length=8
    )
    backend.train_from_iterator(_SENTENCES, trainer)
    # The trainer makes its special tokens added tokens too; byte tokens are none in real tokenizers.
    backend = Tokenizer.from_str(json.dumps(json.loads(backend.to_str()) | {"added_tokens": []}))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in facts.control])
    if family == "qwen3":
        backend.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    if adds_bos:
        bos = facts.bos or facts.eos
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    if template is None:
        template = (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=facts.bos,
        eos_token=facts.eos,
        pad_token=facts.eos,
        chat_template=template or None,
        clean_up_tokenization_spaces=False,
    )


def trained_texts(tokenizer: PreTrainedTokenizerFast, example: Example) -> list[str]:
    """The text of each unbroken run of trained tokens."""
    runs = groupby(range(len(example.labels)), key=lambda i: example.labels[i] != -100)
    return [tokenizer.decode([example.labels[i] for i in run]) for trained, run in runs if trained]
