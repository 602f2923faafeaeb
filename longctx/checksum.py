"""CRC-32 checksums of files, and of JSON objects that carry their own.

A checksum detects accidents: any single flipped byte for certain, other changes with a miss rate of 2^-32.  It does not
detect forgery, since a forger can write the checksum too.
"""

import json
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

KEY = "crc32"
_READ_BYTES = 2**20


def crc32_of_file(file: Path) -> int:
    """Return the CRC-32 of ``file``, about as fast as a disk reads it.  Raises OSError if it cannot be read."""
    crc = 0
    with file.open("rb") as stream:
        while data := stream.read(_READ_BYTES):
            crc = zlib.crc32(data, crc)
    return crc


def crc32_of_files(files: Iterable[Path]) -> list[int]:
    """Return the CRC-32 of each of ``files``, in their order; up to four files are read at a time."""
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(crc32_of_file, files))


def with_checksum(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON object ``values`` with the checksum of its JSON text added under the key ``crc32``."""
    return {**values, KEY: _crc32_of(values)}


def has_valid_checksum(values: Mapping[str, Any]) -> bool:
    """Return True if ``values``, read from JSON, has the checksum that `with_checksum` gives it."""
    return values.get(KEY) == _crc32_of(values)


def _crc32_of(values: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps({name: value for name, value in values.items() if name != KEY}).encode())
