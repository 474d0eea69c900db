"""A chat template's text for a conversation, and where in it each answer stands.

Templates are programs: they trim, drop earlier reasoning, put the end of one turn into the next, or refuse. So the
place of an answer is found by experiment, in the rendering of the whole conversation: the answers are replaced by
unique markers, which shows the template's own text around each; then the true answers put back between must give the
true rendering, character by character. Where that fails, the last answer is found as what follows its prompt.

An answer's span is all that a model has to say after the generation prompt, up to and with the token that ends a
turn: Qwen3's empty reasoning before a last answer is in it.
"""

import hashlib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import jinja2

from qlora_trainer.data.encoding import Stretch, Tokenizer
from qlora_trainer.data.messages import Message
from qlora_trainer.errors import DataError

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

LAST_TURN_ONLY = (
    "the chat template renders earlier turns otherwise than they are written: only the last turn is learned"
)
END_ADDED = "the chat template ends no turn with a control token: the end-of-text token was added after the last answer"


@dataclass(frozen=True)
class Rendering:
    """A conversation as text, in stretches, with what should be told about how its answers were found."""

    stretches: list[Stretch]
    notices: tuple[str, ...] = ()


class ChatTemplate:
    """One tokenizer's chat template, or the plain one.

    `header` is what the generation prompt adds before an answer ("" where a template has none of it), `end_of_turn` the
    control token after an answer, or None.

    Raises:
        DataError: the template cannot render one question and its answer.
    """

    def __init__(self, tokenizer: Tokenizer, control_pattern: re.Pattern[str]) -> None:
        self.tokenizer = tokenizer
        self.control_pattern = control_pattern
        self.is_plain = tokenizer.chat_template is None
        self.eos_token = tokenizer.eos_token or ""  # a renderer has refused tokenizers without one
        question, marker = Message("user", "question"), "Qm0Q"
        whole = self.text([question, Message("assistant", marker)], where="the chat template, tried on one exchange")
        before = self.text([question], where="the chat template, tried on a question")
        prompt = self.text([question], generation=True, where="the chat template, tried on a question")
        self.header = prompt[len(before) :].rstrip(" ") if prompt.startswith(before) else ""
        self.end_of_turn = self._end_of_turn(whole.partition(marker)[2])

    def text(self, messages: Sequence[Message], generation: bool = False, *, where: str) -> str:
        """The template's text, before any check.

        Raises:
            DataError: the template refuses the conversation.
        """
        plain = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self.tokenizer.apply_chat_template(
                plain,
                chat_template=PLAIN_TEMPLATE if self.is_plain else None,
                tokenize=False,
                add_generation_prompt=generation,
            )
        except (jinja2.TemplateError, ValueError, TypeError, KeyError, IndexError) as error:
            roles = ", ".join(message.role for message in messages)
            hint = " Put the system text into the first user turn." if "system" in f"{error}".lower() else ""
            raise DataError(
                f"{where}: the model's chat template cannot render a conversation of the roles {roles}. "
                f"It says: {error}.{hint}"
            ) from error

    def render(self, messages: Sequence[Message], targets: Collection[int], *, others: bool, where: str) -> Rendering:
        """The whole conversation, learned at the turns whose indices are `targets`, or with `others` at all but those.

        Raises:
            DataError: the template refuses the conversation, or hides even its last answer.
        """
        shielded, shields = self._shielded(messages)
        text = self.text(shielded, where=where)
        _check_nothing_left_out(shielded, text, where)
        notices = []
        try:
            spans = self._spans(shielded, text, sorted(targets), where)
        except DataError:
            spans = None  # the template reads contents and stumbled over a marker
        if spans is None:
            if others:
                raise DataError(
                    f"{where}: the row excludes turns from learning, and this model's chat template hides where they "
                    "stand. Set data.learn to assistant or last."
                )
            last = max(index for index, message in enumerate(messages) if message.role == "assistant")
            shielded = shielded[: last + 1]
            text, start, end = self._last_turn(shielded, last, where)
            spans = [(start, end)] if last in targets else []
            notices.append(LAST_TURN_ONLY)
        if self.end_of_turn is None and shielded[-1].role == "assistant":
            pieces = _cut(text.rstrip(), spans, others)
            pieces.append(Stretch(self.eos_token, learned=(len(shielded) - 1 in targets) != others))
            notices.append(END_ADDED)
        else:
            pieces = _cut(text, spans, others)
        return Rendering(_unshielded(pieces, shields), tuple(notices))

    def render_prompt(self, messages: Sequence[Message], *, where: str) -> list[Stretch]:
        """What stands before an answer to `messages`: character by character as in training."""
        shielded, shields = self._shielded(messages)
        if self.header:
            text = self.text(shielded, generation=True, where=where)
        else:
            marker = f"Q{_nonce(shielded)}m0Q"
            text = self.text([*shielded, Message("assistant", marker)], where=where).partition(marker)[0]
        # A space at the end would become a token of its own, where in training it belongs to the answer's first word.
        return _unshielded([Stretch(text.rstrip(" "), learned=False)], shields)

    def _end_of_turn(self, after: str) -> str | None:
        found = self.control_pattern.search(after)
        return found[0] if found and not after[: found.start()].strip() else None

    def _spans(
        self, messages: Sequence[Message], text: str, targets: Sequence[int], where: str
    ) -> list[tuple[int, int]] | None:
        """Where the targets stand in `text`, (start, end) in characters; None where the template defeats markers."""
        nonce = _nonce(messages)
        markers = {index: f"Q{nonce}m{index}Q" for index in targets}
        marked = [replace(m, content=markers.get(index, m.content)) for index, m in enumerate(messages)]
        pieces = []
        rest = self.text(marked, where=where)
        for marker in markers.values():
            if rest.count(marker) != 1:
                return None
            piece, _, rest = rest.partition(marker)
            pieces.append(piece)
        pieces.append(rest)
        if not text.startswith(pieces[0]):
            return None
        spans = []
        position = len(pieces[0])
        for target, before, after in zip(targets, pieces, pieces[1:], strict=False):
            end = _match(text, position, messages[target].content, after)
            if end is None:
                return None
            spans.append((self._answer_start(messages[target], position, before), self._answer_end(end, after)))
            position = end + len(after)
        return spans if position == len(text) else None

    def _answer_start(self, message: Message, start: int, before: str) -> int:
        """Back to the end of the generation prompt, which leaves out spaces at its end."""
        header_at = before.rfind(self.header) if self.header and message.role == "assistant" else -1
        if header_at >= 0:
            return start - (len(before) - header_at - len(self.header))
        return start - (len(before) - len(before.rstrip(" ")))

    def _answer_end(self, end: int, after: str) -> int:
        if self.end_of_turn and after.lstrip().startswith(self.end_of_turn):
            return end + after.index(self.end_of_turn) + len(self.end_of_turn)
        return end

    def _last_turn(self, messages: Sequence[Message], last: int, where: str) -> tuple[str, int, int]:
        """The text up to the last answer, and that answer's span."""
        prompt = self.text(messages[:last], generation=True, where=where).rstrip(" ")
        text = self.text(messages[: last + 1], where=where)
        answer = text.removeprefix(prompt)
        if not text.startswith(prompt) or messages[last].content.strip()[-32:] not in answer:
            raise DataError(
                f"{where}: the model's chat template hides where the last answer stands, so it cannot be learned apart "
                "from the prompt. Set data.learn to all, or use a model with another template."
            )
        end = answer.rfind(self.end_of_turn) if self.end_of_turn else -1
        length = end + len(self.end_of_turn or "") if end >= 0 else len(answer.rstrip())
        return text, len(prompt), len(prompt) + length

    def _shielded(self, messages: Sequence[Message]) -> tuple[list[Message], dict[str, str]]:
        """Contents with the control tokens they spell under other names, so that they can be told from real ones."""
        nonce = ""
        shields: dict[str, str] = {}
        shielded = []
        for message in messages:
            content = message.content
            if self.control_pattern.search(content):
                nonce = nonce or _nonce(messages)
                for token in set(self.control_pattern.findall(content)):
                    shields.setdefault(token, f"Q{nonce}s{len(shields)}Q")
                content = self.control_pattern.sub(lambda match: shields[match[0]], content)
            shielded.append(replace(message, content=content))
        return shielded, {shield: token for token, shield in shields.items()}


def _check_nothing_left_out(messages: Sequence[Message], text: str, where: str) -> None:
    """Some templates skip roles they do not know, without a word. What each turn says must be in the text.

    Looked for by its longest plain word, since templates trim contents or write them as JSON. Of answers, a template
    may drop the reasoning on purpose.
    """
    for index, message in enumerate(messages):
        word = max(re.findall(r"[A-Za-z0-9]+", message.content), key=len, default="")
        if message.role == "assistant" or not word:
            continue
        if text.count(word) < sum(other.content.count(word) for other in messages if other.role != "assistant"):
            raise DataError(
                f"{where}: the model's chat template leaves out turn {index + 1}, of role {message.role}: it has no "
                "place for such turns. Write its text into a user turn, or use a model whose template knows the role."
            )


def _nonce(messages: Sequence[Message]) -> str:
    """A word that no content can hold: the contents' own hash."""
    return hashlib.sha256("\0".join(message.content for message in messages).encode()).hexdigest()[:24]


def _match(text: str, start: int, content: str, after: str) -> int | None:
    """The end of `content` at `start`, as written or as trimmed by the template, where `after` comes next."""
    trimmed = (content.strip(), content.rstrip(), content.lstrip(), content.strip("\n"), content.lstrip("\n"))
    for candidate in (content, *trimmed):
        end = start + len(candidate)
        if text.startswith(candidate, start) and text.startswith(after, end):
            return end
    return None


def _cut(text: str, spans: Sequence[tuple[int, int]], others: bool) -> list[Stretch]:
    pieces = []
    position = 0
    for start, end in spans:
        pieces += [Stretch(text[position:start], learned=others), Stretch(text[start:end], learned=not others)]
        position = end
    return [*pieces, Stretch(text[position:], learned=others)]


def _unshielded(pieces: Sequence[Stretch], shields: dict[str, str]) -> list[Stretch]:
    if not shields:
        return [piece for piece in pieces if piece.text]
    pattern = re.compile("(" + "|".join(map(re.escape, shields)) + ")")
    return [
        Stretch(shields.get(part, part), piece.learned, ordinary=part in shields)
        for piece in pieces
        for part in pattern.split(piece.text)
        if part
    ]
