"""Who made a version: an ed25519 signature in its manifest, and the public keys that a reader trusts.

Signed are the bytes `lorasync manifest v1`, a zero byte and the manifest's digest in hex. The digest covers every field
but itself and the signature, and through the shards' digests every byte of the version. Signing is deterministic, so
ranks that race to commit with one key still write the same bytes; every rank must have it.

Promises: with `trust` set, a version that none of those keys signed is refused, and so is one whose signature was taken
from another version, whose digest was made anew, or that stands under another adapter's or version's name.
Does not: keep versions where they are. Who can write to the store can still delete the newest ones or put a void over
them, so that an older signed version is the latest again; fence the trainer with a claim of a higher epoch; bring a
version from another run of the same adapter name that the same key signed (a key for each run prevents it); and change
what is not signed: checkpoints, trajectories (what the trainer learns from), receipts and hints. Readers and trainers
should have credentials of their own, and only trainers write below manifests/.

    openssl genpkey -algorithm ed25519 -out sign.pem          # the trainer's; keep it at mode 0600
    openssl pkey -in sign.pem -pubout -out trust.pem          # the readers'

`cryptography` does the arithmetic, and is only imported where a key is named. ed25519: RFC 8032.
"""

import hashlib
import logging
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import Untrusted, UsageError
from shared.manifest import Manifest, Signature

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

log = logging.getLogger(__name__)

Seal = Callable[[Manifest], Manifest]

CONTEXT = b"lorasync manifest v1\0"
KEY_NAME_LENGTH = 16  # hex digits of the sha256 of the raw public key
MAX_KEY_FILE_BYTES = 1 << 16

_RAW = re.compile(r"[0-9a-fA-F]{64}")
_PUBLIC_PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----", re.DOTALL)


@dataclass(frozen=True)
class Signer:
    """A private key. `name` tells readers which of their public keys to ask."""

    name: str
    private: "Ed25519PrivateKey"

    def sign(self, manifest: Manifest) -> Manifest:
        """The same manifest, sealed and signed."""
        sealed = manifest.sealed()
        signature = self.private.sign(_message(sealed.digest))
        return replace(sealed, signature=Signature(self.name, signature.hex()))


@dataclass(frozen=True)
class Trust:
    """Public keys by name. Never empty: no keys would mean that nobody is trusted, not that everybody is."""

    keys: "dict[str, Ed25519PublicKey]"

    def demand_signed(self, manifest: Manifest, *, key: str) -> None:
        """Check that one of these keys signed a parsed manifest, whose digest therefore holds.

        Args:
            key: where the manifest lies on the store.

        Raises:
            Untrusted: not signed, signed by another key, or the signature is not this manifest's.
        """
        from cryptography.exceptions import InvalidSignature

        signature = manifest.signature
        if signature is None:
            raise _untrusted("not signed", manifest, key)
        public = self.keys.get(signature.key)
        if public is None:
            raise _untrusted(f"signed by key {signature.key}, which is not trusted", manifest, key)
        try:
            public.verify(bytes.fromhex(signature.ed25519), _message(manifest.digest))
        except (InvalidSignature, ValueError) as error:
            raise _untrusted(f"the signature by key {signature.key} does not fit", manifest, key) from error


def load_seal(path: str) -> Seal:
    """What makes a manifest ready to be put: it gets its digest and, by the private key in this file, a signature.

    Args:
        path: `store.sign_key`; empty: the digest alone.

    Raises:
        UsageError: no such file, not an ed25519 key in PKCS8 PEM without a passphrase, or no `cryptography`.
    """
    if not path:
        return Manifest.sealed
    private, public = _private_key(path)
    return Signer(_name(public), private).sign


def load_trust(places: Sequence[str], sign_key: str = "") -> Trust | None:
    """Read public keys (`store.trust`); None where nothing is named, which trusts whoever can write to the store.

    Args:
        places: each a PEM file, a directory of *.pem, or 64 hex digits.
        sign_key: a private key that is trusted as well. Who signs again what is there (a rollback) names it, so as
            not to sign what somebody else put there.

    Raises:
        UsageError: no such file, no ed25519 key in it, or no `cryptography`.
    """
    found = [public for place in places for public in _public_keys(place)]
    if sign_key:
        found.append(_private_key(sign_key)[1])
    return Trust({_name(public): public for public in found}) if found else None


def _private_key(path: str) -> "tuple[Ed25519PrivateKey, Ed25519PublicKey]":
    serialization, ed25519, unsupported = _cryptography("sign")
    file = Path(path).expanduser()
    try:
        private = serialization.load_pem_private_key(_read(file, "store.sign_key"), password=None)
    except (ValueError, TypeError, unsupported) as error:
        hint = "Make one with: openssl genpkey -algorithm ed25519 -out sign.pem"
        raise UsageError(f"no PEM private key: {error}", op="read signing key", key=path, hint=hint) from error
    if not isinstance(private, ed25519.Ed25519PrivateKey):
        raise UsageError("not an ed25519 key", op="read signing key", key=path)
    if stat.S_IMODE(file.stat().st_mode) & (stat.S_IRWXG | stat.S_IRWXO):
        log.warning("signing key %s may be read by others than its owner; set its mode to 0600", path)
    return private, private.public_key()


def _public_keys(place: str) -> "Iterator[Ed25519PublicKey]":
    """The keys that one entry of `store.trust` names, at least one."""
    serialization, ed25519, unsupported = _cryptography("trust")
    if _RAW.fullmatch(place):
        yield ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(place))
        return
    path = Path(place).expanduser()
    files = sorted(path.glob("*.pem")) if place and path.is_dir() else [path]
    if not files:
        raise UsageError("no *.pem in it", op="read trusted key", key=place, hint="An empty store.trust trusts anyone")
    for file in files:
        blocks = _PUBLIC_PEM.findall(_read(file, "store.trust"))
        if not blocks:
            hint = "Write the public key out: openssl pkey -in sign.pem -pubout -out trust.pem"
            raise UsageError("no PEM public key", op="read trusted key", key=str(file), hint=hint)
        for block in blocks:
            try:
                public = serialization.load_pem_public_key(block)
            except (ValueError, unsupported) as error:
                raise UsageError(f"no PEM public key: {error}", op="read trusted key", key=str(file)) from error
            if not isinstance(public, ed25519.Ed25519PublicKey):
                raise UsageError("not an ed25519 key", op="read trusted key", key=str(file))
            yield public


def _read(file: Path, field: str) -> bytes:
    try:
        if not file.is_file():
            raise UsageError("no such file", op="read key", key=str(file), hint=f"Mend {field}")
        with file.open("rb") as stream:
            return stream.read(MAX_KEY_FILE_BYTES)
    except OSError as error:
        raise UsageError(f"{error.strerror}", op="read key", key=str(file), hint=f"Mend {field}") from error


def _cryptography(what: str) -> tuple[Any, Any, type[Exception]]:
    """The package's parts that both loaders need, and its error for keys that it does not know."""
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        hint = 'Run: pip install "lorasync[sign]"'
        raise UsageError(f"to {what} versions, cryptography must be installed", op="read key", hint=hint) from error
    return serialization, ed25519, UnsupportedAlgorithm


def _message(digest: str) -> bytes:
    return CONTEXT + digest.encode("ascii")


def _name(public: "Ed25519PublicKey") -> str:
    return hashlib.sha256(public.public_bytes_raw()).hexdigest()[:KEY_NAME_LENGTH]


def _untrusted(problem: str, manifest: Manifest, key: str) -> Untrusted:
    hint = "store.trust names the keys that count"
    return Untrusted(problem, op="check signature", key=key, version=str(manifest.version), hint=hint)
