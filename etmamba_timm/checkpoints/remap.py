"""Finding a model's weights in what a file holds, and naming them as this package does."""

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .errors import CheckpointError

_logger = logging.getLogger(__name__)

PATCH = "patch_embed.proj.weight"  # every model here has it: what stands before it is a prefix
# The top-level names of a model's state dict; VideoMamba's own names for two of them.
PARTS = (
    *("motion", "stem", "patch_embed", "cls_token", "pos_embed", "temporal_pos_embedding"),
    *("blocks", "norm", "attn_pool", "head"),
)
VIDEOMAMBA = {"layers": "blocks", "norm_f": "norm"}
# Put into names by torch.compile, FSDP and activation checkpointing, wherever they wrap a module.
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_AVERAGED = re.compile(r"(?:^|[._])(?:ema|swa|avg|averaged?)(?:[._]|$)", re.IGNORECASE)
MOST_NAMED = 3


@dataclass(frozen=True)
class FoundWeights:
    """A model's weights within a file.

    Attributes:
        tensors: by the names of this package.
        converted: names of those that had another name in the file, or a patch weight that was inflated.
        unused: names of everything else in the file.
    """

    tensors: dict[str, Tensor]
    converted: frozenset[str]
    unused: tuple[str, ...]


@dataclass(frozen=True)
class _Place:
    """Where a model may be: in the mapping `inside`, at `path` of the file, all names behind `prefix`."""

    path: tuple[str, ...]
    inside: Mapping
    prefix: str

    @property
    def name(self) -> str:
        return ".".join([*self.path, self.prefix])

    @property
    def is_averaged(self) -> bool:
        return _AVERAGED.search(self.name) is not None

    @property
    def is_ours(self) -> bool:
        blocks = ("blocks", "layers")
        return any(_plain(key).startswith(f"{self.prefix}{b}.0.mixer.A_log") for b in blocks for key in self.inside)

    def tensors(self) -> list[Any]:
        return [value for key, value in self.inside.items() if _plain(key).startswith(self.prefix)]


def find_weights(raw: object, source: str) -> FoundWeights:
    """The weights of a model in `raw`, whatever wraps them: dicts in dicts, prefixes of Lightning, DDP, compile.

    The model is where a name ends in `PATCH`; what stands before it is the prefix. Averaged weights (`ema`) go before
    others. VideoMamba's `layers.` becomes `blocks.`, `norm_f.` becomes `norm.`, and a 2-D patch weight [D, C, p, p]
    becomes [D, C, 1, p, p].

    Args:
        raw: what the file holds.
        source: the file, for messages.

    Raises:
        CheckpointError: there is no such model, more than one, or something that isn't a tensor among its weights.
    """
    places = list(_places(raw))
    places = [place for place in places if place.is_ours] or places
    places = [place for place in places if place.is_averaged] or places
    distinct: list[_Place] = []
    for place in places:  # the same tensors twice are one model
        if not any(_same(place.tensors(), other.tensors()) for other in distinct):
            distinct.append(place)
    if not distinct:
        raise CheckpointError(
            f"{source} is no checkpoint of this package: no tensor's name ends in {PATCH!r}, by which a model is "
            f"found; it holds {_holdings(raw)}"
        )
    if len(distinct) > 1:
        names = ", ".join(repr(place.name) for place in distinct)
        raise CheckpointError(f"{source} holds several models, at {names}; save the one that is wanted alone")
    return _extract(distinct[0], raw, source)


def _places(raw: object, path: tuple[str, ...] = ()) -> Iterator[_Place]:
    if not isinstance(raw, Mapping) or len(path) > 8:
        return
    for key, value in raw.items():
        if not isinstance(key, str):
            continue
        name = _plain(key)
        if isinstance(value, Tensor) and (name == PATCH or name.endswith("." + PATCH)):
            yield _Place(path, raw, name.removesuffix(PATCH))
        elif "optim" not in key.lower():
            yield from _places(value, (*path, key))


def _extract(place: _Place, raw: object, source: str) -> FoundWeights:
    tensors: dict[str, Tensor] = {}
    converted, unused, ignored = set(), [], []
    for key, value in place.inside.items():
        name = _plain(key).removeprefix(place.prefix)
        top, dot, rest = name.partition(".")
        ours = VIDEOMAMBA.get(top, top) + dot + rest
        if not (_plain(key).startswith(place.prefix) and ours.partition(".")[0] in PARTS):
            unused.append(".".join([*place.path, str(key)]))
            if isinstance(value, Tensor):
                ignored.append(unused[-1])
            continue
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{source} is no checkpoint: {key} is a {type(value).__name__}, not a tensor")
        if ours in tensors:
            raise CheckpointError(f"{source} is no checkpoint: it holds {ours} twice")
        if ours == PATCH and value.ndim == 4:
            value = value.unsqueeze(2)
            converted.add(ours)
        tensors[ours] = value
        if ours != name:
            converted.add(ours)
    if ignored:
        _logger.warning("%s: tensors that aren't the model's are left out: %s", source, _some(ignored))
    return FoundWeights(tensors, frozenset(converted), (*_beside(raw, place.path), *unused))


def _beside(raw: Any, path: tuple[str, ...]) -> Iterator[str]:
    """Names of what lies beside `path`, from the file's top down."""
    for depth, step in enumerate(path):
        yield from (".".join([*path[:depth], str(key)]) for key in raw if key != step)
        raw = raw[step]


def _plain(key: object) -> str:
    return _WRAPPERS.sub("", key) if isinstance(key, str) else ""


def _same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(x is y or (_address(x) == _address(y) != 0) for x, y in zip(a, b, strict=True))


def _address(value: object) -> int:
    return value.data_ptr() if isinstance(value, Tensor) else 0


def _holdings(raw: object) -> str:
    if not isinstance(raw, Mapping):
        return f"a {type(raw).__name__}"
    names = [str(key) for key in raw]
    adapters = any("lora_" in name for name in names)
    remedy = " (LoRA adapters alone: merge them first, model.merge_and_unload(), and save that)" if adapters else ""
    return f"entries such as {_some(names)} ({len(names)} in all){remedy}" if names else "nothing"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
