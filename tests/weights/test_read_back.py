"""What was written is read back: every tensor, key, shape, dtype and byte, and no word more than is true."""

import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qlora_trainer.common.errors import MergeError
from qlora_trainer.weights.read_back import verify_files
from qlora_trainer.weights.tensors import TensorSpec

WRITTEN = {
    "a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.ones(2, 5, dtype=torch.bfloat16),
}
SPECS = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in WRITTEN.items()]
SUMS = {name: zlib.crc32(bytes(tensor.view(torch.uint8).flatten().tolist())) for name, tensor in WRITTEN.items()}


def directory(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_what_was_written_is_found_and_every_byte_is_counted(tmp_path: Path) -> None:
    reported: list[tuple[str, int, int | None]] = []
    verify_files(directory(tmp_path, WRITTEN), SPECS, SUMS, lambda *said: reported.append(said))
    assert reported[-1] == ("verifying files", 3 * 4 * 4 + 2 * 5 * 2, 3 * 4 * 4 + 2 * 5 * 2)
    assert len(reported) == 2


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": WRITTEN["a"]}, "1 tensor missing or unexpected; b is missing"),
        ({**WRITTEN, "c": torch.ones(1)}, "1 tensor missing or unexpected; c is not expected"),
        ({"x": WRITTEN["a"], "y": WRITTEN["b"]}, "4 tensors missing or unexpected; a is missing"),
        ({**WRITTEN, "b": WRITTEN["b"].half()}, "b is torch.float16 (2, 5), not torch.bfloat16 (2, 5)"),
        ({**WRITTEN, "a": WRITTEN["a"].reshape(4, 3)}, "a is torch.float32 (4, 3), not torch.float32 (3, 4)"),
        ({**WRITTEN, "a": WRITTEN["a"] + 1e-6}, "a is not what was written"),
        ({**WRITTEN, "a": WRITTEN["a"] / 0}, "a holds values that are not finite"),
    ],
)
def test_what_differs_is_named(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(MergeError) as caught:
        verify_files(directory(tmp_path, tensors), SPECS, SUMS, what="copy")
    assert "The copy failed its verification: " in str(caught.value)
    assert message in str(caught.value)


def test_one_flipped_bit_on_the_disk_is_found(tmp_path: Path) -> None:
    path = directory(tmp_path, WRITTEN) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(MergeError, match=r"is not what was written\. The disk or the memory may be failing"):
        verify_files(tmp_path, SPECS, SUMS)


def test_files_that_cannot_be_read_fail_the_verification(tmp_path: Path) -> None:
    (directory(tmp_path, WRITTEN) / "model.safetensors").write_bytes(b"")
    with pytest.raises(MergeError, match=r"The merged model failed its verification: .*model.safetensors is damaged"):
        verify_files(tmp_path, SPECS, SUMS)
