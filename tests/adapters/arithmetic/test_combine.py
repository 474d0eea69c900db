"""Combined adapters are what PEFT makes of the same adapters, and what their formulas say."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_trainer.adapters.arithmetic.combine import (
    CombinedAdapter,
    WeightedAdapter,
    combine_adapters,
    elected_mean,
    keep_largest,
    keep_some,
)
from qlora_trainer.adapters.arithmetic.methods import CombineSettings
from qlora_trainer.adapters.kinds.lora_file import LoraFileConfig
from qlora_trainer.adapters.peft_format import StoredAdapter, write_adapter
from qlora_trainer.common.errors import AdapterError

SIZES = {"first": (24, 16), "second": (16, 24)}  # (I, O)
PREFIX = "base_model.model."


def stored(seed: int, ranks: dict[str, int], **fields: Any) -> StoredAdapter:
    """Random factors of a rank for each named layer."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, rank in ranks.items():
        inputs, outputs = SIZES[path]
        tensors[f"{PREFIX}{path}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator)
        tensors[f"{PREFIX}{path}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator)
    rank = max(ranks.values())
    pattern = {path: found for path, found in ranks.items() if found != rank}
    settings = {"r": rank, "lora_alpha": 6.0, "target_modules": sorted(ranks), "rank_pattern": pattern}
    return StoredAdapter(LoraFileConfig(**{**settings, "task_type": None, **fields}), tensors)


def deltas(adapter: StoredAdapter) -> dict[str, Tensor]:
    """s B A of each layer, in fp64."""
    return {
        path: fold.scaling * fold.lora_B.double() @ fold.lora_A.double()  # type: ignore[attr-defined]
        for path, fold in adapter.config.folds(adapter.tensors).items()
    }


def combined(parts: list[StoredAdapter], weights: list[float], *settings: Any) -> CombinedAdapter:
    named = [WeightedAdapter(f"adapter {index}", *pair) for index, pair in enumerate(zip(parts, weights, strict=True))]
    return combine_adapters(named, CombineSettings(*settings))


def as_stored(made: CombinedAdapter) -> StoredAdapter:
    return StoredAdapter(made.file_config(sorted(made.ranks), "tiny", None, False), made.tensors)


def the_sum(parts: list[StoredAdapter], weights: list[float]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for part, weight in zip(parts, weights, strict=True):
        for path, delta in deltas(part).items():
            total[path] = total.get(path, 0.0) + weight * delta
    return total


UNEVEN = [stored(1, {"first": 4, "second": 2}), stored(2, {"first": 3}, lora_alpha=1.0), stored(3, {"second": 5})]
EVEN = [stored(1, {"first": 4, "second": 4}), stored(2, {"first": 4, "second": 4}, lora_alpha=3.0)]


def test_cat_is_the_weighted_sum_of_adapters_of_other_ranks_scalings_and_layers() -> None:
    weights = [0.7, -0.3, 2.0]
    made = combined(UNEVEN, weights, "cat")
    assert made.ranks == {"first": 7, "second": 7}
    assert made.difference < 1e-6
    found = deltas(as_stored(made))
    for path, expected in the_sum(UNEVEN, weights).items():
        torch.testing.assert_close(found[path], expected, rtol=1e-5, atol=1e-5)


def test_svd_is_the_nearest_of_its_rank_to_the_weighted_sum() -> None:
    weights = [0.7, -0.3, 2.0]
    made = combined(UNEVEN, weights, "svd", 3)
    assert made.ranks == {"first": 3, "second": 3}
    found, missing = deltas(as_stored(made)), torch.tensor(0.0).double()
    for path, expected in the_sum(UNEVEN, weights).items():
        rest = torch.linalg.svdvals(expected)[3:]
        assert (found[path] - expected).norm() == pytest.approx(float(rest.norm()), rel=1e-5)
        missing += rest.square().sum()
    total = sum(float(delta.square().sum()) for delta in the_sum(UNEVEN, weights).values())
    assert made.difference == pytest.approx(float(missing / total) ** 0.5, rel=1e-5)
    whole = combined(UNEVEN, weights, "svd", 100)
    assert whole.ranks == {"first": 7, "second": 7}  # no more than there is
    assert whole.difference < 1e-6


class Layers(nn.Module):
    """A model of two linear layers, as PEFT adapts them."""

    def __init__(self) -> None:
        super().__init__()
        for path, (inputs, outputs) in SIZES.items():
            setattr(self, path, nn.Linear(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule("second")(self.get_submodule("first")(x))


def by_peft(parts: list[StoredAdapter], weights: list[float], directory: Path, **options: Any) -> dict[str, Tensor]:
    """The deltas of PEFT's add_weighted_adapter."""
    from peft import PeftModel

    names = [f"part{index}" for index in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        (directory / name).mkdir()
        write_adapter(directory / name, part.tensors, part.config)
    model = PeftModel.from_pretrained(Layers(), directory / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(directory / name, adapter_name=name)
    model.add_weighted_adapter(names, weights, "sum", **options)
    layers = {path: model.base_model.model.get_submodule(path) for path in SIZES}
    return {path: layer.get_delta_weight("sum").double() for path, layer in layers.items()}


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.5, -0.5]], ids=str)
@pytest.mark.parametrize(
    ("method", "rank", "density"),
    [("cat", None, None), ("linear", None, None), ("svd", 5, None), ("ties", None, 0.3), ("ties_svd", 5, 0.3)],
)
def test_peft_makes_the_same_of_the_same_adapters(
    method: str, rank: int | None, density: float | None, weights: list[float], tmp_path: Path
) -> None:
    found = deltas(as_stored(combined(EVEN, weights, method, rank, density)))
    options = {"combination_type": method, "svd_rank": rank, "density": density}
    for path, expected in by_peft(EVEN, weights, tmp_path, **options).items():
        assert (found[path] - expected).norm() < 1e-5 * expected.norm(), path


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_peft_drops_the_same_values_by_the_same_generator(method: str) -> None:
    from peft.utils import merge_utils

    part = [stored(1, {"first": 4}), stored(2, {"first": 4}, lora_alpha=3.0)]
    made = combined(part, [0.7, -0.3], method, None, 0.6, 5)
    torch.manual_seed(5)
    folds = [one.config.folds(one.tensors)["first"] for one in part]
    scaled = torch.tensor([fold.scaling * w for fold, w in zip(folds, [0.7, -0.3], strict=True)])  # type: ignore[attr-defined]
    theirs = getattr(merge_utils, method)
    A = theirs([fold.lora_A for fold in folds], scaled.abs().sqrt() * scaled.sign(), 0.6)  # type: ignore[attr-defined]
    B = theirs([fold.lora_B for fold in folds], scaled.abs().sqrt(), 0.6)  # type: ignore[attr-defined]
    torch.testing.assert_close(made.tensors[f"{PREFIX}first.lora_A.weight"], A, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(made.tensors[f"{PREFIX}first.lora_B.weight"], B, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["dare_linear_svd", "dare_ties_svd"])
def test_peft_drops_the_same_values_of_deltas_too(method: str) -> None:
    from peft.utils import merge_utils

    part = [stored(1, {"first": 4}), stored(2, {"first": 4}, lora_alpha=3.0)]
    made = combined(part, [0.7, -0.3], method, 16, 0.6, 5)  # the whole rank
    torch.manual_seed(5)
    each = [deltas(one)["first"].float() for one in part]
    expected = getattr(merge_utils, method.removesuffix("_svd"))(each, torch.tensor([0.7, -0.3]), 0.6)
    torch.testing.assert_close(deltas(as_stored(made))["first"].float(), expected, rtol=1e-4, atol=1e-4)


def test_what_dare_drops_is_made_up_for_on_average_and_is_the_seeds() -> None:
    weights = [0.7, -0.3]
    drawn = [combined(EVEN, weights, "dare_linear_svd", 16, 0.5, seed) for seed in range(300)]
    mean = sum(deltas(as_stored(made))["first"] for made in drawn) / len(drawn)
    expected = the_sum(EVEN, weights)["first"]
    # The error of a mean of n draws falls as 1 / sqrt(n): here about 1 / 17 of the sum.
    assert (mean - expected).norm() < 0.12 * expected.norm()
    again = combined(EVEN, weights, "dare_linear_svd", 16, 0.5, 7)
    assert all(torch.equal(tensor, drawn[7].tensors[name]) for name, tensor in again.tensors.items())
    assert not torch.equal(*(made.tensors[f"{PREFIX}first.lora_A.weight"] for made in drawn[:2]))


def test_ties_averages_what_has_the_sign_of_the_sum() -> None:
    first, second, third = torch.tensor([[3.0, -1.0, 2.0, 0.0], [1.0, 2.0, -1.0, 0.0], [-1.0, 0.0, -3.0, 0.0]])
    found = elected_mean([first, second, third], [1.0, 0.5, 2.0])
    assert found.tolist() == [(3.0 + 0.5) / 2, 1.0, (-0.5 - 6.0) / 2, 0.0]
    assert keep_largest(torch.tensor([1.0, -4.0, 3.0, 0.5]), 0.5).tolist() == [0.0, -4.0, 3.0, 0.0]


def test_a_density_of_one_keeps_everything() -> None:
    values = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(keep_largest(values, 1.0), values)
    assert torch.equal(keep_some(values, 1.0, torch.Generator()), values)
    linear, dare = (combined(EVEN, [0.7, 0.3], *s).tensors for s in (("linear",), ("dare_linear", None, 1.0)))
    assert all(torch.equal(tensor, dare[name]) for name, tensor in linear.items())


def test_one_adapter_can_be_cut_to_a_rank() -> None:
    made = combined(EVEN[:1], [1.0], "svd", 2)
    assert made.ranks == {"first": 2, "second": 2}
    assert 0.0 < made.difference < 1.0


def refused(parts: list[StoredAdapter], *settings: Any) -> str:
    with pytest.raises(AdapterError) as error:
        combined(parts, [1.0] * len(parts), *settings)
    return str(error.value)


@pytest.mark.parametrize("method", [("linear",), ("ties", None, 0.5), ("dare_ties", None, 0.5)], ids=str)
def test_factors_of_other_ranks_are_not_summed(method: tuple[Any, ...]) -> None:
    reported = refused([EVEN[0], stored(2, {"first": 3})], *method)
    assert f"--method {method[0]} sums factors of equal rank, and first has the rank 4 in adapter 0 and 3" in reported


def test_adapters_that_have_no_sum_are_refused_with_the_reason() -> None:
    plain = EVEN[0]
    magnitudes = {f"{PREFIX}{path}.lora_magnitude_vector": torch.ones(outputs) for path, (_, outputs) in SIZES.items()}
    dora = StoredAdapter(plain.config.model_copy(update={"use_dora": True}), {**plain.tensors, **magnitudes})
    assert "adapter 1 is an adapter of the kind dora" in refused([plain, dora], "cat")
    biased = StoredAdapter(plain.config.model_copy(update={"bias": "all"}), plain.tensors)
    assert "adapter 1 also trained biases (bias: all)" in refused([plain, biased], "cat")
    of_tokens = StoredAdapter(plain.config.model_copy(update={"trainable_token_indices": [3]}), plain.tensors)
    assert "adapter 1 also trained rows of tokens" in refused([plain, of_tokens], "cat")


def test_layers_of_another_model_and_too_large_a_rank_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "first", (24, 20))
    other = stored(2, {"first": 4})
    assert "first has 24 inputs and 16 outputs in adapter 0, and 24 and 20 in adapter 1" in refused(
        [EVEN[0], other], "cat"
    )
    many = [stored(seed, {"second": 16}) for seed in range(65)]
    assert "would have the rank 1040, and at most 1024" in refused(many, "cat")
