"""Write safetensors files with the umask's permissions; safetensors itself makes them readable only to their owner."""

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path

from longctx.shapes import Tensor


def save_file(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write ``tensors`` and ``metadata`` to ``file``, with the permissions of any new file; replace an existing file.

    safetensors writes a temporary file of mode 0600 and renames it, whatever the umask.  Raises OSError, which names
    ``file``, if it cannot be written, for example on a full disk; then there is no file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file as write

    file.unlink(missing_ok=True)
    file.touch()
    mode = file.stat().st_mode
    try:
        write(dict(tensors), file, metadata=dict(metadata) if metadata else None)
    except SafetensorError as error:
        file.unlink()
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code) if number else str(error), str(file)) from error
    file.chmod(mode)
