"""Files that appear whole or not at all."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

_SECTIONS = (40, 48), (58, 60), (60, 62)  # where ELF has their offset, size and number


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside, flush, then rename over: an interrupted write leaves the old file."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    part = Path(name)
    try:
        write(part)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        part.chmod(0o666 & ~_umask())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def is_cut_short(library: Path) -> bool:
    """Whether a compiled library was not written to its end; False for what is not 64-bit ELF."""
    with open(library, "rb") as file:
        head = file.read(64)
    if head[:6] != b"\x7fELF\x02\x01":  # 64 bits, the lowest byte first
        return False
    # the table of sections comes last
    table, each, count = (int.from_bytes(head[i:j], "little") for i, j in _SECTIONS)
    return library.stat().st_size < table + each * count


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
