"""Measure what each memory-efficient option costs in eval loss, and what it saves on the device.

    python -m benchmarks.memory_options [--steps N] [--model M] [--without-plan] [--only NAME …]

Trains the demo's model on the demo's rows as it is and once with each option, from the same adapters on the same rows
in the same steps, on the CPU in fp32. The eval loss at the end is measured with the option's own LM head, and
where that is quantized also with the original one, which the merged model has. Bytes are those of the plan on a card,
allocator slack aside: for this model at the demo's lengths, and for Llama-3.1-8B at 2,048 tokens, rank 16.

The demo's model ties its embedding to its head, so there the embedding goes to the host together with a head of 8 bits;
for the 8B model, which does not, it goes alone.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from qlora_trainer.cli.demo_run import copy_demo_rows, demo_settings, packaged_model
from qlora_trainer.common.cache import user_cache
from qlora_trainer.config.load import make_config
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.batching.loader import micro_batch_tokens
from qlora_trainer.model.forward import examine_forward
from qlora_trainer.model.source import resolve_model
from qlora_trainer.planning.memory_plan import SLACK, plan_memory
from qlora_trainer.runs.directory import prepare_data
from qlora_trainer.runs.start import start_run
from qlora_trainer.runs.trained import open_trained
from qlora_trainer.training.evaluation import eval_loss
from qlora_trainer.weights.model_directory import ModelDirectory

Sections = dict[str, dict[str, Any]]

LLAMA_8B = Path(__file__).parent / "models" / "llama-3.1-8b"

HOST: Sections = {"model": {"embeddings": "cpu"}}
TIED_HOST: Sections = {"model": {"embeddings": "cpu", "lm_head": "8bit"}}
BF16: Sections = {"adapter": {"dtype": "bfloat16"}}
ADAM_8BIT: Sections = {"optimizer": {"name": "paged_adamw_8bit"}}
OPTIONS: dict[str, Sections] = {
    "as it is": {},
    "embeddings on the host": HOST,
    "head in 8 bits": {"model": {"lm_head": "8bit"}},
    "head in 4 bits": {"model": {"lm_head": "4bit"}},
    "8-bit Adam": ADAM_8BIT,
    "bf16 adapters": BF16,
    "all, head in 4 bits": {"model": {"embeddings": "cpu", "lm_head": "4bit"}, **BF16, **ADAM_8BIT},
}


class Losses(NamedTuple):
    """Hold eval losses at the end of a run."""

    own: float
    with_original_head: float


def changed(raw: Sections, changes: Sections) -> Sections:
    return {name: {**raw.get(name, {}), **changes.get(name, {})} for name in raw.keys() | changes.keys()}


def train(config: RunConfig) -> Losses:
    """Train to the end; the last step measures the eval loss."""
    run = start_run(config)
    losses: list[float] = []
    run.train(lambda record: losses.append(record.get("eval_loss", float("nan"))))
    run.release()
    if run.config.model.lm_head == "dense":
        return Losses(losses[-1], losses[-1])
    exact = open_trained(run.directory, lm_head="dense", embeddings="device")
    eval_set = prepare_data(config, exact.renderer.tokenizer, exact.base.directory).eval
    model, tokens = exact.base.model, micro_batch_tokens(config)
    return Losses(losses[-1], eval_loss(model, eval_set, examine_forward(model), tokens))


def planned(directory: ModelDirectory, raw: Sections) -> int:
    """Plan the bytes on a card that torch allocates, and paged state."""
    plan = plan_memory(directory, make_config(raw))
    return plan.total - plan.components[SLACK]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--model", default=None, help="by default the demo's")
    parser.add_argument("--without-plan", action="store_true", help="leave out the bytes")
    parser.add_argument("--only", nargs="+", choices=list(OPTIONS), default=list(OPTIONS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        copy_demo_rows(work)
        name = arguments.model or packaged_model()
        base = resolve_model(name, None, user_cache())
        is_tied = base.config().get_text_config().tie_word_embeddings
        demo = changed(
            demo_settings(name, work, work),
            {"training": {"max_steps": arguments.steps, "evaluate_every": 10**6, "save_every": 10**6}},
        )
        large: Sections = {"model": {"name": str(LLAMA_8B)}, "data": {"train": "rows.jsonl", "max_length": 2048}}
        print("| option | eval loss | its original head | difference | saved here | saved, Llama-3.1-8B |")
        print("|---|---|---|---|---|---|")
        plain: Losses | None = None
        before: tuple[int, int] | None = None
        for index, option in enumerate(["as it is", *(o for o in arguments.only if o != "as it is")]):
            changes = OPTIONS[option]
            here = changed(demo, TIED_HOST if changes is HOST and is_tied else changes)
            losses = train(make_config(changed(here, {"training": {"output_dir": str(work / str(index))}})))
            plain = plain or losses
            saved = ["", ""]
            if not arguments.without_plan:
                after = planned(base, here), planned(ModelDirectory.open(LLAMA_8B), changed(large, changes))
                before = before or after
                saved = [f"{(b - a) / 2**20:,.1f} MiB" for b, a in zip(before, after, strict=True)]
            difference = losses.with_original_head - plain.own
            cells = [option, f"{losses.own:.4f}", f"{losses.with_original_head:.4f}", f"{difference:+.4f}", *saved]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
