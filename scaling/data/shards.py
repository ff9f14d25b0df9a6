"""How a token cache is cut into shards, and writing and checking one so that a kill costs one shard.

- The cut follows from the counts alone: whoever encodes which shard, the files are the same.
- A shard exists when its record does: the tokens are written aside, synced and renamed first, the record
  with their checksum after. What does not match its checksum is encoded again.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaling.data.images import Split
from scaling.records import RecordsError, read_json, write_json

MIN_SHARD, MAX_SHARDS = 64, 256
"""Images at least in a shard (what a kill can cost), shards at most in a split (each is an open map)."""
PROBE_BYTES = 4096
UINT16 = np.dtype("<u2")
UInt16 = NDArray[np.uint16]


@dataclass(frozen=True)
class Shard:
    """Images ``first`` … ``first + images − 1`` of a split, with ``views`` token sequences each."""

    split: Split
    number: int
    first: int
    images: int
    views: int
    seq_len: int

    @property
    def name(self) -> str:
        """File name without suffix."""
        return f"{self.split}-{self.number:05d}"

    @property
    def size(self) -> int:
        """Bytes of the token file."""
        return self.images * self.views * self.seq_len * UINT16.itemsize

    def verified(self, folder: Path) -> dict[str, Any] | None:
        """The shard's record if its file is whole, every byte checked; else None."""
        record_file, file = folder / f"{self.name}.json", folder / f"{self.name}.bin"
        if not (record_file.exists() and file.exists() and file.stat().st_size == self.size):
            return None
        try:
            record: dict[str, Any] = read_json(record_file)
        except RecordsError:
            return None
        return record if record["sha256"] == sha256(file) else None

    def exists(self, folder: Path) -> bool:
        """Whether the shard was written; ``verified`` says whether it still is whole."""
        return (folder / f"{self.name}.json").exists()

    def write(self, folder: Path, tokens: UInt16, skipped: list[dict[str, Any]]) -> None:
        """Put the tokens (images, views, L) and then their record on the disk."""
        file = folder / f"{self.name}.bin"
        _write_bytes(file, tokens.tobytes())
        record = {"sha256": sha256(file), "probe": probe(file), "skipped": skipped}
        write_json(folder / f"{self.name}.json", record)

    def discard(self, folder: Path) -> None:
        """Let a shard that is not whole be missing."""
        (folder / f"{self.name}.json").unlink(missing_ok=True)


def shards(split: Split, images: int, views: int, seq_len: int) -> list[Shard]:
    """How a split of so many images is cut; a pure function of the counts."""
    per = shard_images(images)
    return [
        Shard(split, number, first, min(per, images - first), views, seq_len)
        for number, first in enumerate(range(0, images, per))
    ]


def shard_images(images: int) -> int:
    """Images in each shard but the last."""
    return max(MIN_SHARD, -(-images // MAX_SHARDS))


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def probe(file: Path) -> str:
    """SHA-256 of both ends of a file: finds a torn or overwritten one without reading it all."""
    with file.open("rb") as stream:
        digest = hashlib.sha256(stream.read(PROBE_BYTES))
        stream.seek(max(0, file.stat().st_size - PROBE_BYTES))
        digest.update(stream.read())
    return digest.hexdigest()


def _write_bytes(file: Path, content: bytes) -> None:
    """The whole file, on the disk, or the old one; nothing half-written is left behind by an error."""
    aside = file.with_name(f".{file.name}.part")
    try:
        with aside.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(file)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
