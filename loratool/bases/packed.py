"""What a kind of packed weights is: `Codec` finds them in a checkpoint, `Packed` decodes rows of one of them."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from loratool.adapters.adapter import StoredTensor
from loratool.bases.packing_settings import Setting, Settings
from loratool.bases.weights import Memory, Room
from loratool.files.checkpoint import Checkpoint
from loratool.files.safefile import FLOAT_NAMES
from loratool.lazy import NDArray, Tensor, torch
from loratool.notes import Note


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A weight whose values are decoded from packed ones: a `StoredWeight`, but for `decode`.

    What is decoded are whole *lines*: rows of the matrix that the last dimension of the values and all others make.
    """

    shape: tuple[int, ...]  # of the values
    line: int  # values in a line
    dtype: str  # of the plain copy
    tensors: tuple[StoredTensor, ...]  # those on disk that it is made of; the first holds the packed values
    scheme: str  # what a person would call it, such as "nf4, blocks of 64"
    exact: str = "F32"  # values are the float32 that the documented decoding of the format gives

    @property
    def memory(self) -> int:
        """Bytes of packed values that each thread holds from call to call."""
        return 0

    @abstractmethod
    def decode(self, first: int, count: int, device: torch.device, room: Room) -> Tensor:
        """Lines `first` … `first + count`, (count, line) of float32 on `device`, in memory that is the caller's."""

    @property
    def by_numpy(self) -> bool:
        """Whether `decode_into` is there for this weight: importing torch takes longer than decoding many weights."""
        return False

    def decode_into(self, values: NDArray[Any], first: int, memory: Memory) -> None:
        """Put lines from line `first` on into (n, line) of float32: the bits that `decode` gives, by numpy."""
        raise NotImplementedError

    def check(self, room: Room) -> str:  # noqa: ARG002 (what has nothing to check needs no room)
        """What is wrong with the values of its scales, indices and the like; empty where nothing is.

        It is asked once for each weight that is going to be decoded, before anything is written.
        """
        return ""

    def doubt(self, room: Room) -> str:  # noqa: ARG002 (most formats leave nothing open)
        """What a user should know of values that tools read differently; empty where there is nothing.

        It is asked when `check` is, and is no reason to refuse.
        """
        return ""

    def rows(self, first: int, count: int, device: torch.device, dtype: torch.dtype, room: Room) -> Tensor:
        lines = math.prod(self.shape[1:]) // max(self.line, 1)  # in a row
        return self.decode(first * lines, count * lines, device, room).view(count, -1).to(dtype)

    def matrix(self, columns: int) -> Packed:
        """The same values as rows of so many columns. Raises `ValueError` where those are no whole lines."""
        lines, rest = divmod(columns, max(self.line, 1))
        rows = math.prod(self.shape) // max(columns, 1)
        if rest or rows * lines * self.line != math.prod(self.shape):
            raise ValueError(f"a packed weight in lines of {self.line} cannot be reshaped to {columns} columns")
        shape = (rows, columns)
        return self if shape == self.shape else dataclasses.replace(self, shape=shape)


@dataclass(frozen=True, kw_only=True)
class Requantizable(Packed):
    """A packed weight whose values can be packed anew, into tensors of the same names, dtypes and shapes.

    `tensors[0]` holds the values, the others are its *parameters*, such as scales: by name, as they are stored. Values go
    back to the nearest ones that the parameters give, which are the base's own or new ones, made of all the values:

        own = weight.parameters(room)
        new = weight.new_parameters(torch.cat([weight.measure(lines) for lines in …]), own)
        packed = weight.encode(lines, first, own or new)            # bytes for `tensors[0]`
        weight.decode_packed(packed, first, count, own or new)      # what `decode` will give of them

    Lines come `together` at a time, or several times as many, but for the last ones. Any thread may call, on any device.
    """

    @property
    def together(self) -> int:
        """Lines that are packed together, as a block or a byte may hold values of several."""
        return 1

    @abstractmethod
    def parameters(self, room: Room) -> Mapping[str, Tensor]:
        """The base's own, of all tensors but the first, on the CPU in their dtypes and shapes on disk."""

    @abstractmethod
    def measure(self, values: Tensor) -> Tensor:
        """What new parameters need to know of some lines of float32: (a number for each line, or for each block, …)."""

    @abstractmethod
    def new_parameters(self, measured: Tensor, own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The parameters with which all of the lines lose least, of what was measured of them, in order."""

    @abstractmethod
    def encode(self, values: Tensor, first: int, parameters: Mapping[str, Tensor]) -> Tensor:
        """Lines of float32 from line `first` on → (bytes,) of uint8, line after line."""

    @abstractmethod
    def decode_packed(self, packed: Tensor, first: int, count: int, parameters: Mapping[str, Tensor]) -> Tensor:
        """What `encode` gave, as (count, line) of float32: the same bits that `decode` reads from an output."""

    def laid_out(self, packed: Tensor) -> Tensor:
        """The bytes of all lines, as they lie in `tensors[0]`: in the same order, but where lines are columns on disk."""
        return packed


@dataclass(frozen=True, kw_only=True)
class WithoutParameters(Requantizable):
    """One whose packed values are all that it has: scales, if any, are among them."""

    def parameters(self, room: Room) -> Mapping[str, Tensor]:  # noqa: ARG002 (nothing is read)
        return {}

    def measure(self, values: Tensor) -> Tensor:
        return values.new_zeros(0)

    def new_parameters(self, measured: Tensor, own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:  # noqa: ARG002
        return own


@dataclass(frozen=True)
class Packing:
    """What a codec found in a checkpoint."""

    weights: Mapping[str, Packed]  # by the names of their plain copies
    # tensors that go as well where a weight becomes plain, such as the scale of a layer's inputs: by the same names
    leftovers: Mapping[str, Sequence[str]] = field(default_factory=dict)
    # tensors on disk of weights that cannot be decoded → what packs them, such as "AQLM": they can be copied only
    unread: Mapping[str, str] = field(default_factory=dict)
    marks: Collection[str] = ()  # tensors that say that weights are packed: they go where all weights become plain


class Codec(Protocol):
    """One kind of packed weights. It reads, and it knows how the configs of that kind name plain weights.

    A codec is a subclass, so that it has what most kinds have in common.
    """

    name: str  # in --json, such as "gptq"
    title: str  # for a person, such as "GPTQ"
    # what it reads, for a person, with the class of such weights: docs/supported.md is made of it
    kinds: tuple[tuple[str, type[Packed]], ...] = ()

    def find(self, base: Checkpoint, settings: Settings) -> Packing | None:
        """The packed weights of a checkpoint; None where it is of another kind.

        Only headers are read, and tensors that say how others are packed (a few bytes each). Raises `InputError` naming
        every module that is incomplete or of an unknown scheme, each with its scheme and the way out.
        """

    def left_plain(
        self,
        setting: Setting,
        packing: Packing,  # noqa: ARG002 (some kinds list no weights)
        plain: Collection[str],  # noqa: ARG002
        base: Checkpoint,  # noqa: ARG002
    ) -> Mapping[str, Any]:
        """The values of one setting where the weights `plain` (their plain names) are not packed any more.

        The spelling is what the loaders of that kind match. Nothing else of the values changes.
        """
        return setting.values

    def named_too(
        self,
        packing: Packing,  # noqa: ARG002 (most loaders match whole names)
        plain: Collection[str],  # noqa: ARG002
        base: Checkpoint,  # noqa: ARG002
    ) -> Collection[str]:
        """Other packed weights that a loader takes for plain where the list names those of `plain`."""
        return ()

    def metadata(
        self,
        metadata: Mapping[str, str],
        packing: Packing,  # noqa: ARG002 (most kinds say nothing there)
        plain: Collection[str],  # noqa: ARG002
    ) -> Mapping[str, str]:
        """The metadata in the header of one file where the weights `plain` are not packed any more."""
        return metadata

    def notes(
        self,
        packing: Packing,  # noqa: ARG002 (most loaders keep plain weights as they are)
        plain: Collection[str],  # noqa: ARG002
    ) -> Sequence[Note]:
        """What a user should know of a model where the weights `plain` are not packed any more, and others are."""
        return ()


def plain_dtype(base: Checkpoint) -> str:
    """The dtype of a model before it was packed, as its config tells.

    Configs of diffusers name none: what is not packed has that dtype. BF16 where there is nothing to go by.
    """
    named = {name: dtype for dtype, name in FLOAT_NAMES.items()}
    texts = [base.config, base.config.get("text_config")]
    said = (part.get(key) for part in texts if isinstance(part, Mapping) for key in ("dtype", "torch_dtype"))
    usual = base.usual_dtype if base.config else ""
    return next((named[name] for name in said if isinstance(name, str) and name in named), usual or "BF16")
