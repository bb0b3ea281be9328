"""Documents from text files and JSONL, read a line at a time; what is no UTF-8 text is refused by line or byte."""

from collections.abc import Iterator
from pathlib import Path

from smollm_jax.errors import InputFileError
from smollm_jax.files import parse_json, refuse_marks

TEXT_SUFFIXES = (".txt", ".text", ".md")
MAX_LINE = 16 << 20  # bytes; a whole book has 1 MB


def text_files(source: Path) -> list[Path]:
    """The files a text source consists of, in order; raises `InputFileError` when there are none."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise InputFileError(f"{source}: no such file or folder")
    named = [file for file in sorted(source.rglob("*")) if file.suffix.lower() in (*TEXT_SUFFIXES, ".jsonl")]
    found = [file for file in named if file.is_file()]  # no pipe, which would be waited for
    if not found:
        raise InputFileError(f"{source}: holds no file that ends in {', '.join(TEXT_SUFFIXES)} or .jsonl")
    return found


def documents(file: Path) -> Iterator[str]:
    """The documents of one file: its whole text, or the "text" of each line of a `.jsonl`.

    Line ends become a newline, as in Python's own reading of text.
    """
    if file.suffix.lower() != ".jsonl":
        yield "".join(line for _, line in text_lines(file)).replace("\r\n", "\n").replace("\r", "\n")
        return
    for number, line in text_lines(file):
        if not line.strip():
            continue
        value = parse_json(line, f"{file}: line {number}")
        if not isinstance(value, dict) or type(value.get("text")) is not str:
            raise InputFileError(f"{file}: line {number} is no JSON object with a 'text' that is a string")
        _refuse_nul(value["text"], f"{file}: line {number}: 'text'")
        yield value["text"]


def text_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Line number, from 1, and text of each line of a UTF-8 file, its line end kept; reads one line at a time.

    Raises `InputFileError` naming the line or the byte: a byte order mark, UTF-16, a byte that is not UTF-8, NUL,
    and a line so long that the file is no text.
    """
    start = 0  # of the line, in bytes
    try:
        with file.open("rb") as raw:
            refuse_marks(raw.read(4096), file)
            raw.seek(0)
            for number, line in enumerate(iter(lambda: raw.readline(MAX_LINE + 1), b""), 1):
                if len(line) > MAX_LINE:
                    raise InputFileError(f"{file}: line {number} is longer than {MAX_LINE:,} bytes: this is no text")
                text = line.decode("utf-8")
                _refuse_nul(text, f"{file}: line {number}")
                start += len(line)
                yield number, text
    except UnicodeDecodeError as error:
        raise InputFileError(f"{file}: byte {start + error.start} is not UTF-8") from error
    except OSError as error:
        raise InputFileError(f"{file}: cannot be read: {error}") from error


def _refuse_nul(text: str, where: str) -> None:
    if (place := text.find("\0")) >= 0:
        raise InputFileError(f"{where}: character {place} is NUL: this is no text")
