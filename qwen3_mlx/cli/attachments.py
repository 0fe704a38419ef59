"""Files that are sent with a message: text, code, and the text of a PDF."""

import logging
import re
from pathlib import Path

from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.extras import install_command

_MAX_BYTES = 50_000_000
_ATTACHED = re.compile(r"(?:[^\n]+:\n(`{3,})\n.*?\n\1(?:\n\n|$))+", re.DOTALL)
_BYTE_ORDER_MARKS = (b"\xff\xfe", b"\xfe\xff")


def read_attachment(file: Path) -> str:
    """Return a file as a part of a message: its name, and its text between fences.

    Raises:
        Qwen3Error: the file has no text, or needs a package that is not installed.
        OSError: the file cannot be read.
    """
    if not file.is_file():
        raise Qwen3Error(f"{file} is a folder or a device" if file.exists() else f"no file {file}")
    if file.stat().st_size > _MAX_BYTES:
        raise Qwen3Error(f"{file} is larger than {_MAX_BYTES // 10**6} MB")
    content = file.read_bytes()
    text = _text_of_pdf(file) if content.startswith(b"%PDF-") else _decoded(file, content)
    if not text.strip():
        raise Qwen3Error(f"{file} has no text")
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return "\n".join([f"{file.name}:", fence, text.rstrip("\n"), fence])


def without_attachments(text: str) -> str:
    """Return a message without the files at its beginning; as it is if it has nothing else."""
    files = _ATTACHED.match(text)
    return (text[files.end() :] if files else "") or text


def _decoded(file: Path, content: bytes) -> str:
    try:
        if content.startswith(_BYTE_ORDER_MARKS):
            return content.decode("utf-16")
        if b"\0" in content:
            raise ValueError
        return content.decode("utf-8-sig")
    except ValueError:
        raise Qwen3Error(f"{file} is neither text in UTF-8 nor a PDF") from None


def _text_of_pdf(file: Path) -> str:
    try:
        import pypdf
    except ImportError:
        raise Qwen3Error(f"reading a PDF needs pypdf: {install_command('pdf')}") from None
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # its warnings are about repairs
    try:
        pages = [page.extract_text() for page in pypdf.PdfReader(file).pages]
    except Exception as error:
        raise Qwen3Error(f"{file} cannot be read as a PDF: {error}") from error
    text = "\n\n".join(page.strip() for page in pages)
    if not text.strip():
        raise Qwen3Error(f"{file} has no text; its pages may be pictures")
    return text
