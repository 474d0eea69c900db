"""A conversation is found in a file by every name that its turns are then read by."""

import json
from pathlib import Path

import pytest
from advice import settings_in, ways
from data_files import write_file

from qlora_trainer.common.errors import DataError
from qlora_trainer.data.formats.parse import RecordReader
from qlora_trainer.data.formats.turns import unread_keys
from qlora_trainer.data.reading.files import open_source
from qlora_trainer.data.turn_names import ROLE_NAMES, is_turn
from qlora_trainer.data.types import Conversation


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "Human", "content": "a"}, {"role": "Assistant", "content": "b"}],
        [{"from": "prompter", "value": "a"}, {"from": "ai", "value": "b"}],
        [{"role": "user", "parts": [{"text": "a"}]}, {"role": "model", "parts": [{"text": "b"}]}],
        [{"role": "user", "text": "a"}, {"role": "chatbot", "message": "b"}],
        [{"speaker": "User", "text": "a"}, {"speaker": "Assistant", "text": "b"}],
        [{"role": "user", "content": "a"}, {"role": "tool_calls", "content": '{"name": "f", "arguments": {}}'}],
    ],
)
def test_turns_are_found_by_every_name_that_they_are_read_by(tmp_path, turns):
    for content, name in ((json.dumps(turns) + "\n", "x.jsonl"), (json.dumps(turns, indent=1), "x.json")):
        found = [row for _, row in open_source(str(write_file(tmp_path, name, content))).records()]
        assert found == [{"messages": turns}]
    assert not isinstance(found[0], DataError)
    row = RecordReader("auto", {}, {}).read(found[0], "x.json, row 1")
    assert isinstance(row, Conversation)
    assert [message.role for message in row.messages] == ["user", "assistant"]
    assert [key for turn in turns for key in unread_keys([turn])] == []


@pytest.mark.parametrize("name", ROLE_NAMES)
def test_a_turn_is_known_by_every_name_of_a_role_in_capitals_too(name):
    for speaker, content in (("role", "content"), ("from", "value"), ("role", "parts"), ("speaker", "text")):
        assert is_turn({speaker: name, content: "x"})
        assert is_turn({speaker: name.upper(), content: "x"})
        assert not is_turn({speaker: f"{name}s of mine", content: "x"})
    assert not is_turn({"role": name, "content": None})


def refusal_of(tmp_path: Path, turns: list[dict[str, str]]) -> str:
    """Return the message on a file that holds one object with turns under a name that is not ours."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"dialogue": turns}))
    ((_, row),) = open_source(str(path)).records()
    assert not isinstance(row, DataError)
    with pytest.raises(DataError) as caught:
        RecordReader("auto", {}, {}).read(row, "rows.json, row 1")
    return str(caught.value)


@pytest.mark.parametrize("speaker", ["role", "from", "speaker"])
def test_turns_alone_in_a_file_are_a_conversation_and_no_rows(tmp_path, speaker):
    message = refusal_of(tmp_path, [{speaker: "user", "text": "a"}, {speaker: "assistant", "text": "b"}])
    assert "data.rows" not in message
    assert ["data.columns={messages: dialogue}"] in ways(message)


@pytest.mark.parametrize("speaker", ["role", "from", "speaker"])
def test_of_speakers_that_are_not_known_both_readings_are_offered(tmp_path, speaker):
    message = refusal_of(tmp_path, [{speaker: "Alice", "text": "a"}, {speaker: "Bob", "text": "b"}])
    assert settings_in(message) == ["data.rows=dialogue", "data.columns={messages: dialogue}"]
    names = {"alice": "user", "bob": "assistant"}
    row = RecordReader("auto", {"messages": "dialogue"}, {}, roles=names).read(
        {"dialogue": [{speaker: "Alice", "text": "a"}, {speaker: "Bob", "text": "b"}]}, "rows.json, row 1"
    )
    assert isinstance(row, Conversation)
    assert [message.role for message in row.messages] == ["user", "assistant"]
