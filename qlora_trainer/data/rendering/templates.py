"""Run one chat template as a program, and find its habits by experiment.

Templates trim, drop earlier reasoning, move the end of a turn, write today's date, or refuse. What they do is found by
rendering small dialogues, never by reading their text. The program is run as transformers runs it (its compiler, its
variables; a test compares), with one difference: the clock that `strftime_now` reads is a fixed date, so that a run's
rows, its resumption and its answers all say the same day. Left out: where in a rendering each turn is (spans.py).
"""

import datetime
import re
from functools import cached_property, lru_cache
from typing import Any

import jinja2

from qlora_trainer.common.errors import DataError, first_line
from qlora_trainer.common.transformers_internals import chat_template_environment, render_with_answer_spans
from qlora_trainer.data.rendering.dialogue import END_OF_REASONING, Dialogue
from qlora_trainer.data.rendering.encoding import Tokenizer
from qlora_trainer.data.rendering.template_limits import TemplateLimitError, check_length, limit_operations, limited

# For a tokenizer that has no template of its own, such as GPT-2's.
PLAIN_TEMPLATE = """\
{%- for message in messages -%}
{{- "" if loop.first else "\n\n" -}}
{%- if message.role == "user" -%}{{ "### Instruction:\n" + message.content }}
{%- elif message.role == "assistant" -%}{{ "### Response:\n" + message.content + eos_token }}
{%- elif message.role == "tool" -%}{{ "### Result:\n" + message.content }}
{%- else -%}{{ message.content }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "\n\n### Response:\n" }}{%- endif -%}
"""

Blocks = list[tuple[int, int]]  # (start, end) in characters
_MARKER = "Qm0Q"
_QUESTION = {"role": "user", "content": "question"}
_TOOL = {"name": "lookup", "description": "Looks up.", "parameters": {"type": "object", "properties": {}}}
# Two dates that differ in weekday, day, month and year, however they are written.
_DATES = (datetime.date(1999, 12, 31), datetime.date(2011, 3, 5))


class ChatTemplate:
    """Render by the chat template of one tokenizer.

    `header` is what the generation prompt adds before an answer ("" where a template has none of it), `end_of_turn` the
    control token after an answer, or None; `ends` are those that end a turn of any kind.

    Args:
        tokenizer: of transformers.
        source: the template's text; None for the plain one.
        control_pattern: matches the tokenizer's control tokens.
        date: what `strftime_now` reads; None for today.

    Raises:
        DataError: the template cannot render one question and its answer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        source: str | None,
        control_pattern: re.Pattern[str],
        date: datetime.date | None = None,
    ) -> None:
        self.is_plain = source is None
        self.control_pattern = control_pattern
        added = sorted({token.content for token in tokenizer.added_tokens_decoder.values()}, key=len, reverse=True)
        self.token_pattern = re.compile("|".join(map(re.escape, added)) or r"(?!)")
        self.eos_token = tokenizer.eos_token or ""  # a renderer has refused tokenizers without one
        self._variables = dict(tokenizer.special_tokens_map)
        try:
            self._program = _compiled(PLAIN_TEMPLATE if source is None else source)
        except Exception as error:  # a template is a program of others: whatever it raises is its fault
            raise DataError(
                f"The model's chat template (chat_template.jinja, or chat_template in tokenizer_config.json) cannot be "
                f"read: {_said(error)}."
            ) from error
        self.written_date = self._fix_date(date)
        self._has_blocks = False
        self._probe()

    def text(self, dialogue: Dialogue, where: str, generation: bool = False) -> str:
        """Render a dialogue.

        Args:
            dialogue: of a row.
            where: file and line, for errors.
            generation: end where an answer begins.

        Returns:
            The template's text.

        Raises:
            DataError: the template refuses the dialogue.
        """
        try:
            return self._run(dialogue, generation, self._variables)
        except Exception as error:
            raise DataError(_refusal(dialogue, error, where)) from error

    def text_and_blocks(self, dialogue: Dialogue, where: str) -> tuple[str, Blocks]:
        """Render a dialogue, and find the places that the template itself marks with {% generation %}.

        Args:
            dialogue: of a row.
            where: file and line, for errors.

        Returns:
            The text, and the places.

        Raises:
            DataError: the template refuses the dialogue.
        """
        if not self._has_blocks:
            return self.text(dialogue, where), []
        try:
            with limited():
                found = render_with_answer_spans(self._program, dialogue.messages, dialogue.tools, self._variables)
            check_length(found[0], dialogue.messages, dialogue.tools)
            return found
        except Exception as error:
            raise DataError(_refusal(dialogue, error, where)) from error

    @cached_property
    def knows_tools(self) -> bool:
        """Find whether the template writes the tools that a row offers.

        Returns:
            True if it does.
        """
        tool = {"type": "function", "function": {**_TOOL, "name": _MARKER}}
        return _MARKER in (self._try([_QUESTION, {"role": "assistant", "content": "answer"}], [tool]) or "")

    @cached_property
    def knows_reasoning(self) -> bool:
        """Find whether the template writes the reasoning of the last answer.

        Returns:
            True if it does.
        """
        answer = {"role": "assistant", "content": "answer", "reasoning_content": _MARKER, "thinking": _MARKER}
        return _MARKER in (self._try([_QUESTION, answer]) or "")

    @cached_property
    def keeps_inline_reasoning(self) -> bool:
        """Find whether the template writes reasoning that is part of an answer's text, as it is written there.

        Some split such texts, and write the reasoning elsewhere, or drop it; some do so in earlier turns alone.

        Returns:
            True if the template writes it in the last turn and in earlier ones.
        """
        answer = {"role": "assistant", "content": f"<think>{_MARKER}{END_OF_REASONING}answer"}
        texts = [self._try([_QUESTION, answer]), self._try([_QUESTION, answer, _QUESTION, answer])]
        return [(text or "").count(str(answer["content"])) for text in texts] == [1, 2]

    def _run(self, dialogue: Dialogue, generation: bool, variables: dict[str, Any]) -> str:
        with limited():
            text: str = self._program.render(
                messages=dialogue.messages,
                tools=dialogue.tools,
                documents=None,
                add_generation_prompt=generation,
                **variables,
            )
        check_length(text, dialogue.messages, dialogue.tools)
        return text

    def _try(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, **variables: Any
    ) -> str | None:
        try:
            return self._run(Dialogue(messages, tools), False, {**self._variables, **variables})
        except TemplateLimitError as error:
            raise DataError(f"The model's chat template cannot be used: tried on a few turns, {error}.") from error
        except Exception:
            return None

    def _fix_date(self, date: datetime.date | None) -> datetime.date | None:
        """Set the date that the template reads, and return it where the template writes it.

        Some templates write a date of their own unless they are given `date_string`: they get one only by name.
        """
        fixed = date or datetime.date.today()
        self._variables["strftime_now"] = fixed.strftime
        if self._differs("strftime_now", [day.strftime for day in _DATES]):
            return fixed
        if date is not None and self._differs("date_string", [day.strftime("%d %b %Y") for day in _DATES]):
            self._variables["date_string"] = date.strftime("%d %b %Y")
            return date
        return None

    def _differs(self, variable: str, values: list[Any]) -> bool:
        turns = [_QUESTION, {"role": "assistant", "content": "answer"}]
        tool = {"type": "function", "function": _TOOL}
        probes: list[tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = [
            (turns, None),
            ([{"role": "system", "content": "Be brief."}, *turns], None),
            (turns, [tool]),
        ]
        texts = [[self._try(messages, tools, **{variable: value}) for messages, tools in probes] for value in values]
        return texts[0] != texts[1]

    def _probe(self) -> None:
        where = "the chat template, tried on one exchange"
        answered = Dialogue([_QUESTION, {"role": "assistant", "content": _MARKER}])
        _, _, after = self.text(answered, where).partition(_MARKER)
        self._has_blocks = True  # tried on the next line
        self._has_blocks = bool(self.text_and_blocks(answered, where)[1])
        asked = Dialogue([{"role": "user", "content": _MARKER}])
        before = self.text(asked, "the chat template, tried on a question").rpartition(_MARKER)[2]
        prompt = self.text(asked, "the chat template, tried on a question", generation=True).rpartition(_MARKER)[2]
        self.header = self._added(before, prompt)
        found = self.control_pattern.search(after)
        self.end_of_turn = found[0] if found else None
        self._probe_calls()
        ends = {self.end_of_turn, self.end_of_call, self._end_before_a_question(answered)}
        self.ends = frozenset(end for end in ends if end)

    def common_prefix(self, one: str, other: str) -> int:
        """Count the characters that two texts begin with in common, without a part of any token of the vocabulary.

        Args:
            one: text.
            other: text.

        Returns:
            Characters.
        """
        same = shared_beginning(one, other)
        for match in [*self.token_pattern.finditer(one), *self.token_pattern.finditer(other)]:
            if match.start() < same < match.end():
                same = match.start()
        return same

    def _added(self, before: str, prompt: str) -> str:
        """Return what a generation prompt has beyond the same text without it."""
        return prompt[self.common_prefix(before, prompt) :]

    def _end_before_a_question(self, answered: Dialogue) -> str | None:
        """Find the control token after an earlier answer, if it is not the one that opens the question after it."""
        text = self._try([*answered.messages, {"role": "user", "content": "Qm1Q"}]) or ""
        between = text.partition(_MARKER)[2].partition("Qm1Q")[0]
        tokens = list(self.control_pattern.finditer(between))
        return tokens[0][0] if len(tokens) > 1 and not between[: tokens[0].start()].strip() else None

    def _probe_calls(self) -> None:
        """Find how calls are given to the template, and the control token that ends a turn of calls."""
        self.arguments_as_text = False
        self.end_of_call: str | None = None
        for as_text in (False, True):
            for call_id in ({}, {"id": "000000000"}):
                arguments = '{"city": "Paris"}' if as_text else {"city": "Paris"}
                call = {"type": "function", "function": {"name": _MARKER, "arguments": arguments}, **call_id}
                text = self._try([_QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}])
                if text and _MARKER in text and "Paris" in text:
                    ends = self.control_pattern.findall(text.partition(_MARKER)[2])
                    self.arguments_as_text = as_text
                    self.end_of_call = self.end_of_turn if self.end_of_turn in ends else ends[-1] if ends else None
                    return


def shared_beginning(one: str, other: str) -> int:
    """Count the characters that two texts begin with in common.

    Args:
        one: text.
        other: text.

    Returns:
        Characters.
    """
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


@lru_cache
def _compiled(source: str) -> Any:
    """Compile a template as transformers does, but for operations that would fill the memory."""
    environment = chat_template_environment()
    limit_operations(environment)
    return environment.from_string(source)


def _refusal(dialogue: Dialogue, error: Exception, where: str) -> str:
    roles = ", ".join(message["role"] for message in dialogue.messages)
    is_of_system = "system" in roles and "system" in f"{error}".lower()
    hint = " Put the system text into the first user turn." if is_of_system else ""
    if not isinstance(error, jinja2.TemplateError):
        hint = " Mend it: chat_template.jinja in the model's directory, or chat_template in tokenizer_config.json."
    return (
        f"{where}: the model's chat template cannot render a conversation of the roles {roles}. "
        f"It says: {_said(error)}.{hint}"
    )


def _said(error: Exception) -> str:
    """Return what a template itself says where it raises an error, else the error with its kind."""
    return str(error) if isinstance(error, jinja2.TemplateError) else first_line(error)
