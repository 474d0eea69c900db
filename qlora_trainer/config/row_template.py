"""Cut the texts of data.template, such as "{title}: {body}", into plain text and the fields that are filled in.

They are checked where the key is declared (data_schema.py), and cut again where rows are read (data/formats).
"""

from string import Formatter

from qlora_trainer.common.errors import ConfigError


def parts(template: str) -> list[tuple[str, str | None]]:
    """Cut a template into texts, each with the path of the field that follows it.

    Args:
        template: text with {path} fields.

    Returns:
        (text, path) pairs; the path is None at the end.

    Raises:
        ConfigError: a brace is open or alone, a field is empty, or has more than a path.
    """
    found: list[tuple[str, str | None]] = []
    try:
        for text, path, form, conversion in Formatter().parse(template):
            if form or conversion or path == "":
                raise ValueError(f"the field {{{path}}} should be a path alone")
            found.append((text, path))
    except ValueError as error:
        problem = f"{error}; write {{{{ and }}}} for braces"
        raise ConfigError(f"data.template has the text {template!r}: {problem[0].lower()}{problem[1:]}") from error
    return found
