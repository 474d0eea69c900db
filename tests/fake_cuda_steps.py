"""Training steps on fake tensors of device cuda: what branches on the device is walked, and nothing is computed.

    python tests/fake_cuda_steps.py LIBRARY MODEL_DIRECTORY

LIBRARY is fake_cuda.cpp, compiled. Prints a JSON object: by setting, the operations that ran on cuda. A process of its
own, because the library must be there before torch, and because torch.cuda is then answered for.
"""

import ctypes
import importlib.util
import json
import platform
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

LIBRARY, MODEL = Path(sys.argv[1]), Path(sys.argv[2])
assert "torch" not in sys.modules
spec = importlib.util.find_spec("torch")
assert spec is not None
assert spec.origin is not None
for pattern in ("libgomp*.so*", "libc10.so", "libtorch_cpu.so"):
    for path in (Path(spec.origin).parent / "lib").glob(pattern):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
ctypes.CDLL(str(LIBRARY), mode=ctypes.RTLD_GLOBAL)

import torch  # noqa: E402
from torch import nn  # noqa: E402

from qlora_kernels.torch_internals import (  # noqa: E402
    FakeTensorMode,
    TorchDispatchMode,
    leaves,
    storage_address,
)
from qlora_trainer.adapters.inject import add_adapters  # noqa: E402
from qlora_trainer.config.load import make_config  # noqa: E402
from qlora_trainer.data.batching.packing import make_packs  # noqa: E402
from qlora_trainer.data.types import Example  # noqa: E402
from qlora_trainer.model.modules.cpu_embedding import keep_embeddings_on_cpu  # noqa: E402
from qlora_trainer.planning.empty_run import as_fake  # noqa: E402
from qlora_trainer.planning.fake_tensors import FakeRun  # noqa: E402
from qlora_trainer.planning.skeleton import build_skeleton, fill_skeleton  # noqa: E402
from qlora_trainer.training.memory.activations import choose_policy  # noqa: E402
from qlora_trainer.training.state import build_state  # noqa: E402
from qlora_trainer.training.step import train_step  # noqa: E402
from qlora_trainer.weights.model_directory import ModelDirectory  # noqa: E402
from qlora_trainer.weights.nf4 import load_bitsandbytes  # noqa: E402

PINNED: dict[int, torch.Tensor] = {}  # by the address of its memory, which no other gets while it is here
SYNCHRONIZED: list[str] = []  # calls that wait until the device is idle


def pin(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to pinned memory."""
    pinned = tensor.clone()
    PINNED[storage_address(pinned.untyped_storage())] = pinned
    return pinned


class Stream:
    """In whose order everything happens at once."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.device_index = 0

    def wait_stream(self, other: Any) -> None:
        """Done."""

    wait_event = wait_stream

    def record_event(self) -> "Stream":
        return self

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *error: object) -> None:
        """Back on the other."""


def answer_for_cuda() -> None:
    """torch.cuda as on a machine with one Ampere card."""
    FakeTensorMode.avoid_device_init = property(lambda self: True)  # type: ignore[method-assign, assignment]
    torch.version.cuda = "13.0"
    answers = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (8, 6),
        "get_device_name": "a fake card",
        "get_device_properties": SimpleNamespace(major=8, minor=6, total_memory=24 << 30, multi_processor_count=82),
        "is_current_stream_capturing": False,
        "mem_get_info": (24 << 30, 24 << 30),
        "is_bf16_supported": True,
        "init": None,
        "_lazy_init": None,
        "current_stream": Stream(),
    }
    for name, value in answers.items():
        setattr(torch.cuda, name, lambda *arguments, value=value, **named: value)
    torch.cuda.synchronize = lambda *arguments: SYNCHRONIZED.append("synchronize")
    torch.Tensor.pin_memory = lambda self, *arguments: pin(self)  # type: ignore[method-assign]
    torch.cuda.Stream = Stream  # type: ignore[misc, assignment]
    torch.cuda.device = lambda index: nullcontext()  # type: ignore[assignment, misc, return-value]
    torch.cuda.stream = lambda stream: stream  # type: ignore[assignment, return-value]
    modules: Any = (torch.cuda, torch.cuda.random)
    for module in modules:
        module.get_rng_state = lambda *arguments, **named: torch.empty(16, dtype=torch.uint8, device="cpu")
        module.set_rng_state = lambda *arguments, **named: None


class Seen(TorchDispatchMode):
    """Note which operations are given or make a tensor on cuda, and for which of them the host waits.

    It waits to read from the device, and to copy to it from memory that is not pinned, as the driver does that itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.waits: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given, made = (
            [leaf for leaf in leaves(nest) if isinstance(leaf, torch.Tensor)] for nest in ((args, kwargs), out)
        )
        if func.name() == "qlora_kernels::copy_to_host":  # to pinned memory, by a stream that is waited for
            PINNED[storage_address(out.untyped_storage())] = out
            self.names.add(func.name())
        elif any(tensor.is_cuda for tensor in (*given, *made)):
            self.names.add(func.name())
            reads = func.name() in ("aten::_local_scalar_dense", "aten::nonzero", "qlora_kernels::label_rows")
            to_host = not all(tensor.is_cuda for tensor in made)
            if any(tensor.is_cuda for tensor in given) and (reads or to_host):
                self.waits.append(f"read by {func.name()}")
            if func.name() in ("aten::_to_copy", "aten::copy_") and made[0].is_cuda and not given[-1].is_cuda:
                is_pinned = storage_address(given[-1].untyped_storage()) in PINNED
                if not (is_pinned and (True in args[2:] or (kwargs or {}).get("non_blocking"))):
                    self.waits.append(f"copied from the host by {func.name()}")
        return out


def to_cuda(model: nn.Module) -> None:
    """Fake tensors on cuda in the place of those on the CPU; ties stay ties."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype, device="cuda")
                    made[id(old)] = nn.Parameter(new, requires_grad=False) if tensors is module._parameters else new
                tensors[name] = made[id(old)]


def operations_of(
    fake: FakeRun, dtype: torch.dtype, optimizer: str, level: str, embeddings: str = "device"
) -> dict[str, list[str]]:
    """Those of two steps, and of a step of generation; and what the host waits for in the two steps."""
    config = make_config(
        {
            "model": {"name": str(MODEL)},
            "adapter": {"rank": 8, "dropout": 0.1},
            "optimizer": {"name": optimizer},
            "data": {"train": "rows.jsonl", "max_length": 128},
            "training": {"global_batch_size": 2, "activation_checkpointing": level, "neftune_noise_alpha": 5.0},
        }
    )
    model = build_skeleton(ModelDirectory.open(MODEL))
    seen = Seen()
    with fake:
        fill_skeleton(model, config.model, dtype)
        device = torch.device("cuda", 0)
        if embeddings == "cpu":
            keep_embeddings_on_cpu(model, device, dtype)
        to_cuda(model)
        add_adapters(model, config.adapter, config.training.seed)
        state = build_state(
            model, config, [Example([1], [1])] * 2, dtype, choose_policy(config.training, torch.device("cuda"))
        )
        assert state.device == device, state.device
        state.total_steps = 2
    state.model.train()
    pack = as_fake(make_packs([Example([1] * size, [1] * size) for size in (70, 58)], 128, packing=True)[0], fake.mode)
    with fake:
        SYNCHRONIZED.clear()
        with seen:
            for _ in range(2):
                train_step(state, [pack, pack])
            waits = seen.waits + SYNCHRONIZED
        model.eval()
        with seen, torch.no_grad():
            model(input_ids=torch.ones((1, 1), dtype=torch.int64, device=device), use_cache=False)
    return {"on cuda": sorted(seen.names), "waits": waits}


if __name__ == "__main__":
    load_bitsandbytes()  # before torch.cuda answers: it would look for more of CUDA than there is
    answer_for_cuda()
    platform.release = lambda: "5.15-microsoft-standard-WSL2"  # where nothing pages, as that would call the driver
    settings: dict[str, tuple[Any, ...]] = {
        "bf16, full": (torch.bfloat16, "paged_adamw_32bit", "full"),
        "bf16, tiled": (torch.bfloat16, "paged_adamw_8bit", "tiled"),
        "bf16, embeddings on the CPU": (torch.bfloat16, "paged_adamw_32bit", "none", "cpu"),
        "fp32, full": (torch.float32, "adamw", "full"),
    }
    fake = FakeRun()  # one for all: what is kept from step to step, such as the code of NF4, belongs to it
    print(json.dumps({name: operations_of(fake, *setting) for name, setting in settings.items()}))
