"""Remember what a base was found to be, so that its files are hashed once and not at every start.

A record holds the base's fingerprint and the hash of each tensor's bytes on disk. It is found again while the files of
weights are the same (common/file_identity.py) and are loaded in the same way: another version of transformers may name
or tie tensors otherwise. What a checkpoint's files do not say, such as the codes of weights that are quantized while
loading, is computed and hashed at every start all the same.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from qlora_trainer.common.errors import ModelError
from qlora_trainer.common.file_identity import FileRecords
from qlora_trainer.common.units import counted
from qlora_trainer.model.fingerprint import BaseFingerprint, config_identity
from qlora_trainer.model.load_plan import LoadPlan

_FORMAT = 1  # raise it where the same files would give another fingerprint


@dataclass(frozen=True)
class HashedBase:
    """Hold what was found in a base's files."""

    fingerprint: BaseFingerprint
    stored: dict[str, str]  # sha256 of each tensor's bytes as the files hold them, by the checkpoint's names

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `dataclasses.asdict` gave; KeyError or TypeError where `data` is something else.

        Args:
            data: the fields by name.

        Returns:
            The base.
        """
        return cls(BaseFingerprint.from_json(data["fingerprint"]), dict(data["stored"]))


class KnownBases:
    """Keep the records of bases in the user's cache.

    Args:
        cache_dir: the user's; the records are in a folder of it.
    """

    def __init__(self, cache_dir: Path) -> None:
        self._records = FileRecords(cache_dir / "bases")

    def find(self, plan: LoadPlan) -> HashedBase | None:
        """Find what is known of a base.

        Args:
            plan: of the base.

        Returns:
            The record, with the config as it is now; None where its files were never hashed, or have changed.
        """
        content = self._records.find(_subject(plan), plan.directory.file_identity)
        try:
            known = HashedBase.from_json(content)
        except (KeyError, TypeError, ValueError, AttributeError):
            return None
        config = config_identity(plan.directory.config_json)  # of a small file, which is read anyway
        return dataclasses.replace(known, fingerprint=dataclasses.replace(known.fingerprint, config=config))

    def keep(self, plan: LoadPlan, base: HashedBase, began_ns: int) -> None:
        """Remember a base whose files were hashed.

        Args:
            plan: of the base.
            base: what was found.
            began_ns: when reading began, by time.time_ns().
        """
        self._records.keep(_subject(plan), plan.directory.file_identity, dataclasses.asdict(base), began_ns)

    def refuse_other_bytes(self, plan: LoadPlan, base: HashedBase) -> None:
        """Compare a base that was hashed again with its record.

        Args:
            plan: of the base.
            base: as it was found now.

        Raises:
            ModelError: tensors differ from what they were, though their files seem untouched. The record is removed.
        """
        known = self.find(plan)
        if known is None:
            return
        if other := sorted(name for name, sha256 in known.stored.items() if base.stored.get(name) != sha256):
            self._records.forget(_subject(plan))
            raise ModelError(
                f"{plan.directory} has other bytes than when it was first read in "
                f"{counted(len(other), 'tensor')}, such as "
                f"{other[0]}, though its files have the same sizes and times: the disk may be failing. Fetch the "
                "model again."
            )


def _subject(plan: LoadPlan) -> str:
    """Return the key of a base's record: its directory, and a hash of how its tensors are loaded."""
    tables = [
        _FORMAT,
        str(plan.source_dtype),
        plan.four_bit,
        sorted(plan.transposed),
        {name: [dense.names, str(dense.dtype)] for name, dense in plan.dense.items()},
        sorted(plan.statistics),
        plan.original,
    ]
    return f"{plan.directory.path.resolve()} {hashlib.sha256(json.dumps(tables).encode()).hexdigest()}"
