"""Read a row of text that a chat template has already written back into its turns, where that is exact.

Exact means that the model's own template writes the same text of the turns again, but for the beginning-of-text token
and what follows the last answer: then training on the turns is training on what the file says, with real control
tokens. Otherwise the run stops and asks: the same turns may be written by the model's template (data.rendered=turns),
or the text be trained as it is (data.rendered=text). Left out: the kinds of templates (formats/rendered.py).
"""

import re
from collections.abc import Callable
from dataclasses import replace

from qlora_trainer.common.errors import ConfigError
from qlora_trainer.config.data_schema import RenderedText
from qlora_trainer.config.override import override
from qlora_trainer.data.formats.rendered import Frame, looks_rendered, make_frame, read_rendered
from qlora_trainer.data.rendering.encoding import Tokenizer
from qlora_trainer.data.rendering.renderer import Renderer
from qlora_trainer.data.rendering.spans import Rendering
from qlora_trainer.data.types import Conversation, Document, Message, PromptCompletion, Row

READ_BACK = (
    "the text is a conversation that a chat template wrote, and is read back into its turns; to train on it as plain "
    f"text: {override('data.rendered', 'text')}"
)
_MARKER = "Qr7f{}Q"
_MARKERS = re.compile(r"Qr7f[0-9]Q")


class RenderedRows:
    """Read rows of one model.

    Args:
        tokenizer: of the model.
        renderer: of the run.
    """

    def __init__(self, tokenizer: Tokenizer, renderer: Renderer) -> None:
        self.tokenizer, self.renderer = tokenizer, renderer
        self._frames: list[Frame] | None = None

    def read(self, row: Row, setting: RenderedText, warn: Callable[[str], None], where: str) -> Row:
        """Read one row.

        Args:
            row: of any kind.
            setting: data.rendered.
            warn: is called with what is worth reporting.
            where: file and line, for errors.

        Returns:
            The turns of a text that a template wrote; any other row as it is.

        Raises:
            ConfigError: a template wrote the text, and the model's template would write its turns otherwise.
        """
        if setting == "text" or isinstance(row, Conversation):
            return row
        text = row.text if isinstance(row, Document) else row.prompt + row.completion
        if not looks_rendered(text) and not self._begins_as_own(text):
            return row
        for frame in self._own_frames():
            turns = frame.read(self._without_start(text))
            found = _conversation(turns, row) if turns and self._is_exact(turns, text) else None
            if found:
                warn(READ_BACK)
                return found
        name, turns = read_rendered(text) or ("", [])
        found = _conversation(turns, row) if turns else None
        if found and (setting == "turns" or self._is_exact(turns or [], text)):
            warn(READ_BACK)
            return found
        if not found and not looks_rendered(text):
            return row
        raise ConfigError(self._message(name, found is not None, row, where))

    def _message(self, name: str, is_known: bool, row: Row, where: str) -> str:
        what = "text is" if isinstance(row, Document) else "prompt and completion are"
        as_text = f"To train on it as plain text, its control tokens spelled out: {override('data.rendered', 'text')}."
        if not is_known:
            return (
                f"{where}: {what} written by a chat template at the beginning, but not as a whole, or by one not "
                f"known, so it cannot be read back into turns. {as_text}"
            )
        return (
            f"{where}: {what} a conversation that a chat template wrote already ({name}), and the model's own template "
            "writes these turns otherwise. To train on the turns, as the model's template writes them: "
            f"{override('data.rendered', 'turns')}. {as_text}"
        )

    def _begins_as_own(self, text: str) -> bool:
        """Return True if a text begins with a control token and has one that ends a turn of the model's template."""
        pattern = self.renderer.encoder.control_pattern
        return bool(pattern.match(text)) and any(
            self._without_start(text).startswith(f.before) for f in self._own_frames()
        )

    def _own_frames(self) -> list[Frame]:
        if self._frames is None:
            self._frames = []
            for system in (False, True):
                roles = [*["system"] * system, "user", "assistant", "user", "assistant"]
                turns = [Message(role, _MARKER.format(index)) for index, role in enumerate(roles)]
                written = self._written(turns)
                if written is not None and (frame := make_frame(_MARKERS.split(self._without_start(written)), system)):
                    self._frames.append(frame)
        return self._frames

    def _written(self, turns: list[Message]) -> str | None:
        """Write turns as the model's own template does; None where it has none, or refuses them."""
        if self.tokenizer.chat_template is None:
            return None
        (rendering,) = self.renderer.texts([("an experiment", Conversation(tuple(turns)))])
        return "".join(span.text for span in rendering.spans) if isinstance(rendering, Rendering) else None

    def _without_start(self, text: str) -> str:
        bos = str(self.tokenizer.special_tokens_map.get("bos_token") or "")
        return text.removeprefix(bos) if bos and text.count(bos) == 1 else text

    def _is_exact(self, turns: list[Message], text: str) -> bool:
        written = self._written(turns)
        if written is None:
            return False
        ours, theirs = self._without_start(written).rstrip(), self._without_start(text.lstrip()).rstrip()
        end = ours[ours.rfind(turns[-1].content) + len(turns[-1].content) :] if turns[-1].content in ours else ""
        return theirs in (ours, ours.removesuffix(end).rstrip(), f"{ours}{self.tokenizer.eos_token}")


def _conversation(turns: list[Message], row: Row) -> Conversation | None:
    """Make a conversation; of a prompt with its completion only answers in the latter are trained.

    None where the prompt holds the beginning of the answer that the completion ends.
    """
    if isinstance(row, PromptCompletion):
        text, position, made = row.prompt + row.completion, 0, []
        for turn in turns:
            position = text.index(turn.content, position)
            is_given = position < len(row.prompt.rstrip())
            made.append(replace(turn, learn=False) if turn.role == "assistant" and is_given else turn)
            position += len(turn.content)
        if made[-1].learn is False:
            return None
        turns = made
    return Conversation(tuple(turns))
