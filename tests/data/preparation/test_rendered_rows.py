"""Text that a chat template wrote already is read back into turns where that is exact, and else refused or counted."""

import pytest
from advice import prepared, refusal, texts, ways
from tiny_tokenizers import FAMILIES, tiny_tokenizer

from qlora_trainer.data.formats.rendered import looks_rendered, read_rendered
from qlora_trainer.data.preparation.rendered_rows import READ_BACK

TURNS = [("user", "Hi, is 1 < 2?"), ("assistant", "Yes.\n\nIt is."), ("user", "Sure?"), ("assistant", "Quite sure.")]
SYSTEM = ("system", "Be brief.")
FAMILY_NAMES = [name for name in FAMILIES if name != "generation"]


def messages(turns):
    return [{"role": role, "content": content} for role, content in turns]


def said(turns):
    return " | ".join(f"{role}: {content}" for role, content in turns)


def written(family, turns):
    return tiny_tokenizer(family).apply_chat_template(messages(turns), tokenize=False)


# Each template's text of one exchange, by hand from the model's documents.
BY_HAND = {
    "ChatML": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n",
    "Llama 3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>",
    "Llama 2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello! </s>",
    "Mistral": "<s>[INST] Hi [/INST] Hello!</s>",
    "Mistral 3": "<s>[INST]Hi[/INST]Hello!</s>",
    "Gemma": "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n",
    "Phi-3": "<|user|>\nHi<|end|>\n<|assistant|>\nHello!<|end|>\n<|endoftext|>",
    "Phi-4": "<|im_start|>user<|im_sep|>Hi<|im_end|><|im_start|>assistant<|im_sep|>Hello!<|im_end|>",
    "Zephyr": "<|user|>\nHi</s>\n<|assistant|>\nHello!</s>\n",
    "Granite": "<|start_of_role|>user<|end_of_role|>Hi<|end_of_text|>\n"
    "<|start_of_role|>assistant<|end_of_role|>Hello!<|end_of_text|>\n",
}


@pytest.mark.parametrize("name", BY_HAND)
def test_texts_of_the_known_templates_are_taken_apart(name):
    assert looks_rendered(BY_HAND[name])
    found = read_rendered(BY_HAND[name])
    assert found
    turns = [(turn.role, turn.content) for turn in found[1]]
    assert turns == [SYSTEM] * (name == "Llama 2") + [("user", "Hi"), ("assistant", "Hello!")]


# Of templates that are not taken apart, by hand from the models' documents; and known ones with other roles or blanks.
UNKNOWN = {
    "DeepSeek": "<\uff5cbegin▁of▁sentence\uff5c>Be brief."
    "<\uff5cUser\uff5c>Hi<\uff5cAssistant\uff5c>Hello!<\uff5cend▁of▁sentence\uff5c>",
    "DeepSeek without its start": "<\uff5cUser\uff5c>Hi<\uff5cAssistant\uff5c>Hello!<\uff5cend▁of▁sentence\uff5c>",
    "gpt-oss": "<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>final<|message|>Hello!<|return|>",
    "GLM": "[gMASK]<sop><|user|>\nHi<|assistant|>\nHello!",
    "Cohere": "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>Hello!<|END_OF_TURN_TOKEN|>",
    "ChatML with a function": "<|im_start|>function\n{}<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n",
    "ChatML in capitals": "<|im_start|>User\nHi<|im_end|>\n<|im_start|>Assistant\nHello!<|im_end|>\n",
    "ChatML on one line": "<|im_start|>user Hi<|im_end|> <|im_start|>assistant Hello!<|im_end|>",
    "Kimi": "<|im_user|>user<|im_middle|>Hi<|im_end|><|im_assistant|>assistant<|im_middle|>Hello!<|im_end|>",
    "EXAONE": "[|user|]Hi\n[|assistant|]Hello![|endofturn|]\n",
    "Seed": "<seed:bos>user\nHi<seed:eos><seed:bos>assistant\nHello!<seed:eos>",
    "Nemotron": "<extra_id_0>System\n\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\nHello!\n",
    "Apertus": "<s><|user_start|>Hi<|user_end|><|assistant_start|>Hello!<|assistant_end|>",
    "Hunyuan": "<\uff5chy_begin▁of▁sentence\uff5c><\uff5chy_User\uff5c>Hi<\uff5chy_Assistant\uff5c>Hello!",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_text_of_a_templates_shape_is_refused_whatever_the_models_family(tmp_path, name):
    half = UNKNOWN[name].index("Hello!")
    for row in ({"text": UNKNOWN[name]}, {"prompt": UNKNOWN[name][:half], "completion": UNKNOWN[name][half:]}):
        (as_text,) = ways(refusal(tmp_path, [row], family="smollm2"))
        assert texts(prepared(tmp_path, [row], as_text, "smollm2")) == [" -> ".join(row.values())]


@pytest.mark.parametrize(
    "text",
    [
        "<user_list><user_id>3</user_id><user_name>Assistant</user_name></user_list>",
        "<|endoftext|> ends a document, and <|user|> opens a turn.",
        "<s>System design</s> is a course for every user; <s>assistant</s> positions are open."[3:],
        "[user] hello [assistant] hi",
        "| user | assistant |\n|---|---|\n",
        "def f(x): return x <|user|> x  # <|user|> and <|assistant|>",
        "What does <|im_start|>user mean?",
        "<|im_start|> opens a turn, and <|im_end|> closes it.",
        "[INST is a marker",
        "Write <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>",
        "",
    ],
)
def test_a_text_that_is_only_about_templates_stays_text(tmp_path, text):
    assert read_rendered(text) is None
    if text:
        assert texts(prepared(tmp_path, [{"text": text}], [])) == [text]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_what_the_models_own_template_wrote_is_read_back_and_gives_the_same_tokens(tmp_path, family):
    turns = TURNS if family == "qwen3" else [*[SYSTEM] * FAMILIES[family].system, *TURNS]
    text = written(family, turns)
    rows = [{"text": text}, {"text": text.removeprefix(FAMILIES[family].bos or "") if family != "smollm2" else text}]
    found = prepared(tmp_path, rows, [], family)
    assert texts(found) == [said(turns)] * 2
    assert found.report.sources[0].warnings == {READ_BACK: 2}
    expected = prepared(tmp_path, [{"messages": messages(turns)}], [], family).train[0]
    assert [found.train[i].input_ids for i in range(2)] == [expected.input_ids] * 2
    assert found.train[0].labels == expected.labels


def test_of_a_rendered_prompt_with_its_completion_the_answers_of_the_completion_are_trained(tmp_path):
    text = written("smollm2", [SYSTEM, *TURNS])
    prompt, _, completion = text.rpartition("Quite sure.")
    for ending in (f"Quite sure.{completion}", "Quite sure."):
        (row,) = [{"prompt": prompt, "completion": ending}]
        found = prepared(tmp_path, [row], [])
        assert texts(found) == [said([SYSTEM, *TURNS])]
        trained = [token for token in found.train[0].labels if token != -100]
        assert tiny_tokenizer("smollm2").decode(trained) == "Quite sure.<|im_end|>"


@pytest.mark.parametrize("name", BY_HAND)
def test_a_text_that_the_models_template_would_write_otherwise_is_refused_and_each_line_settles_it(tmp_path, name):
    rows = [{"text": BY_HAND[name]}]
    as_turns, as_text = ways(refusal(tmp_path, rows, family="qwen2_5"))
    found = prepared(tmp_path, rows, as_turns, "qwen2_5")
    assert texts(found) == [said([SYSTEM] * (name == "Llama 2") + [("user", "Hi"), ("assistant", "Hello!")])]
    assert texts(prepared(tmp_path, rows, as_text, "qwen2_5")) == [BY_HAND[name]]


def test_a_text_that_begins_as_a_conversation_and_is_none_is_refused_with_the_line_for_plain_text(tmp_path):
    rows = [{"text": BY_HAND["ChatML"] + "and more"}]
    (as_text,) = ways(refusal(tmp_path, rows))
    assert texts(prepared(tmp_path, rows, as_text)) == [rows[0]["text"]]


def test_turns_that_were_read_back_may_not_be_empty(tmp_path):
    row = {"text": "<|im_start|>user\n <|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"}
    found = prepared(tmp_path, [row, {"text": BY_HAND["ChatML"]}], ["data.rendered=turns"])
    assert list(found.report.sources[0].dropped.values()) == [1]


def test_control_tokens_that_texts_spell_are_counted_in_every_format(tmp_path):
    spelled = "See <|im_start|> and <|im_end|> and <|im_end|>."
    for row in ({"text": spelled}, {"prompt": "p", "completion": spelled}, {"question": spelled, "answer": "a"}):
        found = prepared(tmp_path, [row, dict.fromkeys(row, "none"), row], [])
        assert found.report.sources[0].spelled == {"<|im_start|>": 2, "<|im_end|>": 2}
        counted = "2 of 3 rows hold the spelling of <|im_start|>, 2 of <|im_end|>; it is read as text, not as the"
        assert f"rows.jsonl: {counted} control token" in found.report.warnings


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "", "output": "a"}, "the prompt is empty"),
        ({"question": " \n", "answer": "a"}, "the prompt is empty"),
        ({"prompt": "", "completion": "a"}, "the prompt is empty"),
        ({"question": "q", "answer": "  "}, "the answer is empty"),
        ({"prompt": "q", "completion": ""}, "the answer is empty"),
        ({"messages": messages([("user", " "), ("assistant", "a")])}, "a turn of the user or the assistant is empty"),
        (
            {"messages": messages([("user", "q"), ("assistant", ""), ("user", "q"), ("assistant", "a")])},
            "a turn of the user or the assistant is empty",
        ),
        ({"prompt": messages([("user", "")]), "completion": messages([("assistant", "a")])}, "a turn of the user or"),
    ],
)
def test_an_empty_prompt_and_an_empty_answer_leave_the_row_out_and_are_counted_with_their_lines(tmp_path, row, reason):
    good = {
        name: messages([("user", "q"), ("assistant", "a")]) if isinstance(v, list) else "x" for name, v in row.items()
    }
    if "prompt" in row and isinstance(row["prompt"], list):
        good = {"prompt": messages([("user", "q")]), "completion": messages([("assistant", "a")])}
    found = prepared(tmp_path, [good, row, good, row], [])
    assert len(found.train) == 2
    (warning,) = [line for line in found.report.warnings if "left out" in line]
    assert warning.startswith(f"rows.jsonl: 2 of 4 rows are left out: {reason}")
    assert warning.endswith("(lines 2, 4)")


def test_a_null_value_is_named_with_the_way_out_and_the_other_bad_rows(tmp_path):
    rows = [{"question": "q", "answer": answer} for answer in ("a", None, "b", 5, None, *"c" * 35)]
    message = refusal(tmp_path, rows)
    assert message == (
        "rows.jsonl, line 2: answer is null. Correct it (and 2 more: lines 4, 5), or skip such rows: "
        "'data.on_bad_row=skip'."
    )
    found = prepared(tmp_path, rows, ways(message)[-1])
    assert len(found.train) == 37
    (warning,) = [line for line in found.report.warnings if "skipped" in line]
    assert found.report.skipped_rows
    assert f"; {found.report.skipped_rows} lists each" in warning
    assert found.report.sources[0].places["answer is null"] == ["line 2", "line 5"]
    missing = refusal(tmp_path, [rows[0], {"question": "q"}])
    assert "line 2: answer is missing. question_answer rows need question, answer; the row has question." in missing
    assert "Known formats" not in message + missing
