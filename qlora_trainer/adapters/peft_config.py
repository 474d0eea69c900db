"""Read adapter_config.json of PEFT's format, and refuse by name what would make an adapter another function.

All problems of a file are reported at once. Left out: writing it, and the tensors (peft_format.py).

Legend: R rank, I in features, O out features.
"""

import math
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qlora_trainer.adapters.formulas import lora_scaling
from qlora_trainer.common.boundary import read_bounded_json
from qlora_trainer.common.dotted_names import ends_in
from qlora_trainer.common.errors import AdapterError

ADAPTER_CONFIG = "adapter_config.json"
MAX_CONFIG_BYTES = 2**20
MAX_RANK = 3 * 1024  # three fused parts times the largest adapter.rank

# Keys of PEFT's config that say how an adapter came about or where it was put, which its tensors show better.
_IGNORED = {
    "auto_mapping",
    "exclude_modules",
    "layers_pattern",
    "layers_to_transform",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
}
# Keys that change what an adapter does, and what to do about them. Neutral (null, false, empty) they pass.
_REFUSED = {
    "use_dora": "DoRA is not supported yet",
    "modules_to_save": "modules saved whole are not supported; train it without them, or merge it with PEFT first",
    "trainable_token_indices": "trained token embeddings are not supported; merge it with PEFT first",
    "target_parameters": "adapters on bare parameters are not supported; merge it with PEFT first",
    "layer_replication": "replicated layers are not supported; merge it with PEFT first",
    "lora_bias": "a bias on lora_B is not supported; merge it with PEFT first",
    "alora_invocation_tokens": "activated LoRA is not supported",
}
_PLAIN_INITIALIZATIONS = (None, True, False, "gaussian", "orthogonal")  # others change the base's weights, or may


class AdapterFileConfig(BaseModel):
    """Hold the keys of adapter_config.json that we write and read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    peft_type: Literal["LORA"] = "LORA"
    task_type: Literal["CAUSAL_LM"] | None = "CAUSAL_LM"
    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: int = Field(ge=1, le=MAX_RANK)
    lora_alpha: float = Field(gt=0.0)
    lora_dropout: float = Field(0.0, ge=0.0, le=1.0)
    rank_pattern: dict[str, int] = {}  # of layers of another rank than r, by the end of their path
    alpha_pattern: dict[str, float] = {}  # likewise of alpha
    target_modules: list[str] | str | None  # ends of module paths, or a regex; reading goes by the tensors instead
    bias: Literal["none", "lora_only", "all"] = "none"
    use_rslora: bool = False
    use_dora: Literal[False] = False
    fan_in_fan_out: bool = False  # the base stores these weights (I, O), as GPT-2's Conv1D does
    init_lora_weights: bool | str | None = True
    modules_to_save: None = None
    inference_mode: bool = True

    def rank_of(self, path: str) -> int:
        """Return the rank of a layer.

        Names are compared as they are written, though PEFT would read them as expressions.

        Args:
            path: of the layer.

        Returns:
            R.
        """
        return next((r for end, r in self.rank_pattern.items() if ends_in(path, end)), self.r)

    @model_validator(mode="after")
    def _one_scaling_holds_for_all(self) -> Self:
        scaling = lora_scaling(self.r, self.lora_alpha, self.use_rslora)
        for name in {**self.rank_pattern, **self.alpha_pattern}:
            rank, alpha = self.rank_pattern.get(name, self.r), self.alpha_pattern.get(name, self.lora_alpha)
            if not 1 <= rank <= MAX_RANK or not math.isclose(lora_scaling(rank, alpha, self.use_rslora), scaling):
                key = "rank_pattern" if name in self.rank_pattern else "alpha_pattern"
                raise ValueError(
                    f"{key} gives {name} rank {rank} and alpha {alpha:g}, and so another scaling than the other layers "
                    "have, which is not supported; train it with one scaling"
                )
        return self


def read_config(path: Path) -> AdapterFileConfig:
    """Read adapter_config.json; kinds that cannot be trained here are refused by name, all problems at once.

    Args:
        path: of the file.

    Returns:
        The config.

    Raises:
        AdapterError: the file is not what it should be.
    """
    raw = read_bounded_json(path, dict, MAX_CONFIG_BYTES, AdapterError, "Fetch or save the adapter again.")
    if raw.get("peft_type") != "LORA":
        raise AdapterError(f"{path} is an adapter of type {raw.get('peft_type')!r}; only LORA is supported.")
    known = {}
    problems = []
    for key, value in raw.items():
        if key in _REFUSED and value:
            problems.append(f"{key} is {_short(value)}: {_REFUSED[key]}")
        elif key in AdapterFileConfig.model_fields:
            known[key] = value
        elif key not in _IGNORED and value:
            problems.append(
                f"{key} is {_short(value)}: this key is not known here, and may change what the adapter does"
            )
    if known.get("init_lora_weights") not in _PLAIN_INITIALIZATIONS:
        problems.append(
            f"init_lora_weights is {_short(known['init_lora_weights'])}, which may change the base's weights "
            "too; convert it to a plain LoRA (PEFT's save_pretrained with path_initial_model_for_weight_conversion)"
        )
    try:
        # What is refused has been reported; here it must not be reported again.
        config = AdapterFileConfig.model_validate({k: v for k, v in known.items() if k not in _REFUSED})
    except ValidationError as error:
        problems += [_as_text(item["loc"], item["msg"]) for item in error.errors()]
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in dict.fromkeys(problems))
        raise AdapterError(f"{path} describes an adapter that cannot be used here:\n{lines}")
    return config


def _as_text(place: tuple[int | str, ...], message: str) -> str:
    """Write one of pydantic's errors as text; what concerns several keys has no place."""
    return f"{place[0]}: {message.lower()}" if place else message.removeprefix("Value error, ")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
