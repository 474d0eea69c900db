"""Make a run from a config, or resume one from its directory.

What can fail fast comes first: the config and the output directory, then the tokenizer and the data (bad rows fail in
seconds), then the base, the adapters and the optimizer. `resume_run` makes the same objects from the run directory and
loads the newest valid checkpoint into them; a new run has a checkpoint of step 0, so that it can always be resumed.
Both return run.py's `Run`. Left out: training it (run.py).
"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from qlora_trainer.adapters.inject import add_adapters, load_adapter_state
from qlora_trainer.adapters.kinds.table import ADAPTER_KINDS, adapter_kind
from qlora_trainer.adapters.peft_format import read_adapter
from qlora_trainer.adapters.tokens.new_tokens import run_tokenizer
from qlora_trainer.adapters.tokens.put_tokens import check_token_ids
from qlora_trainer.common.atomic import new_directory, refuse_existing
from qlora_trainer.common.cache import user_cache
from qlora_trainer.common.errors import CheckpointError, ConfigError, missing_files_name
from qlora_trainer.common.process_memory import (
    private_bytes,
    return_freed_memory,
    trim_freed_memory,
    use_one_arena,
)
from qlora_trainer.common.progress import Progress, silent
from qlora_trainer.config.load import save_config, written_value
from qlora_trainer.config.override import override
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.preparation.source_keys import check_files
from qlora_trainer.data.rendering.renderer import Renderer
from qlora_trainer.model.device import choose_device, kernel_warnings, missing_card_warnings
from qlora_trainer.model.fingerprint import BaseFingerprint
from qlora_trainer.model.modules.experts import named_as_experts
from qlora_trainer.model.quantized_copy import load_base
from qlora_trainer.model.source import resolve_model
from qlora_trainer.planning.fit import check_fits_here
from qlora_trainer.planning.memory_plan import longest_row
from qlora_trainer.planning.options import changed_options, options_in_words
from qlora_trainer.runs.base_start import start_of_base
from qlora_trainer.runs.checkpoint import load_checkpoint, newest_checkpoint
from qlora_trainer.runs.directory import (
    RUN_CONFIG_NAME,
    prepare_data,
    read_run_config,
    read_samples,
    run_renderer,
    write_run_config,
)
from qlora_trainer.runs.initial_adapter import check_base, check_settings
from qlora_trainer.runs.pace import limit_in_force, lowered_warning, pace_here, smaller_by_plan
from qlora_trainer.runs.resume_rules import config_changes, environment, environment_differences, with_saved_options
from qlora_trainer.runs.run import Run
from qlora_trainer.runs.untrained_tokens import untrained_token_warnings
from qlora_trainer.training.determinism import set_up_cublas, workers_for
from qlora_trainer.training.memory.activations import choose_policy
from qlora_trainer.training.memory.managed_memory import paging_refusal
from qlora_trainer.training.state import as_saved, build_state, state_outside_file
from qlora_trainer.weights.gguf.importer import import_warnings
from qlora_trainer.weights.model_directory import ModelDirectory

_LARGE_BASE = 2**30  # bytes; for a smaller base on a CPU, new pages cost more time than the memory is worth


def start_run(config: RunConfig, progress: Progress = silent) -> Run:
    """Make a new run; its directory is made last, with the config and a checkpoint of step 0.

    On an error, of any kind of QLoRATrainerError, nothing is left in the output directory.

    Args:
        config: of the run, resolved; training.output_dir must be new or empty.
        progress: is called as files are fetched, prepared and loaded.

    Returns:
        The run before its first step. Its config also has the commit of a hub model, the date of its template, and the
        memory-efficient options that it was left to choose.
    """
    directory = Path(config.training.output_dir)
    refuse_existing(directory)
    check_files(config.data)  # before the model, which may take minutes to fetch or import
    device = _run_device(config)  # and a GPU that is asked for and not there
    with missing_files_name("adapter.init_from"):
        source = Path(config.adapter.init_from) if config.adapter.init_from else None
        initial = read_adapter(source) if source else None
    with missing_files_name("model.name"):
        model = resolve_model(config.model.name, config.model.revision, user_cache(), progress)
    config = _with_commit(config, model.path)
    if start := start_of_base(model, config.adapter):
        source, initial = start, read_adapter(start)
    if source and initial:
        check_settings(initial, source, config, model)
    tokenizer = run_tokenizer(model, config.adapter)
    renderer = run_renderer(config, tokenizer, model)
    config = _with_date(config, renderer)
    run = _assemble(config, directory, model, renderer, device, progress)
    if source and initial:
        run.warnings += check_base(initial, source, config, run.base.fingerprint)
        check_token_ids(run.base.model, initial.config)
        load_adapter_state(run.base.model, initial.tensors)
    with new_directory(directory) as work:
        save_config(run.config, work / RUN_CONFIG_NAME)
        run.prepared.write_skipped_rows(work)
        run.save(work)
    return run


def resume_run(directory: Path, overrides: Sequence[str] = (), progress: Progress = silent) -> Run:
    """Make a run in the state of its newest valid checkpoint; without one, CheckpointError is raised.

    Args:
        directory: the run directory.
        overrides: `section.key=value` of keys that only concern memory, logging or where files are, such as
            training.activation_checkpointing=full; written to config.yaml. Edits of config.yaml count in the same way.
        progress: is called as files are fetched, prepared and loaded.

    Returns:
        The run, ready to train on; its warnings say what has changed.

    Raises:
        CheckpointError: the checkpoint belongs to other data, another base, or other settings.
    """
    try:
        config = read_run_config(directory, overrides)
    except ConfigError:
        _refuse_other_kind(directory, overrides)
        raise
    read_samples(directory)  # a damaged file is reported here, not when training ends
    found = newest_checkpoint(directory)
    tensors, state = load_checkpoint(found.path)
    config = with_saved_options(state["config"], config)
    refused, warnings = config_changes(state["config"], config)
    adapter = read_adapter(found.path)
    refused += [
        f"{key}: {was} → {now}, by the adapter's own file"
        for key, (was, now) in adapter.differences(config.adapter).items()
        if not any(change.startswith(f"{key}:") for change in refused)
    ]
    if refused:
        raise CheckpointError(_another_run(directory, found.path, refused))
    check_files(config.data)
    device = _run_device(config)
    with missing_files_name("model.name"):
        model = resolve_model(config.model.name, config.model.revision, user_cache(), progress)
    in_force = as_saved(config, state["training"]["memory"], longest_row(model, config))
    renderer = run_renderer(config, run_tokenizer(model, config.adapter), model)
    run = _assemble(config, directory, model, renderer, device, progress, in_force)
    if difference := BaseFingerprint.from_json(state["base"]).difference(run.base.fingerprint):
        raise CheckpointError(
            f"The base {config.model.name} is not the one this run trains on: {difference}. Restore it, or start a new "
            "run on this one."
        )
    if state["data"] != run.prepared.key:
        raise CheckpointError(
            f"The data of this run changed since {found.path.name}: the files, the tokenizer or how rows are rendered. "
            "A resumed run would not be the one that was started. Restore the data, or start a new run with "
            f"{override('adapter.init_from', str(found.path))}"
        )
    check_token_ids(run.base.model, adapter.config)
    load_adapter_state(run.base.model, state_outside_file(tensors) or adapter.tensors)
    run.state.load_state_dict(tensors, state["training"])
    if run.plan and (lowered := lowered_warning(run.plan, in_force)):
        run.state.set_memory(limit_in_force(run.plan, config, in_force), run.plan.policy)
        run.warnings.append(lowered)
    here = environment(run.base.device, run.base.compute_dtype)
    run.warnings += [*found.passed_over, *warnings, *environment_differences(state["environment"], here)]
    if run.config != read_run_config(directory):
        write_run_config(run.config, directory)
    return run


def _run_device(config: RunConfig) -> torch.device:
    """Choose the device of a run, and set up what must be before it is first used.

    That is cuBLAS, where a run on CUDA is to be repeatable; on a CPU it is the allocator, before threads begin.
    """
    if config.training.deterministic:
        set_up_cublas(config.model.device)
    device = choose_device(config.model.device)
    if device.type == "cpu":
        use_one_arena()
    return device


def _assemble(
    config: RunConfig,
    directory: Path,
    model: ModelDirectory,
    renderer: Renderer,
    device: torch.device,
    progress: Progress,
    in_force: RunConfig | None = None,
) -> Run:
    """Make a run before its first step; `in_force` is the config with what a checkpoint's run had chosen."""
    prepared = prepare_data(config, renderer.tokenizer, model, progress)
    unpaged = _unpaged_warnings(config, device, progress)  # before the plan, which counts the state where it is held
    slower = kernel_warnings(device.type)
    pace = pace_here(config, prepared, device)
    plan = check_fits_here(model, config, device, progress, pace, in_force)
    options = plan.options if plan else config.memory_options()
    chosen, config = changed_options(config, options), config.replace(options)
    program_bytes = private_bytes()
    base = load_base(model, config.model, user_cache(), progress)
    if base.device.type == "cpu":
        trim_freed_memory()  # of preparing data and of loading
        if base.bytes > _LARGE_BASE:
            return_freed_memory()
    torch.manual_seed(config.training.seed)  # for dropout; everything else has a generator of its own
    adapted = add_adapters(base.model, config.adapter, config.training.seed, renderer.tokenizer)
    policy = plan.policy if plan else choose_policy(config.training, base.device)
    workers = workers_for(config.training, on_cpu=base.device.type == "cpu")
    state = build_state(base.model, config, prepared.train, base.compute_dtype, policy, prepared.mixture, workers)
    state.set_memory(limit_in_force(plan, config, in_force), policy)
    if plan:
        state.smaller = smaller_by_plan(model, config, device, pace)
    warnings = [*prepared.report.warnings, *import_warnings(model.path), *base.warnings, *state.forward.warnings]
    warnings += untrained_token_warnings(base, renderer.tokenizer, prepared.train)
    warnings += [*missing_card_warnings(config.model.device), *unpaged, *slower]
    if chosen:
        warnings.append(
            f"This run fits only with memory-efficient options, and has {options_in_words(chosen)}; its config.yaml "
            "keeps them. For others, set these keys, shorten data.max_length, or lower "
            f"{adapter_kind(config.adapter).size}."
        )
    if names := named_as_experts(base.model, adapted):
        warnings.append(
            f"PEFT mistakes this model's adapters on {', '.join(names)} for adapters on experts and will not load "
            "them. Use the merged model there, or leave these layers out: adapter.target_modules=attention."
        )
    if base.device.type == "cuda" and not config.training.deterministic:
        warnings.append(
            "On CUDA the backward of attention and of index operations is not deterministic, so a resumed run is "
            "close to the uninterrupted one, not equal to it. To resume bit for bit, set training.deterministic=true."
        )
    return Run(directory, config, renderer, prepared, base, adapted, state, warnings, pace, plan, program_bytes)


def _unpaged_warnings(config: RunConfig, device: torch.device, progress: Progress) -> list[str]:
    """Return a warning if the config's optimizer pages its state and the GPU cannot; else nothing."""
    if device.type != "cuda" or config.optimizer.name == "adamw":
        return []
    progress("trying paged memory", 0, None)
    refusal = paging_refusal(device)
    if not refusal:
        return []
    narrower = " or optimizer.name=paged_adamw_8bit" if config.optimizer.name != "paged_adamw_8bit" else ""
    return [
        f"The optimizer's state is not paged and stays on the card: {refusal}. It trains the same, but the "
        "state cannot move to the host where the card is full. If memory runs out, start a run with a lower "
        f"{adapter_kind(config.adapter).size}{narrower}."
    ]


def _with_commit(config: RunConfig, path: Path) -> RunConfig:
    """Set the commit of a model from the hub, whose name or branch may mean other weights later."""
    if (
        path.parent.name != "snapshots"
        or Path(config.model.name).exists()
        or not re.fullmatch("[0-9a-f]{40}", path.name)
    ):
        return config
    return config.replace({"model.revision": path.name})


def _with_date(config: RunConfig, renderer: Renderer) -> RunConfig:
    """Set the day of the run's start for a chat template that writes today's date, so that a resumed run repeats it."""
    return config.replace({"data.template_date": renderer.template_date}) if renderer.template_date else config


def _refuse_other_kind(directory: Path, overrides: Sequence[str]) -> None:
    """Refuse a changed adapter.kind by its name, where a config is refused for what the kind before leaves in it."""
    now = written_value(directory / RUN_CONFIG_NAME, overrides, "adapter.kind")
    if now not in [*ADAPTER_KINDS]:
        return
    found = newest_checkpoint(directory)
    was = load_checkpoint(found.path)[1]["config"]["adapter"]["kind"]
    if now != was:
        raise CheckpointError(_another_run(directory, found.path, [f"adapter.kind: {was} → {now}"]))


def _another_run(directory: Path, checkpoint: Path, refused: Sequence[str]) -> str:
    """Say which settings may not change, and what to do."""
    changes = "\n".join(f"  - {change}" for change in refused)
    return (
        f"These settings differ from those of {checkpoint} and would make it a different run:\n{changes}\n"
        f"Put them back in {directory / RUN_CONFIG_NAME}, or start a new run with "
        f"{override('adapter.init_from', str(checkpoint))}"
    )
