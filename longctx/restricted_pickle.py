"""Read the pickled index of a training checkpoint without running any code in it.

torch's reader unpickles a checkpoint's ``.metadata``, and unpickling calls whatever the file names.  The reader here
knows the classes that belong there by name, imports none of them, and refuses every other.
"""

import pickle
from pathlib import Path
from typing import Any

METADATA = ".metadata"
_TORCH = {
    "torch": (
        *("Size", "bool", "uint8", "int8", "int16", "int32", "int64"),
        *("bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"),
    ),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.planner": ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
}
_KNOWN = {(module, name) for module, names in _TORCH.items() for name in names}


class _Placeholder:
    """Stands for an object of torch: keeps the object's pickled state, and has no behaviour."""

    state: Any = None

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        self.state = state


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[_Placeholder]:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which belongs in no checkpoint")
        return _Placeholder


def files_named_in(metadata: Path) -> set[str]:
    """Return the names of the files that a checkpoint's ``.metadata`` refers to; runs no code that it contains.

    Raises ValueError if the file names a class that belongs in no checkpoint, or cannot be read.
    """
    try:
        with metadata.open("rb") as file:
            storage: dict[object, _Placeholder] = _RestrictedUnpickler(file).load().state["storage_data"]
        return {record.state["relative_path"] for record in storage.values()}
    except Exception as error:  # damaged pickles raise errors of many kinds
        raise ValueError(str(error) or type(error).__name__) from error
