"""Promises of the merge: what it writes is the model that was trained, whole, or nothing at all."""

import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from gguf_files import tiny_weights, write_gguf
from marks import slow_but
from merge_runs import LLAMA, Run, make_base, merge_to, on_base, stored, train
from safetensors.torch import load_file, save_file
from spying import noting
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
)

from qlora_trainer.common.errors import CheckpointError, DiskError, MergeError, ModelError, OutputExistsError
from qlora_trainer.common.progress import silent
from qlora_trainer.merging import fold as merging
from qlora_trainer.merging.logits import WholeLogits, compare_logits
from qlora_trainer.merging.merge_plan import MergeInputs, plan_merge
from qlora_trainer.merging.rounding import rounded_weights
from qlora_trainer.merging.streamed_model import load_streamed_model
from qlora_trainer.merging.verify import Verification, choose_base, verify_merge
from qlora_trainer.model.forward import LossPath
from qlora_trainer.weights import reading
from qlora_trainer.weights.gguf.importer import import_gguf
from qlora_trainer.weights.gguf.reader import GGUFWeights
from qlora_trainer.weights.model_directory import ModelDirectory
from qlora_trainer.weights.reading import row_blocks

ROWS = [list(range(5, 60)), [3, 1, 4, 1, 5, 9, 2, 6], list(range(100, 20, -1))]


def prequantized(source: Path, target: Path) -> Path:
    """A copy in NF4, by transformers and bitsandbytes."""
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=four_bit, dtype=torch.bfloat16)
    model.save_pretrained(target)
    return target


def load_plain(directory: Path) -> Any:
    """What any user of transformers gets, in fp32."""
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def by_hand(run: Run, name: str, source: Tensor) -> Tensor:
    """A merged tensor in fp32, by bitsandbytes and three lines of arithmetic on whole tensors."""
    weight = source
    if name.removesuffix(".weight") in run.inputs.fingerprint.tensors:
        packed, state = quantize_4bit(weight.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4")
        state.dtype = torch.float32
        weight = dequantize_4bit(packed, state)
    key = f"base_model.model.{name.removesuffix('.weight')}"
    if f"{key}.lora_A.weight" in run.inputs.adapter:
        lora_A, lora_B = (run.inputs.adapter[f"{key}.lora_{factor}.weight"] for factor in "AB")
        weight = weight + 2.0 * (lora_B @ lora_A)
    return weight.float()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Tied and sharded."""
    config = LlamaConfig(**LLAMA, tie_word_embeddings=True)
    return train(make_base(tmp_path_factory.mktemp("llama"), config, shard="200KB"))


@pytest.mark.parametrize("tied", slow_but([True, False], False))
def test_merged_fp16_is_the_fp32_sum_cast_once_bit_for_bit(tmp_path: Path, llama: Run, tied: bool) -> None:
    run = llama if tied else train(make_base(tmp_path / "base", LlamaConfig(**LLAMA, tie_word_embeddings=False)))
    report = merge_to(run.inputs, tmp_path / "merged")
    source, merged = stored(run.inputs.base.path), stored(tmp_path / "merged")
    assert merged.keys() == source.keys()
    assert ("lm_head.weight" in merged) is not tied
    for name, tensor in merged.items():
        assert tensor.dtype == torch.float16
        assert torch.equal(tensor, by_hand(run, name, source[name]).half()), name
    assert (report.folded, report.dequantized, report.tensors) == (14, 14, len(source))


def test_blocks_of_rows_give_the_bits_of_whole_tensors(
    tmp_path: Path, llama: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge_to(llama.inputs, tmp_path / "whole", dtype=torch.float32)
    blocks = functools.partial(merging.row_blocks, block_elements=1)
    assert len(blocks((640, 64))) == 2
    for module in (merging, reading):
        monkeypatch.setattr(module, "row_blocks", blocks)
    merge_to(llama.inputs, tmp_path / "blocks", dtype=torch.float32)
    whole, by_blocks = stored(tmp_path / "whole"), stored(tmp_path / "blocks")
    assert all(torch.equal(whole[name], by_blocks[name]) for name in whole)


def test_a_gpt2_saved_without_its_prefix_is_mapped_and_transposed(tmp_path: Path) -> None:
    """The hub's gpt2 calls its tensors h.0…, transformers' module is transformer.h.0…; Conv1D stores (I, O)."""
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=128)
    whole = make_base(tmp_path / "whole", config, torch.float32)
    GPT2Model.from_pretrained(whole).save_pretrained(tmp_path / "base")
    assert "h.0.attn.c_attn.weight" in ModelDirectory.open(tmp_path / "base").tensors
    run = train(tmp_path / "base")
    assert run.inputs.fan_in_fan_out
    merge_to(run.inputs, tmp_path / "merged", dtype=torch.float32)
    check_logits(run, tmp_path / "merged", kl=1e-10)


def reference(run: Run) -> WholeLogits:
    return WholeLogits.of_rows([run.logits(torch.tensor([row])) for row in ROWS])


def verifier(run: Run, dtype: torch.dtype = torch.float16) -> Any:
    with rounded_weights(run.model, dtype):
        rounded = reference(run)
    return functools.partial(
        verify_merge,
        sample_rows=ROWS,
        reference=reference(run),
        rounded=rounded,
        load_merged=lambda merged: load_plain(merged.path),
        loss_path=LossPath(),
    )


def check_logits(run: Run, directory: Path, kl: float) -> None:
    model = load_plain(directory)
    with torch.no_grad():
        merged = WholeLogits.of_rows([model(input_ids=torch.tensor([row])).logits for row in ROWS])
    difference = compare_logits(reference(run), merged)
    assert difference.kl < kl
    assert difference.top1_agreement == 1.0


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**LLAMA, tie_word_embeddings=False),
        Qwen2Config(**LLAMA, tie_word_embeddings=True),
        Phi3Config(**LLAMA, pad_token_id=0),
    ],
    ids=lambda config: config.model_type,
)
def test_plain_transformers_loads_the_merge_and_gives_the_trained_logits(
    tmp_path: Path, config: PretrainedConfig
) -> None:
    run = train(make_base(tmp_path / "base", config))
    merge_to(run.inputs, tmp_path / "exact", dtype=torch.float32)
    check_logits(run, tmp_path / "exact", kl=1e-10)
    report = merge_to(run.inputs, tmp_path / "merged", verify=verifier(run))
    assert report.verification is not None
    assert report.verification.difference.kl < 1e-5


def test_a_prequantized_base_merges_without_its_16_bit_copy(tmp_path: Path, llama: Run) -> None:
    run = train(prequantized(llama.inputs.base.path, tmp_path / "base"))
    merge_to(run.inputs, tmp_path / "merged", verify=verifier(run))
    merge_to(llama.inputs, tmp_path / "from_plain")
    merged, from_plain = stored(tmp_path / "merged"), stored(tmp_path / "from_plain")
    assert merged.keys() == from_plain.keys()
    assert all(torch.equal(merged[name], from_plain[name]) for name in merged)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    with pytest.raises(MergeError, match="no original weights"):
        merge_to(run.inputs, tmp_path / "original", base="original")


def test_the_original_base_is_the_checkpoints_own_weights_plus_the_adapter(tmp_path: Path, llama: Run) -> None:
    report = merge_to(llama.inputs, tmp_path / "merged", base="original")
    assert report.base == "original"
    with pytest.raises(AssertionError):
        check_logits(llama, tmp_path / "merged", kl=1e-3)  # another function than the one trained
    name = "model.layers.1.mlp.down_proj"
    lora_A, lora_B = (llama.inputs.adapter[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
    source = stored(llama.inputs.base.path)[f"{name}.weight"].float()
    assert torch.equal(stored(tmp_path / "merged")[f"{name}.weight"], (source + 2.0 * (lora_B @ lora_A)).half())


def test_trained_biases_replace_those_of_the_base(tmp_path: Path) -> None:
    run = train(make_base(tmp_path / "base", Qwen2Config(**LLAMA)), bias="all")
    assert sum(name.endswith(".bias") for name in run.inputs.adapter) == 6
    merge_to(run.inputs, tmp_path / "merged", verify=verifier(run))
    path = "model.layers.0.self_attn.q_proj"
    merged, source = stored(tmp_path / "merged")[f"{path}.bias"], stored(run.inputs.base.path)[f"{path}.bias"]
    assert torch.equal(merged, run.inputs.adapter[f"base_model.model.{path}.base_layer.bias"].half())
    assert not torch.equal(merged, source.half())


def test_a_base_other_than_the_one_trained_is_refused(tmp_path: Path, llama: Run) -> None:
    other = tmp_path / "other"
    shutil.copytree(llama.inputs.base.path, other)
    name = "model.layers.0.mlp.up_proj.weight"
    file = ModelDirectory.open(other).tensors[name].file
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    tensors[name][3, 5] *= -1.0
    save_file(tensors, file, metadata={"format": "pt"})
    for base in ("dequantized", "original"):
        with pytest.raises(CheckpointError, match=f"{name} in .* does not give the 4-bit weights"):
            merge_to(on_base(llama.inputs, other), tmp_path / "merged", base=base)
    assert not (tmp_path / "merged").exists()

    fingerprint = llama.inputs.fingerprint
    path, recorded = next(iter(fingerprint.tensors.items()))

    def with_offset(factor: float) -> MergeInputs:
        changed = dataclasses.replace(recorded, offset=recorded.offset * factor)
        tensors = fingerprint.tensors | {path: changed}
        return dataclasses.replace(llama.inputs, fingerprint=dataclasses.replace(fingerprint, tensors=tensors))

    with pytest.raises(CheckpointError, match="offset"):
        merge_to(with_offset(1.00001), tmp_path / "merged")
    merge_to(with_offset(1.0000004), tmp_path / "merged", dtype=torch.float32)  # as summed in another order
    found = stored(tmp_path / "merged")[f"{path}.weight"]
    expected = by_hand(llama, f"{path}.weight", stored(llama.inputs.base.path)[f"{path}.weight"])
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-7)
    assert not torch.equal(found, expected)  # the recorded offset was used


def spoil(directory: Path, change: Any) -> None:
    """Change the tensors of a merged directory's only shard in place."""
    file = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


LAST = "model.layers.1.self_attn.v_proj.weight"
SPOILED = {
    "missing": (lambda tensors: tensors.pop(LAST), "v_proj.weight is missing"),
    "unexpected": (lambda tensors: tensors.update(extra=torch.ones(2)), "extra is not expected"),
    "nan": (lambda tensors: tensors[LAST].view(-1)[7].fill_(math.nan), "v_proj.weight holds values that are not fin"),
    "dtype": (lambda tensors: tensors.update({LAST: tensors[LAST].float()}), "v_proj.weight is torch.float32"),
    "shape": (lambda tensors: tensors.update({LAST: tensors[LAST].T.contiguous()}), r"v_proj.weight is .*\(64, 32\)"),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_spoiled_file_fails_the_verification(
    tmp_path: Path, llama: Run, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    change, message = SPOILED[kind]
    spoiling = noting(merging.verify_files, lambda work, *_: spoil(work, change))
    monkeypatch.setattr(merging, "verify_files", spoiling)
    with pytest.raises(MergeError, match=message):
        merge_to(llama.inputs, tmp_path / "merged")
    assert not any(tmp_path.iterdir())


def test_one_wrong_tensor_in_sound_files_fails_the_verification(tmp_path: Path, llama: Run) -> None:
    """All bytes are fine, but one layer of 14 lost its adapter: only the logits show it."""

    def lose_an_adapter(tensors: dict[str, Tensor]) -> None:
        lora_A, lora_B = (
            llama.inputs.adapter[f"base_model.model.{LAST.removesuffix('.weight')}.lora_{factor}.weight"]
            for factor in "AB"
        )
        tensors[LAST] -= (2.0 * (lora_B @ lora_A)).half()

    def verify(written: ModelDirectory) -> Verification:
        spoil(written.path, lose_an_adapter)
        return verifier(llama)(written)

    with pytest.raises(
        MergeError, match=r"logits are not those of the trained one: beyond .* KL .* \(at most 1\.0e-08\)"
    ):
        merge_to(llama.inputs, tmp_path / "merged", verify=verify)
    assert not any(tmp_path.iterdir())


def test_a_logit_that_is_nan_never_passes(tmp_path: Path, llama: Run) -> None:
    merge_to(llama.inputs, tmp_path / "merged")
    made = reference(llama)
    check = functools.partial(verifier(llama), ModelDirectory.open(tmp_path / "merged"), reference=made)
    assert check().difference.kl < 1e-5
    made.values[60, 3] = math.nan
    with pytest.raises(MergeError, match="logits are not those"):
        check()
    made.values[60, 3] = 0.0
    with pytest.raises(MergeError, match="logits are not those"):
        check(rounded=WholeLogits(torch.full_like(made.values, math.nan)))


def test_auto_takes_the_lower_eval_loss_and_says_both() -> None:
    assert choose_base(2.0, 1.5).base == "original"
    assert choose_base(1.5, 2.0).base == "dequantized"
    assert choose_base(1.5, 1.5).base == "dequantized"
    assert choose_base(None, 1.5).base == "dequantized"
    assert choose_base(2.0, math.nan).base == "dequantized"
    choice = choose_base(2.0, 1.5)
    assert choice.eval_loss == {"dequantized": 2.0, "original": 1.5}
    assert "2.0000" in choice.reason
    assert "1.5000" in choice.reason


def test_overflow_is_refused_by_name_and_flushes_are_counted(tmp_path: Path) -> None:
    directory = make_base(tmp_path / "base", LlamaConfig(**LLAMA), torch.float32)
    file = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    tensors["model.norm.weight"][:3] = torch.tensor([1e-9, -1e-9, 0.0])
    save_file(tensors, file, metadata={"format": "pt"})
    run = train(directory)
    without_embedding = merge_to(run.inputs, tmp_path / "small").flushed_to_zero
    expected = sum(
        int(((weight := by_hand(run, name, tensor)) != 0).sum()) - int((weight.half() != 0).sum())
        for name, tensor in tensors.items()
    )
    assert without_embedding == expected >= 2

    tensors["model.norm.weight"][5] = 70144.0
    save_file(tensors, file, metadata={"format": "pt"})
    run = train(directory)
    with pytest.raises(MergeError, match=r"model\.norm\.weight has a value of 70144, .*bfloat16"):
        merge_to(run.inputs, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    merge_to(run.inputs, tmp_path / "merged", dtype=torch.bfloat16)
    assert stored(tmp_path / "merged")["model.norm.weight"][5] == 70144.0


def test_tensors_that_are_no_floats_stay_as_they_are(tmp_path: Path, llama: Run) -> None:
    directory = tmp_path / "base"
    shutil.copytree(llama.inputs.base.path, directory)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    extra = {"steps": torch.tensor(12345678901), "mask": torch.tensor([True, False, True])}
    save_file(extra, directory / "extra.safetensors")
    index["weight_map"] |= dict.fromkeys(extra, "extra.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    merge_to(on_base(llama.inputs, directory), tmp_path / "merged")
    merged = stored(tmp_path / "merged")
    assert all(
        merged[name].dtype == tensor.dtype and torch.equal(merged[name], tensor) for name, tensor in extra.items()
    )


def test_files_next_to_the_weights_are_copied_and_the_config_barely_touched(tmp_path: Path, llama: Run) -> None:
    directory = tmp_path / "base"
    shutil.copytree(llama.inputs.base.path, directory)
    kept = {
        "tokenizer.json": b'{"b":1,  "a": "\xc3\xa9"}\r\n',
        "tokenizer_config.json": b"{}",
        "chat_template.jinja": b"{{ x }}",
        "tokenizer.model": bytes(range(256)),
        "merges.txt": b"a b\n",
        "LICENSE": b"free",
        "additional_chat_templates/tool.jinja": b"{{ tools }}",
    }
    left = {"README.md": b"x", "trainer_state.json": b"{}", "optimizer.pt": b"x", "pytorch_model.bin": b"x"}
    for name, content in (kept | left).items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)
    config = json.loads((directory / "config.json").read_text())
    config = {"z_first": 1, "quantization_config": {"quant_method": "stale"}} | config | {"größe": 0.1}
    (directory / "config.json").write_text(json.dumps(config))

    inputs = on_base(llama.inputs, directory)
    merge_to(inputs, tmp_path / "merged", provenance={"run": "r1"})
    for name, content in kept.items():
        assert (tmp_path / "merged" / name).read_bytes() == content
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    expected = {key: value for key, value in config.items() if key != "quantization_config"}
    assert config["dtype"] == "bfloat16"
    assert written == expected | {"dtype": "float16", "torch_dtype": "float16"}
    assert list(written)[: len(expected)] == list(expected)
    generation = (directory / "generation_config.json").read_bytes()
    assert (tmp_path / "merged" / "generation_config.json").read_bytes() == generation
    record = json.loads((tmp_path / "merged" / "qlora_merge.json").read_text())
    assert (record["base"], record["dtype"], record["run"]) == ("dequantized", "float16", "r1")
    names = {str(path.relative_to(tmp_path / "merged")) for path in (tmp_path / "merged").rglob("*") if path.is_file()}
    ours = {"config.json", "generation_config.json", "qlora_merge.json", "model.safetensors"}
    assert names == kept.keys() | ours


def altered(inputs: MergeInputs, changes: Mapping[str, Tensor | None]) -> MergeInputs:
    both = {**inputs.adapter, **changes}
    adapter = {name: tensor for name, tensor in both.items() if tensor is not None}
    return dataclasses.replace(inputs, adapter=adapter)


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path, llama: Run) -> None:
    inputs, prefix = llama.inputs, "base_model.model."
    q_proj = f"{prefix}model.layers.0.self_attn.q_proj"
    head = {f"{prefix}lm_head.lora_A.weight": torch.ones(8, 64), f"{prefix}lm_head.lora_B.weight": torch.ones(128, 8)}
    tied = {f"{prefix}model.embed_tokens.lora_{factor}.weight": torch.ones(8, 8) for factor in "AB"}
    cases: dict[str, Mapping[str, Tensor | None]] = {
        "neither a LoRA factor nor a bias": {f"{prefix}lm_head.weight": torch.ones(128, 64)},
        r"lm_head\.weight has an adapter, but the base's": head,
        r"changes model\.embed_tokens\.weight, which this model ties": tied,
        "only one of lora_A and lora_B": {f"{q_proj}.lora_B.weight": None},
        r"which do not fit a weight of \(64, 64\)": {f"{q_proj}.lora_B.weight": torch.ones(65, 8)},
        r"q_proj\.bias was trained, but": {f"{q_proj}.bias": torch.ones(64)},
        "no LoRA factors": dict.fromkeys(inputs.adapter),
    }
    for message, changes in cases.items():
        with pytest.raises(MergeError, match=message):
            merge_to(altered(inputs, changes), tmp_path / "merged")
    for dtype in (torch.uint8, torch.float8_e4m3fn, torch.float64):
        with pytest.raises(MergeError, match="cannot be written as"):
            merge_to(inputs, tmp_path / "merged", dtype=dtype)
    tensors = inputs.fingerprint.tensors | {
        "model.layers.0.mlp.experts": next(iter(inputs.fingerprint.tensors.values()))
    }
    fused = dataclasses.replace(inputs.fingerprint, tensors=tensors)
    with pytest.raises(MergeError, match=r"experts\.weight was 4-bit in training, but .* transformers fuses"):
        merge_to(dataclasses.replace(inputs, fingerprint=fused), tmp_path / "merged")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("untied", slow_but([True, False], True))
def test_of_a_gguf_base_neither_embedding_nor_head_is_ever_decoded_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untied: bool
) -> None:
    """Nothing of it is mapped: what is read is decoded. Neither the merge nor its verification reads more than rows."""
    directory = import_gguf(write_gguf(tmp_path / "base.gguf", tiny_weights(untied=untied)), tmp_path / "cache", silent)
    run = train(directory)
    vocabulary = run.model.config.vocab_size
    for module in (merging, reading):
        monkeypatch.setattr(module, "row_blocks", functools.partial(row_blocks, block_elements=1, minimum_rows=64))
    read_most: dict[str, int] = {}
    read = GGUFWeights.read

    def count(self: GGUFWeights, name: str, rows: slice | None = None) -> Tensor:
        found = read(self, name, rows)
        read_most[name] = max(read_most.get(name, 0), len(found))
        return found

    monkeypatch.setattr(GGUFWeights, "read", count)
    inputs = on_base(run.inputs, directory)  # opened where reading is counted
    streamed = load_streamed_model(inputs.base, torch.device("cpu"))
    with torch.no_grad():
        streamed(input_ids=torch.tensor(ROWS[:1]))
    merge_to(inputs, tmp_path / "merged", dtype=torch.float32)
    merge_to(inputs, tmp_path / "original", dtype=torch.float32, base="original")
    by_tokens = [name for name, info in ModelDirectory.open(directory).tensors.items() if info.shape[0] == vocabulary]
    assert len(by_tokens) == 1 + untied
    assert all(0 < read_most[name] < 0.5 * vocabulary for name in by_tokens)
    check_logits(run, tmp_path / "merged", kl=1e-10)


def test_a_tensor_of_training_that_the_checkpoint_lacks_is_refused(tmp_path: Path, llama: Run) -> None:
    dense = llama.inputs.fingerprint.dense | {"model.extra.weight": "0" * 64}
    fingerprint = dataclasses.replace(llama.inputs.fingerprint, dense=dense)
    with pytest.raises(MergeError, match=r"model\.extra\.weight was in the base in training, but"):
        merge_to(dataclasses.replace(llama.inputs, fingerprint=fingerprint), tmp_path / "merged")


def test_a_place_in_the_users_home_is_known_by_its_full_path(
    tmp_path: Path, llama: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    with pytest.raises(OutputExistsError, match="full exists"):
        plan_merge(llama.inputs, Path("~/full"))
    asked: list[Path] = []
    monkeypatch.setattr(shutil, "disk_usage", noting(lambda path: SimpleNamespace(free=2**40), asked.append))
    plan_merge(llama.inputs, Path("~/merged"))
    assert asked == [tmp_path]


def test_output_needs_an_empty_place_and_space_on_the_disk(
    tmp_path: Path, llama: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "adapter_config.json").write_text("{}")  # loaders would apply the adapter a second time
    with pytest.raises(OutputExistsError, match="not empty"):
        merge_to(llama.inputs, tmp_path / "full")
    adapted = tmp_path / "adapted"
    shutil.copytree(llama.inputs.base.path, adapted)
    (adapted / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="adapter_config"):
        merge_to(on_base(llama.inputs, adapted), tmp_path / "merged")
    planned = plan_merge(llama.inputs, tmp_path / "deep" / "merged").tensors
    assert len(planned) == len(stored(llama.inputs.base.path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**24))
    with pytest.raises(DiskError, match="GiB free"):
        plan_merge(llama.inputs, tmp_path / "deep" / "merged")
    assert not (tmp_path / "deep").exists()


def test_a_changed_tensor_that_is_not_4_bit_is_refused_by_name(tmp_path: Path, llama: Run) -> None:
    for name in ("model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"):
        other = tmp_path / name
        shutil.copytree(llama.inputs.base.path, other)
        file = ModelDirectory.open(other).tensors[name].file
        tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
        tensors[name].view(-1)[5] += 0.5
        save_file(tensors, file, metadata={"format": "pt"})
        for base in ("dequantized", "original"):
            with pytest.raises(CheckpointError, match=f"{name} in .* holds other values than in training"):
                merge_to(on_base(llama.inputs, other), tmp_path / "merged", base=base)
        assert not (tmp_path / "merged").exists()


def test_changed_block_scales_of_a_prequantized_base_are_refused(tmp_path: Path, llama: Run) -> None:
    """The packed codes and the mean are those of training, but every other block has its neighbor's scale."""
    directory = prequantized(llama.inputs.base.path, tmp_path / "base")
    merge_to(on_base(llama.inputs, directory), tmp_path / "merged")
    name = "model.layers.0.mlp.up_proj.weight.absmax"
    file = ModelDirectory.open(directory).tensors[name].file
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    tensors[name] = tensors[name].flip(0)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight in .* does not give the 4-bit weights"):
        merge_to(on_base(llama.inputs, directory), tmp_path / "again")


@pytest.mark.parametrize("dtype", slow_but([torch.float16, torch.bfloat16, torch.float32], torch.float32))
def test_a_run_merges_from_either_copy_of_its_base_to_the_same_bits(
    tmp_path: Path, llama: Run, dtype: torch.dtype
) -> None:
    copy = prequantized(llama.inputs.base.path, tmp_path / "copy")
    on_copy = train(copy).inputs
    merged = []
    for trained, inputs in (("original", llama.inputs), ("copy", on_copy)):
        for directory in (llama.inputs.base.path, copy):
            output = tmp_path / f"{trained}-{directory.name}"
            merge_to(on_base(inputs, directory), output, dtype=dtype, max_shard_bytes=100_000)
            merged.append(stored(output))
    assert len(merged) == 4
    for tensors in merged[1:]:
        assert tensors.keys() == merged[0].keys()
        assert all(tensors[name].dtype == dtype and torch.equal(tensors[name], merged[0][name]) for name in tensors)


def test_what_is_not_finite_is_refused_by_name(tmp_path: Path, llama: Run) -> None:
    """In the adapter, and so in one block of one weight, whatever the dtype."""
    key = "base_model.model.model.layers.1.mlp.gate_proj.lora_B.weight"
    for value in (math.nan, math.inf):
        spoiled = llama.inputs.adapter[key].clone()
        spoiled[-1, 0] = value
        for dtype in (torch.float16, torch.float32):
            with pytest.raises(MergeError, match=r"layers\.1\.mlp\.gate_proj\.weight holds values that are not finite"):
                merge_to(altered(llama.inputs, {key: spoiled}), tmp_path / "merged", dtype=dtype)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_flushed_elements_are_counted_about_the_smallest_numbers(dtype: torch.dtype) -> None:
    """Half of the smallest number goes to zero, and a little more does not; zeros of either sign are none."""
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    kept = [smallest, -smallest, smallest * 0.75, 1.0]
    lost = [smallest / 2, -smallest / 2, smallest / 4]
    block = torch.tensor([kept + lost + [0.0, -0.0]], dtype=torch.float32)
    assert merging._count_flushed(block, block.to(dtype)) == len(lost)
    assert merging._count_flushed(block, block) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_merges_to_the_same_weights(tmp_path: Path, llama: Run) -> None:
    """NF4 to the bit, the adapter's product to fp32's rounding."""
    merge_to(llama.inputs, tmp_path / "cpu", dtype=torch.float32)
    report = merge_to(llama.inputs, tmp_path / "cuda", dtype=torch.float32, device="cuda")
    assert report.folded == 14
    on_cpu, on_cuda = stored(tmp_path / "cpu"), stored(tmp_path / "cuda")
    assert all(torch.allclose(on_cuda[name], tensor, rtol=0.0, atol=1e-6) for name, tensor in on_cpu.items())
