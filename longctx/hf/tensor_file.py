"""Write safetensors files with the umask's permissions; safetensors itself makes them readable only to their owner."""

from collections.abc import Mapping
from pathlib import Path

from longctx.shapes import Tensor


def save_file(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write ``tensors`` and ``metadata`` to ``file``, with the permissions of any new file; replace an existing file.

    safetensors writes a temporary file of mode 0600 and renames it, whatever the umask.
    """
    from safetensors.torch import save_file as write

    file.unlink(missing_ok=True)
    file.touch()
    mode = file.stat().st_mode
    write(dict(tensors), file, metadata=dict(metadata) if metadata else None)
    file.chmod(mode)
