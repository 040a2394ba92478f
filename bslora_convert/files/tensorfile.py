"""Reading and writing tensor files without trusting what they say of themselves."""

import hashlib
import json
import pickle
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bslora_convert.errors import InputError, reason_of
from bslora_convert.files.jsonfile import check_file

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DTYPE_CODES = {  # in the order in which safetensors puts their numbers
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32, "BF16": torch.bfloat16,
    "F16": torch.float16, "I16": torch.int16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a `.safetensors` file, or of a `.bin`/`.pt` file read with `weights_only=True`.

    :raises InputError: when the file is missing, a Git-LFS pointer, truncated or holds anything but tensors.
    """
    check_file(path)
    try:
        # What a damaged file makes the two readers raise has no common base: TypeError and AssertionError among it.
        if path.suffix == ".safetensors":
            return load_file(path)
        _check_archive(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # whose words advise to load it all the same
        raise InputError(
            f"{path}: not a file of plain tensors: it holds something else, which could run code, so it is not loaded; "
            "ask its author for safetensors"
        ) from None
    except Exception as error:
        what = "truncated or not a safetensors file" if path.suffix == ".safetensors" else "not a file of plain tensors"
        raise InputError(f"{path}: {what} ({reason_of(error)})") from None
    if not isinstance(loaded, dict):
        raise InputError(f"{path}: a dictionary of tensors is expected, found {type(loaded).__name__}")
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or not _holds_its_numbers(value):
            raise InputError(f"{path}: entry {key!r} is not a named tensor")
    return {key: value.detach() for key, value in loaded.items()}


def _check_archive(path: Path) -> None:
    """Refuses an archive that would unpack to more than it is; what torch writes is stored as it is.

    :raises ValueError: saying so.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("its archive is compressed, which torch never writes")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("its archive says that it holds more than the file does")


def read_headers(path: Path) -> dict[str, Tensor]:
    """Shapes and dtypes of every tensor as meta tensors; of a safetensors file only its header is read.

    :raises InputError: as `read_tensors`; numbers themselves are not looked at.
    """
    if path.suffix != ".safetensors":
        return {key: tensor.to("meta") for key, tensor in read_tensors(path).items()}
    check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  a handle, not a dictionary
            return {
                key: torch.empty(part.get_shape(), dtype=DTYPE_CODES[part.get_dtype()], device="meta")
                for key, part in slices.items()
            }
    except Exception as error:
        raise InputError(f"{path}: truncated or not a safetensors file ({reason_of(error)})") from None


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file.

    :raises InputError: when it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: can't be read ({error})") from None


def _holds_its_numbers(tensor: Tensor) -> bool:
    """Whether a tensor is a plain one that has stored every number, unlike a meta or sparse tensor or one expanded by strides."""
    if tensor.layout != torch.strided or tensor.is_nested or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


METADATA = {"format": "pt"}  # as PEFT writes
CHECKSUM = "data_sha256"  # in the header of what is checked wherever it goes: SHA-256 of all bytes after the header


def file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the file that `write_tensors` would make with a checksum: a length, the header filled up to eights, the numbers.

    The order of the numbers decides how many digits the offsets in the header have.
    """
    codes = {dtype: code for code, dtype in DTYPE_CODES.items()}
    header: dict[str, Any] = {"__metadata__": {**METADATA, CHECKSUM: "0" * 64}}
    at = 0
    for name in _in_order(tensors):
        tensor = tensors[name]
        header[name] = {
            "dtype": codes[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at := at + tensor.nbytes],
        }
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + at


def _in_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names as their numbers stand in a file: by dtype, then by name."""
    order = list(DTYPE_CODES.values())
    return sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))


def holds_its_checksum(path: Path) -> bool | None:
    """Whether a safetensors file's numbers are those that its own header has the checksum of; None where it has none.

    :raises InputError: when it is damaged otherwise.
    """
    expected = read_metadata(path).get(CHECKSUM)
    if expected is None:
        return None
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        return hashlib.file_digest(file, "sha256").hexdigest() == expected


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, checksum: bool = False) -> None:
    """Writes a safetensors file with the metadata that PEFT writes; tensors that share memory are written apart.

    checksum: whether its header gets one of the numbers (`CHECKSUM`).

    :raises OSError: when it can't be written.
    """
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        if plain.numel() and plain.untyped_storage().data_ptr() in seen:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        stored[name] = plain
    metadata = dict(METADATA)
    if checksum:
        digest = hashlib.sha256()
        for name in _in_order(stored):
            digest.update(stored[name].reshape(-1).view(torch.uint8).numpy().data)
        metadata[CHECKSUM] = digest.hexdigest()
    try:
        save_file(stored, path, metadata=metadata)
    except SafetensorError as error:  # a full disk, for instance, which is no OSError there
        raise OSError(f"{path}: {error}") from error
    if checksum:
        _order_metadata(path)
    with suppress(OSError):  # mounts of object stores have no modes
        path.chmod(
            path.parent.stat().st_mode & 0o666
        )  # whom the directory is open to; the library writes for the owner only


def sign(path: Path) -> None:
    """Gives a file that another library wrote as `write_tensors` does without a checksum one in its header.

    :raises InputError: when it is damaged. :raises OSError: when it can't be written.
    """
    held = load_file(path)
    if read_metadata(path) != METADATA or not {tensor.dtype for tensor in held.values()} <= set(DTYPE_CODES.values()):
        return
    partial = path.with_name(f".{path.name}.partial")
    try:
        write_tensors(partial, held, checksum=True)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _order_metadata(path: Path) -> None:
    """Puts a header's metadata in order, which the library leaves to chance: the same tensors give the same bytes."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items(), reverse=True))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length))


def check_finite(path: Path, key: str, tensor: Tensor) -> None:
    """Refuses NaN and infinity.

    :raises InputError: naming file and tensor.
    """
    if tensor.numel() == 0 or tensor.is_meta:
        return
    # The extremes carry any NaN or infinity; counting what is wrong can take its time.
    if not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise InputError(f"{path}: tensor {key} holds {bad} NaN or infinite values; the adapter is damaged")


def check_not_empty(path: Path, key: str, tensor: Tensor) -> None:
    """Refuses a tensor without numbers.

    :raises InputError: naming file and tensor.
    """
    if tensor.numel() == 0:
        raise InputError(
            f"{path}: tensor {key} is empty (shape {tuple(tensor.shape)}): DeepSpeed ZeRO-3 leaves that of weights that were not "
            "gathered when they were saved; save the adapter again with its weights gathered"
        )


def check_passenger(path: Path, key: str, tensor: Tensor) -> None:
    """Refuses what no whole weight that travels along can be: empty, or with NaN in it. An infinite bias may be meant.

    :raises InputError: naming file and tensor.
    """
    check_not_empty(path, key, tensor)
    if tensor.dtype in FLOATS and not tensor.is_meta and bool(tensor.isnan().any()):
        raise InputError(
            f"{path}: tensor {key} holds NaN: the training that saved it had failed by then, or it is damaged"
        )


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
