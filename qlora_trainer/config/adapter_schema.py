"""Declare the settings of adapters, and which of them each kind has.

A setting that the chosen kind has not is refused unless it is at its default. Left out: what kinds do
(adapters/kinds/).
"""

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from qlora_trainer.common.errors import ConfigError
from qlora_trainer.config.data_schema import Section

_OF_LINEAR = ("target_modules", "layers_to_transform")  # of kinds that adapt linear layers
_OF_LORA = (*_OF_LINEAR, "bias", "rank", "alpha", "dropout", "rank_pattern", "alpha_pattern", "use_rslora")
_TOKENS = ("new_tokens", "trainable_tokens")  # of kinds whose file in PEFT's format has rows of tokens
SETTINGS_OF_KIND: Mapping[str, tuple[str, ...]] = {
    "lora": (*_OF_LORA, *_TOKENS, "fused_parts", "init"),
    "dora": (*_OF_LORA, *_TOKENS),
    "ia3": (*_OF_LINEAR, "feedforward_modules"),
    "bottleneck": ("bottleneck_size", "activation", "placement"),
    "prompt": ("virtual_tokens", "prompt_init_text"),
    "prefix": ("virtual_tokens", "prefix_projection", "prefix_hidden_size"),
}
"""The settings of the section adapter that a kind has, but for those of all kinds."""


def settings_of_others(kind: str) -> set[str]:
    """Return the settings that only other kinds of adapters have.

    Args:
        kind: the value of adapter.kind.

    Returns:
        Names of fields of AdapterConfig.
    """
    return {name for names in SETTINGS_OF_KIND.values() for name in names} - {*SETTINGS_OF_KIND[kind]}


class AdapterConfig(Section):
    """Configure the adapter, which is what trains."""

    kind: Literal["lora", "dora", "ia3", "bottleneck", "prompt", "prefix"] = Field(
        "lora",
        description="Kind of adapter: lora (Hu et al. 2021); dora, which trains a norm for each row too (Liu et al. "
        "2024); ia3, which scales keys, values and the inputs of MLPs' last layers (Liu et al. 2022); bottleneck, a "
        "small MLP after each attention and MLP (Houlsby et al. 2019), prompt, virtual tokens before each row "
        "(prompt tuning, Lester et al. 2021), and prefix, keys and values before each row in every layer (Li and Liang "
        "2021), which do not merge.",
    )
    rank: int = Field(16, ge=1, le=1024, description="Rank R of lora_A (R, I) and lora_B (O, R).")
    alpha: float = Field(32.0, gt=0.0, description="The adapter is scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Dropout on the adapter's input, a probability.")
    target_modules: str | list[str] = Field(
        "auto",
        description="auto, all-linear, attention, mlp, names such as [q_proj, v_proj] (the ends of paths), or a "
        "regular expression that whole paths must match. auto: all-linear; of ia3 keys, values, and MLPs' last layers.",
    )
    feedforward_modules: list[str] | Literal["auto"] = Field(
        "auto",
        description="Of ia3: names of the target_modules whose input is scaled; auto: the last layers of MLPs.",
    )
    fused_parts: dict[str, list[str]] = Field(
        {},
        description="Parts to adapt in layers that compute several projections at once: {layer: parts}, such as "
        "{c_attn: [query, value]}. Each part has an adapter of this rank. Layers not named are adapted whole.",
    )
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=1024)]] = Field(
        {},
        description="Ranks of layers that have another: {end of a path: rank}, such as {q_proj: 64, "
        "layers.0.mlp.up_proj: 8}. Of several that fit a layer the first holds.",
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0.0)]] = Field(
        {},
        description="Alphas of layers that have another, likewise. A layer is scaled by its own alpha / rank.",
    )
    layers_to_transform: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = Field(
        None, description="Adapt these decoder layers only, counted from 0; null: all."
    )
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023).")
    bottleneck_size: int = Field(
        64,
        ge=1,
        le=8192,
        description="With kind bottleneck: width R of the small MLP, whose matrices are (R, H), (H, R).",
    )
    activation: Literal["relu", "gelu", "silu"] = Field(
        "relu", description="With kind bottleneck: the function between its two matrices; gelu is the exact one."
    )
    placement: Literal["attention+mlp", "mlp", "attention"] = Field(
        "attention+mlp",
        description="With kind bottleneck: after which parts of a decoder layer it is put, before their output is "
        "added to the hidden states. mlp: after everything but attention (Pfeiffer et al. 2021).",
    )
    bias: Literal["none", "lora_only", "all"] = Field(
        "none", description="Which biases of the base train too: none, those of adapted layers, or all."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Dtype of what the adapter trains and of its gradients. bfloat16 takes half the memory and loses "
        "small updates. auto: float32, or bfloat16 where the run fits only so.",
    )
    new_tokens: list[str] | dict[str, str] = Field(
        [],
        description="Tokens to add to the tokenizer, whose rows of embedding and LM head train: a list, or {token: "
        "text} to begin each as the mean of a text's tokens. Without a text it begins as the mean of all tokens.",
    )
    trainable_tokens: list[str] = Field(
        [],
        description="Tokens that the tokenizer has, such as [<|im_start|>], whose rows of embedding and LM head train.",
    )
    virtual_tokens: int = Field(
        20,
        ge=1,
        le=4096,
        description="With kind prompt: trained tokens before each row, which data.max_length counts. With kind prefix: "
        "trained keys and values before each row, which take positions of the model, and no tokens of a row.",
    )
    prompt_init_text: str | None = Field(
        None,
        description="Text whose tokens the virtual tokens begin as, repeated or cut to their number. null: tokens of "
        "the vocabulary, drawn by the seed.",
    )
    prefix_projection: bool = Field(
        False,
        description="With kind prefix: train a small MLP that makes the keys and values of one vector each, in their "
        "place. Files of the adapter hold what it makes.",
    )
    prefix_hidden_size: int = Field(
        512,
        ge=1,
        le=16384,
        description="With adapter.prefix_projection: width of the MLP; its last matrix has so many rows, and a column "
        "for each number of a token's keys and values.",
    )
    init: Literal["kaiming", "gaussian", "olora", "pissa", "loftq"] = Field(
        "kaiming",
        description="How the adapter starts. kaiming: A drawn uniformly, as in PEFT; gaussian: from a normal "
        "distribution of deviation 1 / rank; B is zero. olora, pissa, loftq: a part of each weight, on a base that "
        "--init of the command quantize made for it.",
    )
    init_from: str | None = Field(
        None, description="Directory of a PEFT adapter to start from, with a fresh optimizer."
    )

    @property
    def is_always_fp32(self) -> bool:
        """Return True if the adapter takes no other dtype: vectors that start at 1 lose their updates in bf16."""
        return self.kind == "ia3"

    @property
    def leading_tokens(self) -> int:
        """Return the number of virtual tokens that are before each row."""
        return self.virtual_tokens if self.kind == "prompt" else 0

    @property
    def as_stored(self) -> "AdapterConfig":
        """Return the settings of an adapter that is read from its file, which no MLP of a prefix is in."""
        return self.model_copy(update={"prefix_projection": False})

    def positions_of_rows(self, positions: int | None) -> int | None:
        """Return how many of a model's positions are left to rows: a prefix has the first ones.

        Args:
            positions: of the model; None: it has no limit.

        Returns:
            Positions; None without a limit.

        Raises:
            ConfigError: none is left.
        """
        if positions is None or self.kind != "prefix":
            return positions
        if self.virtual_tokens >= positions:
            raise ConfigError(
                f"adapter.virtual_tokens is {self.virtual_tokens}, and the model has {positions} positions, of which a "
                "prefix takes one for each: nothing is left for a row. Lower adapter.virtual_tokens."
            )
        return positions - self.virtual_tokens

    @property
    def new_token_texts(self) -> dict[str, str | None]:
        """Return the texts whose mean new tokens begin as, by token; None for the mean of all tokens."""
        return {**self.new_tokens} if isinstance(self.new_tokens, dict) else dict.fromkeys(self.new_tokens)

    @property
    def trains_tokens(self) -> bool:
        """Return True if rows of the embedding and the LM head train."""
        return bool(self.new_tokens or self.trainable_tokens)

    @field_validator("new_tokens", "trainable_tokens")
    @classmethod
    def _tokens_are_named_once(cls, value: list[str] | dict[str, str]) -> list[str] | dict[str, str]:
        if not all(token.strip() for token in value):
            raise ValueError("names an empty token; write its text, or leave it out")
        if len(set(value)) < len(value):
            twice = next(token for token in value if list(value).count(token) > 1)
            raise ValueError(f"names {twice!r} twice")
        if isinstance(value, dict) and (empty := [token for token, text in value.items() if not text.strip()]):
            raise ValueError(f"gives {empty[0]!r} an empty text; write what it begins as, or give a list of tokens")
        return value

    @field_validator("prompt_init_text")
    @classmethod
    def _text_is_not_empty(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("is empty; write a text, or leave it out")
        return value

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

    @model_validator(mode="after")
    def _settings_of_the_kind_have_effect(self) -> "AdapterConfig":
        others, fields = settings_of_others(self.kind), type(self).model_fields
        found = [n for n in fields if n in others and getattr(self, n) != fields[n].get_default()]
        if found:
            have, them = ("has", "it") if len(found) == 1 else ("have", "them")
            names = " and ".join(f"adapter.{name}" for name in found)
            raise ValueError(f"{names} {have} no effect with adapter.kind={self.kind}; leave {them} out")
        if not self.prefix_projection and self.prefix_hidden_size != fields["prefix_hidden_size"].get_default():
            raise ValueError(
                "adapter.prefix_hidden_size has no effect where adapter.prefix_projection is false; leave it out"
            )
        if self.prefix_projection and self.init_from is not None:
            raise ValueError(
                "adapter.init_from names a file, which holds a prefix and no MLP that made it, so none can go on "
                "training; set adapter.prefix_projection=false"
            )
        if self.init_from is not None and self.init != "kaiming":
            raise ValueError(
                f"adapter.init={self.init} has no effect with adapter.init_from, which has its values; leave it out"
            )
        if self.fused_parts and self.init not in ("kaiming", "gaussian"):
            raise ValueError(f"adapter.init={self.init} splits whole weights; leave adapter.fused_parts out")
        if self.trains_tokens and self.init not in ("kaiming", "gaussian"):
            raise ValueError(
                f"adapter.init={self.init} starts from a file, which has no rows of tokens; leave adapter.new_tokens "
                "and adapter.trainable_tokens out"
            )
        if self.is_always_fp32 and self.dtype == "bfloat16":
            raise ValueError(
                "adapter.dtype=bfloat16 would lose the updates of vectors near 1; set adapter.dtype=float32"
            )
        return self
