"""API keys: random, kept as hashes, each of one tenant; and the names under which a tenant's users are stored."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import logging
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from filelock import FileLock

from persona_plug.errors import ConfigError
from persona_plug.files import write_atomically

logger = logging.getLogger(__name__)

LOCAL_TENANT = "local"  # who asks a gateway without keys, which listens on this machine only
_TENANT = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, slots=True)
class Key:
    """A line of the key file.

    Attributes:
        id: Names the key in logs and for revoking; it is not secret.
        tenant: Whose key it is.
        sha256: Hash of the key. The key has 256 random bits, so a slow hash would protect nothing more.
        created: UTC date and time.
    """

    id: str
    tenant: str
    sha256: str
    created: str


def new_key(path: Path, tenant: str) -> tuple[Key, str]:
    """Add a key to the file and return it with its secret, which is kept nowhere.

    Args:
        path: JSONL of keys, made with permissions 600 if it is not there.
        tenant: Letters, digits, dots, dashes, underscores.

    Raises:
        ConfigError: The tenant's name or the file cannot be used.
    """
    if not _TENANT.fullmatch(tenant):
        raise ConfigError(f"tenant {tenant!r:.80} must be 1 to 64 letters, digits, dots, dashes or underscores")
    secret = "pp-" + secrets.token_urlsafe(32)
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    key = Key("key-" + secrets.token_hex(4), tenant, _digest(secret), created)
    with FileLock(f"{path}.lock", mode=0o600):
        _write(path, [*(read_keys(path) if path.exists() else []), key])
    return key, secret


def revoke_key(path: Path, ident: str) -> Key:
    """Take a key out of the file; a running gateway refuses it from the next request on.

    Raises:
        ConfigError: There is no such key.
    """
    with FileLock(f"{path}.lock", mode=0o600):
        keys = read_keys(path)
        for key in keys:
            if key.id == ident:
                _write(path, [k for k in keys if k.id != ident])
                return key
    raise ConfigError(f"{path} holds no key {ident!r:.80}; `persona-plug keys list` shows them")


def read_keys(path: Path) -> list[Key]:
    """Return the keys of a file.

    Raises:
        ConfigError: The file is missing, or a line is not a key.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as exc:
        raise ConfigError(f"key file {path}: {exc.strerror}; make one with `persona-plug keys new`") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"key file {path}: not UTF-8 text; `persona-plug keys new` writes one") from exc
    lines = lines[:-1] if lines[-1] == "" else lines
    keys = []
    for number, line in enumerate(lines, start=1):
        try:
            key = Key(**json.loads(line))
            if not (_TENANT.fullmatch(key.tenant) and re.fullmatch(r"[0-9a-f]{64}", key.sha256)):
                raise ValueError
        except (TypeError, ValueError, RecursionError) as exc:
            raise ConfigError(f"{path}:{number}: not a key; lines are written by `persona-plug keys new`") from exc
        keys.append(key)
    return keys


class Keyring:
    """Knows who asks. The file is read again when it changes, so that a revoked key ends at once."""

    def __init__(self, path: Path | None) -> None:
        """Read the keys; without a file everybody is the local tenant.

        Raises:
            ConfigError: The file cannot be used or holds no key.
        """
        self.path, self._stamp = path, (0, 0)
        self._keys: Sequence[Key] = []
        if path is not None:
            self._keys, self._stamp = read_keys(path), _stamp(path)
            if not self._keys:
                raise ConfigError(f"key file {path} holds no key; make one with `persona-plug keys new`")

    @property
    def tenants(self) -> frozenset[str]:
        """Who may ask."""
        return frozenset(key.tenant for key in self._keys) if self.path else frozenset({LOCAL_TENANT})

    def find(self, authorization: str) -> Key | None:
        """Return whose key an Authorization header carries, or None."""
        if self.path is None:
            return Key("key-local", LOCAL_TENANT, "", "")
        self._reload(self.path)
        kind, _, secret = authorization.partition(" ")
        digest = _digest(secret.strip()) if kind.lower() == "bearer" else ""
        found = None
        for key in self._keys:  # all of them, each in constant time: nothing is learned from how long it takes
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found

    def _reload(self, path: Path) -> None:
        try:
            stamp = _stamp(path)
            if stamp != self._stamp:
                self._keys, self._stamp = read_keys(path), stamp
        except (OSError, ConfigError) as exc:
            if self._keys:
                logger.error("the key file cannot be read (%s): every key is refused until it can", type(exc).__name__)
            self._keys, self._stamp = [], (0, 0)


def store_key(tenant: str, user: str) -> str:
    """Return the name under which a tenant's user is stored; a slash in either cannot reach another tenant.

    Whoever is alone needs no tenant: users of the local one have their own names, if no slash is in them.
    """
    if tenant == LOCAL_TENANT and "/" not in user:
        return user
    return f"{quote(tenant, safe='')}/{quote(user, safe='')}"


def tenant_of(name: str) -> str:
    """Return whose user is stored under a name."""
    tenant, slash, _ = name.partition("/")
    return unquote(tenant) if slash else LOCAL_TENANT


def check_host(host: str, keys: Path | None) -> None:
    """Refuse to listen beyond this machine without keys.

    Raises:
        ConfigError: Says what to do.
    """
    if keys is None and not is_loopback(host):
        raise ConfigError(f"host {host!r} can be reached from outside: give --keys FILE, or listen on 127.0.0.1")


def is_loopback(host: str) -> bool:
    """Tell whether a host is this machine; names other than localhost are not looked up."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_ino


def _write(path: Path, keys: Sequence[Key]) -> None:
    text = "".join(json.dumps(asdict(key)) + "\n" for key in keys)
    write_atomically(path, text.encode(), 0o600)
