"""Refuse settings that would have no effect on the files, and sources with too few rows that can be used.

Left out: what makes a row bad (formats, rendering).
"""

from collections import Counter
from collections.abc import Sequence

from qlora_trainer.common.errors import DataError
from qlora_trainer.common.units import counted
from qlora_trainer.config.data_schema import DataConfig, SourceFile
from qlora_trainer.config.override import override
from qlora_trainer.data.preparation.reports import SourceReport, places_in_words
from qlora_trainer.data.reading.files import RecordSource

_MEANT_FOR = {
    "header": "CSV, TSV and Excel files without a line of names",
    "encoding": "text files",
    "rows": "JSON files with their rows inside an object",
}


def check_effects(config: DataConfig, sources: Sequence[tuple[SourceFile, RecordSource]]) -> None:
    """Refuse what is set for a source and means nothing for its files, or for all sources and means nothing for any.

    Args:
        config: of the run.
        sources: each as it is read, with the config's own settings filled in.

    Raises:
        DataError: a setting has no effect.
    """
    own: list[SourceFile] = [*(config.train if isinstance(config.train, list) else [])]
    evals = config.eval if isinstance(config.eval, list) else [config.eval]
    own_eval = [item for item in evals if isinstance(item, SourceFile)]
    for key, meant_for in _MEANT_FOR.items():
        for given, (_, source) in zip(own, sources, strict=False):
            _check(getattr(given, key), key, source, meant_for)
        for given, (_, source) in zip(reversed(own_eval), reversed(sources), strict=False):
            _check(getattr(given, key), key, source, meant_for)
        is_used = any(key in source.effects for _, source in sources)
        if getattr(config, key) and not is_used:
            names = ", ".join(source.name for _, source in sources)
            raise DataError(
                f"data.{key} is for {meant_for}, and has no effect on {names}. Leave it out: "
                f"{override(f'data.{key}', [] if key == 'header' else None)}"
            )


def _check(value: object, key: str, source: RecordSource, meant_for: str) -> None:
    if value and key not in source.effects:
        raise DataError(f"{source.path}: {key} is for {meant_for}, and has no effect here. Leave it out of the source.")


def check_skipped(sources: Sequence[SourceReport], max_skipped: float) -> None:
    """Refuse a source of which too many rows are skipped.

    Args:
        sources: the reports.
        max_skipped: the largest share.

    Raises:
        DataError: of one, more are skipped.
    """
    for source in sources:
        skipped = sum(source.skipped.values())
        if not exceeds_limit(skipped, source.rows, max_skipped):
            continue
        share = skipped / source.rows
        most = sorted(source.skipped.items(), key=lambda item: -item[1])[:3]
        reasons = "; ".join(f"{count:,} {reason}" for reason, count in most)
        raise DataError(
            f"{source.name}: {skipped:,} of {counted(source.rows, 'row')} ({share:.1%}) would be skipped, more than "
            f"data.max_skipped allows ({max_skipped:g}): {reasons}. "
            f"Correct the rows or how they are read; or allow it: "
            f"{skip_limit_setting(skipped, source.rows)}"
        )


def exceeds_limit(skipped: int, rows: int, max_skipped: float) -> bool:
    """Return True if more rows are skipped than is allowed.

    Compared is the quotient, as `skip_limit_setting` writes it: in floating point, 0.29 * 100 is less than 29.

    Args:
        skipped: how many.
        rows: of how many.
        max_skipped: the largest share.

    Returns:
        True if too many are.
    """
    return skipped > 0 and skipped / rows > max_skipped


def skip_limit_setting(skipped: int, rows: int) -> str:
    """Write the setting that allows so many rows to be skipped.

    Args:
        skipped: how many.
        rows: of how many.

    Returns:
        As a shell takes it: the share in whole hundredths, rounded up.
    """
    return override("data.max_skipped", -(-100 * skipped // rows) / 100)


def _reasons(source: SourceReport) -> list[str]:
    """List why rows of a source are not used, each with how many they are and where the first ones are."""
    found = []
    for reason, count in (Counter(source.dropped) + Counter(source.skipped)).items():
        places = source.places.get(reason, [])
        at = f": {places_in_words(places)}{', …' * (len(places) < count)}" if places else ""
        found.append(f"{reason} ({count:,}{at})")
    return found


def check_usable(sources: Sequence[SourceReport], for_eval: Sequence[bool], is_mixed: bool, max_length: int) -> None:
    """Refuse a set without rows, and a mixed source without any.

    Args:
        sources: the reports.
        for_eval: which of them are kept for evaluation.
        is_mixed: whether an epoch takes a part of each training source.
        max_length: longest example, for the message.

    Raises:
        DataError: a set is empty.
    """
    groups = {
        name: [source for source, is_eval in zip(sources, for_eval, strict=True) if is_eval == kept]
        for kept, name in ((False, "train"), (True, "eval"))
    }
    checked = [(name, group) for name, group in groups.items() if group]
    if is_mixed:
        checked += [("train", [source]) for source in groups["train"]]
    for name, group in checked:
        if any(source.examples for source in group):
            continue
        reasons = "; ".join(reason for source in group for reason in _reasons(source))
        rows, names = sum(source.rows for source in group), ", ".join(source.name for source in group)
        raise DataError(
            f"data.{name}: {f'none of the {rows:,} rows' if rows != 1 else 'the only row'} of "
            f"{names} can{'not' * (rows == 1)} be used: {reasons}. data.max_length is {max_length}."
        )
