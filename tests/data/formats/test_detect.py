"""A row's format is seen by its columns; where it is not, the error message says what the row most likely is."""

import pytest

from qlora_trainer.common.errors import ConfigError, DataError
from qlora_trainer.data.formats.detect import COLUMNS, detect_format, known_columns, resolve_format
from qlora_trainer.data.reading.files import open_source


def resolve(record, format="auto", columns=(), template=None):
    return resolve_format(record, format, dict.fromkeys(columns, "x"), "rows.jsonl, line 3", template)


@pytest.mark.parametrize("format", COLUMNS)
def test_every_format_is_seen_by_what_it_needs_whatever_else_is_there(format):
    required, _ = COLUMNS[format]
    assert detect_format(required) == format
    assert resolve({**dict.fromkeys(required, "x"), "id": 1, "score": None}) == format
    assert known_columns(format) >= set(required)


def test_columns_that_the_config_makes_decide_before_those_of_the_file():
    record = {"messages": [], "text": "t", "a": "b"}
    assert resolve(record) == "chat"
    assert resolve(record, columns=["question", "answer"]) == "question_answer"
    assert resolve(record, template={"text": "{a}"}) == "text"
    assert resolve({"instruction": "q", "a": "b"}, columns=["response"]) == "dolly"


def test_null_columns_decide_nothing():
    assert resolve({"messages": None, "conversations": [], "text": None}) == "sharegpt"
    with pytest.raises(DataError, match="the columns text are of no known format"):
        resolve({"text": None})


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"question": "q", "reply": {"text": "a"}}, r"'data.columns={question: question, answer: reply.text}'"),
        ({"question": "q", "notes": {"text": "a"}}, r"nothing called answer. .*'data.columns={answer: notes.text}'"),
    ],
)
def test_a_row_of_no_format_gets_the_way_out(record, words):
    with pytest.raises(DataError, match=f"rows.jsonl, line 3: .*{words}"):
        resolve(record)


def first_row(path):
    where, record = next(open_source(str(path)).records())
    assert isinstance(record, dict)
    return resolve_format(record, "auto", {}, where)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mtbench_questions/question.jsonl", r"turns holds what one side says, and without answers"),
        (
            "dpo_en_demo/dpo_en_demo.json",
            r"'data.columns={prompt: conversations, completion: chosen}' 'data.ignore=\[rejected\]'",
        ),
        (
            "torchtune_tiny/stack_exchange_paired_tiny.json",
            r"'data.columns={question: question, answer: response_j}' 'data.ignore=\[response_k\]'",
        ),
        (
            "self_instruct/seed_tasks.jsonl",
            r"{instruction: instruction, output: instances.0.output, input: instances.0.input}",
        ),
        ("e2e/test.jsonl", r"nothing called completion. .*'data.columns={completion: references.0}'"),
        ("poem_sentiment/train.tsv", r"name the columns, such as: 'data.header=\[column1, column2, column3"),
        ("poem_sentiment/dev.tsv", r"name the columns, such as: 'data.header=\[column1, column2, column3"),
    ],
)
def test_real_files_that_cannot_be_read_as_they_are_say_what_to_do(shared_data, name, words):
    with pytest.raises((DataError, ConfigError), match=words):
        first_row(shared_data(name))
