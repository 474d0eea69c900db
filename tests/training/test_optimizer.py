"""The optimizer over flat groups: right updates, exact resume, state that stays paged."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from qlora_trainer.common.errors import CheckpointError
from qlora_trainer.config.schema import OptimizerConfig
from qlora_trainer.training.flat import FlatGroup, flatten_parameters
from qlora_trainer.training.optimizer import Optimizer, build_optimizer
from qlora_trainer.weights.nf4 import load_bitsandbytes

NAMES = ["paged_adamw_32bit", "paged_adamw_8bit", "adamw"]
F = load_bitsandbytes().functional


def config(**fields: Any) -> OptimizerConfig:
    return OptimizerConfig(**fields)


def parameters(device: str = "cpu", rows: int = 80) -> dict[str, nn.Parameter]:
    """Two groups' worth; with 80 rows the first has over 4,096 elements, so that bitsandbytes really uses 8 bits."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"lora_A": (rows, 64), "lora_B": (3, 5), "bias": (7,)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(device)) for name, shape in shapes.items()}


def groups_of(named: dict[str, nn.Parameter], weight_decay: float = 0.1) -> list[FlatGroup]:
    items = list(named.items())
    return [
        flatten_parameters(items[:2], name="decay", weight_decay=weight_decay),
        flatten_parameters(items[2:], name="no_decay", weight_decay=0.0),
    ]


def take_steps(optimizer: Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for group in optimizer.groups:
            for parameter in group.parameters.values():
                assert parameter.grad is not None
                parameter.grad.copy_(torch.randn(parameter.shape, generator=generator))
        optimizer.step(learning_rate=1e-2)


def through_a_file(tensors: dict[str, Tensor], state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load(save(tensors)), json.loads(json.dumps(state))


@pytest.mark.parametrize(("name", "tolerance"), [("adamw", 0.0), ("paged_adamw_32bit", 1e-6)])
def test_flat_groups_train_like_separate_parameters(name: str, tolerance: float) -> None:
    named, plain = parameters(), parameters()
    optimizer = build_optimizer(config(name=name), groups_of(named))
    decayed = {"params": [plain["lora_A"], plain["lora_B"]], "weight_decay": 0.1}
    reference = torch.optim.AdamW([decayed, {"params": [plain["bias"]], "weight_decay": 0.0}], lr=1e-2, fused=True)
    for step in range(5):
        take_steps(optimizer, step, step + 1)
        for key, parameter in plain.items():
            gradient = named[key].grad
            assert gradient is not None
            parameter.grad = gradient.clone()
        reference.step()
    for key, parameter in plain.items():
        torch.testing.assert_close(named[key], parameter, rtol=tolerance, atol=tolerance)


def test_a_groups_rate_is_its_factor_times_the_steps() -> None:
    """As LoRA+ has it for lora_B: against torch's AdamW with two rates."""
    ours, plain = parameters(), parameters()
    names = list(ours)
    groups = [
        flatten_parameters([(name, ours[name])], name=name, weight_decay=0.1, rate_factor=factor)
        for name, factor in zip(names, (1.0, 16.0, 1.0), strict=True)
    ]
    rates = dict(zip(names, (1e-3, 16e-3, 1e-3), strict=True))
    reference = torch.optim.AdamW([{"params": [plain[name]], "lr": rates[name]} for name in names], weight_decay=0.1)
    optimizer = build_optimizer(config(name="adamw"), groups)
    for step in range(3):
        for name in names:
            gradient = torch.randn(plain[name].shape, generator=torch.Generator().manual_seed(step))
            plain[name].grad = gradient.clone()
            ours[name].grad.copy_(gradient)  # type: ignore[union-attr]
        reference.step()
        optimizer.step(1e-3)
    for name in names:
        torch.testing.assert_close(ours[name], plain[name], rtol=1e-6, atol=1e-7)


def test_8bit_state_trains_close_to_32bit_state() -> None:
    start, wide, narrow = parameters(), parameters(), parameters()
    take_steps(build_optimizer(config(name="paged_adamw_32bit"), groups_of(wide)), 0, 5)
    take_steps(build_optimizer(config(name="paged_adamw_8bit"), groups_of(narrow)), 0, 5)
    moved = (wide["lora_A"] - start["lora_A"]).norm()
    assert 0 < (wide["lora_A"] - narrow["lora_A"]).norm() < 0.05 * moved


@pytest.mark.parametrize("name", ["paged_adamw_32bit", "paged_adamw_8bit"])
def test_bf16_parameters_take_the_fp32_step_rounded_and_keep_their_state_in_its_width(name: str) -> None:
    def built(dtype: torch.dtype) -> tuple[dict[str, nn.Parameter], Optimizer]:
        named = {key: nn.Parameter(p.detach().bfloat16().to(dtype)) for key, p in parameters().items()}
        return named, build_optimizer(config(name=name), groups_of(named))

    (low, narrow), (full, wide) = built(torch.bfloat16), built(torch.float32)
    for optimizer in (narrow, wide):
        for group in optimizer.groups:
            for index, parameter in enumerate(group.parameters.values()):
                generator = torch.Generator().manual_seed(index)
                assert parameter.grad is not None
                parameter.grad.copy_(torch.randn(parameter.shape, generator=generator).bfloat16())
        optimizer.step(learning_rate=1e-2)
    for key, parameter in full.items():
        assert torch.equal(low[key], parameter.bfloat16())
    (narrow_state, _), (wide_state, _) = narrow.state_dict(), wide.state_dict()
    assert narrow_state.keys() == wide_state.keys()
    assert all(narrow_state[k].dtype == wide_state[k].dtype for k in wide_state)
    assert torch.float32 in {tensor.dtype for tensor in narrow_state.values()}


def test_padding_stays_zero() -> None:
    for name in NAMES:
        group = flatten_parameters([("a", nn.Parameter(torch.ones(5)))], name="all", weight_decay=0.1)
        take_steps(build_optimizer(config(name=name), [group]), 0, 3)
        assert not group.data[5:].any()


@pytest.mark.parametrize("name", NAMES)
def test_resumed_optimizer_equals_uninterrupted_optimizer(name: str) -> None:
    whole = parameters()
    take_steps(build_optimizer(config(name=name), groups_of(whole)), 0, 8)

    first = parameters()
    interrupted = build_optimizer(config(name=name), groups_of(first))
    take_steps(interrupted, 0, 4)
    saved = through_a_file(*interrupted.state_dict())
    second = {key: nn.Parameter(parameter.detach().clone()) for key, parameter in first.items()}
    resumed = build_optimizer(config(name=name), groups_of(second))
    resumed.load_state_dict(*saved)
    take_steps(resumed, 4, 8)
    for key, parameter in whole.items():
        assert torch.equal(second[key], parameter)


@pytest.mark.parametrize("name", NAMES)
def test_saved_state_does_not_change_with_further_steps(name: str) -> None:
    optimizer = build_optimizer(config(name=name), groups_of(parameters()))
    take_steps(optimizer, 0, 1)
    tensors, state = optimizer.state_dict()
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    take_steps(optimizer, 1, 2)
    assert all(torch.equal(tensors[key], tensor) for key, tensor in before.items())
    assert [group["step"] for group in state["groups"]] == [1, 1]


@pytest.mark.parametrize(
    ("fields", "weight_decay", "message"),
    [
        ({"name": "paged_adamw_8bit"}, 0.1, "PagedAdamW8bit"),
        ({"name": "adamw"}, 0.1, "AdamW"),
        ({"beta2": 0.95}, 0.1, "betas"),
        ({"epsilon": 1e-6}, 0.1, "epsilon"),
        ({}, 0.2, "weight_decay of decay"),
    ],
)
def test_state_of_another_optimizer_is_refused(fields: dict[str, Any], weight_decay: float, message: str) -> None:
    source = build_optimizer(config(), groups_of(parameters()))
    take_steps(source, 0, 1)
    target = build_optimizer(config(**fields), groups_of(parameters(), weight_decay))
    with pytest.raises(CheckpointError, match=message):
        target.load_state_dict(*source.state_dict())
    tensors, state = target.state_dict()
    assert not any(tensor.any() for tensor in tensors.values()), "nothing may change when state is refused"
    assert [group["step"] for group in state["groups"]] == [0, 0]


def test_state_of_other_parameters_is_refused_by_name() -> None:
    tensors, state = build_optimizer(config(), groups_of(parameters())).state_dict()
    swapped = dict(reversed(list(parameters().items())[:2])) | {"bias": parameters()["bias"]}
    with pytest.raises(CheckpointError, match=r"parameter 0 of decay is .*lora_A.* and .*lora_B"):
        build_optimizer(config(), groups_of(swapped)).load_state_dict(tensors, state)
    with pytest.raises(CheckpointError, match=r"80, 64.*81, 64"):
        build_optimizer(config(), groups_of(parameters(rows=81))).load_state_dict(tensors, state)
    one = flatten_parameters(list(parameters().items()), name="decay", weight_decay=0.1)
    with pytest.raises(CheckpointError, match="parameter groups are"):
        build_optimizer(config(), [one]).load_state_dict(tensors, state)


def test_missing_extra_and_misshapen_state_is_refused() -> None:
    optimizer = build_optimizer(config(), groups_of(parameters()))
    tensors, state = optimizer.state_dict()
    with pytest.raises(CheckpointError, match=r"decay\.state2 is missing"):
        optimizer.load_state_dict({key: value for key, value in tensors.items() if key != "decay.state2"}, state)
    with pytest.raises(CheckpointError, match=r"decay\.extra"):
        optimizer.load_state_dict(tensors | {"decay.extra": torch.zeros(1)}, state)
    with pytest.raises(CheckpointError, match="float16"):
        optimizer.load_state_dict(tensors | {"decay.state1": tensors["decay.state1"].half()}, state)


def test_state_takes_8_or_2_bytes_a_parameter_and_is_not_paged_on_a_cpu() -> None:
    size = 4096
    for name, expected in {"paged_adamw_32bit": 8 * size, "adamw": 8 * size}.items():
        group = flatten_parameters([("a", nn.Parameter(torch.ones(size)))], name="all", weight_decay=0.0)
        optimizer = build_optimizer(config(name=name), [group])
        assert (optimizer.state_bytes, optimizer.paged_bytes) == (expected, 0)
    group = flatten_parameters([("a", nn.Parameter(torch.ones(size)))], name="all", weight_decay=0.0)
    narrow = build_optimizer(config(name="paged_adamw_8bit"), [group])
    assert narrow.state_bytes == 2 * size + 2 * 4 * size // 256  # two bytes each, and a maximum per 256 of each state


def test_bitsandbytes_does_not_warn_of_paging_on_a_cpu() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take_steps(build_optimizer(config(), groups_of(parameters())), 0, 2)


class CudaLooking(nn.Parameter):
    """A parameter whose data is on the CPU, but which says that it is on a CUDA device."""

    device = torch.device("cuda", 0)


class CudaLookingGroups:
    """A group of 100,000 elements, which bitsandbytes pages; only what is asked of CUDA is replaced."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paged: list[Tensor] = []
        self.on_the_card: list[Tensor] = []
        zeros_like = torch.zeros_like

        def get_paged(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
            buffer = torch.empty(shape, dtype=dtype)
            buffer.is_paged, buffer.page_deviceid = True, device.index  # type: ignore[attr-defined]
            self.paged.append(buffer)
            return buffer

        def zeros_on_the_card(like: Tensor, **options: Any) -> Tensor:
            zeros = zeros_like(like, **{**options, "device": "cpu"})
            if options.get("device") == CudaLooking.device:
                self.on_the_card.append(zeros)
            return zeros

        monkeypatch.setattr(F, "get_paged", get_paged)
        monkeypatch.setattr(F, "fill", lambda buffer, value: buffer.fill_(value))
        monkeypatch.setattr(F.GlobalPageManager.get_instance(), "paged_tensors", [])
        monkeypatch.setattr(torch, "zeros_like", zeros_on_the_card)

    def __call__(self, kind: type[nn.Parameter]) -> list[FlatGroup]:
        weight = nn.Parameter(torch.ones(100_000))
        group = flatten_parameters([("lora_A", weight)], name="decay", weight_decay=0.0)
        data = kind(group.data.detach())
        data.grad = group.grad
        return [FlatGroup(group.name, data, 0.0, group.parameters, group.slices)]


def test_restored_state_lies_in_the_buffers_that_bitsandbytes_pages(
    monkeypatch: pytest.MonkeyPatch, bitsandbytes_of_the_child: Callable[..., Path]
) -> None:
    """bitsandbytes' own code runs; only its C calls for managed memory are replaced."""
    bitsandbytes_of_the_child("return torch.empty(shape, dtype=dtype)")
    groups = CudaLookingGroups(monkeypatch)
    paged = groups.paged
    source = build_optimizer(config(), groups(nn.Parameter))
    take_steps(source, 0, 2)
    tensors, state = source.state_dict()
    assert not paged

    target = build_optimizer(config(), groups(CudaLooking))
    target.load_state_dict(tensors, state)
    live = target.optimizer.state[target.groups[0].data]
    assert len(paged) == 2
    assert live["state1"] is paged[0]
    assert live["state2"] is paged[1]
    assert target.paged_bytes == target.state_bytes == 2 * 4 * 100_000
    assert live["step"] == 2
    assert torch.equal(paged[0], tensors["decay.state1"])
    assert torch.equal(paged[1], tensors["decay.state2"])
    copies, _ = target.state_dict()
    assert not any(getattr(copy, "is_paged", False) for copy in copies.values())


def test_a_card_that_refuses_to_page_trains_on_with_state_of_its_own(
    monkeypatch: pytest.MonkeyPatch, bitsandbytes_of_the_child: Callable[..., Path]
) -> None:
    """The child ends as bitsandbytes ends a process; a checkpoint of paged state goes on there."""
    bitsandbytes_of_the_child("ctypes.CDLL(None).exit(1)")
    groups = CudaLookingGroups(monkeypatch)
    source = build_optimizer(config(), groups(nn.Parameter))
    take_steps(source, 0, 2)
    tensors, state = source.state_dict()
    assert state["class"] == "PagedAdamW32bit"

    target = build_optimizer(config(), groups(CudaLooking))
    target.load_state_dict(tensors, state)
    assert not target.is_paged
    assert not groups.paged
    live = target.optimizer.state[target.groups[0].data]
    assert [live["state1"].data_ptr(), live["state2"].data_ptr()] == [t.data_ptr() for t in groups.on_the_card]
    assert (target.state_bytes, target.paged_bytes) == (2 * 4 * 100_000, 0)
    assert torch.equal(live["state2"], tensors["decay.state2"])
    assert live["step"] == 2


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("names", [("PagedAdamW", "AdamW"), ("AdamW", "PagedAdamW")], ids=["to none", "to paging"])
def test_a_checkpoint_goes_on_with_or_without_paging_to_the_same_bits(names: tuple[str, str], bits: int) -> None:
    def built(name: str, named: dict[str, nn.Parameter]) -> Optimizer:
        groups, settings = groups_of(named), config()
        params = [{"params": [group.data], "weight_decay": group.weight_decay} for group in groups]
        kind = getattr(load_bitsandbytes().optim, f"{name}{bits}bit")
        return Optimizer(kind(params, betas=(settings.beta1, settings.beta2), eps=settings.epsilon), groups, bits)

    whole, first = parameters(), parameters()
    take_steps(built(names[0], whole), 0, 6)
    interrupted = built(names[0], first)
    take_steps(interrupted, 0, 3)
    second = {key: nn.Parameter(parameter.detach().clone()) for key, parameter in first.items()}
    resumed = built(names[1], second)
    resumed.load_state_dict(*through_a_file(*interrupted.state_dict()))
    take_steps(resumed, 3, 6)
    for key, parameter in whole.items():
        assert torch.equal(second[key], parameter)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["paged_adamw_32bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paged_state_stays_paged_after_resume_on_cuda(name: str, dtype: torch.dtype) -> None:
    whole = {key: nn.Parameter(p.detach().to(dtype)) for key, p in parameters("cuda", rows=2000).items()}
    uninterrupted = build_optimizer(config(name=name), groups_of(whole))
    assert uninterrupted.paged_bytes >= 2 * 128_000
    take_steps(uninterrupted, 0, 6)

    first = {key: nn.Parameter(p.detach().to(dtype)) for key, p in parameters("cuda", rows=2000).items()}
    interrupted = build_optimizer(config(name=name), groups_of(first))
    take_steps(interrupted, 0, 3)
    saved = through_a_file(*interrupted.state_dict())
    second = {key: nn.Parameter(parameter.detach().clone()) for key, parameter in first.items()}
    resumed = build_optimizer(config(name=name), groups_of(second))
    resumed.load_state_dict(*saved)
    assert resumed.paged_bytes == uninterrupted.paged_bytes
    take_steps(resumed, 3, 6)
    for key, parameter in whole.items():
        assert torch.equal(second[key], parameter)
