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

from qlora_kernels.torch_internals import FakeTensorMode, TorchDispatchMode, leaves  # noqa: E402
from qlora_trainer.adapters.inject import add_adapters  # noqa: E402
from qlora_trainer.config.load import make_config  # noqa: E402
from qlora_trainer.data.batching.packing import make_packs  # noqa: E402
from qlora_trainer.data.types import Example  # noqa: E402
from qlora_trainer.planning.empty_run import as_fake  # noqa: E402
from qlora_trainer.planning.fake_tensors import FakeRun  # noqa: E402
from qlora_trainer.planning.skeleton import build_skeleton, fill_skeleton  # noqa: E402
from qlora_trainer.training.memory.activations import choose_policy  # noqa: E402
from qlora_trainer.training.state import build_state  # noqa: E402
from qlora_trainer.training.step import train_step  # noqa: E402
from qlora_trainer.weights.model_directory import ModelDirectory  # noqa: E402
from qlora_trainer.weights.nf4 import load_bitsandbytes  # noqa: E402


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
        "synchronize": None,
        "init": None,
        "_lazy_init": None,
        "current_stream": Stream(),
    }
    for name, value in answers.items():
        setattr(torch.cuda, name, lambda *arguments, value=value, **named: value)
    torch.Tensor.pin_memory = lambda self, *arguments: self  # type: ignore[method-assign]
    torch.cuda.Stream = Stream  # type: ignore[misc, assignment]
    torch.cuda.device = lambda index: nullcontext()  # type: ignore[assignment, misc, return-value]
    torch.cuda.stream = lambda stream: stream  # type: ignore[assignment, return-value]
    modules: Any = (torch.cuda, torch.cuda.random)
    for module in modules:
        module.get_rng_state = lambda *arguments, **named: torch.empty(16, dtype=torch.uint8, device="cpu")
        module.set_rng_state = lambda *arguments, **named: None


class Seen(TorchDispatchMode):
    """Which operations are given or make a tensor on cuda, and for which of them the host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.waits: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        found = leaves((args, kwargs, out))
        if any(isinstance(leaf, torch.Tensor) and leaf.device.type == "cuda" for leaf in found):
            self.names.add(func.name())
            given_on_cuda = any(isinstance(leaf, torch.Tensor) and leaf.is_cuda for leaf in leaves((args, kwargs)))
            made_elsewhere = any(isinstance(leaf, torch.Tensor) and not leaf.is_cuda for leaf in leaves(out))
            reads = func.name() in ("aten::_local_scalar_dense", "aten::nonzero", "qlora_kernels::label_rows")
            copies = func.name() != "qlora_kernels::copy_to_host" and made_elsewhere
            if given_on_cuda and (reads or copies):
                self.waits.append(func.name())
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


def operations_of(fake: FakeRun, dtype: torch.dtype, optimizer: str, **changes: Any) -> dict[str, list[str]]:
    """Those of two steps, and of a step of generation; and those of the two steps that the host waits for."""
    config = make_config(
        {
            "model": {"name": str(MODEL)},
            "adapter": {"rank": 8, "dropout": 0.1},
            "optimizer": {"name": optimizer},
            "data": {"train": "rows.jsonl", "max_length": 128},
            "training": {"global_batch_size": 2, **changes},
        }
    )
    model = build_skeleton(ModelDirectory.open(MODEL))
    seen = Seen()
    with fake:
        fill_skeleton(model, config.model, dtype)
        to_cuda(model)
        add_adapters(model, config.adapter, config.training.seed)
        device = torch.device("cuda", 0)
        state = build_state(
            model, config, [Example([1], [1])] * 2, dtype, choose_policy(config.training, torch.device("cuda"))
        )
        assert state.device == device, state.device
        state.total_steps = 2
    state.model.train()
    pack = as_fake(make_packs([Example([1] * size, [1] * size) for size in (70, 58)], 128, packing=True)[0], fake.mode)
    with fake:
        with seen:
            for _ in range(2):
                train_step(state, [pack, pack])
            waits = list(seen.waits)
        model.eval()
        with seen, torch.no_grad():
            model(input_ids=torch.ones((1, 1), dtype=torch.int64, device=device), use_cache=False)
    return {"on cuda": sorted(seen.names), "waits": waits}


if __name__ == "__main__":
    load_bitsandbytes()  # before torch.cuda answers: it would look for more of CUDA than there is
    answer_for_cuda()
    platform.release = lambda: "5.15-microsoft-standard-WSL2"  # where nothing pages, as that would call the driver
    settings = {
        "bf16, full": (torch.bfloat16, "paged_adamw_32bit", "full"),
        "bf16, tiled": (torch.bfloat16, "paged_adamw_8bit", "tiled"),
        "fp32, full": (torch.float32, "adamw", "full"),
    }
    fake = FakeRun()  # one for all: what is kept from step to step, such as documents' bounds, belongs to it
    print(
        json.dumps(
            {
                n: operations_of(fake, d, optimizer, activation_checkpointing=a)
                for n, (d, optimizer, a) in settings.items()
            }
        )
    )
