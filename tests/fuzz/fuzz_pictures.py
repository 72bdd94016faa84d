"""Folders of pictures: damaged ones, ones of other formats, bombs."""

from __future__ import annotations

import io
import struct
import zlib
from functools import cached_property
from pathlib import Path
from random import Random

from harness import Reader
from mutators import mutated_bytes
from PIL import Image

from tqexport.model import InputInfo
from tqexport.verification.samples import read_samples

__all__ = ["READER"]

_POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(executed) (w) file closefile showpage\n"
_FOLDERS = ("0", "3", "digit", "10", "99999999999999999999", "\u0663", "..x", ".hidden", "\x1b[2J", "a" * 200)


class _Pictures(Reader):
    name = "pictures"

    @cached_property
    def right(self) -> list[bytes]:
        """Pictures of every format, and of formats that are not read."""
        files = [_POSTSCRIPT]
        for mode in ("L", "RGB", "RGBA", "P", "1"):
            for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "PDF"):
                stream = io.BytesIO()
                try:
                    Image.new(mode, (12, 9)).save(stream, kind)
                except (OSError, KeyError, ValueError):  # not every format has every mode
                    continue
                files.append(stream.getvalue())
        for size in ((9_000, 9_000), (60_000, 60_000)):
            files.append(_bomb(*size))
        return files

    def write(self, folder: Path, random: Random) -> Path:
        for _ in range(random.choice((0, 1, 1, 2))):
            kind = folder / "data" / random.choice(_FOLDERS)
            kind.mkdir(parents=True, exist_ok=True)
            content = random.choice(self.right)
            content = content if random.random() < 0.2 else mutated_bytes(content, random, self.right)
            (kind / f"{random.randrange(9)}.png").write_bytes(content)
        (folder / "data").mkdir(exist_ok=True)
        return folder / "data"

    def read(self, path: Path) -> None:
        read_samples(path, [InputInfo("input", (1, 8, 8))], ["digit", "other", "x", "y"])


def _bomb(width: int, height: int) -> bytes:
    """A small PNG that unpacks to many pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = zlib.compress(bytes((width + 1) * min(height, 500)), 9)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


READER = _Pictures()
