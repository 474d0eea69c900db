"""Hold LoRA's adapter_config.json of PEFT's format, and check its tensors.

Only lora_A, lora_B and (where the config says so) bias tensors are allowed: a file that also holds `lm_head.weight`
would silently overwrite the base in loaders that accept it. Layers may differ in rank and alpha (rank_pattern,
alpha_pattern): layers of which some parts are adapted alone are stored so, next to others (fused_parts.py).

Legend: R rank, I in features, O out features.
"""

import math
import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from qlora_trainer.adapters.file_config import PEFT_PREFIX, Differences, FileConfig, value_in_brief
from qlora_trainer.adapters.folds import DoraFold, Fold, LoraFold, MergedTokens
from qlora_trainer.adapters.formulas import lora_scaling
from qlora_trainer.adapters.patterns import layer_alpha, layer_parts, layer_rank, of_pattern
from qlora_trainer.adapters.tokens.token_file import (
    TokenIndices,
    check_token_tensors,
    in_order_of_ids,
    indices_problem,
    is_token_tensor,
    sorted_ids,
    token_tensors,
)
from qlora_trainer.common.dotted_names import ends_in
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.config.schema import AdapterConfig

MAX_RANK = 3 * 1024  # three fused parts times the largest adapter.rank
StoredRank = Annotated[int, Field(ge=1, le=MAX_RANK)]
StoredAlpha = Annotated[float, Field(gt=0.0)]
_FACTOR = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<part>[AB])\.weight")
_MAGNITUDE = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_magnitude_vector")
_BIAS = re.compile(r"base_model\.model\.(?P<path>.+)\.bias")
_PLAIN_INITIALIZATIONS = (None, True, False, "gaussian", "orthogonal")  # others change the base's weights, or may


class LoraFileConfig(FileConfig):
    """Hold the keys of a LoRA adapter's file."""

    ignored: ClassVar[frozenset[str]] = FileConfig.ignored | {
        "exclude_modules",
        "layers_pattern",
        "layers_to_transform",
        "megatron_core",
        "qalora_group_size",
    }
    refused: ClassVar[Mapping[str, str]] = {
        "modules_to_save": "modules saved whole are not supported; train it without them, or merge it with PEFT first",
        "target_parameters": "adapters on bare parameters are not supported; merge it with PEFT first",
        "layer_replication": "replicated layers are not supported; merge it with PEFT first",
        "lora_bias": "a bias on lora_B is not supported; merge it with PEFT first",
        "alora_invocation_tokens": "activated LoRA is not supported",
    }

    peft_type: Literal["LORA"] = "LORA"
    task_type: Literal["CAUSAL_LM"] | None = "CAUSAL_LM"
    r: StoredRank
    lora_alpha: StoredAlpha
    lora_dropout: float = Field(0.0, ge=0.0, le=1.0)
    rank_pattern: dict[str, StoredRank] = Field(default_factory=dict)  # other ranks than r, by the end of a path
    alpha_pattern: dict[str, StoredAlpha] = Field(default_factory=dict)  # likewise of alpha
    target_modules: list[str] | str | None  # ends of module paths, or a regex; reading goes by the tensors instead
    bias: Literal["none", "lora_only", "all"] = "none"
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False  # the base stores these weights (I, O), as GPT-2's Conv1D does
    init_lora_weights: bool | str | None = True
    trainable_token_indices: TokenIndices | None = None  # tokens whose rows of embedding and head trained
    modules_to_save: None = None

    @property
    def kind(self) -> str:
        """Return the value of adapter.kind that such an adapter has."""
        return "dora" if self.use_dora else "lora"

    @property
    def is_stored_transposed(self) -> bool:
        """Return True if the base stores the adapted weights (I, O), as GPT-2's Conv1D does."""
        return self.fan_in_fan_out

    @classmethod
    def more_problems(cls, known: Mapping[str, Any]) -> list[str]:
        """Refuse initializations that change the base, and tokens named in a way that is not ours.

        Args:
            known: the file's values of our keys.

        Returns:
            A line each.
        """
        problem = indices_problem(known.get("trainable_token_indices"))
        problems = [problem] if problem else []
        if known.get("init_lora_weights") in _PLAIN_INITIALIZATIONS:
            return problems
        return [
            *problems,
            f"init_lora_weights is {value_in_brief(known['init_lora_weights'])}, which may change the base's weights "
            "too; convert it to a plain LoRA (PEFT's save_pretrained with path_initial_model_for_weight_conversion)",
        ]

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Return the tokens whose rows trained."""
        return sorted_ids(self.trainable_token_indices)

    def rank_of(self, path: str) -> int:
        """Return the rank of a layer.

        Names are compared as they are written, though PEFT would read them as expressions.

        Args:
            path: of the layer.

        Returns:
            R.
        """
        return of_pattern(self.rank_pattern, path, self.r)

    def scaling_of(self, path: str) -> float:
        """Return the factor of a layer's adapter.

        Args:
            path: of the layer.

        Returns:
            s.
        """
        alpha = of_pattern(self.alpha_pattern, path, self.lora_alpha)
        return lora_scaling(self.rank_of(path), alpha, self.use_rslora)

    def check_tensors(self, tensors: Mapping[str, Tensor], origin: str) -> None:
        """Check that these are pairs of lora_A and lora_B of the config's ranks, and biases that it names.

        Args:
            tensors: by PEFT's names: lora_A (R, I), lora_B (O, R), biases (O,).
            origin: of them, for the message.

        Raises:
            AdapterError: they are not.
        """
        pairs: dict[str, set[str]] = {}
        for name, tensor in tensors.items():
            match = _FACTOR.fullmatch(name)
            if match is None:
                continue
            path, part = match["path"], match["part"]
            pairs.setdefault(path, set()).add(part)
            rank_dimension, rank = 0 if part == "A" else 1, self.rank_of(path)
            if tensor.dim() != 2 or tensor.shape[rank_dimension] != rank:
                wanted = f"({rank}, in features)" if part == "A" else f"(out features, {rank})"
                raise AdapterError(
                    f"{origin}: {name} has shape {tuple(tensor.shape)}; with r {rank} it should be {wanted}."
                )
        if not pairs:
            raise AdapterError(f"{origin} holds no lora_A and lora_B tensors.")
        for path, parts in pairs.items():
            if len(parts) == 1:
                raise AdapterError(f"{origin}: {path} has lora_{parts.pop()} but not the other half of the pair.")
        self._check_patterns(pairs, origin)
        self._check_magnitudes(tensors, pairs, origin)
        check_token_tensors(tensors, self.trainable_token_indices, origin)
        for name, tensor in tensors.items():
            of_layer = _FACTOR.fullmatch(name) or (self.use_dora and _MAGNITUDE.fullmatch(name))
            if not (of_layer or is_token_tensor(name)):
                self._check_bias(name, tensor, pairs, origin)

    def adapted_paths(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """List the paths of the adapted layers.

        Args:
            tensors: by PEFT's names.

        Returns:
            The paths, in the order of the file.
        """
        return list(stored_ranks(tensors))

    def folds(self, tensors: Mapping[str, Tensor]) -> dict[str, Fold]:
        """Say what becomes of each adapted weight in a merge.

        Args:
            tensors: by PEFT's names.

        Returns:
            Folds by the path of the layer.
        """
        return {path: self._fold(tensors, path) for path in stored_ranks(tensors)}

    def in_order(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put rows of tokens in the order of their ids.

        Args:
            tensors: by PEFT's names.

        Returns:
            The tensors.
        """
        return in_order_of_ids(tensors, self.trainable_token_indices)

    def token_rows(self, tensors: Mapping[str, Tensor]) -> dict[str, MergedTokens]:
        """Find the rows of tokens that were trained.

        Args:
            tensors: by PEFT's names, in the order of the ids.

        Returns:
            Rows by the path of the embedding or head.
        """
        return {path: MergedTokens(self.token_ids, rows) for path, rows in token_tensors(tensors).items()}

    def biases(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Find the biases of the base that were trained.

        Args:
            tensors: by PEFT's names.

        Returns:
            (O,) by the path of the module.
        """
        found = {match["path"]: tensor for name, tensor in tensors.items() if (match := _BIAS.fullmatch(name))}
        return {path.removesuffix(".base_layer"): tensor for path, tensor in found.items()}

    def settings_of(self, tensors: Mapping[str, Tensor], wanted: AdapterConfig) -> Differences:
        """Put ranks, scalings and bias mode next to a run's, layer by layer.

        One function can be written in several ways, so the settings differ only where a layer does.

        Args:
            tensors: by PEFT's names.
            wanted: the run's section `adapter`.

        Returns:
            Pairs, equal or not.
        """
        pairs: Differences = {"adapter.bias": (self.bias, wanted.bias)}
        ranks = stored_ranks(tensors)
        # Parts of a fused layer that are adapted alone are stored as one adapter of their summed rank.
        if any(rank != layer_rank(wanted, path) * layer_parts(wanted, path) for path, rank in ranks.items()):
            pairs["adapter.rank"] = (self.r, wanted.rank)
            pairs["adapter.rank_pattern"] = (self.rank_pattern, wanted.rank_pattern)
        if not all(
            math.isclose(
                self.scaling_of(path),
                lora_scaling(layer_rank(wanted, path), layer_alpha(wanted, path), wanted.use_rslora),
                rel_tol=1e-12,
            )
            for path in ranks
        ):
            pairs["adapter.alpha"] = (self.lora_alpha, wanted.alpha)
            pairs["adapter.alpha_pattern"] = (self.alpha_pattern, wanted.alpha_pattern)
            pairs["adapter.use_rslora"] = (self.use_rslora, wanted.use_rslora)
        return pairs

    def as_json(self) -> dict[str, Any]:
        """Return the config as it is written, with alpha as an integer where it is one: some readers insist.

        Returns:
            JSON.
        """
        content = super().as_json()
        if content["trainable_token_indices"] is None:
            del content["trainable_token_indices"]  # some readers refuse keys that they do not know
        content["lora_alpha"] = _as_integer(content["lora_alpha"])
        content["alpha_pattern"] = {name: _as_integer(alpha) for name, alpha in content["alpha_pattern"].items()}
        return content

    def _fold(self, tensors: Mapping[str, Tensor], path: str) -> Fold:
        of_layer = f"{PEFT_PREFIX}{path}."
        A, B = tensors[f"{of_layer}lora_A.weight"], tensors[f"{of_layer}lora_B.weight"]
        if self.use_dora:
            return DoraFold(A, B, self.scaling_of(path), tensors[f"{of_layer}lora_magnitude_vector"])
        return LoraFold(A, B, self.scaling_of(path))

    def _check_patterns(self, adapted: Collection[str], origin: str) -> None:
        """Refuse a pattern that is an expression for PEFT: taken as it is written, it would fit no layer."""
        for key, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for name in pattern:
                if re.escape(name).replace(r"\.", ".") != name and not any(ends_in(path, name) for path in adapted):
                    raise AdapterError(
                        f"{origin}: {key} names {name}, which PEFT reads as a regular expression. That is not "
                        "supported; write each layer's path out in adapter_config.json."
                    )

    def _check_magnitudes(self, tensors: Mapping[str, Tensor], adapted: Collection[str], origin: str) -> None:
        """Check that DoRA has a magnitude for each output of each adapted layer."""
        if not self.use_dora:
            return
        for path in adapted:
            name = f"{PEFT_PREFIX}{path}.lora_magnitude_vector"
            outputs = len(tensors[f"{PEFT_PREFIX}{path}.lora_B.weight"])
            if name not in tensors:
                raise AdapterError(f"{origin} says use_dora, and lacks {name}; the file is incomplete.")
            if tensors[name].shape != (outputs,):
                raise AdapterError(f"{origin}: {name} has shape {tuple(tensors[name].shape)}, not ({outputs},).")

    def _check_bias(self, name: str, tensor: Tensor, adapted: Mapping[str, object], origin: str) -> None:
        """Refuse a bias of a wrong name: an adapted layer's is `<path>.base_layer.bias`, any other's `<path>.bias`."""
        match = _BIAS.fullmatch(name)
        if match is None:
            raise AdapterError(
                f"{origin} also holds {name}, which is no part of such an adapter and would overwrite the base. "
                "Heads, embeddings and modules saved whole are not supported."
            )
        path = match["path"]
        of_adapted = path.endswith(".base_layer") and path.removesuffix(".base_layer") in adapted
        if self.bias == "none" or (self.bias == "lora_only" and not of_adapted):
            raise AdapterError(f"{origin} holds the bias {name}, though its config says bias: {self.bias}.")
        if tensor.dim() != 1:
            raise AdapterError(f"{origin}: the bias {name} has shape {tuple(tensor.shape)}; one dimension is expected.")


def stored_ranks(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return R of each adapted layer, by its path, from tensors named as PEFT names them.

    Args:
        tensors: of an adapter.

    Returns:
        Ranks by path.
    """
    return {
        match["path"]: len(tensor)
        for name, tensor in tensors.items()
        if (match := _FACTOR.fullmatch(name)) and match["part"] == "A"
    }


def _as_integer(alpha: float) -> float:
    return int(alpha) if alpha.is_integer() else alpha
