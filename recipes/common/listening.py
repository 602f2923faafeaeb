"""Where a server listens: its address, its port, and the key that clients need."""

import os
import socket
from ipaddress import ip_address
from pathlib import Path

KEY_VARIABLE = "LONGCTX_API_KEY"


def read_key(file: str | None) -> str | None:
    """Return the API key from ``file`` (setting ``api_key_file``), else from the environment variable `KEY_VARIABLE`.

    Returns None if neither is given.

    Raises ValueError for a file that cannot be read, and for a key that is not one word of printable ASCII characters.
    """
    name, key = f"the environment variable {KEY_VARIABLE}", os.environ.get(KEY_VARIABLE)
    if file:
        name = f"api_key_file={file}"
        try:
            key = Path(file).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{name} cannot be read: {error}; give a file with the key") from error
    if key is None:
        return None
    words = key.split()
    if not (words and key.isascii()):
        raise ValueError(f"{name} has no key of ASCII characters: write one, or leave it out")
    if len(words) > 1 or not words[0].isprintable():
        raise ValueError(
            f"{name} has a key that no client can send ({len(words)} words): write one word of printable characters"
        )
    return words[0]


def refuse_open_host(host: str, key: str | None) -> None:
    """Raise ValueError unless ``host`` is an address; without a ``key``, it must be a loopback address."""
    try:
        address = ip_address(host)
    except ValueError:
        raise ValueError(f"host={host} is not an address: use 127.0.0.1, or 0.0.0.0 with an API key") from None
    if not (address.is_loopback or key):
        raise ValueError(
            f"host={host} can be reached from other machines and needs an API key: give api_key_file=FILE, set "
            f"{KEY_VARIABLE}, or use host=127.0.0.1"
        )


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at ``host`` and ``port``.  Raises ValueError if they cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ValueError(
            f"port={port} of host={host} cannot be used ({error.strerror}): give another port, or an "
            "address of this machine"
        ) from error
