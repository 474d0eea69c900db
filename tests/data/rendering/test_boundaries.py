"""A row begins with the tokens of its prompt, as the tokenizer gives them to a server that is sent the prompt alone."""

import json
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import FAMILIES, tiny_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qlora_trainer.data.rendering.boundaries import Boundaries
from qlora_trainer.data.rendering.renderer import PROMPT_TOKENS_DIFFER, Rendered, Renderer
from qlora_trainer.data.types import Conversation, Message, PromptCompletion

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {"gpt2": GPT2, "qwen": QWEN, "llama3": LLAMA3}
TEXTS = [
    "one\n\ntwo\n\n\nthree",
    "\n\tassistant user ",
    "See http://example.org",
    "  x  1234567 ",
    "English: dog\nFrench:",
]
OPENS_REASONING = """\
{%- for m in messages -%}
{{- "<|im_start|>" + m.role + "\\n" -}}
{%- if m.role == "assistant" -%}{{- "<think>\\n" + (m.reasoning_content or "") + "\\n</think>\\n\\n" -}}{%- endif -%}
{{- m.content + "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|im_start|>assistant\\n<think>\\n" }}{%- endif -%}
"""
ENDS_IN_A_BLANK = """\
{%- for m in messages -%}{{ m.role + ": " + m.content + "<|im_end|>" }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ "assistant: " }}{%- endif -%}
"""


@cache
def tokenizer_of(kind: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE by a model family's split rule, or sentencepiece's way with a blank put before a text."""
    if kind in SPLITS:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(SPLITS[kind]), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        if kind == "llama2":
            backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            parts: list[Any] = [decoders.Strip(" ", 1, 0)]
        else:
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
            parts = [decoders.Strip(" ", 1, 0)]
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *parts]
        )
        alphabet = []
    special = [] if kind in SPLITS else ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False, max_token_length=12
    )
    backend.train_from_iterator(TEXTS * 9, trainer)
    backend = Tokenizer.from_str(json.dumps(json.loads(backend.to_str()) | {"added_tokens": []}))
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=template)


def rendered(tokenizer: PreTrainedTokenizerFast, row: Any, **settings: Any) -> Rendered:
    (found,) = Renderer(tokenizer, max_length=10**6, **settings).render_batch([("row", row)])
    assert isinstance(found, Rendered)
    return found


def chat(*contents: str) -> Conversation:
    return Conversation(tuple(Message("assistant" if i % 2 else "user", text) for i, text in enumerate(contents)))


texts = st.lists(
    st.sampled_from(["\n", "\n\n", " ", "  ", "\t", "http:", "//", "é", "one", " two", "12", "345", "<|im_end|>", "."]),
    max_size=6,
).map("".join)


@settings(max_examples=150)
@given(kind=st.sampled_from([*SPLITS, "llama2", "metaspace"]), prompt=texts, completion=texts.filter(str.strip))
def test_a_completion_follows_the_tokens_of_its_prompt_alone(kind: str, prompt: str, completion: str) -> None:
    """The server's tokens come from plain transformers, where a control token that the text spells is not at stake."""
    tokenizer = tokenizer_of(kind)
    found = rendered(tokenizer, PromptCompletion(prompt, completion))
    ids = found.examples[0].input_ids
    alone = Renderer(tokenizer).render_prompt(prompt).input_ids
    if "<|im_end|>" not in prompt:
        assert alone == tokenizer(prompt, add_special_tokens=False).input_ids
    if "<|im_end|>" not in prompt + completion:
        assert tokenizer.decode(ids[:-1]) == tokenizer.decode(tokenizer(prompt + completion).input_ids)
    if ids[: len(alone)] != alone:
        assert PROMPT_TOKENS_DIFFER in found.warnings
    else:
        assert found.examples[0].labels[: len(alone)] == [-100] * len(alone)
        assert found.examples[0].labels[len(alone) :] == ids[len(alone) :], "and all that follows is trained"


@pytest.mark.parametrize("kind", [*SPLITS, "llama2", "metaspace"])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("English: dog\nFrench:\n\n", "chien"),
        ("English: dog\nFrench: ", "chien"),
        ("See http:", "//example.org"),
        ("def f():\n\t", "return 1"),
        ("one\n", "\ntwo"),
        ("123", "4567"),
        ("tw", "o"),
        ("word " * 60 + "one", "two"),
    ],
)
def test_a_boundary_inside_a_token_or_a_run_of_blanks_is_kept(kind: str, prompt: str, completion: str) -> None:
    tokenizer = tokenizer_of(kind)
    found = rendered(tokenizer, PromptCompletion(prompt, completion))
    server = tokenizer(prompt, add_special_tokens=False).input_ids
    assert found.examples[0].input_ids[: len(server)] == server
    assert found.examples[0].labels[: len(server)] == [-100] * len(server)
    assert PROMPT_TOKENS_DIFFER not in found.warnings
    assert tokenizer.decode(found.examples[0].input_ids[len(server) : -1]).strip() == completion.strip()


def test_some_of_these_boundaries_do_lie_inside_tokens() -> None:
    tokenizer = tokenizer_of("gpt2")
    for prompt, completion in (("See http:", "//example.org"), ("one\n\n", "two"), ("tw", "o")):
        alone, joined = (tokenizer(text).input_ids for text in (prompt, prompt + completion))
        assert joined[: len(alone)] != alone


def server_prompt(tokenizer: PreTrainedTokenizerFast, *contents: str) -> list[int]:
    messages = [{"role": m.role, "content": m.content} for m in chat(*contents).messages]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


@pytest.mark.parametrize("kind", [*SPLITS, "llama2", "metaspace"])
@pytest.mark.parametrize("template", [OPENS_REASONING, ENDS_IN_A_BLANK], ids=["opens reasoning", "ends in a blank"])
@pytest.mark.parametrize("answer", ["Italy.", "\nItaly", "  Italy", "\n\n\tItaly"])
@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
def test_an_answer_follows_the_tokens_of_its_prompt_alone(kind: str, template: str, answer: str, train_on: Any) -> None:
    tokenizer = tokenizer_of(kind, template)
    found = rendered(tokenizer, chat("Where?", answer), train_on=train_on)
    server = server_prompt(tokenizer, "Where?")
    ids, labels = found.examples[0].input_ids, found.examples[0].labels
    assert ids[: len(server)] == server
    assert labels[len(server)] == ids[len(server)]
    assert labels[: len(server)] == ([-100] * len(server) if train_on != "all" else server)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_a_row_begins_with_what_a_server_that_runs_the_template_gives(family: str, kind: str) -> None:
    tokenizer = tiny_tokenizer(family, kind)
    example = rendered(tokenizer, chat("What is it?", "A fox.", "And then?", "It sleeps.")).examples[0]
    server = server_prompt(tokenizer, "What is it?", "A fox.", "And then?")
    assert example.input_ids[: len(server)] == server
    assert example.labels[len(server)] != -100


def test_an_earlier_answer_after_other_tokens_than_its_prompt_has_is_reported() -> None:
    """Both boundaries cannot be kept in one row: the prompt of the later answer holds the earlier one."""
    tokenizer = tokenizer_of("qwen", OPENS_REASONING)
    found = rendered(tokenizer, chat("Where?", "Italy.", "And now?", "France."))
    assert found.warnings.count(PROMPT_TOKENS_DIFFER) == 1
    server = server_prompt(tokenizer, "Where?", "Italy.", "And now?")
    assert found.examples[0].input_ids[: len(server)] == server
    assert PROMPT_TOKENS_DIFFER not in rendered(tokenizer, chat("Where?", "Italy.")).warnings


@pytest.mark.parametrize(
    ("kind", "as_it_is"), [("gpt2", True), ("qwen", True), ("llama2", False), ("metaspace", False)]
)
def test_a_tokenizer_that_puts_nothing_before_a_text_is_not_built_again(kind: str, as_it_is: bool) -> None:
    """A large one takes seconds."""
    backend = tokenizer_of(kind).backend_tokenizer
    assert (Boundaries(backend, frozenset())._continuation() is backend) == as_it_is
