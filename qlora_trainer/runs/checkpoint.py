"""Save and load checkpoints so that a kill or a full disk loses none, and a flipped bit is detected.

A checkpoint is a directory `checkpoints/step-000100` in the run directory: the adapter in PEFT's two files, what else
training needs (`trainer_state.safetensors` for tensors, `trainer_state.json` for the rest), and `manifest.json` with
the size and sha256 of each. It is written under a temporary name, every file and directory is synced, and one rename
gives it its name (common/atomic.py); only then are older ones deleted. So at every moment the newest valid checkpoint
is the old one or the new one, complete. Loading verifies the hashes first: a flipped bit in tensor data would otherwise
load without an error.

No pickle: random states are uint8 tensors and JSON. Left out: what the state means (training/state.py) and the
adapter's own format (adapters/peft_format.py). One process writes to a run directory at a time.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_trainer.common.atomic import new_directory, remove_leftovers_in
from qlora_trainer.common.boundary import read_bounded_json
from qlora_trainer.common.errors import CheckpointError, DiskError
from qlora_trainer.common.file_identity import file_sha256
from qlora_trainer.common.units import counted

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
STATE_TENSORS = "trainer_state.safetensors"
STATE_JSON = "trainer_state.json"
MAX_CHECKPOINT_JSON_BYTES = 64 * 2**20

_STEP = re.compile(r"(?P<aside>\.)?step-(?P<step>\d+)(?(aside)\.replaced)")


class FoundCheckpoint(NamedTuple):
    """Hold the newest valid checkpoint and the reasons why newer ones were passed over."""

    path: Path
    step: int
    passed_over: list[str]  # one sentence for each newer checkpoint that is damaged


def save_checkpoint(
    run_dir: Path,
    step: int,
    *,
    write_adapter: Callable[[Path], None],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write `checkpoints/step-<step>`, then delete all but the newest up to it.

    Args:
        run_dir: the run directory.
        step: optimizer steps taken.
        write_adapter: writes the adapter's files into the directory that it is called with.
        tensors: the state's tensors, contiguous and without shared memory.
        state: the rest of the state, which JSON can hold.
        keep: so many checkpoints are kept, this one included.

    Returns:
        The checkpoint's directory.

    Raises:
        DiskError: a write failed, then earlier checkpoints are untouched and nothing half-written is left; or the
            checkpoint is written, and older ones could not be deleted.
    """
    checkpoints = run_dir / "checkpoints"
    final = checkpoints / f"step-{step:06d}"
    try:
        remove_leftovers_in(checkpoints)
        with new_directory(final, replaces=True) as work:
            write_adapter(work)
            save_file(dict(tensors), work / STATE_TENSORS)
            (work / STATE_JSON).write_text(json.dumps(state), encoding="utf-8")
            _seal(work, step)
    except (OSError, SafetensorError) as error:
        reason = error.__cause__ if isinstance(error, DiskError) else error
        raise DiskError(
            f"The checkpoint of step {step} could not be written to {checkpoints}, or the checkpoint it replaces could "
            f"not be deleted: {reason}. Earlier checkpoints are untouched. Free some space or fix the directory's "
            "permissions, then resume; a smaller checkpoint.keep needs less space."
        ) from error
    try:
        _prune(checkpoints, step, keep)
    except OSError as error:
        raise DiskError(
            f"The checkpoint {final} is written, but older ones could not be deleted: {error}. Fix the permissions "
            f"of {checkpoints}, then resume."
        ) from error
    return final


def newest_checkpoint(run_dir: Path) -> FoundCheckpoint:
    """Find the newest checkpoint whose files all have the size and hash of its manifest.

    Args:
        run_dir: the run directory.

    Returns:
        The checkpoint, with a sentence for each newer one that is damaged.

    Raises:
        CheckpointError: there is none; the message says what was found.
    """
    checkpoints = run_dir / "checkpoints"
    candidates = list_checkpoints(checkpoints)
    passed_over = []
    for step, path in candidates:
        try:
            _verify(path)
        except CheckpointError as error:
            passed_over.append(str(error))
        else:
            return FoundCheckpoint(path, step, passed_over)
    if not candidates:
        raise CheckpointError(
            f"There is no checkpoint in {checkpoints}. If training stopped before its first one, start the run "
            "again; otherwise check that this is a run directory."
        )
    raise CheckpointError(
        f"No checkpoint in {checkpoints} can be used:\n" + "\n".join(f"  - {reason}" for reason in passed_over)
    )


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Verify a checkpoint's files and load its state.

    A file that is missing, damaged or of another format version raises CheckpointError.

    Args:
        path: the checkpoint's directory.

    Returns:
        (tensors, on the CPU, and state), as `save_checkpoint` was given them.
    """
    _verify(path)
    state = _read_json(path / STATE_JSON)
    return load_file(path / STATE_TENSORS), state


def _seal(directory: Path, step: int) -> None:
    """Give every file the mode that a plain write would give, hash it, and write the manifest."""
    mode = (directory / STATE_JSON).stat().st_mode & 0o777  # safetensors creates its files with 0600
    files = {}
    for path in sorted(directory.iterdir()):
        path.chmod(mode)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    manifest = directory / MANIFEST
    manifest.write_text(
        json.dumps({"format_version": FORMAT_VERSION, "step": step, "files": files}, indent=2), encoding="utf-8"
    )


def _prune(checkpoints: Path, newest: int, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints up to and with `newest`."""
    older = [path for step, path in list_checkpoints(checkpoints) if step < newest]
    for path in older[keep - 1 :]:
        shutil.rmtree(path)


def list_checkpoints(checkpoints: Path) -> list[tuple[int, Path]]:
    """List every checkpoint directory, newest first; of two of one step, the replacement first.

    Args:
        checkpoints: the directory that they are in.

    Returns:
        (step, path) of each; empty where there is no such directory.
    """
    if not checkpoints.is_dir():
        return []
    matches = [(match, path) for path in checkpoints.iterdir() if (match := _STEP.fullmatch(path.name))]
    matches.sort(key=lambda item: (-int(item[0]["step"]), item[0]["aside"] is not None))
    return [(int(match["step"]), path) for match, path in matches]


def _verify(path: Path) -> None:
    """Raise CheckpointError unless every file is there with the size and hash that the manifest gives."""
    manifest = _read_json(path / MANIFEST)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format {manifest.get('format_version')}; this version reads {FORMAT_VERSION}. "
            "Use the version of qlora-trainer that wrote it."
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or not {STATE_TENSORS, STATE_JSON} <= files.keys():
        raise CheckpointError(f"{path / MANIFEST} does not list the trainer's state; the checkpoint is damaged.")
    for name, expected in files.items():
        if name != Path(name).name or not isinstance(expected, dict):
            raise CheckpointError(f"{path / MANIFEST} has a wrong entry {name!r}; the checkpoint is damaged.")
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing.")
        if (size := file.stat().st_size) != expected.get("bytes"):
            raise CheckpointError(
                f"{file} has {counted(size, 'byte')} instead of {expected.get('bytes')}; it is damaged."
            )
        if file_sha256(file) != expected.get("sha256"):
            raise CheckpointError(f"{file} does not have the contents that were written (sha256 differs).")


def _read_json(path: Path) -> dict[str, Any]:
    advice = "The checkpoint is damaged: restore it, or use another one."
    return read_bounded_json(path, dict, MAX_CHECKPOINT_JSON_BYTES, CheckpointError, advice)
