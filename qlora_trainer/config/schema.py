"""Every key of a run's configuration: its type, default, unit and a sentence, checked where it is declared.

Frozen: what a run was begun with does not change. configs/README.md explains each key once more for reading. Left out:
reading files and telling what is wrong with them (load.py).
"""

import codecs
import datetime
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

DataFormat = Literal["auto", "chat", "sharegpt", "alpaca", "dolly", "prompt_completion", "question_answer", "text"]


def _encoding_is_known(value: str | None) -> str | None:
    try:
        "".encode(value or "utf-8")
        if codecs.lookup(value or "utf-8").name in ("idna", "punycode"):  # of names in the internet, not of files
            raise LookupError
    except (LookupError, UnicodeError, ValueError):
        raise ValueError(
            "is no text encoding that Python knows; such are utf-8, utf-16, cp1252, latin-1, gb18030"
        ) from None
    return value


Encoding = Annotated[str | None, AfterValidator(_encoding_is_known)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The frozen base."""

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
        description="Refuse a base of which less than this share of the linear weights (LM head left out) "
        "becomes 4-bit, for example one whose experts are fused on disk.",
    )
    cache_quantized: bool = Field(
        False,
        description="Keep the base in 4 bits in the user's cache at its first use, and load that copy from then on, in "
        "seconds. It is the same base; it takes about a third of the 16-bit checkpoint's space on disk.",
    )
    embeddings: Literal["device", "cpu"] = Field(
        "device",
        description="Where the input embedding is kept. cpu: in host memory, from where the rows of a micro-batch "
        "are copied; the results are the same.",
    )
    lm_head: Literal["dense", "8bit", "4bit"] = Field(
        "dense",
        description="How the LM head is held. 8bit (a scale a row) and 4bit (NF4) approximate it in training; the "
        "merged model has the original one.",
    )


class AdapterConfig(Section):
    """The trainable part."""

    kind: Literal["lora"] = Field("lora", description="Kind of adapter (LoRA, Hu et al. 2021).")
    rank: int = Field(16, ge=1, le=1024, description="Rank R of lora_A (R, I) and lora_B (O, R).")
    alpha: float = Field(32.0, gt=0.0, description="The adapter is scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Dropout on the adapter's input, a probability.")
    target_modules: str | list[str] = Field(
        "all-linear",
        description="all-linear, attention, mlp, names such as [q_proj, v_proj] (the ends of paths), or a regular "
        "expression that whole paths must match.",
    )
    fused_parts: dict[str, list[str]] = Field(
        {},
        description="Parts to adapt alone in layers that compute several projections at once, by the layer's name, "
        "such as {c_attn: [query, value]}; each has the rank. Layers not named are adapted whole.",
    )
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023).")
    bias: Literal["none", "lora_only", "all"] = Field(
        "none", description="Which biases of the base train too: none, those of adapted layers, or all."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Dtype of lora_A and lora_B and of their gradients. bfloat16 halves both and loses small updates.",
    )
    init_from: str | None = Field(None, description="Directory of a PEFT adapter to start from, optimizer fresh.")

    @field_validator("target_modules")
    @classmethod
    def _targets_are_named(cls, value: str | list[str]) -> str | list[str]:
        if not value:
            raise ValueError("is empty; use all-linear, attention, mlp, or a list such as [q_proj, v_proj]")
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"is no regular expression: {error}") from None
        return value

    @field_validator("fused_parts")
    @classmethod
    def _parts_are_named_once(cls, value: dict[str, list[str]]) -> dict[str, list[str]]:
        for layer, parts in value.items():
            if not parts:
                raise ValueError(f"names no part of {layer}; give some, such as [query, value], or leave {layer} out")
            if len(set(parts)) < len(parts):
                raise ValueError(f"names a part of {layer} twice")
        return value


class SourceFile(Section):
    """A file or hub data set, and how to read it."""

    path: str = Field(
        description="A file (.jsonl, .json, .csv, .tsv, .parquet, .txt; also .gz, .zst) or a hub data set's name."
    )
    format: DataFormat = Field("auto", description="How to read its rows; auto: by their columns.")
    columns: dict[str, str] = Field({}, description="As data.columns, for this source.")
    template: dict[str, str] = Field({}, description="As data.template, for this source.")
    header: list[str] = Field([], description="As data.header, for this source.")
    encoding: Encoding = Field(None, description="As data.encoding, for this source.")
    split: str = Field("train", description="Which split of a hub data set; a file has none.")
    subset: str | None = Field(None, description="Which subset (configuration) of a hub data set that has several.")


class Source(SourceFile):
    """One data set of several."""

    weight: float | None = Field(
        None,
        ge=1e-9,
        le=1e9,
        description="Its share of an epoch's rows, relative to the other weights. The source that is scarcest for its "
        "weight is used once an epoch, and none is repeated; of the others, each epoch takes other rows.",
    )
    count: int | None = Field(
        None,
        ge=1,
        description="So many of its rows an epoch: repeated where it has fewer, other rows each epoch where it has "
        "more. null: all of them.",
    )

    @model_validator(mode="after")
    def _weight_or_count(self) -> "Source":
        if self.weight is not None and self.count is not None:
            raise ValueError("has a weight and a count; a source is mixed by one of them")
        return self


class DataConfig(Section):
    """What is trained."""

    train: str | list[Source] = Field(description="A file, a hub data set's name, or a list of sources.")
    eval: float | str | SourceFile = Field(
        0.05,
        description="Share of an epoch's rows kept out of training for evaluation (0 for none), of each source as much "
        "as its part in an epoch; or a file of them; or a source of its own, {path, …}.",
    )
    format: DataFormat = Field("auto", description="How to read rows, where a source does not say; auto: by columns.")
    columns: dict[str, str] = Field(
        {},
        description="Where our columns come from: {ours: path}, such as {prompt: query, completion: answers.0.text}; a "
        "path ending in ? may be absent. Here and in the three below, what a source says itself comes first.",
    )
    template: dict[str, str] = Field(
        {},
        description="Columns made of text around fields: {ours: text with {path} in it}; {{ and }} are braces.",
    )
    header: list[str] = Field(
        [], description="The columns' names of CSV and TSV files that have no line of them, in order."
    )
    encoding: Encoding = Field(
        None, description="Encoding of text files, such as utf-16 or cp1252; null: UTF-8. Nothing is guessed."
    )
    max_length: int = Field(2048, ge=8, description="Longest row in tokens; also capped by the model's positions.")
    too_long: Literal["truncate", "drop", "error"] = Field(
        "truncate",
        description="What happens to a longer row. truncate: a conversation loses whole turns from its end, a "
        "completion its end; what would lose all that is trained is dropped. Plain text is split into rows of "
        "max_length instead.",
    )
    on_bad_row: Literal["error", "skip"] = Field(
        "error",
        description="A row that cannot be read or rendered: stop there, or skip it, count it, and list it in the run "
        "directory's skipped_rows.jsonl.",
    )
    packing: bool = Field(True, description="Lay rows end to end without padding; attention keeps them apart.")
    train_on: Literal["assistant", "last", "all"] | list[Literal["system", "user", "assistant", "tool"]] = Field(
        "assistant",
        description="Which tokens carry loss: all assistant turns, the last one, all turns of a list of roles such as "
        "[assistant, tool], or every token. What a message says of itself (weight, train, learn) comes first.",
    )
    template_date: datetime.date | None = Field(
        None,
        description="The date, such as 2026-01-31, that a chat template writes as today's; null: the day the run "
        "starts.",
    )

    @field_validator("train_on")
    @classmethod
    def _roles_are_named(cls, value: str | list[str]) -> str | list[str]:
        if not value:
            raise ValueError("is an empty list; use assistant, last, all, or a list of roles such as [assistant, tool]")
        return value

    @field_validator("eval", mode="before")
    @classmethod
    def _number_is_a_share(cls, value: object) -> object:
        """YAML reads 1e-1 as text, as it has no dot; a file of such a name can be given as ./1e-1."""
        try:
            return float(value) if isinstance(value, str) else value
        except ValueError:
            return value

    @field_validator("eval")
    @classmethod
    def _eval_is_a_share_or_path(cls, value: float | str | SourceFile) -> float | str | SourceFile:
        if isinstance(value, float) and not 0.0 <= value < 1.0:
            raise ValueError("must be a share from 0 up to (not including) 1, or the path of a file")
        return value

    @field_validator("train")
    @classmethod
    def _all_sources_are_weighted_or_none(cls, value: str | list[Source]) -> str | list[Source]:
        without = [source.path for source in value if isinstance(source, Source) and source.weight is None]
        if without and len(without) < len(value) and not isinstance(value, str):
            raise ValueError(f"some sources have a weight, but not {', '.join(without)}; give one to all, or to none")
        return value


class OptimizerConfig(Section):
    """How adapters are updated."""

    name: Literal["paged_adamw_32bit", "paged_adamw_8bit", "adamw"] = Field(
        "paged_adamw_32bit", description="bitsandbytes' paged AdamW with 32- or 8-bit state, or torch's AdamW."
    )
    learning_rate: float = Field(2e-4, gt=0.0, description="Peak learning rate.")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="Shape after the warm-up.")
    warmup_ratio: float = Field(0.03, ge=0.0, lt=1.0, description="Share of all steps with a rising learning rate.")
    weight_decay: float = Field(0.0, ge=0.0, description="Decoupled weight decay, on lora_A and lora_B only.")
    beta1: float = Field(0.9, ge=0.0, lt=1.0, description="Decay of Adam's first moment.")
    beta2: float = Field(0.999, ge=0.0, lt=1.0, description="Decay of Adam's second moment.")
    epsilon: float = Field(1e-8, gt=0.0, description="Adam's epsilon.")
    max_grad_norm: float = Field(1.0, gt=0.0, description="Gradients are scaled down to this global norm.")


class TrainingConfig(Section):
    """The run."""

    output_dir: str = Field("runs/my-run", description="The run directory; must be new or empty.")
    max_steps: int | None = Field(None, ge=1, description="Stop after so many optimizer steps; null: by epochs.")
    epochs: int = Field(1, ge=1, description="Passes over the training rows.")
    global_batch_size: int = Field(
        16, ge=1, description="Over all devices and micro-batches, the rows of one optimizer step."
    )
    micro_batch_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="Most tokens of one forward pass. auto: max_length."
    )
    activation_checkpointing: Literal["auto", "none", "full", "offload", "tiled"] = Field(
        "auto",
        description="What backward recomputes of each decoder layer. none: nothing, all is kept; full: the layer, from "
        "its input; offload: as full, with that input in host memory; tiled: as offload, with MLPs a tile of tokens "
        "at a time. auto: the fastest that fits.",
    )
    uncheckpointed_layers: int = Field(
        0,
        ge=0,
        description="So many of the last decoder layers keep everything; the others follow activation_checkpointing.",
    )
    offload_every_n_layers: int = Field(
        1,
        ge=1,
        description="Under offload and tiled: offload the input of every so many layers; the layers between are "
        "computed from it again.",
    )
    seed: int = Field(0, ge=0, le=2**63 - 1, description="Seed of initial adapters, dropout, and the order of rows.")
    deterministic: bool = Field(
        False, description="On CUDA sum in a fixed order too, so that runs repeat bit for bit; takes time and memory."
    )
    evaluate_every: int = Field(100, ge=1, description="Measure the eval loss every so many steps, and at the end.")
    save_every: int = Field(100, ge=1, description="Write a checkpoint every so many steps, and at the end.")

    @model_validator(mode="after")
    def _settings_of_a_level_have_effect(self) -> "TrainingConfig":
        if self.uncheckpointed_layers and self.activation_checkpointing in ("auto", "none"):
            raise ValueError(
                "uncheckpointed_layers has no effect with "
                f"activation_checkpointing={self.activation_checkpointing}; leave it out"
            )
        if self.offload_every_n_layers > 1 and self.activation_checkpointing not in ("offload", "tiled"):
            raise ValueError(
                "offload_every_n_layers has no effect with "
                f"activation_checkpointing={self.activation_checkpointing}; leave it out"
            )
        return self


class EvaluationConfig(Section):
    """What is measured besides the eval loss."""

    samples: int = Field(3, ge=0, description="Eval rows answered before and after training, for the report.")
    max_new_tokens: int = Field(128, ge=1, description="Longest generated answer, in tokens.")


class CheckpointConfig(Section):
    """What is kept."""

    keep: int = Field(3, ge=1, description="Checkpoints kept; older ones are deleted after a new one is safe.")


class RunConfig(Section):
    """Everything `qlora train` needs to know."""

    model: ModelConfig
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="before")
    @classmethod
    def _bare_section_is_empty(cls, raw: Any) -> Any:
        """A section whose every key is commented out arrives as null."""
        if not isinstance(raw, Mapping):
            return raw
        return {key: {} if value is None and key in cls.model_fields else value for key, value in raw.items()}

    @model_validator(mode="after")
    def _moments_are_not_in_bfloat16(self) -> "RunConfig":
        """torch's AdamW keeps its moments in the parameters' dtype, and in bf16 the second one stops moving."""
        if self.adapter.dtype == "bfloat16" and self.optimizer.name == "adamw":
            raise ValueError(
                "adapter.dtype is bfloat16 and optimizer.name is adamw, which would keep Adam's moments in bfloat16 "
                "too. Set optimizer.name to paged_adamw_32bit or paged_adamw_8bit, or adapter.dtype to float32"
            )
        return self

    @model_validator(mode="after")
    def _micro_batch_holds_a_row(self) -> "RunConfig":
        limit = self.training.micro_batch_tokens
        if limit != "auto" and limit < self.data.max_length:
            raise ValueError(
                f"training.micro_batch_tokens is {limit}, less than data.max_length {self.data.max_length}: a row of "
                "full length would fit no micro-batch. Raise the former or lower the latter"
            )
        return self
