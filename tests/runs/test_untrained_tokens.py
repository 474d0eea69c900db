"""Control tokens that the rows use and the base never learned are named before the first step."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.model.tokenizer import load_tokenizer
from qlora_trainer.runs.start import start_run
from qlora_trainer.weights.model_directory import ModelDirectory

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BOTH = (EMBEDDING, HEAD)


def zero(matrix: Tensor, ids: list[int]) -> None:
    matrix[ids] = 0


def tiny(matrix: Tensor, ids: list[int]) -> None:
    matrix[ids] = 1e-12


def the_mean(matrix: Tensor, ids: list[int]) -> None:
    """As transformers enlarges an embedding since 4.46: the mean of all rows, and a little noise."""
    mean, deviation = matrix.float().mean(0), matrix.float().std(0)
    noise = torch.randn(len(ids), matrix.shape[1], generator=torch.Generator().manual_seed(0)) * 1e-5
    matrix[ids] = (mean + noise * deviation).to(matrix.dtype)


def alike(matrix: Tensor, ids: list[int]) -> None:
    matrix[ids] = matrix[7].clone()


def warnings_of(config: RunConfig) -> list[str]:
    return [warning for warning in start_run(config).warnings if "never learned" in warning]


def changed(directory: Path, names: tuple[str, ...], how: Callable[[Tensor, list[int]], None], *tokens: str) -> Path:
    ids = load_tokenizer(ModelDirectory.open(directory)).convert_tokens_to_ids(list(tokens))
    tensors = load_file(directory / "model.safetensors")
    for name in names:
        how(tensors[name], ids)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture
def base(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "base"))


@pytest.mark.parametrize(
    ("names", "how", "said"),
    [
        (BOTH, zero, "'<|im_end|>' (embedding zero, LM head zero)"),
        (BOTH, tiny, "'<|im_end|>' (embedding zero, LM head zero)"),
        (BOTH, the_mean, "'<|im_end|>' (embedding the same as of other tokens, LM head the same as of other tokens)"),
        ((EMBEDDING,), alike, "'<|im_end|>' (embedding the same as of other tokens)"),
    ],
)
def test_rows_that_were_never_trained_are_named_with_the_way_out(
    names: tuple[str, ...],
    how: Callable[[Tensor, list[int]], None],
    said: str,
    base: Path,
    tiny_config: Callable[..., RunConfig],
) -> None:
    changed(base, names, how, "<|im_start|>", "<|im_end|>")
    (warning,) = warnings_of(tiny_config(model={"name": str(base)}))
    assert said in warning
    assert "'<|im_start|>' (embedding" in warning
    assert "instruct variant" in warning
    assert "chat_template.jinja" in warning


def test_a_token_that_is_never_trained_needs_no_row_in_the_head(
    base: Path, tiny_config: Callable[..., RunConfig]
) -> None:
    """A prompt's tokens are read, not written."""
    changed(base, (HEAD,), zero, "<|im_start|>", "<|im_end|>")
    (warning,) = warnings_of(tiny_config(model={"name": str(base)}))
    assert "'<|im_end|>' (LM head zero)" in warning
    assert "im_start" not in warning


def test_tokens_that_no_row_uses_and_trained_ones_are_not_named(
    base: Path, tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    assert warnings_of(tiny_config("first", model={"name": str(base)})) == []
    changed(base, BOTH, zero, "<|im_start|>", "<|im_end|>")
    (tmp_path / "text.jsonl").write_text(json.dumps({"prompt": "the quick", "completion": "fox"}) + "\n")
    text = {"train": str(tmp_path / "text.jsonl"), "eval": 0.0}
    (warning,) = warnings_of(tiny_config("second", model={"name": str(base)}, data=text))
    assert "im_end" in warning  # the end of the text
    assert "im_start" not in warning


@pytest.mark.slow
def test_tokens_whose_rows_train_are_not_named(base: Path, tiny_config: Callable[..., RunConfig]) -> None:
    changed(base, BOTH, zero, "<|im_start|>", "<|im_end|>")
    model = {"name": str(base)}
    (warning,) = warnings_of(tiny_config("one", model=model, adapter={"trainable_tokens": ["<|im_end|>"]}))
    assert "'<|im_start|>' (embedding" in warning
    assert "im_end" not in warning
    assert "adapter.trainable_tokens" in warning
    both = {"trainable_tokens": ["<|im_end|>", "<|im_start|>"]}
    assert warnings_of(tiny_config("both", model=model, adapter=both)) == []


def test_one_untrained_token_is_known_by_those_that_no_row_uses(
    base: Path, tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """<think> on a base without it: an added token that is not special, with a reserved one next to it."""
    own = Tokenizer.from_file(str(base / "tokenizer.json"))
    own.add_tokens([AddedToken("<think>", special=False), AddedToken("<reserved>", special=True)])
    own.save(str(base / "tokenizer.json"))
    changed(base, BOTH, alike, "<think>", "<reserved>")
    said = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "<think> a fox"}]
    (tmp_path / "thoughts.jsonl").write_text(json.dumps({"messages": said}) + "\n")
    rows = {"train": str(tmp_path / "thoughts.jsonl"), "eval": 0.0}
    (warning,) = warnings_of(tiny_config(model={"name": str(base)}, data=rows))
    assert "'<think>' (embedding the same as of other tokens, LM head the same as of other tokens)" in warning
    assert "reserved" not in warning


def test_a_tied_model_and_one_of_other_names_are_looked_at_too(
    tiny_models: Callable[[str], Path], tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    for family, name in (("llama_tied", EMBEDDING), ("gpt2", "transformer.wte.weight")):
        base = Path(shutil.copytree(tiny_models(family), tmp_path / family))
        changed(base, (name,), zero, "<|im_start|>", "<|im_end|>")
        (warning,) = warnings_of(tiny_config(f"run-{family}", model={"name": str(base)}))
        assert "'<|im_end|>' (embedding zero)" in warning
