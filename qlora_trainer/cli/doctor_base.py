"""Verify a run's base for `qlora doctor RUN`: every byte is read, hashed, and compared with what the run trains on."""

from pathlib import Path

from qlora_trainer.cli.findings import FAILURES, Finding
from qlora_trainer.common.cache import user_cache
from qlora_trainer.common.errors import first_line
from qlora_trainer.common.progress import Progress
from qlora_trainer.common.units import counted
from qlora_trainer.model.quantized_copy import load_base
from qlora_trainer.model.source import resolve_model
from qlora_trainer.runs.trained import read_trained

_NAME = "Base of the run"


def verified_base(run_directory: Path, progress: Progress) -> Finding:
    """Load a run's base as `model.verify_bytes` does, and compare it with the fingerprint of the run's adapter.

    A directory that is no run, or has no adapter that can be read, raises a QLoRATrainerError.

    Args:
        run_directory: of the run.
        progress: is called as the base is read.

    Returns:
        ok, or a problem with what differs or cannot be read.
    """
    run = read_trained(run_directory)
    settings = run.config.replace({"model.verify_bytes": True}).model
    advice = "Restore the files that the run was started with: fetch the model again."
    try:
        directory = resolve_model(settings.name, settings.revision, user_cache(), progress)
        base = load_base(directory, settings, user_cache(), progress)
    except FAILURES as error:
        return Finding(_NAME, "problem", str(error) or first_line(error), advice)
    if difference := run.fingerprint.difference(base.fingerprint):
        return Finding(_NAME, "problem", f"{directory} is not the base that this run trains on: {difference}", advice)
    now = base.fingerprint.sources  # a byte may change that no quantized weight shows
    if other := [name for name, sha256 in run.fingerprint.sources.items() if now.get(name, sha256) != sha256]:
        detail = (
            f"{directory} has other bytes than when the run started in {counted(len(other), 'tensor')}, "
            f"such as {other[0]}"
        )
        return Finding(_NAME, "problem", detail, advice)
    return Finding(_NAME, "ok", f"{directory} was read: it is the base that this run trains on")
