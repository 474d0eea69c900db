"""List what names of columns and keys mean to formats and trainers, so that none is left out in silence.

Two kinds have a meaning: marks, which say whether or how much a row or turn is trained (label, accepted, mask, …),
and texts that a model would be given or taught (system, input, context, rejected, …). Names are compared by their
words: Loss-Weight, lossWeight and loss_weight are one. Left out: what becomes of a column that is not read (unread.py).
"""

import math
import re
from collections import deque
from collections.abc import Mapping
from functools import lru_cache
from typing import Any


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# TRL, LLaMA-Factory, axolotl, Unsloth, mlx-lm, torchtune, ms-swift, Megatron and open-instruct, by their documents.
MARK_WORDS = frozenset(
    _names(
        "loss mask masks masked weight weights train trained trainable training untrained learn learnable reward "
        "rewards score scores rating ratings rank ranks label labels kto chosen rejected reject preference preferred "
        "dispreferred desirable undesirable advantage advantages margin winner logprobs"
    )
)
# Whether a row is good, as the last word of a name or after "is": correct_answer is an answer.
VERDICT_WORDS = frozenset(
    _names(
        "correct incorrect correctness wrong accepted approved unapproved verified unverified validated valid invalid "
        "passed failed helpfulness"
    )
)
_CLASSES = frozenset(_names("label labels class classes target targets intent sentiment"))

# What a column is for, and what it is called, the usual name first. Some are names of other things as often: AMBIGUOUS.
SLOTS: dict[str, tuple[str, ...]] = {
    "system": _names("system system_prompt system_message system_instruction sys_prompt sys systemprompt"),
    "history": _names("history chat_history"),
    "tools": _names("tools functions available_tools"),
    "asked": _names(
        "question prompt instruction query questions prompts instructions queries user human user_message user_prompt "
        "user_input user_query request problem problem_statement task_description input inputs source src q ask "
        "utterance"
    ),
    "answered": _names(
        "answer completion response output assistant answers completions responses outputs assistant_message "
        "assistant_response model_response reply target targets expected_output solution tgt gpt bot chatgpt chatbot "
        "model a summary generation best_answer correct_answer answer_key"
    ),
    "context": _names("context contexts input inputs passage paragraph document article background knowledge"),
}
AMBIGUOUS = frozenset(
    _names(
        "user human source src model a q ask bot gpt chatgpt chatbot assistant request summary generation article "
        "background knowledge document paragraph sys tgt utterance answer_key"
    )
)
_TEXTS = frozenset(
    {name for names in SLOTS.values() for name in names if name not in AMBIGUOUS}
    | set(
        _names(
            "messages conversations conversation dialogue dialog contents turns text documents input_ids "
            "attention_mask segments image images audio audios video videos objects tool_calls function_call thinking "
            "reasoning reasoning_content chat_template_kwargs ground_truth positive negative positives negatives "
            "response_j response_k prefix suffix"
        )
    )
)
# Next to a text column, what only says where a text is from.
METADATA_WORDS = frozenset(
    _names(
        "id ids idx index uid uuid guid key hash md5 sha sha1 sha256 url urls uri link links source src dump file "
        "files filename path date datetime time timestamp created updated added year author authors lang language "
        "languages title meta metadata license domain site host dataset subset split corpus token tokens count length "
        "len size num n bytes chars words page pages position offset version warc number row line"
    )
)
# What a turn says, or is given, under names that columns do not have.
_TURN_KEYS = frozenset(_names("content value parts message refusal think thought thoughts tool_plan"))
# Of a multiple-choice question; what is named as the right one is an answer.
_CHOICES = re.compile(r"(\w+_)?(choices|options|endings)(_[a-z0-9])?|(choice|option|ending)_[a-z0-9]")
_RIGHT = frozenset(_names("correct gold right best selected true"))
_MOST_ITEMS = 100  # of a list that are searched for marks
_MOST_SEARCHED = 10_000  # values of one column, in objects and lists inside each other
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")


@lru_cache(maxsize=8192)
def words_of(name: str) -> tuple[str, ...]:
    """Cut a name into its words.

    Args:
        name: of a column or key.

    Returns:
        Words in lower case; none of a name in another script than Latin.
    """
    return tuple(word.lower() for word in _WORD.findall(name))


@lru_cache(maxsize=8192)
def plain_name(name: str) -> str:
    """Write a name in lower case with underscores, and without a last word that only says that it is text.

    Args:
        name: of a column or key.

    Returns:
        Such as "response" of ResponseText.
    """
    words = words_of(name)
    return "_".join(words[:-1] if len(words) > 1 and words[-1] in ("text", "content") else words)


def is_mark(name: str) -> bool:
    """Return True if a name may say whether, or how much, something is trained.

    Args:
        name: of a column or key.

    Returns:
        True if a word of it does, or it is a verdict on the row, such as is_correct.
    """
    words = words_of(name)
    judging = words if words[:1] == ("is",) else words[-1:]
    return not (MARK_WORDS.isdisjoint(words) and VERDICT_WORDS.isdisjoint(judging))


def is_class(name: str) -> bool:
    """Return True if a column of this name may hold a class, which can be the answer to a text.

    Args:
        name: of the column.

    Returns:
        Whether a word of it says so.
    """
    return not _CLASSES.isdisjoint(words_of(name))


def is_choices(name: str) -> bool:
    """Return True if a column of this name holds what a multiple-choice question offers, such as options or option_a.

    Args:
        name: of the column.

    Returns:
        Whether it does.
    """
    words = words_of(name)
    return bool(_CHOICES.fullmatch("_".join(words))) and _RIGHT.isdisjoint(words)


def is_context(name: str) -> bool:
    """Return True if an answer may depend on a column of this name next to a question.

    Args:
        name: of the column.

    Returns:
        True for a context under any of its names, and for choices.
    """
    return not is_mark(name) and (is_choices(name) or slot_of(name) == "context")


def has_meaning(name: str) -> bool:
    """Return True if any format or trainer gives a column of this name a meaning.

    Args:
        name: of a column.

    Returns:
        True if it is a mark or a text.
    """
    return is_mark(name) or plain_name(name) in _TEXTS


def key_has_meaning(name: str) -> bool:
    """Return True if any format or trainer gives a key of a turn of this name a meaning.

    Args:
        name: of the key.

    Returns:
        True if a column of that name has one, or it is what a turn says under another name.
    """
    return has_meaning(name) or plain_name(name) in _TURN_KEYS


def marks_inside(value: Any, path: str) -> dict[str, Any]:
    """Find the marks that an object holds, also in objects and lists inside it, or that the objects of a list hold.

    Args:
        value: at `path`.
        path: of the value, names with dots between them, and [] for the items of a list.

    Returns:
        {path: value} of those that are not empty, of several items the first; nothing where the value holds no object.
        Of a list the first items are searched, and of a value so many as take no time that would count.
    """
    found: dict[str, Any] = {}
    left = deque([(path, value)])
    for _ in range(_MOST_SEARCHED):
        if not left:
            break
        path, value = left.popleft()
        if isinstance(value, Mapping):
            for key, inner in value.items():
                if is_mark(key) and not is_empty(inner):
                    found.setdefault(f"{path}.{key}", inner)
                elif isinstance(inner, Mapping | list):
                    left.append((f"{path}.{key}", inner))
        elif isinstance(value, list):
            left.extend((f"{path}[]", item) for item in value[:_MOST_ITEMS] if isinstance(item, Mapping | list))
    return found


def is_metadata(name: str) -> bool:
    """Return True if a column next to a text only says where the text is from, such as url.

    Args:
        name: of the column.

    Returns:
        Whether a word of it says so, and none gives it another meaning.
    """
    return not name.strip() or (not METADATA_WORDS.isdisjoint(words_of(name)) and not has_meaning(name))


def slot_of(name: str) -> str | None:
    """Find what a column of this name is for.

    Args:
        name: of the column.

    Returns:
        A key of SLOTS; of several, context before what is asked; None where it is none of them.
    """
    for slot in ("context", *SLOTS):
        if plain_name(name) in SLOTS[slot]:
            return slot
    return None


def is_empty(value: Any) -> bool:
    """Return True if a value says nothing: null, NaN, blank text, an empty list or object. false and 0 say something.

    A table has a cell in every row, so that what is empty cannot be distinguished from what is not there. NaN is how
    Python's json writes the missing number of a table.

    Args:
        value: of a column or key.

    Returns:
        True if it is empty.
    """
    if isinstance(value, str):
        return not value or value.isspace()
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, list | Mapping) and not value)
