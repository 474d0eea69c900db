"""The kinds of adapters that every law is tried on: settings of ours, and PEFT's config of the same adapter."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from qlora_trainer.config.schema import AdapterConfig


@dataclass(frozen=True)
class KindCase:
    """One kind: its settings, and a function that makes PEFT's config for it, where PEFT has it."""

    settings: dict[str, Any]
    peft_config: Callable[[str], Any] | None = None  # by the family of the model, llama or gpt2; None: PEFT has no such
    tokenizer: Any = None  # of a model without one, for settings that name tokens

    @property
    def config(self) -> AdapterConfig:
        return AdapterConfig(**self.settings)


def _lora(family: str, use_dora: bool = False) -> Any:
    from peft import LoraConfig

    is_gpt2 = family == "gpt2"
    layers = ["c_fc", "mlp.c_proj"] if is_gpt2 else ["gate_proj", "up_proj", "down_proj"]
    options = {"init_lora_weights": False, "fan_in_fan_out": is_gpt2, "use_dora": use_dora}
    return LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=layers, **options)


def _ia3(family: str) -> Any:
    from peft import IA3Config

    is_gpt2 = family == "gpt2"
    last = ["mlp.c_proj"] if is_gpt2 else ["down_proj"]
    layers = ["c_attn", *last] if is_gpt2 else ["k_proj", "v_proj", *last]
    options = {"init_ia3_weights": False, "fan_in_fan_out": is_gpt2}
    return IA3Config(task_type="CAUSAL_LM", target_modules=layers, feedforward_modules=last, **options)


def _prompt(family: str) -> Any:
    from peft import PromptTuningConfig

    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, prompt_tuning_init="RANDOM")


def _prefix(family: str) -> Any:
    from peft import PrefixTuningConfig

    return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)


def _tokens(family: str) -> Any:
    """PEFT's config with rows of tokens, named in an order of its own; GPT-2's head shares the embedding's."""
    config, ids = _lora(family), [9, 5]
    config.trainable_token_indices = ids if family == "gpt2" else {"embed_tokens": ids, "lm_head": ids}
    return config


class _TwoTokens:
    def get_vocab(self) -> dict[str, int]:
        return {"Ġthe": 9, "Ġfox": 5}


_OF_MLPS = {"rank": 4, "alpha": 8, "target_modules": "mlp"}
CASES = {
    "lora": KindCase({"kind": "lora", **_OF_MLPS}, _lora),
    "dora": KindCase({"kind": "dora", **_OF_MLPS}, partial(_lora, use_dora=True)),
    "tokens": KindCase({"kind": "lora", **_OF_MLPS, "trainable_tokens": ["Ġthe", "Ġfox"]}, _tokens, _TwoTokens()),
    "ia3": KindCase({"kind": "ia3"}, _ia3),
    "bottleneck": KindCase({"kind": "bottleneck", "bottleneck_size": 8}),
    "prompt": KindCase({"kind": "prompt", "virtual_tokens": 5}, _prompt),
    "prefix": KindCase({"kind": "prefix", "virtual_tokens": 5}, _prefix),
}
