"""List the memory-efficient options that a config leaves to the plan, in the order in which they are tried.

Each step keeps the options of the steps before it. The order is by what a step costs in eval loss (decision 0008): the
embedding in host memory costs nothing, 8-bit Adam nothing that was measured, then the LM head in 8 bits, bf16 adapters,
and last the LM head in 4 bits. A key that the config sets is never changed. Left out: what fits (fit.py).
"""

from torch import nn

from qlora_trainer.config.schema import PLAIN_OPTIONS, RunConfig
from qlora_trainer.planning.memory_plan import MemoryPlan
from qlora_trainer.planning.skeleton import build_skeleton
from qlora_trainer.weights.model_directory import ModelDirectory

STEPS = (
    ("model.embeddings", "cpu"),
    ("optimizer.name", "paged_adamw_8bit"),
    ("model.lm_head", "8bit"),
    ("adapter.dtype", "bfloat16"),
    ("model.lm_head", "4bit"),
)


def option_steps(directory: ModelDirectory, config: RunConfig) -> list[RunConfig]:
    """Return the config with its options from the plain ones to those that take least memory.

    An LM head that is no linear layer stays dense. An embedding that is one weight with the head moves to host memory
    only with a quantized head, which has a weight of its own; before that nothing would be saved. A base that cannot be
    built is refused by a ModelError.

    Args:
        directory: holds the base's config.json.
        config: of the run.

    Returns:
        Configs that leave no option open; the first has the plain values. Only one, if the config leaves none open.
    """
    is_open = {key for key in PLAIN_OPTIONS if config.value(key) == "auto"}
    chosen = config.memory_options()
    if config.optimizer.name == "adamw":
        is_open.discard("adapter.dtype")  # torch's AdamW would keep its moments in bfloat16 too
    if config.adapter.is_always_fp32:
        is_open.discard("adapter.dtype")
    waits = False
    if is_open & {"model.embeddings", "model.lm_head"}:
        model = build_skeleton(directory, layers=1)
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            is_open.discard("model.lm_head")
        is_tied = head is not None and head.weight is model.get_input_embeddings().weight
        waits = is_tied and chosen["model.lm_head"] == "dense"
    found = [config.replace(chosen)]
    for key, value in STEPS:
        if key not in is_open or (key == "model.embeddings" and waits):
            continue
        chosen = {**chosen, key: value}
        if key == "model.lm_head" and waits and "model.embeddings" in is_open:
            chosen["model.embeddings"] = "cpu"
        found.append(config.replace(chosen))
    return found


def options_in_words(options: dict[str, str]) -> str:
    """Write options as settings for the command line.

    Args:
        options: values by key.

    Returns:
        Such as "model.embeddings=cpu optimizer.name=paged_adamw_8bit".
    """
    return " ".join(f"{key}={value}" for key, value in options.items())


def options_of(plan: MemoryPlan) -> str:
    """Write the options of a plan that are not the plain ones.

    Args:
        plan: of a run.

    Returns:
        As `options_in_words` gives them; empty where all are plain.
    """
    return options_in_words({key: value for key, value in plan.options.items() if value != PLAIN_OPTIONS[key]})


def changed_options(config: RunConfig, options: dict[str, str]) -> dict[str, str]:
    """Return the options in which a plan differs from the plain values, where the config left them open.

    Args:
        config: of the run.
        options: of its plan.

    Returns:
        Values by key.
    """
    plain = config.memory_options()
    return {key: value for key, value in options.items() if value != plain[key]}
