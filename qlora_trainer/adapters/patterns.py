"""Say which rank, alpha and parts a layer has by a config's patterns: values by the end of a path.

PEFT reads the names of its rank_pattern and alpha_pattern as regular expressions; here they are compared as they are
written, in whole parts.
"""

from collections.abc import Collection, Mapping
from typing import TypeVar

from qlora_trainer.common.dotted_names import ends_in
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.config.schema import AdapterConfig

Value = TypeVar("Value")


def of_pattern(pattern: Mapping[str, Value], path: str, otherwise: Value) -> Value:
    """Find a layer's value.

    Args:
        pattern: values by the end of a path.
        path: of the layer.
        otherwise: for a layer that the pattern does not name.

    Returns:
        The value of the first name that the path ends in.
    """
    return next((value for end, value in pattern.items() if ends_in(path, end)), otherwise)


def layer_rank(settings: AdapterConfig, path: str) -> int:
    """Return the rank of a layer's adapter, or of each of its parts' adapters.

    Args:
        settings: the config's section `adapter`.
        path: of the layer.

    Returns:
        R.
    """
    return of_pattern(settings.rank_pattern, path, settings.rank)


def layer_alpha(settings: AdapterConfig, path: str) -> float:
    """Return the alpha of a layer's adapter.

    Args:
        settings: the config's section `adapter`.
        path: of the layer.

    Returns:
        Alpha.
    """
    return of_pattern(settings.alpha_pattern, path, settings.alpha)


def layer_parts(settings: AdapterConfig, path: str) -> int:
    """Return how many adapters a layer has: one, or one for each part of a fused layer that is adapted alone.

    Args:
        settings: the config's section `adapter`.
        path: of the layer.

    Returns:
        The count.
    """
    return len(of_pattern(settings.fused_parts, path, [""]))


def check_patterns(settings: AdapterConfig, paths: Collection[str]) -> None:
    """Check that each name of a pattern is that of an adapted layer.

    Args:
        settings: the config's section `adapter`.
        paths: of the adapted layers.

    Raises:
        AdapterError: a name fits none, so its value would silently be that of no layer.
    """
    for key, pattern in (("rank_pattern", settings.rank_pattern), ("alpha_pattern", settings.alpha_pattern)):
        for end in pattern:
            if not any(ends_in(path, end) for path in paths):
                names = ", ".join(sorted({path.rsplit(".", 1)[-1] for path in paths}))
                raise AdapterError(
                    f"adapter.{key} names {end}, in which the path of no adapted layer ends. Paths look like "
                    f"{next(iter(paths))}, and the names of adapted layers are: {names}."
                )


def layers_differ(settings: AdapterConfig) -> bool:
    """Return True where decoder layers may have adapters of other sizes, so that some cannot speak for all.

    Args:
        settings: the config's section `adapter`.

    Returns:
        True where layers are chosen by number, or a name or an expression has one.
    """
    targets = settings.target_modules
    names = [*settings.rank_pattern, *settings.alpha_pattern, *settings.fused_parts]
    names += targets if isinstance(targets, list) else []
    is_numbered = any(part.isdigit() for name in names for part in name.split("."))
    in_expression = isinstance(targets, str) and any(character.isdigit() for character in targets)
    return settings.layers_to_transform is not None or is_numbered or in_expression
