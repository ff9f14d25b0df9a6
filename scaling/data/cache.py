"""The token cache: every image encoded once, in memory-mapped shards that every run of every sweep reads.

    <folder>/manifest.json       what the tokens are of, the shards with their checksums, the skipped images
    <folder>/train-00000.bin     uint16 little-endian (images, views, L), images in the source's order
    <folder>/train-00000.json    the shard's checksum and skipped images, written after it
    <folder>/train-labels.npy    int64 (images,), skipped images left out
    <folder>/val-00000.bin ...   one view, the centre crop

- The cut follows from the counts alone (``scaling.data.shards``), a shard from its images alone: whoever
  encodes which shard, and however often the work was killed, the bytes are the same.
- Building checks every byte of every shard; opening checks sizes and both ends of each.
- Processes share the work without talking: shard k belongs to process k mod world, and the first
  process waits for the files of the others before it writes the manifest.
- An unreadable image keeps its place in the shard, filled with zeros, and has no index in the cache.
"""

from __future__ import annotations

import contextlib
import mmap
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from scaling.config import DataConfig
from scaling.data.images import SPLITS, ImageSource, Split, UnreadableImageError, check_unreadable, log
from scaling.data.sampler import Int64
from scaling.data.shards import UINT16, Shard, UInt16, probe, sha256, shard_images, shards
from scaling.data.transforms import UInt8, view_arrays
from scaling.process import Interrupted
from scaling.records import RecordsError, read_json, write_json
from scaling.schema import identity

FORMAT = 1
Encode = Callable[[UInt8], UInt16]
"""uint8 images (B, res, res, 3) to token ids (B, L), coarse to fine."""


# -- building --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Progress:
    """How far a build is: images done of all, those found done at its start included."""

    images: int
    total: int
    encoded: int
    """By this process, since it started."""


def build_cache(
    folder: Path,
    data: DataConfig,
    scales: tuple[int, ...],
    vocab: int,
    source: ImageSource,
    encode: Encode,
    tokenizer_hash: str,
    *,
    batch: int = 64,
    threads: int = 1,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[Progress], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Encode what is missing; a whole cache is checked and left as it is.

    Args:
        folder: of the cache; made if it is not there.
        data: the images, counts filled in.
        scales: side lengths of the token maps; L = Σ side².
        vocab: token ids are below it.
        source: where the images come from.
        encode: the tokenizer; gets at most ``batch`` crops of one shard at a time.
        tokenizer_hash: of the tokenizer's config and weights.
        batch: crops per call of ``encode``. It may change tokens by rounding, so keep it for one cache.
        threads: images read ahead at once, while ``encode`` runs.
        rank: which of the ``world`` processes sharing the work this is; 0 writes the manifest.
        progress: called after every batch.
        should_stop: asked after every batch.

    Raises:
        RecordsError: the folder holds a cache of another tokenizer or of other data.
        ConfigError: more than 1 % of a split is unreadable.
        Interrupted: ``should_stop`` said so; whole shards stay.
        OSError: the disk is full; whole shards stay.
    """
    views: dict[Split, int] = {"train": data.views, "val": 1}
    seq_len = sum(side * side for side in scales)
    header = _header(data, scales, vocab, source, tokenizer_hash)
    _begin(folder, header, is_main=rank == 0)
    every = [s for split in SPLITS for s in shards(split, source.count(split), views[split], seq_len)]
    mine = [shard for shard in every if shard.number % world == rank]
    records = {shard.name: record for shard in mine if (record := shard.verified(folder)) is not None}
    for shard in mine:
        if shard.name not in records:
            shard.discard(folder)

    total = sum(shard.images for shard in every)
    done = sum(shard.images for shard in every if shard.exists(folder))
    encoded = 0
    skipped: dict[Split, list[str]] = {split: [] for split in SPLITS}
    for shard in mine:
        if shard.name in records:
            skipped[shard.split] += [entry["error"] for entry in records[shard.name]["skipped"]]
    progress(Progress(done, total, encoded))

    missing = [shard for shard in mine if shard.name not in records]
    with contextlib.closing(_crops(missing, data, source, batch, threads)) as stream:
        tokens = np.zeros((0, 0, 0), UINT16)
        lost: list[dict[str, Any]] = []
        for shard, first, crops, errors in stream:
            if first == 0:
                tokens, lost = np.zeros((shard.images, shard.views, seq_len), UINT16), []
            for row, error in errors.items():
                log.warning("unreadable image skipped: %s", error)
                lost.append({"index": shard.first + first + row, "error": str(error)})
                skipped[shard.split].append(str(error))
            check_unreadable(shard.split, skipped[shard.split], source.count(shard.split))
            rows = [first + row for row in range(len(errors) + len(crops)) if row not in errors]
            if rows:
                tokens[rows] = _encoded(encode, np.concatenate(crops), seq_len, vocab).reshape(
                    len(rows), shard.views, seq_len
                )
            within = first + len(crops) + len(errors)
            encoded += len(crops) + len(errors)
            if within == shard.images:
                shard.write(folder, tokens, lost)
                done, within = sum(s.images for s in every if s.exists(folder)), 0
            progress(Progress(done + within, total, encoded))
            if should_stop():
                raise Interrupted

    if rank == 0:
        records |= _wait_for_others(folder, [s for s in every if s not in mine], should_stop)
        for shard in missing:
            records[shard.name] = read_json(folder / f"{shard.name}.json")
        _finish(folder, header, source, every, records)


def _header(
    data: DataConfig, scales: tuple[int, ...], vocab: int, source: ImageSource, tokenizer_hash: str
) -> dict[str, Any]:
    """What a cache is of; two caches with equal headers hold the same tokens."""
    return {
        "format": FORMAT,
        "tokenizer_hash": tokenizer_hash,
        "data": identity(data),
        "fingerprint": source.fingerprint(),
        "scales": list(scales),
        "seq_len": sum(side * side for side in scales),
        "vocab": vocab,
        "views": data.views,
        "class_names": list(source.class_names),
    }


def _begin(folder: Path, header: dict[str, Any], is_main: bool) -> None:
    file = folder / "manifest.json"
    if file.exists():
        there = read_json(file)
        for key, value in header.items():
            if there.get(key) != value:
                raise RecordsError(
                    f"{folder} holds a token cache of {_other(key, there.get(key), value)}; "
                    "move it away or delete it to encode again"
                )
    elif is_main:
        write_json(file, header | {"complete": False})


def _other(key: str, there: Any, wanted: Any) -> str:
    if key == "tokenizer_hash":
        return f"another tokenizer ({str(there)[:12]}, expected {str(wanted)[:12]})"
    if key in ("data", "fingerprint", "class_names"):
        return f"other data (its {key} differs)"
    return f"another {key}: {there}, expected {wanted}"


Crops = tuple[Shard, int, list[UInt8], dict[int, UnreadableImageError]]
"""A shard, the first of its images here, the readable ones' crops (views, res, res, 3), the errors."""


def _crops(
    wanted: list[Shard], data: DataConfig, source: ImageSource, batch: int, threads: int
) -> Generator[Crops, None, None]:
    """Batches of the shards' images in order, read ahead in threads while the caller encodes."""

    def read(split: Split, index: int) -> UInt8 | UnreadableImageError:
        try:
            return view_arrays(source.image(split, index), data, split, index)
        except UnreadableImageError as error:
            return error

    def batches() -> Iterator[tuple[Shard, int, list[Future[UInt8 | UnreadableImageError]]]]:
        for shard in wanted:
            step = max(1, batch // shard.views)
            for first in range(0, shard.images, step):
                images = range(shard.first + first, shard.first + min(first + step, shard.images))
                yield shard, first, [pool.submit(read, shard.split, i) for i in images]

    pool = ThreadPoolExecutor(threads)
    try:
        queue = batches()
        ahead = list(islice(queue, 2))
        while ahead:
            shard, first, futures = ahead.pop(0)
            results = [future.result() for future in futures]
            ahead += islice(queue, 1)
            errors = {row: r for row, r in enumerate(results) if isinstance(r, UnreadableImageError)}
            yield shard, first, [r for r in results if not isinstance(r, UnreadableImageError)], errors
    finally:
        pool.shutdown(cancel_futures=True)


def _encoded(encode: Encode, crops: UInt8, seq_len: int, vocab: int) -> UInt16:
    tokens = encode(crops)
    if tokens.shape != (len(crops), seq_len) or int(tokens.max()) >= vocab:
        raise ValueError(
            f"the tokenizer gave tokens of shape {tokens.shape} up to {int(tokens.max())}, "
            f"expected {(len(crops), seq_len)} below {vocab}"
        )
    return tokens


def _wait_for_others(
    folder: Path, theirs: list[Shard], should_stop: Callable[[], bool]
) -> dict[str, dict[str, Any]]:
    records: dict[str, dict[str, Any]] = {}
    while True:
        for shard in theirs:
            if shard.name not in records and (record := shard.verified(folder)) is not None:
                records[shard.name] = record
        if len(records) == len(theirs):
            return records
        if should_stop():
            raise Interrupted
        time.sleep(0.2)


def _finish(
    folder: Path,
    header: dict[str, Any],
    source: ImageSource,
    every: list[Shard],
    records: dict[str, dict[str, Any]],
) -> None:
    splits: dict[str, Any] = {}
    for split in SPLITS:
        total = source.count(split)
        cut = [shard for shard in every if shard.split == split]
        skipped = [entry for shard in cut for entry in records[shard.name]["skipped"]]
        check_unreadable(split, [entry["error"] for entry in skipped], total)
        out = {entry["index"] for entry in skipped}
        labels = np.array([source.label(split, i) for i in range(total) if i not in out], dtype=np.int64)
        file = folder / f"{split}-labels.npy"
        aside = folder / f".{split}-labels.part.npy"
        np.save(aside, labels, allow_pickle=False)
        aside.replace(file)
        splits[split] = {
            "images": total - len(out),
            "planned": total,
            "shard_images": shard_images(total),
            "labels_sha256": sha256(file),
            "skipped": skipped,
            "shards": [
                {"name": s.name, "images": s.images, "bytes": s.size}
                | {key: records[s.name][key] for key in ("sha256", "probe")}
                for s in cut
            ],
        }
    manifest = header | {"complete": True, "splits": splits}
    if read_json(folder / "manifest.json") != manifest:
        write_json(folder / "manifest.json", manifest)


# -- reading ---------------------------------------------------------------------------------------


def _mapped(file: Path) -> memoryview:
    with file.open("rb") as stream:
        return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))


class CachedSplit:
    """The tokens of one split, mapped into memory, and its labels."""

    def __init__(self, folder: Path, split: Split, facts: dict[str, Any], views: int, seq_len: int) -> None:
        self.images: int = facts["images"]
        """Images that can be asked for (skipped ones have no index)."""
        self.labels: Int64 = np.load(folder / f"{split}-labels.npy", allow_pickle=False)
        """int64 (images,)."""
        self.views = views
        self.seq_len = seq_len
        self._per: int = facts["shard_images"]
        # Bytes rather than arrays: joining slices takes a third of the time of indexing row by row.
        self._bytes = [_mapped(folder / f"{s['name']}.bin") for s in facts["shards"]]
        out = [entry["index"] for entry in facts["skipped"]]
        self._places: Int64 | None = np.delete(np.arange(facts["planned"]), out) if out else None

    def tokens(self, indices: Int64, views: Int64 | int = 0) -> UInt16:
        """Token ids of some images, uint16 (B, L), coarse to fine.

        Args:
            indices: int64 (B,), 0 to images − 1, in any order.
            views: which crop of each, (B,) or one for all.

        Raises:
            IndexError: an index or a view that there is not.
        """
        shard, row = np.divmod(self.rows(indices, views), self._per * self.views)
        size = self.seq_len * UINT16.itemsize
        starts = row * size
        maps = self._bytes
        pieces = [maps[s][at : at + size] for s, at in zip(shard.tolist(), starts.tolist(), strict=True)]
        return np.frombuffer(bytearray().join(pieces), UINT16).reshape(len(indices), self.seq_len)

    def rows(self, indices: Int64, views: Int64 | int = 0) -> Int64:
        """Where the tokens of some images stand in ``everything``, int64 (B,); arguments as of ``tokens``."""
        view = np.broadcast_to(views, indices.shape)
        for what, values, end in (("image", indices, self.images), ("view", view, self.views)):
            if values.min() < 0 or values.max() >= end:
                raise IndexError(f"{what} {values.min()} to {values.max()} asked for, there are {end}")
        places = indices if self._places is None else self._places[indices]
        found: Int64 = places * self.views + view
        return found

    def everything(self) -> list[UInt16]:
        """All tokens, shard by shard (n, L), as they lie in the files."""
        return [np.frombuffer(one, UINT16).reshape(-1, self.seq_len) for one in self._bytes]

    @property
    def nbytes(self) -> int:
        """Of all tokens."""
        return sum(map(len, self._bytes))


class TokenCache:
    """A whole cache, open for reading."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        views: dict[Split, int] = {"train": manifest["views"], "val": 1}
        self._splits = {
            split: CachedSplit(folder, split, manifest["splits"][split], views[split], manifest["seq_len"])
            for split in SPLITS
        }

    def split(self, split: Split) -> CachedSplit:
        """The tokens of "train" or "val"."""
        return self._splits[split]


def open_cache(
    folder: str | Path,
    tokenizer_hash: str | None = None,
    scales: tuple[int, ...] | None = None,
    verify: bool = False,
) -> TokenCache:
    """Open a whole cache for reading.

    Args:
        folder: where ``build_cache`` put it.
        tokenizer_hash: if given, the tokenizer that the tokens must come from.
        scales: if given, the scales that they must have.
        verify: check every byte, instead of sizes and both ends of each shard.

    Raises:
        RecordsError: no cache, one that is not finished or damaged, or one of another tokenizer.
    """
    folder = Path(folder)
    again = "encode again (what is whole is kept)"
    file = folder / "manifest.json"
    if not file.exists():
        raise RecordsError(f"{folder}: no token cache there; tokenize first")
    manifest = read_json(file)
    if manifest.get("format") != FORMAT:
        raise RecordsError(f"{file}: format {manifest.get('format')}, this program reads {FORMAT}")
    wanted = {"tokenizer_hash": tokenizer_hash, "scales": None if scales is None else list(scales)}
    for key, value in wanted.items():
        if value is not None and manifest[key] != value:
            raise RecordsError(f"{folder} holds a token cache of {_other(key, manifest[key], value)}")
    if not manifest["complete"]:
        raise RecordsError(f"{folder}: the token cache is not finished; {again}")
    for split, facts in manifest["splits"].items():
        labels = folder / f"{split}-labels.npy"
        if not labels.exists() or sha256(labels) != facts["labels_sha256"]:
            raise RecordsError(f"{labels} is missing or damaged; {again}")
        for shard in facts["shards"]:
            tokens = folder / f"{shard['name']}.bin"
            if not tokens.exists() or tokens.stat().st_size != shard["bytes"]:
                raise RecordsError(f"{tokens} is missing or cut short; {again}")
            check, kind = (sha256, "sha256") if verify else (probe, "probe")
            if check(tokens) != shard[kind]:
                raise RecordsError(f"{tokens} is damaged (its checksum differs); {again}")
    return TokenCache(folder, manifest)
