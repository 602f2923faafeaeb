"""Write text files that appear whole or not at all, and name the file in errors of writing."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_IMODE


@contextmanager
def name_in_errors(file: Path) -> Iterator[None]:
    """Name ``file`` in an OSError of the block: errors of ``write`` and ``close``, as on a full disk, name no file."""
    try:
        yield
    except OSError as error:
        error.filename = str(file)
        raise


def write_text(file: Path, text: str) -> None:
    """Write ``text`` to ``file`` in UTF-8, and make its folder if needed; an existing file is replaced by a rename.

    A link stays, and the file that it leads to is replaced.  The new file has the old one's permissions.  A device or a
    pipe, such as /dev/null, is written to.

    Raises OSError, which names ``file``.  Then an existing file is unchanged, and no partial file is left.
    """
    if file.exists() and not file.is_file():
        with name_in_errors(file):
            file.write_text(text, encoding="utf-8")
        return
    file = file.resolve() if file.is_symlink() else file
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    with name_in_errors(file):
        try:
            partial.write_text(text, encoding="utf-8")
            if file.exists():
                partial.chmod(S_IMODE(file.stat().st_mode))
            partial.replace(file)
        except OSError:
            with suppress(OSError):
                partial.unlink()
            raise
