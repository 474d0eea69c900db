"""Start runs one after another on a base that is loaded once: loading an 8B for each would take most of the time.

A run starts as `qlora train` starts it, but for two things: the base is the one that is there, whatever an earlier run
put on it taken off, and memory is not planned again, since plans.py planned it and the config names the policy.
"""

import contextlib
import dataclasses
import json
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from torch import nn

from benchmarks.first_gpu.cases import CASES, raw_config
from benchmarks.first_gpu.device import Device
from benchmarks.first_gpu.kit import Kit
from qlora_trainer.adapters.layers import LoRALinear
from qlora_trainer.common.units import gib
from qlora_trainer.config.load import make_config
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.model.device import give_back_memory
from qlora_trainer.model.load import Base
from qlora_trainer.model.modules.nf4_linear import NF4Linear
from qlora_trainer.model.quantized_copy import load_base
from qlora_trainer.runs import start as runs
from qlora_trainer.runs.run import Run
from qlora_trainer.weights.model_directory import ModelDirectory

FULL: dict[str, Any] = {"activation_checkpointing": "full"}


class BaseRuns:
    """Hold the base, and start and end runs on it."""

    def __init__(self, kit: Kit, device: Device) -> None:
        self.kit = kit
        self.device = device
        self.base: Base | None = None
        self.is_memory_efficient = False  # the base that is loaded
        self.plans: dict[str, Any] = json.loads(kit.plans.read_text())["plans"] if kit.plans.is_file() else {}

    def load(self, is_memory_efficient: bool = False) -> None:
        """Load the base as a run does, and report time and memory."""
        self.unload()
        settings = self.config("load", 2048, FULL, 2, is_memory_efficient).model
        self.device.reset_peak()
        before = self.device.used
        started = time.perf_counter()
        self.base = load_base(ModelDirectory.open(self.kit.model), settings, self.kit.work / "cache")
        self.device.synchronize()
        seconds = time.perf_counter() - started
        self.is_memory_efficient = is_memory_efficient
        name = "load memory-efficient" if is_memory_efficient else "load"
        peak, reserved = self.device.peak_allocated, self.device.peak_reserved
        self.kit.result(
            name.replace(" ", "-"),
            seconds=seconds,
            base_bytes=self.base.bytes,
            allocated=self.device.allocated,
            peak_allocated=peak,
            peak_reserved=reserved,
            used_on_card=self.device.used - before,
        )
        self.kit.verdict(
            f"{name}: {seconds:.1f} s to NF4, hashed; base {gib(self.base.bytes)}, at most {gib(peak)} allocated,"
            f" {gib(reserved)} reserved"
        )

    def unload(self) -> None:
        self.base = None
        give_back_memory()

    def config(
        self, name: str, tokens: int, training: dict[str, Any], steps: int, is_memory_efficient: bool | None = None
    ) -> RunConfig:
        raw = raw_config(
            str(self.kit.model),
            str(self.kit.rows),
            str(self.kit.runs / name),
            self.kit.tokens(tokens),
            training,
            steps,
            self.is_memory_efficient if is_memory_efficient is None else is_memory_efficient,
        )
        raw["model"]["device"] = self.device.name
        return make_config(raw)

    def start(self, name: str, tokens: int, training: dict[str, Any], steps: int) -> Run:
        """Start a run of full rows; one of that name that was there before is gone."""
        shutil.rmtree(self.kit.runs / name, ignore_errors=True)
        config = self.config(name, tokens, training, steps)
        with self._on_this_base():
            return runs.start_run(config)

    def resume(self, name: str) -> Run:
        with self._on_this_base():
            return runs.resume_run(self.kit.runs / name)

    def drop(self, run: Run) -> None:
        """Let go of all of a run but the base."""
        run.state.optimizer.release()
        del run.state
        self.strip()

    def strip(self) -> None:
        """Make the base what it was when it was loaded, and free what runs made."""
        if self.base is not None:
            strip(self.base.model)
        give_back_memory()

    def take_case(self, name: str) -> None:
        """Train as cases.py says, under a limit of memory, and report what it took relative to its plan."""
        case = next(case for case in CASES if case.name == name)
        if case.card is not None and self.device.is_cuda and self.device.total < case.card * 10**9:
            self.kit.verdict(f"train {name}: not tried, this card has {self.device.total / 1e9:.0f} GB")
            return
        plan = self.plans.get(name)
        training = plan["policy"] if plan and not self.kit.is_dry else {"activation_checkpointing": case.policy}
        started = time.perf_counter()
        with self.device.limited_to(case.card):
            run = self.start(name, case.tokens, training, case.steps)
            ready = time.perf_counter() - started
            records: list[dict[str, Any]] = []
            run.train(records.append)
        reserved, allocated = self.device.peak_reserved, self.device.peak_allocated
        timed = records[1:] or records  # a single step was warmed up by the probe
        rate = statistics.median(record["tokens_per_second"] for record in timed)
        recovered = " ".join(record["recovered"] for record in records if "recovered" in record)
        tokens, policy = self.kit.tokens(case.tokens), str(run.state.policy)
        self.kit.result(
            f"train-{name}",
            card_gb=case.card,
            tokens=tokens,
            policy=policy,
            memory_efficient=case.is_memory_efficient,
            tokens_per_second=rate,
            losses=[record["loss"] for record in records],
            seconds_ready=ready,
            seconds=time.perf_counter() - started,
            peak_reserved=reserved,
            peak_allocated=allocated,
            planned={key: value for key, value in plan.items() if key != "components"} if plan else None,
            used_on_card=self.device.used,
            recovered=recovered,
            warnings=run.warnings,
        )
        size = f"on {case.card} GB" if case.card else "on the whole card"
        self.kit.verdict(
            f"train {name} ({size}, {tokens:,} tokens, {policy}): {rate:,.0f} tokens/s, loss {records[0]['loss']:.3f}"
            f" to {records[-1]['loss']:.3f}, {gib(reserved)} reserved, {gib(allocated)} allocated"
            f"{_next_to_plan(plan, reserved, allocated)}{'; RECOVERED: ' + recovered if recovered else ''}"
        )
        self.drop(run)

    @contextlib.contextmanager
    def _on_this_base(self) -> Iterator[None]:
        base = self.base
        assert base is not None
        self.strip()

        def loaded(directory: Path, *_: Any) -> Base:
            return dataclasses.replace(base, warnings=list(base.warnings))

        with (
            mock.patch.object(runs, "load_base", loaded),
            mock.patch.object(runs, "check_fits_here", return_value=None),
        ):
            yield


def strip(model: nn.Module) -> None:
    """Take adapters, memory-efficient forwards and the workspace off a model."""
    for path, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            model.set_submodule(path, module.base)
    for module in model.modules():
        module.__dict__.pop("forward", None)
        if isinstance(module, NF4Linear):
            module.workspaces = ()
    model.requires_grad_(False)
    model.eval()


def _next_to_plan(plan: dict[str, Any] | None, reserved: int, allocated: int) -> str:
    if plan is None or not reserved:
        return ""
    return (
        f"; planned {gib(plan['reserved'])} reserved ({reserved / plan['reserved'] - 1:+.1%}),"
        f" {gib(plan['allocated'])} allocated ({allocated / plan['allocated'] - 1:+.1%})"
    )
