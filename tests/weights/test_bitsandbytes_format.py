"""Promises of 4-bit weights as bitsandbytes stores them: read to the same base, or refused by name."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from prequantized import prequantized
from tiny_models import load
from torch import Tensor

from qlora_trainer.common.errors import QuantizationError
from qlora_trainer.weights.bitsandbytes_format import check_dequantization, weight_from_checkpoint, weight_to_checkpoint
from qlora_trainer.weights.nf4 import WEIGHT_TENSORS, quantize_weight

CPU = torch.device("cpu")


def test_a_prequantized_checkpoint_loads_to_the_same_base(tiny_llama: Path, tmp_path: Path) -> None:
    ours = load(tiny_llama)
    theirs = load(prequantized(tiny_llama, tmp_path / "nf4"))
    assert ours.fingerprint.tensors == theirs.fingerprint.tensors
    ids = torch.arange(5, 25)[None]
    assert torch.equal(ours.model(ids).logits, theirs.model(ids).logits)


@pytest.mark.parametrize("settings", [{"bnb_4bit_quant_type": "fp4"}, {"bnb_4bit_use_double_quant": False}])
def test_a_checkpoint_prequantized_otherwise_is_refused(tiny_llama: Path, tmp_path: Path, settings: dict) -> None:
    with pytest.raises(QuantizationError, match="quantized otherwise"):
        load(prequantized(tiny_llama, tmp_path / "other", **settings))


STATE = "quant_state.bitsandbytes__nf4"


def say(stored: dict[str, Tensor], **facts: object) -> None:
    """Change what the JSON next to a weight says."""
    reported = json.loads(bytes(stored[STATE].tolist())) | facts
    stored[STATE] = torch.frombuffer(bytearray(json.dumps(reported).encode()), dtype=torch.uint8)


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "codes cut": (lambda s: s.update({"": s[""][:-1]}), r"packed is uint8 of shape \(9215,\), .* \(9216,\)"),
    "scales cut": (lambda s: s.update(absmax=s["absmax"][:-1]), r"absmax is uint8 of shape \(287,\)"),
    "scales as floats": (lambda s: s.update(absmax=s["absmax"].float()), "absmax is float32"),
    "scales missing": (lambda s: s.pop("absmax"), "absmax"),
    "nested scales in fp16": (lambda s: s.update(nested_absmax=s["nested_absmax"].half()), "nested_absmax is float16"),
    "nested scales missing": (lambda s: s.pop("nested_absmax"), "nested_absmax"),
    "nested code in fp16": (
        lambda s: s.update(nested_quant_map=s["nested_quant_map"].half()),
        "nested_code is float16",
    ),
    "nested code cut": (lambda s: s.update(nested_quant_map=s["nested_quant_map"][:4]), r"nested_code .*\(4,\)"),
    "nested code not finite": (lambda s: s["nested_quant_map"].fill_(torch.inf), "not finite"),
    "nested scale not finite": (lambda s: s["nested_absmax"].fill_(torch.nan), "not finite"),
    "code changed": (lambda s: s.update(quant_map=s["quant_map"].flip(0)), "quant_map, .* not that of NF4"),
    "code missing": (lambda s: s.pop("quant_map"), "quant_map, .* not that of NF4"),
    "shape not reported": (lambda s: say(s, shape=None), "shape is None"),
    "shape of one size": (lambda s: say(s, shape=[18432]), r"shape is \[18432\]"),
    "shape of no numbers": (lambda s: say(s, shape=["96", 192]), "no matrix's"),
    "shape below zero": (lambda s: say(s, shape=[-96, -192]), "no matrix's"),
    "shape beyond reason": (lambda s: say(s, shape=[2**40, 2**40]), "no matrix's"),
    "another shape": (lambda s: say(s, shape=[96, 256]), r"packed is uint8 of shape \(9216,\)"),
    "offset not reported": (lambda s: say(s, nested_offset=None), "not finite"),
    "offset beyond fp32": (lambda s: say(s, nested_offset=1e300), "not finite"),
    "block size as text": (lambda s: say(s, blocksize="64"), "block size 64 "),
    "no JSON": (lambda s: s[STATE].fill_(91), "cannot be read"),
    "JSON of floats": (lambda s: s.update({STATE: s[STATE].float()}), "cannot be read"),
    "dtype unknown": (lambda s: say(s, dtype=["bfloat16"]), "cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_prequantized_weight_whose_tables_do_not_fit_is_refused_by_name(damage: str) -> None:
    """Before a kernel reads them, which goes by the weight's shape alone."""
    weight = quantize_weight(torch.randn(96, 192, generator=torch.Generator().manual_seed(0)))
    stored = {key: tensor.clone() for key, tensor in weight_to_checkpoint(weight, torch.bfloat16).items()}
    again = weight_from_checkpoint(stored[""], {key: stored[key] for key in stored if key}, "a.weight")
    assert all(torch.equal(getattr(again, table), getattr(weight, table)) for table in WEIGHT_TENSORS)
    change, reported = DAMAGES[damage]
    change(stored)
    with pytest.raises(QuantizationError, match=rf"^a\.weight.* {reported}"):
        weight_from_checkpoint(stored.pop(""), stored, "a.weight")


def test_dequantization_is_checked_against_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    check_dequantization(CPU)
    from qlora_trainer.weights import bitsandbytes_format

    right = bitsandbytes_format.dequantize_nf4
    monkeypatch.setattr(bitsandbytes_format, "dequantize_nf4", lambda *a: right(*a).nextafter(torch.tensor(9e9)))
    with pytest.raises(QuantizationError, match="otherwise than they are defined"):
        check_dequantization(CPU)
