"""Promises of what is written of a run's turns: other programs stop, and ask, as training taught."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from marks import slow_but
from peft import PeftModel
from tiny_models import make_model_directory
from tiny_tokenizers import FAMILIES, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.rendering.renderer import Renderer
from qlora_trainer.data.types import Message
from qlora_trainer.runs.start import start_run
from qlora_trainer.runs.turns import taught_turns

Config = Callable[..., RunConfig]


def quiet(record: dict[str, Any]) -> None:
    """A display that shows nothing."""


@pytest.mark.parametrize("family", slow_but(FAMILIES, "llama3", "qwen2_5"))
@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_the_plain_format_as_a_template_gives_the_tokens_of_training(family: str, kind: str, adds_bos: bool) -> None:
    tokenizer = tiny_tokenizer(family, kind, adds_bos, template="")
    renderer = Renderer(tokenizer)
    taught = taught_turns(renderer, has_conversations=True)
    assert taught.is_new_template
    turns = [Message("user", "What is  the capital?\n"), Message("assistant", "Paris."), Message("user", " Why? ")]
    for asked in (turns, [Message("system", "Be brief. "), *turns], [Message("system", " Be brief."), *turns]):
        found = tokenizer.apply_chat_template(
            [{"role": turn.role, "content": turn.content} for turn in asked],
            chat_template=taught.templates["default"],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
        assert found == renderer.render_prompt(asked).input_ids
    assert dict(taught.stop_tokens) == {tokenizer.eos_token_id: tokenizer.eos_token}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_ends_an_answer_in_a_familys_template_is_among_its_stops(family: str) -> None:
    taught = taught_turns(Renderer(tiny_tokenizer(family)), has_conversations=True)
    assert {FAMILIES[family].end_of_turn, FAMILIES[family].eos} <= set(taught.stop_tokens.values())
    assert not taught.is_new_template
    assert taught.templates == {"default": tiny_tokenizer(family).chat_template}


def test_plain_text_teaches_the_end_of_text_and_no_template() -> None:
    for template in (None, ""):
        taught = taught_turns(Renderer(tiny_tokenizer("gemma", template=template)), has_conversations=False)
        assert set(taught.stop_tokens.values()) == {"<eos>"}
        assert taught.templates == {}
        assert not taught.is_new_template


def without_template(directory: Path) -> Path:
    """A tiny base whose tokenizer has no chat template, and whose own settings stop at token 2."""
    make_model_directory(directory)
    tiny_tokenizer("smollm2", template="").save_pretrained(directory)
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    return directory


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_an_adapter_carries_the_stops_and_the_template_that_were_taught(
    kind: str, tiny_config: Config, rows: Path, tmp_path: Path
) -> None:
    base = without_template(tmp_path / "base")
    if kind == "text":
        rows.write_text("".join(json.dumps({"text": f'the "messages": {i} fox'}) + "\n" for i in range(12)))
    run = start_run(tiny_config(model={"name": str(base)}, training={"max_steps": 1}))
    assert run.train(quiet)
    adapter = run.directory / "adapter"
    eos = run.renderer.eos_id
    assert GenerationConfig.from_pretrained(adapter).eos_token_id == [2, eos]
    assert (adapter / "chat_template.jinja").exists() == (kind == "chat")
    if kind == "text":
        return
    # PEFT, and what vLLM and llama.cpp read of an adapter, are as before.
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    assert torch.isfinite(model(torch.tensor([[5, 6]])).logits).all()
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    assert {"r", "lora_alpha", "target_modules"} <= settings.keys()  # vLLM's PEFTHelper asks for these
    assert not settings["use_dora"]
    assert settings["modules_to_save"] is None
    assert settings["bias"] == "none"
    assert settings["lora_alpha"] / settings["r"] == 2.0  # llama.cpp knows no rsLoRA, and vLLM one scaling
    assert gguf.SpecialVocab(adapter).chat_template is None  # it takes an adapter's directory for no tokenizer
    assert AutoTokenizer.from_pretrained(base).chat_template is None
