"""PEFT's files: PEFT reads ours with the same logits, we read PEFT's, and nothing dubious gets in."""

import copy
import json
import logging
import os
import pickle
import stat
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import qlora_trainer.model.modules.nf4_linear  # noqa: F401  # guards the import of bitsandbytes, which PEFT repeats
from qlora_trainer.adapters import peft_format
from qlora_trainer.adapters.formulas import lora_scaling
from qlora_trainer.adapters.kinds.lora_file import LoraFileConfig
from qlora_trainer.adapters.peft_format import StoredAdapter, read_adapter, write_adapter
from qlora_trainer.common.errors import AdapterError, DiskError, FileMissingError

RANK = 4
PREFIX = "base_model.model."


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=64, n_layer=1, n_head=4, n_positions=32)).eval()


def random_adapter(model: nn.Module, leaves: set[str]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for path, module in model.named_modules():
        if path.rsplit(".", 1)[-1] in leaves:
            assert isinstance(module, nn.Linear)
            tensors[f"{PREFIX}{path}.lora_A.weight"] = torch.randn(RANK, module.in_features, generator=generator)
            tensors[f"{PREFIX}{path}.lora_B.weight"] = torch.randn(module.out_features, RANK, generator=generator)
    return tensors


def file_config(**fields: Any) -> LoraFileConfig:
    return LoraFileConfig.model_validate(
        {"r": RANK, "lora_alpha": 8.0, "target_modules": ["q_proj", "down_proj"]} | fields
    )


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        output = model(input_ids=torch.arange(24).reshape(2, 12)).logits
    assert isinstance(output, Tensor)
    return output


def small_adapter() -> dict[str, Tensor]:
    path = f"{PREFIX}model.layers.0.self_attn.q_proj"
    return {f"{path}.lora_A.weight": torch.ones(RANK, 8), f"{path}.lora_B.weight": torch.ones(6, RANK)}


def write_raw(directory: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """An adapter's files without our checks."""
    content = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["q_proj"]} | config
    (directory / "adapter_config.json").write_text(json.dumps(content))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


@pytest.mark.parametrize("full_paths", [False, True], ids=["leaf names", "full paths"])
@pytest.mark.parametrize("use_rslora", [False, True], ids=["lora", "rslora"])
def test_peft_loads_our_adapter_silently_and_computes_the_same(
    tmp_path: Path, full_paths: bool, use_rslora: bool, caplog: pytest.LogCaptureFixture
) -> None:
    from peft import PeftModel

    model = tiny_llama()
    tensors = random_adapter(model, {"q_proj", "down_proj"})
    paths = [name.removeprefix(PREFIX).split(".lora_")[0] for name in tensors if ".lora_A." in name]
    targets = paths if full_paths else ["q_proj", "down_proj"]
    config = file_config(target_modules=targets, use_rslora=use_rslora, base_model_name_or_path="tiny")
    write_adapter(tmp_path, tensors, config)

    by_hand = copy.deepcopy(model)
    scaling = lora_scaling(RANK, 8.0, use_rslora)
    assert scaling == (4.0 if use_rslora else 2.0)
    for path in paths:
        lora_a, lora_b = (tensors[f"{PREFIX}{path}.lora_{part}.weight"] for part in "AB")
        by_hand.get_submodule(path).weight.data += scaling * (lora_b @ lora_a)

    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # PEFT asks transformers the old way
        loaded = PeftModel.from_pretrained(model, tmp_path)
    assert caplog.records == []
    expected = logits(by_hand)
    scale = expected.abs().max().item()
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5 * scale)
    with loaded.disable_adapter():
        assert (logits(loaded) - expected).abs().max() > 0.1 * scale, "the adapter must matter"
    state = loaded.state_dict()
    for name, tensor in tensors.items():
        assert torch.equal(state[name.replace(".weight", ".default.weight")], tensor)


def test_we_read_exactly_what_peft_saved(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    targets = ["v_proj", "up_proj"]
    settings = LoraConfig(r=RANK, lora_alpha=6, lora_dropout=0.1, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), settings)
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    live = {name.replace(".default", ""): parameter for name, parameter in model.named_parameters() if "lora_" in name}
    assert adapter.tensors.keys() == live.keys()
    assert all(torch.equal(adapter.tensors[name], parameter) for name, parameter in live.items())
    assert sorted(adapter.paths) == sorted(
        f"model.layers.{layer}.{leaf}" for layer in (0, 1) for leaf in ("self_attn.v_proj", "mlp.up_proj")
    )
    config = adapter.config
    assert isinstance(config, LoraFileConfig)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (RANK, 6.0, 0.1, "none")
    assert set(config.target_modules or []) == {"v_proj", "up_proj"}


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_biases_go_from_peft_to_us_and_back(tmp_path: Path, bias: Any) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    settings = LoraConfig(r=RANK, target_modules=["c_attn"], bias=bias, fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_gpt2(), settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    model.save_pretrained(tmp_path / "theirs")
    adapter = read_adapter(tmp_path / "theirs")
    biases = [name for name in adapter.tensors if name.endswith(".bias")]
    attention = f"{PREFIX}transformer.h.0.attn.c_attn.base_layer.bias"
    assert biases == [] if bias == "none" else attention in biases
    assert (len(biases) > 1) == (bias == "all")
    assert adapter.config.is_stored_transposed

    (tmp_path / "ours").mkdir()
    write_adapter(tmp_path / "ours", adapter.tensors, adapter.config)
    again = read_adapter(tmp_path / "ours")
    assert again.config == adapter.config
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "ours").eval()), logits(model.eval()))


def test_16_bit_adapters_are_read_as_fp32(tmp_path: Path) -> None:
    adapter = read_adapter(write_raw(tmp_path, {name: value.bfloat16() for name, value in small_adapter().items()}))
    assert {tensor.dtype for tensor in adapter.tensors.values()} == {torch.float32}


def test_written_files_are_plain_files_of_the_known_shape(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_adapter(tmp_path, small_adapter(), file_config(target_modules=["v_proj", "q_proj"]))
    finally:
        os.umask(before)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o644}
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content["target_modules"] == ["q_proj", "v_proj"]
    assert (content["lora_alpha"], type(content["lora_alpha"])) == (8, int)
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == small_adapter().keys()
    assert isinstance(read_adapter(tmp_path), StoredAdapter)


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        f"{PREFIX}lm_head.weight",
        f"{PREFIX}model.embed_tokens.weight",
        f"{PREFIX}model.layers.0.self_attn.q_proj.base_layer.weight",
        f"{PREFIX}model.layers.0.self_attn.q_proj.lora_magnitude_vector",
        f"{PREFIX}model.embed_tokens.lora_embedding_A",
        f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
    ],
)
def test_a_tensor_that_is_no_part_of_an_adapter_is_refused_by_name(tmp_path: Path, name: str) -> None:
    write_raw(tmp_path, small_adapter() | {name: torch.ones(RANK, 8)})
    with pytest.raises(AdapterError, match=f"also holds {name}"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rank_pattern", {"q_proj": 0}),
        ("alpha_pattern", {"q_proj": -1.0}),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [[1]]),
        ("layer_replication", [[0, 1]]),
        ("lora_bias", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "loftq"),
        ("a_key_of_the_future", {"changes": "everything"}),
        ("peft_type", "LOHA"),
        ("task_type", "SEQ_CLS"),
        ("r", 100_000),
        ("r", True),
        ("r", "4"),
        ("lora_alpha", float("nan")),
        ("lora_dropout", 1.5),
        ("bias", "some"),
    ],
)
def test_a_config_that_means_another_function_is_refused_by_key(tmp_path: Path, key: str, value: Any) -> None:
    write_raw(tmp_path, small_adapter(), **{key: value})
    with pytest.raises(AdapterError, match="of type 'LOHA'" if key == "peft_type" else rf"- {key}\b"):
        read_adapter(tmp_path)


def test_all_problems_of_a_config_are_reported_at_once(tmp_path: Path) -> None:
    write_raw(tmp_path, small_adapter(), lora_bias=True, modules_to_save=["lm_head"], r=0)
    with pytest.raises(AdapterError, match=r"(?s)lora_bias.*modules_to_save.*- r:"):
        read_adapter(tmp_path)


def rank_in(directory: Path) -> int:
    config = read_adapter(directory).config
    assert isinstance(config, LoraFileConfig)
    return config.r


def test_keys_that_change_nothing_are_accepted(tmp_path: Path) -> None:
    write_raw(tmp_path, small_adapter(), use_dora=False, rank_pattern={}, modules_to_save=None, a_future_key=None)
    assert rank_in(tmp_path) == RANK
    write_raw(tmp_path, small_adapter(), exclude_modules="lm_head", layers_to_transform=[0], layers_pattern="layers")
    assert rank_in(tmp_path) == RANK


def test_ranks_shapes_and_halves_must_fit(tmp_path: Path) -> None:
    a, b = small_adapter()
    tensors = small_adapter()
    with pytest.raises(AdapterError, match=r"lora_A\.weight has shape \(4, 8\); with r 8"):
        read_adapter(write_raw(tmp_path, tensors, r=8))
    with pytest.raises(AdapterError, match=r"lora_B\.weight has shape \(4, 6\)"):
        read_adapter(write_raw(tmp_path, {a: tensors[a], b: tensors[b].T.contiguous()}))
    with pytest.raises(AdapterError, match=r"q_proj has lora_A but not the other half"):
        read_adapter(write_raw(tmp_path, {a: tensors[a]}))
    with pytest.raises(AdapterError, match="no lora_A and lora_B"):
        read_adapter(write_raw(tmp_path, {}))
    with pytest.raises(AdapterError, match="int64"):
        read_adapter(write_raw(tmp_path, {a: tensors[a].long(), b: tensors[b]}))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_neither_read_nor_written(tmp_path: Path, bad: float) -> None:
    tensors = small_adapter()
    next(iter(tensors.values()))[1, 2] = bad
    with pytest.raises(AdapterError, match=r"lora_A\.weight holds values that are not finite"):
        write_adapter(tmp_path, tensors, file_config())
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(AdapterError, match=r"lora_A\.weight holds values that are not finite"):
        read_adapter(write_raw(tmp_path, tensors))


def test_biases_must_be_those_the_config_names(tmp_path: Path) -> None:
    own, other = f"{PREFIX}model.layers.0.self_attn.q_proj.base_layer.bias", f"{PREFIX}model.norm.bias"
    for bias, name, fits in [
        ("none", own, False),
        ("lora_only", own, True),
        ("lora_only", other, False),
        ("all", other, True),
    ]:
        write_raw(tmp_path, small_adapter() | {name: torch.ones(6)}, bias=bias)
        if fits:
            assert name in read_adapter(tmp_path).tensors
        else:
            with pytest.raises(AdapterError, match=f"bias {name}, though its config says bias: {bias}"):
                read_adapter(tmp_path)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    write_raw(tmp_path, small_adapter())
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(AdapterError, match="a pickle, which can run code"):
        read_adapter(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_missing_and_damaged_files_are_reported(tmp_path: Path) -> None:
    with pytest.raises(FileMissingError, match="is not an adapter"):
        read_adapter(tmp_path / "nowhere")
    write_raw(tmp_path, small_adapter())
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    with pytest.raises(AdapterError, match="not a safetensors file, or is damaged"):
        read_adapter(tmp_path)
    weights.unlink()
    with pytest.raises(FileMissingError, match="adapter_model"):
        read_adapter(tmp_path)
    for text, message in {"{": "is not JSON", "[" * 100_000: "is not JSON", "[]": "holds a list"}.items():
        write_raw(tmp_path, small_adapter())
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(AdapterError, match=message):
            read_adapter(tmp_path)


def test_sizes_are_capped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_raw(tmp_path, small_adapter(), auto_mapping=" " * 2**20)
    with pytest.raises(AdapterError, match="more than the 1048576"):
        read_adapter(tmp_path)
    write_raw(tmp_path, small_adapter())
    monkeypatch.setattr(peft_format, "MAX_TENSORS", 1)
    with pytest.raises(AdapterError, match="holds 2 tensors"):
        read_adapter(tmp_path)


def test_a_write_that_fails_is_reported_and_leaves_no_config(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="could not be written"):
        write_adapter(tmp_path / "nowhere", small_adapter(), file_config())
    (tmp_path / "adapter_model.safetensors").mkdir()
    with pytest.raises(DiskError, match="could not be written"):
        write_adapter(tmp_path, small_adapter(), file_config())
    assert not (tmp_path / "adapter_config.json").exists()
