"""Compare dotted names, such as those of a model's layers and tensors."""


def ends_in(name: str, end: str) -> bool:
    """Return True if a dotted name ends in whole parts of another.

    Args:
        name: such as "model.layers.0.self_attn.q_proj".
        end: such as "self_attn.q_proj"; a leading dot means the same.

    Returns:
        True if it does; "proj" is no whole part of "q_proj".
    """
    return f".{name}".endswith(f".{end.removeprefix('.')}")
