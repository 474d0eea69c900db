"""Declare every key of a run's configuration with its type, default, unit, description and checks.

A config is frozen: it does not change after it is made. docs/reference/config.md is made from these declarations. Left
out: the keys of the adapter and of the data (adapter_schema.py, data_schema.py), and reading files and reporting what
is wrong with them (load.py).
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qlora_trainer.config.adapter_schema import SETTINGS_OF_KIND, AdapterConfig
from qlora_trainer.config.data_schema import DataConfig, Section

PLAIN_OPTIONS = {
    "model.embeddings": "device",
    "model.lm_head": "dense",
    "adapter.dtype": "float32",
    "optimizer.name": "paged_adamw_32bit",
}
"""Values that `auto` gives memory-efficient options where memory does not need others (planning/options.py)."""

SETTINGS_OF_SCHEDULE: Mapping[str, tuple[str, ...]] = {
    "polynomial": ("polynomial_power",),
    "warmup_stable_decay": ("decay_ratio", "decay_shape"),
}
"""The settings of the section optimizer that only one schedule has."""


class ModelConfig(Section):
    """Configure the frozen base."""

    name: str = Field(description="Hub name, directory of safetensors, or a .gguf file.")
    revision: str | None = Field(None, description="Commit, tag or branch on the hub; null for the newest.")
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Dtype of activations. auto: bfloat16 on CUDA (float16 below Ampere), float32 on a CPU."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to train. auto: CUDA where there is one.")
    min_quantized_fraction: float = Field(
        0.9,
        ge=0.0,
        le=1.0,
        description="Refuse a base if less than this share of its linear weights (without the LM head) becomes "
        "4-bit, as with one whose experts are fused on disk.",
    )
    cache_quantized: bool = Field(
        False,
        description="Write a 4-bit copy of the base to the user's cache at its first use, and load that from then on, "
        "in seconds. It is the same base; it takes about a third of the 16-bit checkpoint's space on disk.",
    )
    verify_bytes: bool = Field(
        False,
        description="Hash the base's files again at this start, even if their sizes and times are unchanged.",
    )
    embeddings: Literal["auto", "device", "cpu"] = Field(
        "auto",
        description="Where the input embedding is kept. cpu: in host memory; the rows that a micro-batch needs are "
        "copied to the device. The results are the same. auto: device, or cpu where the run fits only so.",
    )
    lm_head: Literal["auto", "dense", "8bit", "4bit"] = Field(
        "auto",
        description="How the LM head is kept. 8bit (one scale per row) and 4bit (NF4) approximate it in training; the "
        "merged model has the original one. auto: dense, or 8bit, then 4bit, where the run fits only so.",
    )


class OptimizerConfig(Section):
    """Configure the updates of the adapter."""

    name: Literal["auto", "paged_adamw_32bit", "paged_adamw_8bit", "adamw"] = Field(
        "auto",
        description="bitsandbytes' paged AdamW with 32- or 8-bit state, or torch's AdamW. auto: paged_adamw_32bit, or "
        "paged_adamw_8bit where the run fits only so.",
    )
    learning_rate: float = Field(2e-4, gt=0.0, description="Peak learning rate.")
    lora_plus_ratio: float = Field(
        1.0,
        gt=0.0,
        description="The learning rate of lora_B is this times that of lora_A (LoRA+, Hayou et al. 2024, which advises "
        "16 and a lower learning_rate); 1: the same.",
    )
    schedule: Literal["cosine", "linear", "polynomial", "warmup_stable_decay", "constant"] = Field(
        "cosine",
        description="Shape after the warm-up. warmup_stable_decay: the peak until the last decay_ratio of all steps.",
    )
    warmup_ratio: float = Field(0.03, ge=0.0, lt=1.0, description="Share of all steps with a rising learning rate.")
    minimum_ratio: float = Field(
        0.0, ge=0.0, lt=1.0, description="The learning rate falls to this share of the peak; not of constant."
    )
    polynomial_power: float = Field(
        2.0, gt=0.0, description="Of polynomial: the power of the share of steps that are left; 1 would be linear."
    )
    decay_ratio: float = Field(
        0.1, gt=0.0, le=1.0, description="Of warmup_stable_decay: share of all steps with a falling learning rate."
    )
    decay_shape: Literal["1-sqrt", "linear", "cosine"] = Field(
        "1-sqrt",
        description="Of warmup_stable_decay: how it falls. 1-sqrt: by the square root of the share of the decay that "
        "is done (Hägele et al. 2024).",
    )
    weight_decay: float = Field(0.0, ge=0.0, description="Decoupled weight decay, on the adapter's matrices only.")
    beta1: float = Field(0.9, ge=0.0, lt=1.0, description="Decay of Adam's first moment.")
    beta2: float = Field(0.999, ge=0.0, lt=1.0, description="Decay of Adam's second moment.")
    epsilon: float = Field(1e-8, gt=0.0, description="Adam's epsilon.")
    max_grad_norm: float = Field(1.0, gt=0.0, description="Gradients are scaled down to this global norm.")

    @model_validator(mode="after")
    def _settings_of_a_schedule_have_effect(self) -> "OptimizerConfig":
        for schedule, names in SETTINGS_OF_SCHEDULE.items():
            for name in names if schedule != self.schedule else ():
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"optimizer.{name} has no effect with optimizer.schedule={self.schedule}; leave it out, or set "
                        f"optimizer.schedule={schedule}"
                    )
        if self.schedule == "constant" and self.minimum_ratio:
            raise ValueError("optimizer.minimum_ratio has no effect with optimizer.schedule=constant; leave it out")
        if self.schedule == "warmup_stable_decay" and self.warmup_ratio + self.decay_ratio > 1.0:
            raise ValueError(
                f"optimizer.warmup_ratio is {self.warmup_ratio} and optimizer.decay_ratio {self.decay_ratio}: together "
                "they are more than all steps. Lower one of them"
            )
        return self


class TrainingConfig(Section):
    """Configure the training run: its length, batches, memory and output."""

    output_dir: str = Field("runs/my-run", description="The run directory; must be new or empty.")
    max_steps: int | None = Field(
        None, ge=1, description="Stop after this many optimizer steps; null: after the epochs."
    )
    epochs: int = Field(1, ge=1, description="Passes over the training rows.")
    global_batch_size: int = Field(
        16, ge=1, description="Over all devices and micro-batches, the rows of one optimizer step."
    )
    micro_batch_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Most tokens of one forward pass. auto: chosen together with activation_checkpointing, max_length "
        "or more.",
    )
    activation_checkpointing: Literal["auto", "none", "full", "offload", "tiled"] = Field(
        "auto",
        description="What backward recomputes of each decoder layer. none: nothing, all is kept; full: the layer, from "
        "its input; offload: as full, with that input in host memory; tiled: as offload, with MLPs a tile of tokens "
        "at a time. auto: the fastest that fits, by estimate.",
    )
    uncheckpointed_layers: int = Field(
        0,
        ge=0,
        description="How many of the last decoder layers keep everything; the others follow activation_checkpointing.",
    )
    offload_every_n_layers: int = Field(
        1,
        ge=1,
        description="Under offload and tiled: offload the input of every n-th layer; the inputs of the layers between "
        "are computed from it again.",
    )
    seed: int = Field(0, ge=0, le=2**63 - 1, description="Seed of initial adapters, dropout, and the order of rows.")
    neftune_noise_alpha: float = Field(
        0.0,
        ge=0.0,
        description="Size of the noise on input embeddings in training (NEFTune, Jain et al. 2023, who take 5 to 15); "
        "0: none.",
    )
    deterministic: bool = Field(False, description="On CUDA too, repeat runs bit for bit; this takes time and memory.")
    cpu_workers: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="On a CPU, into how many parts the rows of a micro-batch are divided, which run at once; 1: none, "
        "and all cores work on each product. auto: a part for each core, up to 8, where rows divide evenly.",
    )
    evaluate_every: int = Field(
        100, ge=1, description="Steps between measurements of the eval loss; the end is always measured."
    )
    save_every: int = Field(100, ge=1, description="Steps between checkpoints; the end always has one.")

    @model_validator(mode="after")
    def _settings_of_a_level_have_effect(self) -> "TrainingConfig":
        if self.uncheckpointed_layers and self.activation_checkpointing in ("auto", "none"):
            raise ValueError(
                "training.uncheckpointed_layers has no effect with "
                f"training.activation_checkpointing={self.activation_checkpointing}; leave it out"
            )
        if self.offload_every_n_layers > 1 and self.activation_checkpointing not in ("offload", "tiled"):
            raise ValueError(
                "training.offload_every_n_layers has no effect with "
                f"training.activation_checkpointing={self.activation_checkpointing}; leave it out"
            )
        return self


class EvaluationConfig(Section):
    """Configure what is measured in addition to the eval loss."""

    samples: int = Field(
        3, ge=0, description="How many eval rows are answered before and after training, for the report."
    )
    max_new_tokens: int = Field(128, ge=1, description="Longest generated answer, in tokens.")


class CheckpointConfig(Section):
    """Configure how many checkpoints are kept."""

    keep: int = Field(
        3, ge=1, description="How many checkpoints are kept; older ones are deleted after a new one is safe."
    )


class RunConfig(Section):
    """Configure a run of `qlora train`, all sections together."""

    model: ModelConfig
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def replace(self, values: Mapping[str, Any]) -> "RunConfig":
        """Copy this config with other values for some keys, checked as when a file is read.

        An unknown key, or a value that the schema refuses, raises Pydantic's ValidationError.

        Args:
            values: the new values by key, such as {"training.max_steps": 10}.

        Returns:
            The new config.
        """
        sections: dict[str, Any] = {name: dict(section) for name, section in self}
        for key, value in values.items():
            section, _, name = key.partition(".")
            sections.setdefault(section, {})[name] = value
        return type(self).model_validate(sections)

    def value(self, key: str) -> Any:
        """Return the value of a key.

        Args:
            key: such as training.max_steps; one that does not exist raises AttributeError.

        Returns:
            The value.
        """
        section, _, name = key.partition(".")
        return getattr(getattr(self, section), name)

    def memory_options(self) -> dict[str, str]:
        """Return the memory-efficient options, with the plain value of each that is left open.

        Returns:
            Values by key, such as {"model.lm_head": "dense"}.
        """
        return {key: plain if self.value(key) == "auto" else self.value(key) for key, plain in PLAIN_OPTIONS.items()}

    @model_validator(mode="before")
    @classmethod
    def _bare_section_is_empty(cls, raw: Any) -> Any:
        """Read null as an empty section: that is what YAML makes of one whose keys are all commented out."""
        if not isinstance(raw, Mapping):
            return raw
        return {key: {} if value is None and key in cls.model_fields else value for key, value in raw.items()}

    @model_validator(mode="after")
    def _moments_are_not_in_bfloat16(self) -> "RunConfig":
        """Refuse AdamW of torch on bf16 parameters: it keeps its moments in bf16, where the second stops changing."""
        if self.adapter.dtype == "bfloat16" and self.optimizer.name == "adamw":
            raise ValueError(
                "adapter.dtype is bfloat16 and optimizer.name is adamw, which would keep Adam's moments in bfloat16 "
                "too. Set optimizer.name to paged_adamw_32bit or paged_adamw_8bit, or adapter.dtype to float32"
            )
        return self

    @model_validator(mode="after")
    def _lora_plus_has_a_lora_b(self) -> "RunConfig":
        kind = self.adapter.kind
        if self.optimizer.lora_plus_ratio != 1.0 and "rank" not in SETTINGS_OF_KIND[kind]:
            raise ValueError(f"optimizer.lora_plus_ratio has no effect with adapter.kind={kind}; leave it out")
        return self

    @model_validator(mode="after")
    def _rows_hold_more_than_virtual_tokens(self) -> "RunConfig":
        if self.adapter.leading_tokens >= self.data.max_length:
            raise ValueError(
                f"adapter.virtual_tokens is {self.adapter.virtual_tokens} and data.max_length, which counts them, "
                f"{self.data.max_length}: nothing is left for a row. Raise data.max_length or lower "
                "adapter.virtual_tokens"
            )
        return self

    @model_validator(mode="after")
    def _micro_batch_holds_a_row(self) -> "RunConfig":
        limit = self.training.micro_batch_tokens
        if limit != "auto" and limit < self.data.max_length:
            raise ValueError(
                f"training.micro_batch_tokens is {limit}, less than data.max_length {self.data.max_length}: a row of "
                "full length would fit no micro-batch. Raise training.micro_batch_tokens or lower data.max_length"
            )
        return self
