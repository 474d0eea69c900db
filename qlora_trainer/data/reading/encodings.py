"""Say what is wrong with bytes that are no text of their encoding: a damaged row, or a file of another encoding.

The whole file is looked at once, where the first such byte is found. Nothing is guessed: an encoding is suggested only
where it reads every line, none is UTF-8, and it is not the one that has just failed. Left out: reading lines
(streams.py).
"""

import codecs
import re
import shlex
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import PurePath

from qlora_trainer.common.units import counted
from qlora_trainer.config.override import override
from qlora_trainer.data.reading.data_file import DataFile
from qlora_trainer.data.reading.unpacking import open_unpacked

_CANDIDATES = ("cp1252", "shift_jis", "gb18030")
_CESU = re.compile(rb"\xed[\xa0-\xaf][\x80-\xbf]\xed[\xb0-\xbf][\x80-\xbf]")
_CONTROLS = re.compile("[\x80-\x9f]")  # as characters of text, these show a wrong encoding
_LINE_BYTES = 1 << 26


@dataclass
class Survey:
    """Count a file's lines with characters beyond ASCII by what they are."""

    beyond_ascii: int = 0
    cesu: int = 0  # UTF-8 but for surrogate pairs
    readable: dict[str, int] = field(default_factory=dict)  # by encoding
    utf8_bytes: int = 0  # before the first line that is not UTF-8
    utf8_characters: int = 0  # of those, the characters beyond ASCII
    utf8_lines: int = 0  # the lines that hold them


@lru_cache(maxsize=1)  # each bad row of a file asks for it
def survey(file: DataFile) -> Survey:
    """Look at every line of a file whose newline is one byte.

    Args:
        file: a text file.

    Returns:
        The counts.
    """
    found = Survey()
    names = dict.fromkeys(["utf-8", file.encoding or "utf-8", *_CANDIDATES])
    found.readable = dict.fromkeys(names, 0)
    is_utf8 = True
    with open_unpacked(file) as stream:
        while line := stream.readline(_LINE_BYTES):
            if not line.removeprefix(codecs.BOM_UTF8).isascii():
                found.beyond_ascii += 1
                for name in names:
                    found.readable[name] += _reads(line, name)
                found.cesu += bool(_CESU.search(line)) and _reads(_CESU.sub(b"", line), "utf-8")
                is_utf8 = is_utf8 and found.readable["utf-8"] == found.beyond_ascii
                if is_utf8:
                    found.utf8_lines += 1
                    found.utf8_characters += sum(character > "\x7f" for character in line.decode("utf-8-sig"))
            if is_utf8:
                found.utf8_bytes += len(line)
    return found


def _reads(line: bytes, encoding: str) -> bool:
    try:
        text = line.decode(encoding)
    except UnicodeError:
        return False
    return encoding == "utf-8" or not _CONTROLS.search(text)


def not_text(file: DataFile, place: str, offset: int | None, byte: int, found: Survey | None) -> str:
    """Write the error message for a byte that is not of a file's encoding.

    Args:
        file: the file.
        place: in it, such as "line 3".
        offset: of the byte; None where that is not known.
        byte: its value.
        found: the file's survey; None for an encoding in which a newline is more than one byte.

    Returns:
        The message.
    """
    at = f"the byte 0x{byte:02x}" if offset is None else f"byte {offset} (0x{byte:02x})"
    return f"{file.title}, {place}: {at} is not {file.encoding or 'UTF-8'} text. {_way_out(file, found)}"


def _way_out(file: DataFile, found: Survey | None) -> str:
    if found is None:
        return f"The file is damaged, or of another encoding than {file.encoding}; write it again as UTF-8."
    named = file.encoding or "utf-8"
    good, bad = found.readable[named], found.beyond_ascii - found.readable[named]
    if found.readable["utf-8"] == found.beyond_ascii:
        return f"All of the file is UTF-8 text: leave the encoding out: {override('data.encoding', None)}"
    if found.cesu and found.cesu + found.readable["utf-8"] == found.beyond_ascii:
        return (
            "The file is CESU-8: UTF-8 in which characters such as emoji are two surrogates "
            f"({counted(found.cesu, 'line')}), as some databases export. Write it as UTF-8: {_cesu_repair(file)}"
        )
    if good >= bad and good:
        before = ""
        if named == "utf-8" and found.utf8_characters:
            before = (
                f"The {found.utf8_bytes:,} bytes before the first such line are UTF-8, characters beyond ASCII among "
                f"them: {found.utf8_characters:,} in {counted(found.utf8_lines, 'line')}. "
            )
        return f"{before}{counted(good, 'line')} beyond ASCII can be read, and {bad:,} cannot, so {_damaged(file)}"
    if good and named == "utf-8":
        return (
            f"{counted(good, 'line')} beyond ASCII {'is' if good == 1 else 'are'} UTF-8, and {bad:,} "
            f"{'is' if bad == 1 else 'are'} not: parts of different encodings seem to have "
            "been joined. Write each part as UTF-8 before joining them."
        )
    fits = [name for name in _CANDIDATES if found.readable[name] == found.beyond_ascii]
    if fits and named == "utf-8":
        return (
            f"No line beyond ASCII is UTF-8 ({counted(bad, 'line')}). If the file has another encoding, name it, "
            f"and look at the characters: {override('data.encoding', fits[0])} ({', '.join(fits)} can read all of it). "
            f"Otherwise {_damaged(file)}"
        )
    return (
        f"No line beyond ASCII can be read ({counted(bad, 'line')}). Unless you know another encoding, {_damaged(file)}"
    )


def _damaged(file: DataFile) -> str:
    if file.suffix == ".txt":
        made = shlex.quote(str(PurePath(str(file)).with_suffix(".repaired.txt")))
        return f"this place is damaged. Correct it, or leave out such bytes: iconv -c -f UTF-8 {file.quoted} > {made}"
    return "this row is damaged."


def _cesu_repair(file: DataFile) -> str:
    path = PurePath(str(file))
    made = path.with_name(f"{path.name.removesuffix(path.suffix)}.utf8{path.suffix}")
    program = (
        "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read().decode('utf-8', 'surrogatepass')"
        ".encode('utf-16', 'surrogatepass').decode('utf-16').encode())"
    )
    return f'python3 -c "{program}" < {file.quoted} > {shlex.quote(str(made))}'


class EncodingCheck:
    """Find lines that are UTF-8 where another encoding is named, so that the name may be wrong.

    Args:
        file: read by an encoding of which a newline is one byte.
    """

    def __init__(self, file: DataFile) -> None:
        self._file = file
        self._encoding = file.encoding or "utf-8"
        self._is_utf8 = codecs.lookup(self._encoding).name in ("utf-8", "utf-8-sig")
        self._beyond_ascii, self._utf8, self._example, self._rest = 0, 0, "", b""

    def look(self, raw: bytes) -> None:
        """Look at the next bytes.

        Args:
            raw: a line with its end, or a block.
        """
        if self._is_utf8:
            return
        *lines, self._rest = (self._rest + raw).split(b"\n")
        for line in lines:
            if line.isascii():
                continue
            self._beyond_ascii += 1
            if _reads(line, "utf-8"):
                self._utf8 += 1
                self._example = self._example or next(character for character in line.decode() if character > "\x7f")

    def finish(self) -> None:
        """Warn at the end of the file, where lines were UTF-8 that no chance explains."""
        self.look(b"\n")
        is_single_byte = len(bytes(range(256)).decode(self._encoding, "replace")) == 256
        if self._utf8 > (0 if is_single_byte else self._beyond_ascii // 2):
            read_as = self._example.encode().decode(self._encoding, "replace")
            self._file.note(
                f"the encoding is {self._file.encoding}, but of its lines beyond ASCII {self._utf8:,} of "
                f"{self._beyond_ascii:,} are UTF-8 too, where {self._example!r} is read as {read_as!r}. If the file is "
                f"UTF-8, leave the encoding out: {override('data.encoding', None)}"
            )


def is_wide(encoding: str | None) -> bool:
    """Return True if a newline is more than its one byte, as in UTF-16.

    Args:
        encoding: as Python names it; None for UTF-8.

    Returns:
        True if it is.
    """
    return "\n".encode(encoding or "utf-8") != b"\n"
