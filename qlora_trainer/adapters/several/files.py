"""Read an adapter from its files, and again only if they are the same files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from qlora_trainer.adapters.peft_format import ADAPTER_CONFIG, ADAPTER_WEIGHTS, StoredAdapter, read_adapter
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.common.file_identity import FileIdentity


@dataclass(frozen=True)
class AdapterFiles:
    """Hold where an adapter is, and what shows that its files did not change."""

    directory: Path
    identities: list[FileIdentity]

    @classmethod
    def of(cls, directory: Path) -> Self:
        """Take the identities of an adapter's files as they are now; missing ones are reported by `read`.

        Args:
            directory: of PEFT's two files.

        Returns:
            The files.
        """
        files = [directory / ADAPTER_CONFIG, directory / ADAPTER_WEIGHTS]
        return cls(directory, [FileIdentity.of(file) for file in files if file.is_file()])

    def read(self) -> StoredAdapter:
        """Read the adapter. Errors are those of `read_adapter`.

        Returns:
            The adapter.

        Raises:
            AdapterError: a file changed, or is gone.
        """
        for identity in self.identities:
            if not identity.is_current():
                raise AdapterError(
                    f"{identity.path} changed since its adapter was loaded, or is gone. Drop the adapter, and load it "
                    "again."
                )
        return read_adapter(self.directory)
