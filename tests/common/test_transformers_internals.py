"""transformers still has each private name that common.transformers_internals uses, and it works as it did there."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import jinja2
import pytest
import torch
from gguf import GGUFReader
from gguf_files import tiny_weights, write_gguf
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    Lfm2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    modeling_gguf_pytorch_utils,
)

from qlora_kernels.torch_internals import FakeTensorMode
from qlora_trainer.common import transformers_internals


def test_transformers_has_chat_templates_with_answer_spans() -> None:
    source = "{% for m in messages %}<{% generation %}{{ m.content }}{% endgeneration %}>{{ mark }}{% endfor %}"
    template = transformers_internals.chat_template_environment().from_string(source)
    text, spans = transformers_internals.render_with_answer_spans(template, [{"content": "four"}], None, {"mark": "!"})
    assert (text, spans) == ("<four>!", [(1, 5)])
    with pytest.raises(jinja2.TemplateSyntaxError):
        transformers_internals.chat_template_environment().from_string("{% if %}")


@pytest.fixture(scope="module")
def llama() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
    return LlamaForCausalLM(config).eval()


def test_transformers_has_a_name_of_the_attention(llama: Any) -> None:
    called = []

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *others: Any, **named: Any) -> Any:
        called.append(query.shape)
        return query.transpose(1, 2).contiguous(), None

    AttentionInterface.register("of_a_test", attention)
    before = transformers_internals.attention_name(llama.config)
    transformers_internals.set_attention_name(llama.config, "of_a_test")
    try:
        llama(torch.tensor([[1, 2, 3]]))
    finally:
        transformers_internals.set_attention_name(llama.config, before)
    assert called == [(1, 2, 3, 8)]
    assert transformers_internals.attention_name(llama.config) == before == "sdpa"


def test_transformers_has_a_test_for_tracing() -> None:
    from transformers import masking_utils

    with FakeTensorMode():
        fake = torch.empty(2)
        with transformers_internals.masks_as_for_real_tensors():
            assert not masking_utils.is_tracing(fake)
        assert masking_utils.is_tracing(fake), "else nothing would have to be put in its place"


def test_transformers_has_a_table_of_tied_weights(llama: Any) -> None:
    assert transformers_internals.tied_weight_names(llama) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert transformers_internals.tied_weight_names(nn.Linear(1, 1)) == {}


def test_transformers_has_lists_of_what_a_class_keeps_or_ignores(llama: Any) -> None:
    """With the names as the library declares them: a model that has none of them would hide that one is gone."""
    from transformers import PreTrainedModel

    declared = {"_keep_in_fp32_modules", "_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected"}
    assert declared <= vars(PreTrainedModel).keys() | PreTrainedModel.__annotations__.keys()
    assert transformers_internals.modules_kept_in_fp32(llama) == set()
    assert transformers_internals.patterns_of_missing(llama) == set()
    assert transformers_internals.patterns_of_extra(llama) == set()


def test_transformers_has_a_conversion_mapping() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32}
    config = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, num_local_experts=2)
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    renamings, converters = transformers_internals.conversion_mapping(model)
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    new, pattern = transformers_internals.renamed(name, renamings, converters, "model", model.state_dict())
    assert new == "model.layers.0.mlp.experts.down_proj"
    assert pattern is not None


def test_transformers_has_experts_that_run_eagerly() -> None:
    assert hasattr(MixtralConfig(), "_experts_implementation")
    assert transformers_internals.eager_experts_config()._experts_implementation == "eager"


def test_transformers_has_rotary_frequencies(llama: Any) -> None:
    parameters = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    parameters |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config = LlamaConfig(hidden_size=16, num_attention_heads=2, rope_parameters=parameters)
    frequencies = transformers_internals.rope_frequencies("llama3", config, torch.device("cpu"))
    assert frequencies.shape == (4,)
    assert frequencies[0] == 1.0


def test_transformers_has_tables_for_gguf(llama: Any) -> None:
    assert "gpt2" in transformers_internals.gguf_table_architectures()
    assert "lfm2" in transformers_internals.gguf_conversion_architectures()
    process, names = transformers_internals.gguf_table("llama", llama)
    assert callable(process)
    assert names["token_embd.weight"] == "model.embed_tokens.weight"
    config = Lfm2Config(num_hidden_layers=2)
    renamings, converters = transformers_internals.gguf_conversion_mapping("lfm2", config)
    new, pattern = transformers_internals.renamed("blk.0.shortconv.conv.weight", renamings, converters)
    assert new == "model.layers.0.conv.conv.weight"
    assert pattern is not None


def test_transformers_takes_the_config_of_a_gguf_file_from_an_opened_reader(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_weights())
    read = AutoConfig.from_pretrained(tmp_path, gguf_file=path.name)
    with transformers_internals.gguf_header_known(SimpleNamespace(fields={}, tensors=[])), pytest.raises(IndexError):
        AutoConfig.from_pretrained(tmp_path, gguf_file=path.name)
    with transformers_internals.gguf_header_known(GGUFReader(path)):
        assert AutoConfig.from_pretrained(tmp_path, gguf_file=path.name).to_dict() == read.to_dict()


def test_transformers_translates_a_gguf_header_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_weights())
    asked, load = [], modeling_gguf_pytorch_utils.load_gguf_checkpoint

    def counted(*arguments: Any, **named: Any) -> Any:
        asked.append(arguments)
        return load(*arguments, **named)

    monkeypatch.setattr(modeling_gguf_pytorch_utils, "load_gguf_checkpoint", counted)
    with transformers_internals.gguf_header_known(GGUFReader(path)):
        first, second = (AutoConfig.from_pretrained(tmp_path, gguf_file=path.name) for _ in range(2))
    assert first.to_dict() == second.to_dict()
    assert len(asked) == 1
    AutoConfig.from_pretrained(tmp_path, gguf_file=path.name)
    assert len(asked) == 2


def test_transformers_asks_for_the_names_of_a_gguf_file_once(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, names = [], gguf.get_tensor_name_map

    def counted(*arguments: Any) -> Any:
        asked.append(arguments)
        return names(*arguments)

    monkeypatch.setattr(gguf, "get_tensor_name_map", counted)
    transformers_internals.gguf_table("llama", llama)
    assert len(asked) == 1
    assert gguf.get_tensor_name_map is counted


def test_transformers_knows_what_takes_more_than_text_without_the_packages_that_need_it() -> None:
    """In a process that finds neither Pillow nor torchvision, as where only this project is installed."""
    program = """
import sys
for name in ("PIL", "torchvision", "torchaudio", "librosa", "soundfile"):
    sys.modules[name] = None
from transformers.utils import is_vision_available
assert not is_vision_available()
from qlora_trainer.common.transformers_internals import prepares_more_than_text
print([kind for kind in ("llama", "qwen3", "fuyu", "gemma3", "whisper", "emu3") if prepares_more_than_text(kind)])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "['fuyu', 'gemma3', 'whisper', 'emu3']\n", done.stderr
