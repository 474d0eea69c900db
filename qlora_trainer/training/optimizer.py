"""Update the adapters: paged AdamW over flat groups.

bitsandbytes' optimizers are used as they are, but for three things. Their `step` waits for the device, which here only
does who reads the state. Their `load_state_dict` aliases what it is given, accepts state of other widths, and brings
paged state back as ordinary GPU tensors; so state is saved by group name with the layout it belongs to, checked
exactly, and copied in place into the buffers that bitsandbytes made itself. And those buffers are made when the
optimizer is built, so that memory runs out before training rather than in it, and the bytes really paged are known.
bitsandbytes keeps paged buffers for the life of the process: build one optimizer and keep it. Where the card cannot
page (memory/managed_memory.py), its optimizer that does not takes the place of the one that does: the same arithmetic
and the same state, so that a checkpoint of either resumes as the other.

Left out: the loop, and what happens after a non-finite norm (loop.py).
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_trainer.common.errors import CheckpointError
from qlora_trainer.common.units import counted, dtype_name
from qlora_trainer.config.schema import OptimizerConfig
from qlora_trainer.training.flat import FlatGroup
from qlora_trainer.training.memory.managed_memory import paging_refusal
from qlora_trainer.weights.bitsandbytes_internals import (
    forget_paged,
    is_paged,
    make_state,
    makes_state_early,
    update_parameters,
)
from qlora_trainer.weights.nf4 import load_bitsandbytes

_PAGED = "Paged"  # what the names of bitsandbytes' classes begin with where their state pages
STATE_KEYS = ("state1", "state2", "absmax1", "absmax2", "exp_avg", "exp_avg_sq")


class Optimizer:
    """Update flat groups by AdamW. Build it with `build_optimizer`.

    Args:
        optimizer: of torch or bitsandbytes, one parameter group a flat group.
        groups: all that train.
        bits: of a number of state.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, groups: Sequence[FlatGroup], bits: int) -> None:
        self.optimizer = optimizer
        self.groups = list(groups)
        self.bits = bits
        self._make_state()

    def step(self, learning_rate: float) -> None:
        """Update every parameter from the flat gradients.

        Args:
            learning_rate: of this step.
        """
        for group in self.groups:
            group.check_views()  # an update of a buffer that the model no longer reads would go unnoticed
        for settings, group in zip(self.optimizer.param_groups, self.groups, strict=True):
            settings["lr"] = learning_rate * group.rate_factor
        if makes_state_early(self.optimizer):
            update_parameters(self.optimizer)
        else:
            self.optimizer.step()

    def zero_grad(self) -> None:
        """Zero all gradients in place."""
        for group in self.groups:
            group.zero_grad()

    def release(self) -> None:
        """Take this optimizer's paged buffers off bitsandbytes' list, which would hold them until the process ends."""
        forget_paged(self._tensors().values())

    @property
    def state_bytes(self) -> int:
        """Count the bytes of optimizer state, paged or not.

        Returns:
            Bytes.
        """
        return sum(tensor.nbytes for tensor in self._tensors().values())

    @property
    def paged_bytes(self) -> int:
        """Count the bytes of state really paged: none on a CPU, none of a group under 100,000 elements.

        Returns:
            Bytes.
        """
        return sum(tensor.nbytes for tensor in self._tensors().values() if is_paged(tensor))

    @property
    def steps(self) -> set[int]:
        """Return how many updates the groups have had.

        Returns:
            One number, but for an update that failed between them.
        """
        return {int(self.optimizer.state[group.data]["step"]) for group in self.groups}

    @property
    def is_paged(self) -> bool:
        """Return True if state is asked for that pages where the device can.

        Returns:
            True if it is.
        """
        return is_paged(self.optimizer)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Copy all state to the CPU, by "<group>.<key>".

        Returns:
            The copies, and the JSON that says what they belong to.
        """
        self._wait_for_device()
        tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._tensors().items()}
        return tensors, self._description()

    def load_state_dict(self, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
        """Copy saved state into this optimizer's own buffers, so that paged state stays paged.

        State of another optimizer, width, settings, or set of parameters is refused by a CheckpointError; nothing is
        changed then.

        Args:
            tensors: as `state_dict` gave them.
            description: as `state_dict` gave it.
        """
        self._check(tensors, description)
        steps = {group["name"]: group["step"] for group in description["groups"]}
        for group in self.groups:
            state = self.optimizer.state[group.data]
            if isinstance(state["step"], Tensor):
                state["step"].fill_(steps[group.name])
            else:
                state["step"] = steps[group.name]
        self._wait_for_device()
        for name, buffer in self._tensors().items():
            buffer.copy_(tensors[name])

    def _make_state(self) -> None:
        if not makes_state_early(self.optimizer):
            self._make_torch_state()
            return
        with warnings.catch_warnings():
            # `paged_bytes` says it instead.
            warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
            make_state(self.optimizer)

    def _make_torch_state(self) -> None:
        """Make zero moments at step 0, as torch's AdamW would at its first step."""
        zeros = {
            index: {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(group.data),
                "exp_avg_sq": torch.zeros_like(group.data),
            }
            for index, group in enumerate(self.groups)
        }
        self.optimizer.load_state_dict({"state": zeros, "param_groups": self.optimizer.state_dict()["param_groups"]})

    def _wait_for_device(self) -> None:
        """Wait until the device is idle: on some systems the host may touch paged memory only then."""
        if self.groups[0].data.is_cuda:
            torch.cuda.synchronize(self.groups[0].data.device)

    def _tensors(self) -> dict[str, Tensor]:
        """Return the live state. bitsandbytes' code books (qmap1, qmap2) are constants, not state."""
        return {
            f"{group.name}.{key}": self.optimizer.state[group.data][key]
            for group in self.groups
            for key in STATE_KEYS
            if key in self.optimizer.state[group.data]
        }

    def _description(self) -> dict[str, Any]:
        settings = self.optimizer.param_groups[0]
        return {
            "class": type(self.optimizer).__name__,
            "bits": self.bits,
            "betas": list(settings["betas"]),
            "epsilon": settings["eps"],
            "groups": [
                {
                    "name": group.name,
                    "step": int(self.optimizer.state[group.data]["step"]),
                    "weight_decay": group.weight_decay,
                    "rate_factor": group.rate_factor,
                    "parameters": group.layout(),
                }
                for group in self.groups
            ],
        }

    def _check(self, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
        ours = self._description()
        rule, our_rule = (_update_rule(one.get("class")) for one in (description, ours))
        problems = [
            f"{key} is {description.get(key)} in the checkpoint and {ours[key]} here"
            for key in ("class", "bits", "betas", "epsilon")
            if (rule != our_rule if key == "class" else description.get(key) != ours[key])
        ]
        problems += _layout_problems(description.get("groups"), ours["groups"])
        expected = self._tensors()
        for name in sorted(expected.keys() | tensors.keys()):
            if name not in tensors:
                problems.append(f"the state {name} is missing")
            elif name not in expected:
                problems.append(f"there is state {name}, which this optimizer does not have")
            elif (found := _kind(tensors[name])) != (wanted := _kind(expected[name])):
                problems.append(f"the state {name} is {found} in the checkpoint and {wanted} here")
        if problems:
            raise CheckpointError(
                "The checkpoint's optimizer state does not belong to this run:\n"
                + "\n".join(f"  - {problem}" for problem in problems)
                + "\nResume with the settings it was saved with, or start a new run from its adapter "
                "(adapter.init_from), with a fresh optimizer."
            )


def build_optimizer(config: OptimizerConfig, groups: Sequence[FlatGroup]) -> Optimizer:
    """Build the optimizer that `config.name` names, one parameter group a flat group. Its state exists at once.

    A paged one where the card refuses to page is the same without paging.

    Args:
        config: the config's section `optimizer`.
        groups: all that train.

    Returns:
        The optimizer.
    """
    params = [{"params": [group.data], "weight_decay": group.weight_decay} for group in groups]
    common = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2), "eps": config.epsilon}
    if config.name == "adamw":
        return Optimizer(torch.optim.AdamW(params, fused=True, **common), groups, bits=32)  # type: ignore[arg-type]
    parameter = groups[0].data
    bits = 8 if config.name == "paged_adamw_8bit" else 32
    prefix = "" if parameter.device.type == "cuda" and paging_refusal(parameter.device) else _PAGED
    kind = getattr(load_bitsandbytes().optim, f"{prefix}AdamW{bits}bit")
    return Optimizer(kind(params, **common), groups, bits)


def _update_rule(name: Any) -> Any:
    """Return the name of an optimizer's class, the same paged or not."""
    return name.removeprefix(_PAGED) if isinstance(name, str) else name


def _layout_problems(saved: Any, ours: list[dict[str, Any]]) -> list[str]:
    """List differences in the groups' names, weight decay, and parameters in the order of the buffers."""
    names = [group["name"] for group in ours]
    if not isinstance(saved, list) or [group.get("name") for group in saved] != names:
        found = [group.get("name") for group in saved] if isinstance(saved, list) else saved
        return [f"the parameter groups are {found} in the checkpoint and {names} here"]
    problems = []
    for theirs, group in zip(saved, ours, strict=True):
        problems += [
            f"{key} of {group['name']} is {theirs.get(key)} in the checkpoint and {group[key]} here"
            for key in ("weight_decay", "rate_factor")
            if theirs.get(key) != group[key]
        ]
        if theirs.get("parameters") != group["parameters"]:
            problems.append(_first_difference(group["name"], theirs.get("parameters"), group["parameters"]))
    return problems


def _first_difference(group: str, saved: Any, ours: list[dict[str, Any]]) -> str:
    saved = saved if isinstance(saved, list) else []
    for index, (theirs, own) in enumerate(zip(saved, ours, strict=False)):
        if theirs != own:
            return f"parameter {index} of {group} is {theirs} in the checkpoint and {own} here"
    return f"{group} has {counted(len(saved), 'parameter')} in the checkpoint and {len(ours)} here"


def _kind(tensor: Tensor) -> str:
    return f"{dtype_name(tensor.dtype)} {tuple(tensor.shape)}"
