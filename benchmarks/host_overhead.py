"""Count what a processor does for each decoder layer in a training step, on the branch that a CUDA card takes.

    python -m benchmarks.host_overhead [--policies none full] [--layers 2 4] [--names] [--seconds STEPS]

A card waits for its processor where a step's operations are short. What the processor does for a layer hardly depends
on sizes, so it is counted at tiny ones: forward and backward of one micro-batch, with recomputation where the policy
has it, on fake tensors planned for a card. A layer's share is the difference of two depths, over the layers between.

- operations: what is sent to torch's dispatcher, each once, though an operation of ours may send others when it runs.
- Python calls: of functions, those of the fake tensors themselves left out.
- autograd nodes: in the graph of the loss, with those made for recomputation.

What a card waits for in generating an answer is counted too: the forward of one token of each of four answers, next to
training's forward alone.

Peers are peft + bitsandbytes (peer_memory.py) and transformers' own model in bf16, all weights trained, both with every
layer recomputed, by the same counts. `--seconds` measures the processor time of so many steps too, on real
tensors of a CPU with what is for CPUs left out (QLORA_KERNELS=reference, set by the caller): for two commits in turn.
"""

import argparse
import dataclasses
import functools
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from benchmarks.peer_memory import fill, model_without_weights
from qlora_kernels.torch_internals import TorchDispatchMode
from qlora_trainer.adapters.inject import add_adapters
from qlora_trainer.config.load import make_config
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.batching.packing import Example
from qlora_trainer.model.forward import loss_sum
from qlora_trainer.planning.empty_run import ASSUMED_CARD, empty_run
from qlora_trainer.planning.fake_tensors import FakeRun
from qlora_trainer.planning.skeleton import build_skeleton, fill_skeleton
from qlora_trainer.training.memory.activations import choose_policy
from qlora_trainer.training.state import build_state
from qlora_trainer.training.step import accumulate_gradients
from qlora_trainer.weights.model_directory import ModelDirectory

TOKENS, RANK = 128, 8
OF_FAKE_TENSORS = ("prim.device.default",)  # asked by fake tensors, and by nobody where they are real


@dataclasses.dataclass
class Counts:
    """Hold what was counted in a step."""

    operations: Counter[str] = dataclasses.field(default_factory=Counter)
    calls: Counter[str] = dataclasses.field(default_factory=Counter)
    nodes: Counter[str] = dataclasses.field(default_factory=Counter)

    def less(self, other: "Counts", layers: int) -> "Counts":
        """Subtract another step's, and divide by the layers between the two."""

        def share(mine: Counter[str], theirs: Counter[str]) -> Counter[str]:
            return Counter({k: round((mine[k] - theirs[k]) / layers) for k in mine if mine[k] - theirs[k] >= layers})

        fields = [field.name for field in dataclasses.fields(self)]
        return Counts(**{name: share(getattr(self, name), getattr(other, name)) for name in fields})


class _Operations(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func) not in OF_FAKE_TENSORS:
            self.counts.operations[str(func)] += 1
        return func(*args, **(kwargs or {}))


class _Calls:
    """Count calls of Python functions; a dispatch mode's, and those of what torch wraps around it, are left out."""

    AROUND_A_MODE = ("simple_registry.py", "_dynamo/eval_frame.py", "torch/_compile.py", "torch/compiler/__init__.py")

    def __init__(self, counts: Counts) -> None:
        self.counts = counts
        self.depth_in_a_mode = 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call":
            if self.depth_in_a_mode or code.co_name == "__torch_dispatch__" or "/fake_tensor.py" in code.co_filename:
                self.depth_in_a_mode += 1
            elif not code.co_filename.endswith(self.AROUND_A_MODE) and code.co_filename != __file__:
                self.counts.calls[f"{code.co_filename}:{code.co_qualname}"] += 1
        elif event == "return" and self.depth_in_a_mode:
            self.depth_in_a_mode -= 1


def nodes_of(loss: torch.Tensor) -> Counter[str]:
    """Count the nodes of a graph by name."""
    found: Counter[str] = Counter()
    seen: set[Any] = set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found[type(node).__name__] += 1
            waiting += [following for following, _ in node.next_functions]
    return found


@contextmanager
def counted(counts: Counts) -> Iterator[None]:
    """Count operations and Python calls in the block."""
    with _Operations(counts):
        sys.setprofile(_Calls(counts))
        try:
            yield
        finally:
            sys.setprofile(None)


def count_ours(directory: ModelDirectory, layers: int, policy: str) -> Counts:
    """Count a micro-batch of ours."""
    counts = Counts()
    config = _config(directory, policy)
    kept = choose_policy(config.training, torch.device("cuda"))
    state, pack, fake = empty_run(directory, config, torch.bfloat16, kept, layers, ASSUMED_CARD)
    with fake:
        state.model.train()
        accumulate_gradients(state, [pack])  # what is made once
        with counted(counts), _watching_backward(counts):
            accumulate_gradients(state, [pack])
    return counts


def count_forward(directory: ModelDirectory, layers: int, is_answer: bool) -> Counts:
    """Count a forward of training, or that of one token of four answers."""
    counts = Counts()
    config = _config(directory, "none")
    kept = choose_policy(config.training, torch.device("cuda"))
    state, pack, fake = empty_run(directory, config, torch.bfloat16, kept, layers, ASSUMED_CARD)
    with fake:
        state.model.train()
        accumulate_gradients(state, [pack])  # what is made once
        forward: Callable[[], object] = functools.partial(loss_sum, state.model, pack, state.forward.loss_path)
        if is_answer:
            forward = _forward_of_a_token(state.model)
        with counted(counts):
            forward()
    return counts


def _forward_of_a_token(model: Any) -> Callable[[], None]:
    """Begin four answers, and return what takes the next token of each."""
    cache = DynamicCache(config=model.config)

    def take(tokens: int) -> None:
        with torch.no_grad():
            ids = torch.ones((4, tokens), dtype=torch.int64)
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    model.eval()
    take(10)
    take(1)
    return functools.partial(take, 1)


def count_peer(directory: ModelDirectory, layers: int, is_plain: bool) -> Counts:
    """Count a micro-batch of peft + bitsandbytes, or of transformers' own model with all its weights trained."""
    counts = Counts()
    if is_plain:
        config = directory.config()
        config.num_hidden_layers = layers
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model = model_without_weights(directory.path, RANK, layers, prepared=False)
    with FakeRun(ASSUMED_CARD):
        fill(model)
        ids = torch.ones((1, TOKENS), dtype=torch.int64)

        def step() -> None:
            model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()

        step()
        with counted(counts), _watching_backward(counts):
            step()
    return counts


@contextmanager
def _watching_backward(counts: Counts) -> Iterator[None]:
    """Count the nodes of each graph that `backward` is called on, and those that it makes and runs inside."""
    backward = torch.Tensor.backward

    def watched(self: torch.Tensor, *arguments: Any, **named: Any) -> None:
        counts.nodes.update(nodes_of(self))
        backward(self, *arguments, **named)

    torch.Tensor.backward = watched  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.backward = backward  # type: ignore[method-assign]


def _config(directory: ModelDirectory, policy: str, device: str = "cuda") -> RunConfig:
    values = {
        "model": {"name": str(directory.path), "device": device},
        "adapter": {"rank": RANK},
        "data": {"train": "rows.jsonl", "max_length": TOKENS},
        "training": {"activation_checkpointing": policy, "micro_batch_tokens": TOKENS, "global_batch_size": 2},
    }
    return make_config(values)


def tiny_directory(folder: Path, layers: int) -> ModelDirectory:
    """Write the config of a Llama of tiny widths, with grouped heads as Llama 3's."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    config.save_pretrained(folder)
    return ModelDirectory.open(folder)


def milliseconds(directory: ModelDirectory, layers: int, policy: str, steps: int) -> float:
    """Measure the processor time of a micro-batch on a CPU, of a base whose every weight is zero."""
    config = _config(directory, policy, "cpu")
    kept, dtype = choose_policy(config.training, torch.device("cpu")), torch.bfloat16
    model = build_skeleton(directory, layers, dtype)
    fill_skeleton(model, config.model, dtype)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    add_adapters(model, config.adapter, config.training.seed)
    state = build_state(model, config, [Example([1] * 64, [1] * 64)] * 2, dtype, kept)
    packs = state.loader.next()
    state.model.train()
    accumulate_gradients(state, packs)
    began = time.process_time()
    for _ in range(steps):
        accumulate_gradients(state, packs)
    return (time.process_time() - began) / steps * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", default=["none", "full"])
    parser.add_argument("--layers", nargs=2, type=int, default=[2, 4], metavar=("FEW", "MORE"))
    parser.add_argument("--names", action="store_true", help="name the most frequent ones of ours")
    parser.add_argument("--seconds", type=int, default=0, metavar="STEPS", help="measure processor time too")
    options = parser.parse_args()
    few, more = options.layers
    torch.set_num_threads(1)
    times: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        directory = tiny_directory(Path(folder), more)
        for policy in options.policies if options.seconds else ():
            of_more, of_few = (milliseconds(directory, layers, policy, options.seconds) for layers in (more, few))
            times[policy] = (of_more - of_few) / (more - few)
        found: dict[str, Counts] = {}
        for policy in options.policies:
            found[f"ours, {policy}"] = count_ours(directory, more, policy).less(
                count_ours(directory, few, policy), more - few
            )
        for name, is_answer in (("ours, forward alone", False), ("ours, a token of answers", True)):
            found[name] = count_forward(directory, more, is_answer).less(
                count_forward(directory, few, is_answer), more - few
            )
        for name, is_plain in (("peft + bitsandbytes, full", False), ("transformers, bf16, full", True)):
            found[name] = count_peer(directory, more, is_plain).less(count_peer(directory, few, is_plain), more - few)
    print(f"a decoder layer of Llama, one micro-batch forward and backward:\n{'':28}{'operations':>12}", end="")
    print(f"{'Python calls':>14}{'autograd nodes':>16}")
    for name, counts in found.items():
        print(f"{name:28}{counts.operations.total():12}{counts.calls.total():14}{counts.nodes.total():16}")
    for policy, time_of_a_layer in times.items():
        print(f"ours, {policy}: {time_of_a_layer:.2f} ms of processor time on a CPU")
    if options.names:
        for name, counts in found.items():
            if name.startswith("ours"):
                for kind in (counts.operations, counts.calls, counts.nodes):
                    print(f"\n{name}:")
                    for key, found_times in kind.most_common(40):
                        print(f"{found_times:6} {key.split('site-packages/')[-1]}")


if __name__ == "__main__":
    main()
