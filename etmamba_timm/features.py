"""Files of features: written as the features come, resumed after an interruption, and read.

features, files = read_features("features.safetensors")  # or a folder of shards
"""

import base64
import errno
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .files import check_file, whole_file

SUFFIX = ".safetensors"
SHARD_FILES = 1000  # videos in a shard


def read_features(path: str | Path) -> tuple[Tensor, list[str]]:
    """Reads what `etmamba features` wrote.

    Args:
        path: a safetensors file, or a folder of shards; of an unfinished one, the finished shards.

    Returns: float32 [videos, D], and the name of each video.

    Raises:
        FileNotFoundError: no such file, or no shard in the folder.
        ValueError: a file of another kind, or shards of different widths.
    """
    paths = _shards(Path(path)) if Path(path).is_dir() else [Path(path)]
    if not paths:
        raise FileNotFoundError(f"{path} holds no finished shard of features")
    parts, files = [], []
    for part in paths:
        files += json.loads(_metadata(part)["files"])
        with safe_open(part, "pt") as file:
            parts.append(file.get_tensor("features"))
    if len({part.shape[1] for part in parts}) > 1:
        raise ValueError(f"{path} holds features of different models; read its files one by one")
    return torch.cat(parts), files


def read_settings(path: str | Path) -> dict[str, str]:
    """The settings that were stored with features; arguments and errors as in `read_features`."""
    path = Path(path)
    parts = _shards(path) if path.is_dir() else [path]
    return {key: value for key, value in _metadata(parts[0]).items() if key != "files"}


def checksum(tensors: Iterable[Tensor]) -> str:
    """A short text that is the same for the same values."""
    value = 0
    for tensor in tensors:
        value = zlib.crc32(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data, value)
    return f"crc32 {value:08x}"


def check_features_path(path: str | Path) -> None:
    """Checks that features can be written to `path`. Call it before the work.

    Raises:
        ValueError: neither a .safetensors file nor a folder (new ones without a suffix), or it can't be written.
    """
    path = Path(path)
    if not _is_folder(path):
        check_file(path, (SUFFIX,), "features")
    else:  # a new folder is made in its parent
        check_file((path if path.is_dir() else path.parent) / (path.name + SUFFIX))


class FeatureFiles:
    """Features of many videos in one safetensors file, or in a folder of shards of `SHARD_FILES` videos each.

    A safetensors file is complete or absent. What was added since the last one is in `<its name>.partial`, a line for
    each video, and so survives a killed process. Opened again with the same settings, it continues there.

    Args:
        path: see `check_features_path`.
        settings: all that determines the features, as texts; stored with them.

    Raises:
        ValueError: `path` can't be written, or holds features of other settings.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, str]) -> None:
        check_features_path(path)
        self.path, self.settings = Path(path), dict(settings)
        self.has_shards = _is_folder(self.path)
        self._in_shards: list[str] = []  # names of the videos in finished shards
        number = 0
        if self.has_shards:
            self.path.mkdir(exist_ok=True)
            for shard in _shards(self.path):
                found = _metadata(shard)
                self._in_shards += json.loads(found.pop("files"))
                self._check(shard, found)
                _partial(shard).unlink(missing_ok=True)  # of a process that was killed in between
                number = int(shard.stem.partition("-")[2]) + 1
        self._open(number)

    def missing(self, files: Sequence[str]) -> list[str]:
        """Those of `files` without features, in order; a name that is there twice needs them twice."""
        done = Counter(self._in_shards + [file for file, _ in self._rows])
        missing = []
        for file in files:
            if done[file]:
                done[file] -= 1
            else:
                missing.append(file)
        return missing

    def add(self, file: str, features: Tensor) -> None:
        """Keeps the features of a video, float32 [D].

        Raises:
            ValueError: they can't be written.
        """
        self._rows.append((file, features))
        self._log_line({"file": file, "features": base64.b64encode(features.numpy().tobytes()).decode()})
        if self.has_shards and len(self._rows) == SHARD_FILES:
            self._write(self._rows)
            self._in_shards += [file for file, _ in self._rows]
            self._log.close()
            _partial(self._target).unlink()
            self._open(self._number + 1)

    def close(self, files: Sequence[str], finished: bool) -> None:
        """Writes the last safetensors file.

        Args:
            files: the videos of a single file, in their order there; a folder's are in the order of `add`.
            finished: whether nothing is left to do. Otherwise the next time continues, and of a folder only the full
                shards are written.

        Raises:
            ValueError: it can't be written.
        """
        self._log.close()
        rows = self._rows
        if not self.has_shards:
            found: dict[str, list[Tensor]] = {}
            for file, features in rows:
                found.setdefault(file, []).append(features)
            rows = [(file, found[file].pop(0)) for file in files if found.get(file)]
        if rows and (finished or not self.has_shards):
            self._write(rows)
        if finished or not self._rows:
            _partial(self._target).unlink(missing_ok=True)

    def _open(self, number: int) -> None:
        """Begins or continues a safetensors file."""
        self._number = number
        self._target = self.path / f"features-{number:05}{SUFFIX}" if self.has_shards else self.path
        partial = _partial(self._target)
        self._rows: list[tuple[str, Tensor]] = []
        try:
            lines = partial.read_bytes().splitlines(keepends=True) if partial.exists() else []
            whole = [line for line in lines if line.endswith(b"\n")]  # the last one may be cut off
            if len(whole) > 1:
                self._check(partial, json.loads(whole[0]))
                for row in map(json.loads, whole[1:]):
                    data = bytearray(base64.b64decode(row["features"]))
                    self._rows.append((row["file"], torch.frombuffer(data, dtype=torch.float32)))
                os.truncate(partial, sum(map(len, whole)))
                self._log = partial.open("ab", buffering=0)
            else:
                self._log = partial.open("wb", buffering=0)
                self._log_line(self.settings)
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{partial}: can't be continued ({error}); delete it, or choose another output") from error

    def _check(self, file: Path, found: Mapping[str, str]) -> None:
        if differing := sorted(key for key in found.keys() | self.settings if found.get(key) != self.settings.get(key)):
            changes = "; ".join(f"{key}: {found.get(key)} there, {self.settings.get(key)} now" for key in differing)
            raise ValueError(
                f"{file} holds features of other settings ({changes}); use those, choose another output, or delete it"
            )

    def _log_line(self, value: Mapping[str, str]) -> None:
        data = json.dumps(value).encode() + b"\n"
        try:
            if self._log.write(data) != len(data):  # a full disk may take a part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise ValueError(f"{self.path}: can't be written ({error.strerror})") from error

    def _write(self, rows: Sequence[tuple[str, Tensor]]) -> None:
        files, features = zip(*rows, strict=True)
        data = save({"features": torch.stack(features)}, {"files": json.dumps(files), **self.settings})
        try:
            with whole_file(self._target) as draft:
                draft.write_bytes(data)
        except OSError as error:
            raise ValueError(f"{self._target}: can't be written ({error.strerror})") from error


def _is_folder(path: Path) -> bool:
    return path.is_dir() or not (path.suffix or path.exists())


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"features-?????{SUFFIX}"))


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} can't be read ({error}); delete it, or name another file") from error
    if "files" not in metadata:
        raise ValueError(f"{path} holds no features; `etmamba features` writes them")
    return metadata
