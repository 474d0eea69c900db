"""Columns of other names get a line to copy; roles of other names are known, or named in the config."""

import pytest
from advice import read, refused, ways

from qlora_trainer.data.formats.parse import RecordReader
from qlora_trainer.data.types import Conversation


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        *[("Question", "Answer"), ("Instruction", "Output"), ("PROMPT", "Completion"), ("prompt", "response")],
        *[
            ("input", "output"),
            ("query", "response"),
            ("user", "assistant"),
            ("source", "target"),
            ("problem", "solution"),
        ],
        *[
            ("request", "response"),
            ("human", "gpt"),
            ("Input Text", "Output Text"),
            ("user-message", "reply"),
            ("q", "a"),
        ],
        *[
            ("inputs", "targets"),
            ("en", "fr"),
            ("questionText", "answerText"),
            ("Frage", "Antwort"),
            ("review", "label"),
            ("yes", "a: b"),
        ],
    ],
)
def test_a_question_and_its_answer_by_other_names_get_a_line_to_copy(tmp_path, asked, answered):
    row = {asked: "Q", answered: "A", "id": 7}
    lines = ways(refused(tmp_path, [row]))
    assert read(tmp_path, [row], lines[0]) == ["user: Q | assistant: A"]
    for line in lines[1:]:
        assert read(tmp_path, [row], line) == ["Q -> A"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"context": "C", "question": "Q", "answers": {"text": ["A"], "answer_start": [3]}},
            "user: Q\n\nC | assistant: A",
        ),
        ({"System": "S", "Query": "Q", "Response": "A"}, "system: S | user: Q | assistant: A"),
        ({"system": "S", "query": "Q", "response": "A", "score": 3}, "system: S | user: Q | assistant: A"),
        (
            {"dialog": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
            "user: Q | assistant: A",
        ),
        (
            {
                "systemInstruction": {"role": "system", "parts": [{"text": "S"}]},
                "contents": [{"role": "user", "parts": [{"text": "Q"}]}, {"role": "model", "parts": [{"text": "A"}]}],
            },
            "system: S | user: Q | assistant: A",
        ),
        ({"body": "T"}, "T"),
        ({"instruction": "Q", "references": ["A", "B"]}, "user: Q | assistant: A"),
        ({"task": {"question": "Q", "reply": "A"}}, "user: Q | assistant: A"),
    ],
)
def test_a_row_of_no_format_gets_lines_that_read_it(tmp_path, row, expected):
    lines = ways(refused(tmp_path, [row]))
    assert read(tmp_path, [row], lines[0]) == [expected]


@pytest.mark.parametrize(
    ("name", "role"),
    [
        *[
            ("Chatbot", "assistant"),
            ("prompter", "user"),
            ("human", "user"),
            ("gpt", "assistant"),
            ("model", "assistant"),
        ],
        *[("AI", "assistant"), ("Human", "user"), ("tool_result", "tool"), ("developer", "system")],
    ],
)
def test_usual_names_of_speakers_are_known(name, role):
    turns = [{"role": name, "content": "x"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    row = RecordReader("auto", {}, {}).read({"messages": turns}, "line 1")
    assert isinstance(row, Conversation)
    assert row.messages[0].role == role


@pytest.mark.parametrize("name", ["Narrator", "agent 2", "Модель"])
def test_a_speaker_that_is_not_known_gets_a_line_that_says_who_it_is(tmp_path, name):
    row = {"conversations": [{"from": "human", "value": "q"}, {"from": name, "value": "a"}]}
    (line,) = ways(refused(tmp_path, [row]))
    assert read(tmp_path, [row], line) == ["user: q | assistant: a"]


def test_a_value_that_is_no_text_gets_a_line_that_reads_it(tmp_path):
    for answer, said in ((72, "72"), (True, "true"), (["a", "b"], "a"), ({"value": "a", "n": 1}, "a")):
        row = {"question": "q", "answer": answer}
        (line,) = ways(refused(tmp_path, [row]))
        assert read(tmp_path, [row], line) == [f"user: q | assistant: {said}"]


def test_a_completion_that_holds_the_prompt_gets_lines_that_read_it(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    row = {"prompt": "q", "completion": turns}
    whole, as_text = ways(refused(tmp_path, [row]))
    assert read(tmp_path, [row], whole) == ["user: q | assistant: a"]
    assert read(tmp_path, [row], as_text)[0].startswith('q -> [{"role": "user"')
