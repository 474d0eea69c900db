"""What an answer depends on is read with the question, or stops the run; an offered choice is never the answer."""

import pytest
from advice import prepared, read, refused, texts, ways

from qlora_trainer.data.formats.meanings import is_choices

PAIR = {"question": "q", "answer": "a"}
PLAIN = {"prompt": "q", "completion": "a"}
DOLLY = {"instruction": "q", "response": "a"}
ALPACA = {"instruction": "q", "output": "a"}


@pytest.mark.parametrize("row", [PAIR, PLAIN, DOLLY, ALPACA])
@pytest.mark.parametrize("name", ["document", "knowledge", "background", "paragraph", "article", "Article_Text"])
def test_a_context_of_any_name_next_to_a_question_stops_and_the_line_reads_it(tmp_path, row, name):
    reads, leaves_out = ways(refused(tmp_path, [{**row, name: "Some facts."}]))
    assert read(tmp_path, [{**row, name: "Some facts."}], reads) == ["user: q\n\nSome facts. | assistant: a"]
    assert f"data.ignore=[{name}]" in leaves_out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"choices": ["x", "y"]}, 'q\n\n["x", "y"]'),
        ({"options": {"A": "x", "B": "y"}}, 'q\n\n{"A": "x", "B": "y"}'),
        ({"option_a": "x", "optionB": "y"}, "q\n\nx\n\ny"),
        ({"article": "Facts.", "answer_choices": "x or y"}, "q\n\nFacts.\n\nx or y"),
        ({"context": ["Facts.", "More."]}, 'q\n\n["Facts.", "More."]'),
        ({"context": "Facts.", "System_Prompt": "s", "choices": ["x"]}, 'q\n\nFacts.\n\n["x"]'),
    ],
)
def test_choices_and_several_contexts_are_written_below_the_question(tmp_path, more, said):
    line = ways(refused(tmp_path, [{**PAIR, **more}]))[0]
    (found,) = read(tmp_path, [{**PAIR, **more}], line)
    assert found == "system: s | " * ("System_Prompt" in more) + f"user: {said} | assistant: a"


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"id": "1", "question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}, "B"),
        ({"question": {"stem": "q", "choices": [{"label": "A", "text": "x"}]}, "answerKey": "A"}, None),
        ({"ctx": "q", "endings": ["x", "y"], "label": "1"}, "1"),
        ({"question": "q", "choices": ["x", "y"], "answer": 1}, "1"),
        ({"question": "q", "options": ["x", "y"]}, None),
    ],
)
def test_a_choice_is_never_the_answer(tmp_path, row, answer):
    message = refused(tmp_path, [row])
    assert not any("answer: choices" in word or "answer: options" in word for line in ways(message) for word in line)
    assert "choices.0" not in message
    if answer:
        line = ways(message)[0]
        if "choices may" in (again := refusal_or_text(tmp_path, row, line)):
            line = ways(again)[0]
        (found,) = read(tmp_path, [row], line)
        assert found.startswith("user: q\n\n")
        assert "x" in found
        assert found.endswith(f" | assistant: {answer}")


def refusal_or_text(tmp_path, row, line):
    """Return what a line makes of a row: the next refusal, or the row's text."""
    try:
        return refused(tmp_path, [row], line)
    except AssertionError as read_row:
        return str(read_row)


def test_a_context_that_the_question_holds_already_is_not_lost(tmp_path):
    row = {"prompt": "Facts: sky.\nA: x\nB: y\nq", "completion": "a", "article": "sky.", "choices": ["x", "y"]}
    assert texts(prepared(tmp_path, [row], [])) == [f"{row['prompt']} -> a"]
    assert "article may be" in refused(tmp_path, [{**row, "article": "grass."}])


def test_what_is_named_as_the_right_choice_is_none_of_those_offered():
    assert not any(map(is_choices, ("correct_option", "best_choices", "option", "optional", "choice", "goldOptions")))
    assert all(map(is_choices, ("choices", "Options", "option_1", "optionC", "answer_choices", "choice2")))


def test_turns_of_another_name_next_to_choices_are_read_by_the_line(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    row = {"dialog": turns, "choices": ["x", "y"]}
    (line,) = ways(refused(tmp_path, [row]))
    assert read(tmp_path, [row], line) == ["user: q | assistant: a"]
