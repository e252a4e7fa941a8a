"""PyTorch's `.pth` files, read as data: nothing that they name is imported, called or executed.

A `.pth` file is a program for Python's unpickler. The small interpreter in this module executes only the instructions
that describe objects. An import becomes a `Name`, and a call becomes a `Foreign` record of the name, the arguments and
the state. Only tensors are created, from bytes whose size is checked first. `torch.load(weights_only=True)` is equally
safe, but it rejects files that contain an object of an unknown class.
"""

import math
import mmap
import pickletools
import warnings
import zipfile
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from moa_train.runtime.errors import UserError

DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
NUMBERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
TEXTS = {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
LITERALS = NUMBERS | TEXTS | {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first object in files of PyTorch before 1.6
LARGEST_PROGRAM = 64 << 20  # bytes; real checkpoints need well below 1 MiB of instructions


@dataclass(frozen=True)
class Name:
    """A class or function that unpickling the file would import."""

    module: str
    name: str


@dataclass(eq=False)
class Foreign:
    """An inert record of an object of an unknown class."""

    name: Name
    arguments: tuple[Any, ...]
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Storage:
    """A block of tensor elements in the file."""

    key: str
    dtype: torch.dtype
    elements: int


@dataclass(frozen=True)
class TensorRecord:
    """A tensor as a view of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class DamagedFileError(UserError):
    """The file is not a PyTorch checkpoint, or it was truncated or changed."""


def read_checkpoint(path: Path) -> Any:
    """Return the content of a `.pth` file: dictionaries, lists, numbers, text, tensors and `Foreign` records.

    Raises:
        UserError: the file is missing or damaged, or contains instructions that checkpoints never use.
    """
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return _read_zip(archive)
        # Mapped, because a wrong length in a damaged file would make an ordinary read allocate that much memory.
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return _read_legacy(mapped)
    except UserError as error:
        raise DamagedFileError(f"{path}: {error}") from None
    except (zipfile.BadZipFile, LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise DamagedFileError(f"{path} is not a PyTorch checkpoint, or is damaged ({error}).") from error


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the state dict in a `.pth` file: its whole content, or its entry "model" or "state_dict".

    Raises:
        UserError: the file is missing or damaged, or has no state dict of tensors.
    """
    weights = read_checkpoint(path)
    if isinstance(weights, dict):
        weights = weights.get("model", weights.get("state_dict", weights))
    if not isinstance(weights, dict) or not weights:
        raise UserError(f"{path} has no state dict, neither as its whole content nor as 'model' or 'state_dict'.")
    others = [str(name) for name, value in weights.items() if not isinstance(value, Tensor)]
    if others:
        raise UserError(f"{path}: these entries of the state dict are not tensors: {', '.join(others[:10])}.")
    return weights


def _read_zip(archive: zipfile.ZipFile) -> Any:
    programs = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
    if len(programs) != 1:
        raise UserError("it is a zip archive without PyTorch's data.pkl")
    prefix = programs[0].filename.removesuffix("data.pkl")

    def read(storage: Storage) -> bytes:
        entry = archive.getinfo(f"{prefix}data/{storage.key}")
        # PyTorch never compresses entries, and the size of a compressed entry is unknown before it is unpacked.
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != storage.elements * storage.dtype.itemsize:
            raise UserError(f"the size of storage {storage.key} contradicts its description")
        return archive.read(entry)

    order = f"{prefix}byteorder"
    if order in archive.namelist() and (archive.getinfo(order).file_size > 6 or archive.read(order) != b"little"):
        raise UserError("it was written on a big-endian machine, which is not supported")
    if programs[0].file_size > LARGEST_PROGRAM or programs[0].compress_type != zipfile.ZIP_STORED:
        raise UserError(f"its data.pkl is compressed or too large ({programs[0].file_size} bytes)")
    content, storages = interpret(BytesIO(archive.read(programs[0])))
    return _with_tensors(content, {key: (storage, read(storage)) for key, storage in storages.items()})


def _read_legacy(stream: mmap.mmap) -> Any:
    if interpret(stream)[0] != LEGACY_MAGIC:
        raise UserError("it is a pickle that PyTorch did not write")
    interpret(stream)  # version of the format
    interpret(stream)  # properties of the machine that wrote it
    content, storages = interpret(stream)
    keys, _ = interpret(stream)
    data: dict[str, tuple[Storage, bytes]] = {}
    for key in keys:
        storage = storages[key]
        elements, length = int.from_bytes(stream.read(8), "little"), storage.elements * storage.dtype.itemsize
        if elements != storage.elements or length > len(stream) - stream.tell():
            raise UserError(f"the size of storage {key} contradicts its description")
        data[key] = storage, stream.read(length)
    return _with_tensors(content, data)


def interpret(stream: BytesIO | mmap.mmap) -> tuple[Any, dict[str, Storage]]:
    """Read one pickle from the stream; return the object that it describes and the storages that it names."""
    machine = _Machine()
    with warnings.catch_warnings(action="ignore"):  # pickletools warns of invalid escapes in damaged text
        for opcode, argument, _ in pickletools.genops(cast(IO[bytes], stream)):
            machine.step(opcode.name, argument)
    return machine.stack.pop(), machine.storages


class _Machine:
    """The state of an unpickler: a stack, the marks on it, and a memo."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def step(self, opcode: str, argument: Any) -> None:
        """Execute one instruction, given its name in `pickletools`."""
        push = self.stack.append
        match opcode:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                self.marks.append(len(self.stack))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                push({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE" | "EMPTY_SET":
                push({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}[opcode]())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple(self.pop(int(opcode[-1]))))
            case "TUPLE":
                push(tuple(self.pop_marked()))
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                push(self.memo[argument])
            case "APPEND":
                self.extend(self.pop(1))
            case "APPENDS" | "ADDITEMS":
                self.extend(self.pop_marked())
            case "SETITEM":
                self.update(self.pop(2))
            case "SETITEMS":
                self.update(self.pop_marked())
            case "GLOBAL":
                push(Name(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                push(Name(*self.pop(2)))
            case "BINPERSID":
                push(self.storage(self.pop(1)[0]))
            case "REDUCE" | "NEWOBJ":
                push(described(*self.pop(2)))
            case "BUILD":
                (state,) = self.pop(1)
                if isinstance(self.stack[-1], Foreign):  # on other objects it is only the version of a state dict
                    self.stack[-1].state = state
            case _ if opcode in LITERALS:
                push(argument)
            case _:
                raise UserError(f"it contains the pickle instruction {opcode}, which checkpoints never use")

    def pop(self, count: int) -> list[Any]:
        """Remove and return the topmost ``count`` objects, the deepest first."""
        start = len(self.stack) - count
        if start < 0:
            raise UserError("its description is incomplete")
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def pop_marked(self) -> list[Any]:
        """Remove and return everything above the last mark."""
        return self.pop(len(self.stack) - self.marks.pop())

    def extend(self, values: list[Any]) -> None:
        """Add values to the list or set on top of the stack."""
        top = self.stack[-1]
        if isinstance(top, list):
            top.extend(values)
        elif isinstance(top, set):
            top.update(values)
        elif isinstance(top, Foreign):
            top.items.update(enumerate(values, len(top.items)))
        else:
            raise UserError("it appends to an object that is not a list")

    def update(self, pairs: list[Any]) -> None:
        """Set items of the dictionary on top of the stack; ``pairs`` alternates keys and values."""
        top = self.stack[-1].items if isinstance(self.stack[-1], Foreign) else self.stack[-1]
        if not isinstance(top, dict):
            raise UserError("it sets items of an object that is not a dictionary")
        top.update(zip(pairs[::2], pairs[1::2], strict=True))

    def storage(self, description: Any) -> Storage:
        """Register a storage, given as ("storage", type, key, device, number of elements, ...)."""
        match description:
            case ("storage", Name(name=kind), str(key), _, int(elements), *_) if kind in DTYPES and elements >= 0:
                self.storages[key] = Storage(key, DTYPES[kind], elements)
                return self.storages[key]
        raise UserError("it contains a storage of an unknown type")


def described(name: Any, arguments: Any) -> Any:
    """Return the object that a call in the file describes: a `Foreign` record, except for the calls PyTorch writes."""
    if not isinstance(name, Name) or not isinstance(arguments, tuple):
        raise UserError("it calls an object that is not a function")
    match name.module, name.name:
        case "collections", "OrderedDict":
            return dict(*arguments)
        case "torch", "Size":
            return tuple(*arguments)
        case "torch._utils", "_rebuild_parameter":
            return arguments[0]
        case "torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2":
            match arguments:
                case (Storage(), int(), tuple(), tuple(), *_):
                    return TensorRecord(*arguments[:4])
            raise UserError("it describes a tensor in an unknown way")
    return Foreign(name, arguments)


def _with_tensors(content: Any, data: dict[str, tuple[Storage, bytes]]) -> Any:
    """Replace the records of tensors by tensors. Each container is visited once, even if it occurs several times."""
    elements = {key: _elements(storage, raw) for key, (storage, raw) in data.items()}
    done: dict[int, Any] = {}

    def visit(value: Any) -> Any:
        if isinstance(value, TensorRecord):
            return _tensor(value, elements[value.storage.key])
        if not isinstance(value, dict | list | tuple):
            return value
        if id(value) not in done:
            done[id(value)] = value  # a container that contains itself keeps its original there
            if isinstance(value, dict):
                done[id(value)] = {key: visit(item) for key, item in value.items()}
            else:
                done[id(value)] = type(value)(visit(item) for item in value)
        return done[id(value)]

    return visit(content)


def _elements(storage: Storage, raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=storage.dtype) if raw else torch.empty(0, dtype=storage.dtype)


def _tensor(record: TensorRecord, elements: Tensor) -> Tensor:
    numbers = (record.offset, *record.shape, *record.stride)
    if len(record.shape) != len(record.stride) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise UserError("a tensor has an invalid shape")
    count = math.prod(record.shape)
    last = record.offset + sum((side - 1) * step for side, step in zip(record.shape, record.stride, strict=True))
    if count > len(elements) or (count and last >= len(elements)):
        raise UserError("a tensor extends beyond its storage")
    return elements.as_strided(record.shape, record.stride, record.offset)
