"""Return a run's config with another policy, other options or another length of rows, to be planned.

Left out: which of them fits (fit.py).
"""

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.planning.options import option_steps
from qlora_trainer.training.memory.activations import Policy
from qlora_trainer.training.state import with_policy
from qlora_trainer.weights.model_directory import ModelDirectory


def with_open_policy(config: RunConfig) -> RunConfig:
    """Return the config with its policy left open.

    Args:
        config: of the run.

    Returns:
        The config.
    """
    settings: dict[str, object] = {**Policy("none").as_settings(), "activation_checkpointing": "auto"}
    return config.replace({f"training.{name}": value for name, value in settings.items()})


def with_least_memory(directory: ModelDirectory, config: RunConfig) -> RunConfig:
    """Return the config with the policy and options that need least of the card, of those that it leaves open.

    Args:
        directory: holds the base's config.json.
        config: of the run.

    Returns:
        The config.
    """
    config = option_steps(directory, config)[-1]
    return with_policy(config, Policy("tiled")) if config.training.activation_checkpointing == "auto" else config


def with_length(config: RunConfig, max_length: int) -> RunConfig:
    """Return the config with another length of rows, and the default micro-batches for it.

    Args:
        config: of the run.
        max_length: of a row, in tokens.

    Returns:
        The config.
    """
    return config.replace({"data.max_length": max_length, "training.micro_batch_tokens": "auto"})


def policy_overrides(policy: Policy, config: RunConfig) -> str:
    """Return what to write on the command line to have a policy instead of the config's.

    Args:
        policy: to have.
        config: of the run.

    Returns:
        Such as "training.activation_checkpointing=offload".
    """
    wanted = policy.as_settings().items()
    return " ".join(f"training.{name}={value}" for name, value in wanted if getattr(config.training, name) != value)


def way_overrides(policy: Policy, micro_batch_tokens: int, config: RunConfig) -> str:
    """Return what to write on the command line to have a policy and size of a micro-batch instead of the config's.

    Args:
        policy: to have.
        micro_batch_tokens: most tokens of a micro-batch.
        config: of the run.

    Returns:
        Such as "training.activation_checkpointing=none training.micro_batch_tokens=4096".
    """
    size = f"training.micro_batch_tokens={micro_batch_tokens}"
    is_set = config.training.micro_batch_tokens == micro_batch_tokens
    return " ".join(filter(None, (policy_overrides(policy, config), "" if is_set else size)))


def choice_overrides(policy: Policy, micro_batch_tokens: int) -> str:
    """Return what to write on the command line to pin a policy and the size of a micro-batch.

    Args:
        policy: to have.
        micro_batch_tokens: most tokens of a micro-batch.

    Returns:
        Such as "training.activation_checkpointing=full training.micro_batch_tokens=8192".
    """
    plain = Policy("none").as_settings()
    wanted = {name: value for name, value in policy.as_settings().items() if value != plain[name]}
    values = {"activation_checkpointing": policy.level, **wanted, "micro_batch_tokens": micro_batch_tokens}
    return " ".join(f"training.{name}={value}" for name, value in values.items())
