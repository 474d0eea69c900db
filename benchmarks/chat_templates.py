"""Try conversations of many shapes on real chat templates, and report what breaks a promise of the trainer.

    python -m benchmarks.chat_templates [PATH ...] [--verbose]

A PATH is a folder or a wheel with *.jinja files, such as `pip download --no-deps axolotl` gives; TRL's own templates
are tried where none is named. Each template meets a small tokenizer with the split rules of GPT-2 and of Qwen, whose
control tokens are those that the template writes. The promises, for each conversation that is not refused:

- what is trained is what the model says: no word of a user, a tool or the system;
- no word of any turn is left out, but for reasoning that a warning names;
- the row begins with the tokens that plain transformers gives of the prompt of its last answer, or a warning says that
  it does not.

Printed are templates, conversations rendered and refused, rows with a warning, and each fault. Exit status 1 where
there is one.
"""

import argparse
import json
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora_trainer.common.errors import DataError
from qlora_trainer.data.formats.parse import RecordReader
from qlora_trainer.data.rendering.dialogue import make_dialogue, with_numbered_ids
from qlora_trainer.data.rendering.prompts import PROMPT_DIFFERS
from qlora_trainer.data.rendering.renderer import PROMPT_TOKENS_DIFFER, Renderer
from qlora_trainer.data.rendering.spans import LAST_TURN_ONLY, REASONING_LEFT_OUT, REASONING_NOT_SHOWN
from qlora_trainer.data.types import Conversation
from qlora_trainer.weights.gguf import split_rules

SPLITS = {"gpt2": split_rules.SPLITS["gpt-2"][0], "qwen": split_rules.SPLITS["qwen2"][0]}
MERGES = [("Ċ", "Ċ"), ("Ġ", "Ġ"), ("Ċ", "Ġ"), (":", "/"), ("Ċ", "ĉ")]  # blanks and marks that tokenizers join
CONTROL = re.compile(r"<\|[^|<>\s]+\|>|<[|/]?[a-z_]+[|]?>|\[/?[A-Z_]+\]|<\uff5c[^<>]+\uff5c>|</?s>")
TOOL = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Looks a city up.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def turn(role: str, content: str = "", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def called(content: str = "", **more: Any) -> dict[str, Any]:
    call = {"id": "call00001", "type": "function", "function": {"name": "lookup", "arguments": {"city": "Oslo"}}}
    return turn("assistant", content, tool_calls=[call], **more)


ASKED, AGAIN = turn("user", "uone first"), turn("user", "utwo second")
RESULT = turn("tool", "tone seventeen", tool_call_id="call00001", name="lookup")
SHAPES: dict[str, list[dict[str, Any]]] = {
    "single": [ASKED, turn("assistant", "aone fine.")],
    "multi": [ASKED, turn("assistant", "aone fine."), AGAIN, turn("assistant", "atwo good.")],
    "system": [turn("system", "sone rule"), ASKED, turn("assistant", "aone fine.")],
    "long": [ASKED, turn("assistant", "aone fine.")] * 5,
    "newline": [ASKED, turn("assistant", "\naone fine.")],
    "blanks": [ASKED, turn("assistant", "  aone\n\n\tfine.\n")],
    "question ends in a line": [turn("user", "uone first\n\n"), turn("assistant", "aone fine.")],
    "call": [ASKED, called()],
    "call and text": [ASKED, called("aone wait.")],
    "tool": [ASKED, called(), RESULT, turn("assistant", "aone fine.")],
    "tool and text": [ASKED, called("aone wait."), RESULT, turn("assistant", "atwo fine.")],
    "tool and more": [ASKED, called(), RESULT, turn("assistant", "aone fine."), AGAIN, turn("assistant", "atwo good.")],
    "ends with a tool": [ASKED, called("aone wait."), RESULT],
    "reasoning": [ASKED, turn("assistant", "aone fine.", reasoning_content="rone since.")],
    "earlier reasoning": [
        ASKED,
        turn("assistant", "aone fine.", reasoning_content="rone since."),
        AGAIN,
        turn("assistant", "atwo good.", reasoning_content="rtwo then."),
    ],
    "reasoning and call": [ASKED, called(reasoning_content="rone since."), RESULT, turn("assistant", "aone fine.")],
    "inline reasoning": [ASKED, turn("assistant", "<think>\nrone since.\n</think>\n\naone fine.")],
    "inline reasoning, long answer": [
        ASKED,
        turn("assistant", "<think>\nrone since.\n</think>\n\naone fine. " + "And so it went on. " * 4),
    ],
    "earlier inline reasoning": [
        ASKED,
        turn("assistant", "<think>\nrone since.\n</think>\n\naone fine."),
        AGAIN,
        turn("assistant", "atwo good."),
    ],
    "empty inline reasoning": [ASKED, turn("assistant", "<think>\n\n</think>\n\naone fine.")],
    "end of reasoning alone": [ASKED, turn("assistant", "rone since.\n</think>\n\naone fine.")],
    "address": [turn("user", "uone http:"), turn("assistant", "//aone fine.")],
}
WORDS = re.compile(r"\b[usatr](?:one|two)\b")  # each turn's own, by who says it
TRAIN_ON = ("assistant", "last", "all")


class Fault(NamedTuple):
    """Hold a broken promise."""

    template: str
    shape: str
    train_on: str
    what: str


def main() -> None:
    """Run the campaign, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH")
    parser.add_argument("--verbose", action="store_true", help="print why conversations are refused")
    arguments = parser.parse_args()
    counts, faults, refusals = Counter[str](), list[Fault](), Counter[str]()
    for name, source in found_templates(arguments.paths or [trl_templates()]):
        counts["templates"] += 1
        for split in SPLITS:
            check_template(f"{name} ({split})", source, split, counts, faults, refusals)
    print(json.dumps(counts, indent=1))
    if arguments.verbose:
        for reason, count in refusals.most_common():
            print(f"{count:6} {reason}")
    for fault in faults:
        print("FAULT", *fault, sep=" | ")
    print(f"{len(faults)} faults")
    sys.exit(bool(faults))


def trl_templates() -> Path:
    """Return the folder of the templates that TRL has."""
    import trl

    return Path(trl.__file__).parent


def found_templates(paths: list[Path]) -> Iterator[tuple[str, str]]:
    """Go through the templates of folders and wheels, by name."""
    for path in paths:
        if path.is_dir():
            for file in sorted(path.rglob("*.jinja")):
                yield file.stem, file.read_text()
            continue
        with zipfile.ZipFile(path) as wheel:
            for name in sorted(wheel.namelist()):
                if name.endswith(".jinja"):
                    yield Path(name).stem, wheel.read(name).decode()


def tokenizer_for(source: str, split: str) -> PreTrainedTokenizerFast:
    """Make a tokenizer of single bytes and joined blanks, with the control tokens that a template writes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, *("".join(pair) for pair in MERGES)])}
    backend = Tokenizer(models.BPE(vocabulary, MERGES))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLITS[split]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    tokens = sorted({*CONTROL.findall(source), "<bos>", "<eos>"} - {"<think>", "</think>"})
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in ("<think>", "</think>")])
    ends = [token for token in ("<|im_end|>", "<|eot_id|>", "<turn|>", "<end_of_turn>", "<eos>") if token in tokens]
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token=ends[0], chat_template=source)


def check_template(
    name: str, source: str, split: str, counts: Counter[str], faults: list[Fault], refusals: Counter[str]
) -> None:
    """Try all shapes on one template."""
    tokenizer = tokenizer_for(source, split)
    for shape, messages in SHAPES.items():
        has_tools = any(message["role"] == "tool" or "tool_calls" in message for message in messages)
        record = {"messages": messages, **({"tools": [TOOL]} if has_tools else {})}
        row = RecordReader("auto", {}, {}).read(json.loads(json.dumps(record)), "row")
        assert isinstance(row, Conversation)
        for train_on in TRAIN_ON:
            try:
                (found,) = Renderer(tokenizer, train_on, max_length=10**6).render_batch([("row", row)])
            except DataError as error:  # the template cannot be used at all
                found = error
            if isinstance(found, DataError):
                counts["refused"] += 1
                refusals[re.sub(r"turn \d+|'.*?'", "…", str(found))[:160]] += 1
                continue
            counts["rendered"] += 1
            for warning in found.warnings:
                counts[f"warned: {warning[:60]}"] += 1
            problems = broken_promises(tokenizer, row, messages, train_on, found)
            faults += [Fault(name, shape, train_on, what) for what in problems]


def broken_promises(
    tokenizer: PreTrainedTokenizerFast, row: Conversation, messages: list[dict[str, Any]], train_on: Any, found: Any
) -> Iterator[str]:
    """Compare one rendered conversation with the promises."""
    if found.dropped:
        return
    (example,) = found.examples
    text = tokenizer.decode(example.input_ids)
    trained = tokenizer.decode([label for label in example.labels if label != -100])
    if train_on != "all" and (foreign := [word for word in WORDS.findall(trained) if word[0] in "ust"]):
        yield f"trains {foreign} of others: {trained!r}"
    said = Counter(WORDS.findall(json.dumps([message for message in messages if LAST_TURN_ONLY not in found.warnings])))
    lost = said - Counter(WORDS.findall(text))
    if {REASONING_LEFT_OUT, REASONING_NOT_SHOWN} & set(found.warnings):
        lost = Counter(word for word in lost if word[0] != "r")
    if lost:
        yield f"drops {sorted(lost)} without a word: {text!r}"
    last = max(index for index, message in enumerate(row.messages) if message.role == "assistant")
    if example.labels[-1:] and {PROMPT_DIFFERS, PROMPT_TOKENS_DIFFER} & set(found.warnings):
        return
    server = server_prompt(tokenizer, row, last)
    if server is not None and example.input_ids[: len(server)] != server:
        yield f"does not begin with its prompt {tokenizer.decode(server)!r}: {text!r}"


def server_prompt(tokenizer: PreTrainedTokenizerFast, row: Conversation, last: int) -> list[int] | None:
    """Return what plain transformers gives of the turns before an answer; None where the template refuses them."""
    for as_text in (False, True):
        dialogue = make_dialogue(Conversation(row.messages[:last], row.tools), "row", as_text)
        for given in (dialogue, with_numbered_ids(dialogue)):
            if given is None:
                continue
            try:
                text = tokenizer.apply_chat_template(
                    given.messages, tools=given.tools, tokenize=False, add_generation_prompt=True
                )
            except Exception:
                continue
            ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
            return ids
    return None


if __name__ == "__main__":
    main()
