"""Text files as people write them: in UTF-8, in UTF-16, with a byte order mark or without one."""

from __future__ import annotations

import codecs
from pathlib import Path

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16's, with which it begins
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def read_text(path: Path, encoding: str | None = None, fix: str = "Save it as UTF-8.") -> str:
    """The text of a file, without its byte order mark; line ends stay as they are.

    Args:
        path: The file.
        encoding: What it is written in, if it has no byte order mark; UTF-8 for None.
        fix: The end of the message if it is written in something else.

    Raises:
        ValueError: No such encoding, or bytes that it hasn't; the message has the line.
        OSError: The file can't be read.
    """
    data = path.read_bytes()
    name = next((name for mark, name in _MARKS if data.startswith(mark)), encoding or "utf-8")
    try:
        text = data.decode(name).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = data[error.start : error.start + 1].hex()
        raise ValueError(f"{path}, line {line}: the byte 0x{byte} is not {name}. {fix}") from error
    except LookupError as error:
        raise ValueError(
            f"There is no encoding {name!r}; write utf-8, cp1252, utf-16 or the like."
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"{path}, line {line}: a zero byte, as in UTF-16 without its mark. {fix}")
    return text
