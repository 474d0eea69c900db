"""What a template itself marks as generated is trained."""

import pytest
from conversations import answer, answers_trained, blocks_of, one, user
from tiny_tokenizers import tiny_tokenizer

from qlora_trainer.data.rendering.marked_blocks import NO_BLOCK
from qlora_trainer.data.rendering.renderer import Renderer
from qlora_trainer.data.types import Conversation


@pytest.mark.parametrize(
    ("body", "trained", "warnings"),
    [
        ("{%- generation %}{{- m.content + '<|im_end|>' }}{%- endgeneration %}", ["b<|im_end|>", "d<|im_end|>"], ()),
        (
            "{%- generation %}{{- m.content }}{%- endgeneration %}{{- '<|im_end|>' }}",
            ["b<|im_end|>", "d<|im_end|>"],
            (),
        ),
        (
            "{{- '(' }}{%- generation %}{{- m.content }}{%- endgeneration %}{{- ')<|im_end|>' }}",
            ["b", "<|im_end|>", "d", "<|im_end|>"],
            (),
        ),
        (
            "{%- generation %}{{- m.content + '<|im_end|>\n' }}{%- endgeneration %}",
            ["b<|im_end|>", "d<|im_end|>"],
            (),
        ),
        (
            "{%- if loop.last %}{%- generation %}{{- m.content }}{%- endgeneration %}{%- else %}{{- m.content }}"
            "{%- endif %}{{- '<|im_end|>' }}",
            ["d<|im_end|>"],
            (NO_BLOCK,),
        ),
        # Markers are longer than these words, and so defeated: the blocks alone tell.
        (
            "{%- generation %}{{- (m.content | reverse if m.content | length > 9 else m.content) + '<|im_end|>' }}"
            "{%- endgeneration %}",
            ["b<|im_end|>", "d<|im_end|>"],
            (),
        ),
    ],
    ids=["whole", "end outside", "part of it", "more than it", "last only", "markers defeated"],
)
def test_what_a_template_marks_as_generated_is_trained_with_the_end_of_the_turn(body, trained, warnings):
    tokenizer = tiny_tokenizer("generation", template=blocks_of(body))
    rendered = one(Renderer(tokenizer), Conversation((user("a"), answer("b"), user("c"), answer("d"))))
    assert answers_trained(tokenizer, rendered.examples[0]) == trained
    assert rendered.warnings == warnings
