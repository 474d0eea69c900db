"""Use the blocks that a chat template itself marks as an assistant's, with {% generation %}."""

from collections.abc import Collection, Mapping

from qlora_trainer.data.rendering.dialogue import Dialogue
from qlora_trainer.data.rendering.templates import Blocks, ChatTemplate

NO_BLOCK = "the chat template marks no text as generated in some of the turns to train: those turns are not trained"


def agreed_spans(
    template: ChatTemplate,
    dialogue: Dialogue,
    text: str,
    spans: Mapping[int, Blocks],
    blocks: Blocks,
    wanted: Collection[int],
) -> tuple[dict[int, Blocks], list[str]]:
    """Keep of answers what lies in the template's own blocks too; the token that ends a turn is always trained.

    Args:
        template: that rendered the text.
        dialogue: that was rendered.
        text: its rendering.
        spans: of turns.
        blocks: that the template marks.
        wanted: turns that the row itself names: they are kept whole where the template marks nothing in them.

    Returns:
        (the spans; warnings).
    """
    agreed: dict[int, Blocks] = {}
    has_unmarked = False
    for target, own in spans.items():
        inside = [(max(a, start), min(b, end)) for start, end in own for a, b in blocks if a < end and b > start]
        if dialogue.messages[target]["role"] != "assistant" or (target in wanted and not inside):
            agreed[target] = own
        elif inside:
            end = own[-1][1]
            token = next((token for token in template.ends if text.endswith(token, 0, end)), "")
            begin, last = inside[-1]
            is_joined = not text[last : end - len(token)].strip()
            agreed[target] = [*inside[:-1], (begin, end)] if is_joined else [*inside, (end - len(token), end)]
        else:
            has_unmarked = True
    return agreed, [NO_BLOCK] if has_unmarked else []


def spans_of_blocks(
    template: ChatTemplate, dialogue: Dialogue, text: str, blocks: Blocks, targets: Collection[int]
) -> dict[int, Blocks] | None:
    """Take the template's own blocks, one for each answer, with the tokens that end turns.

    Args:
        template: that rendered the text.
        dialogue: that was rendered.
        text: its rendering.
        blocks: that the template marks.
        targets: turns to train.

    Returns:
        The targets' spans; None where the blocks are not one for each answer.
    """
    answers = [index for index, message in enumerate(dialogue.messages) if message["role"] == "assistant"]
    if len(blocks) != len(answers) or not set(targets) <= set(answers):
        return None
    spans = {}
    for answer, (start, end) in zip(answers, blocks, strict=True):
        end = start + len(text[start:end].rstrip())
        start += len(template.header) if text.startswith(template.header, start) else 0
        after = template.control_pattern.search(text, end)
        if after and after[0] in template.ends and not text[end : after.start()].strip():
            end = after.end()
        if answer in targets:
            spans[answer] = [(start, end)]
    return spans
