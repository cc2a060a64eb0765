"""Signatures of model packages: who vouches for which package as which model."""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import json
import re
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Self

from airflow_mlops.core.codec import canonical_json, from_dict, to_dict
from airflow_mlops.exceptions import ArtifactIntegrityError, ConnectionConfigError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

#: File beside ``package.json`` that holds the signature; the manifest does not list it, as it is made later.
SIGNATURE_FILE = "package.sig"

#: First thing that is signed, so that a signature made for another purpose never fits.
_STATEMENT = "airflow-mlops package 1"

_PEM_BLOCK = re.compile(r"-----BEGIN [A-Z ]+-----.*?-----END [A-Z ]+-----", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class PackageSignature:
    """A detached signature, as ``package.sig`` and the version's tag hold it.

    It covers the package digest, and through it every file, and the model's name: a package that was signed as one
    model is not signed as another.

    :param model_name: registered model.
    :param package_digest: what is vouched for.
    :param key_id: names the key, see :func:`key_id_of`.
    :param signature: Ed25519 signature, base64.
    :param algorithm: the only one.
    """

    model_name: str
    package_digest: str
    key_id: str
    signature: str
    algorithm: Literal["ed25519"] = "ed25519"

    def to_text(self) -> str:
        """Give the text of ``package.sig``."""
        return canonical_json(to_dict(self))

    @classmethod
    def from_text(cls, text: str) -> PackageSignature:
        """Inverse of :meth:`to_text`.

        :raises ValueError: when it is no JSON, or naming each field that does not fit.
        """
        return from_dict(cls, json.loads(text))


@dataclass(frozen=True, kw_only=True, slots=True)
class SigningKey:
    """The private key of whoever registers models.

    :param seed: the 32 bytes of an Ed25519 private key; a secret.
    """

    seed: bytes = field(repr=False)

    @classmethod
    def generate(cls) -> Self:
        """Make a new key from the system's randomness."""
        return cls(seed=secrets.token_bytes(32))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a key: 32 bytes in base64 on one line, or PEM (``openssl genpkey -algorithm ed25519``).

        :raises ConnectionConfigError: it is neither; the text is not shown.
        """
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        key: object = None
        # An error here may quote the key, so it is not chained.
        with contextlib.suppress(ValueError, TypeError, UnsupportedAlgorithm):
            if "-----BEGIN" in text:
                key = load_pem_private_key(text.encode(), password=None)
            else:
                key = Ed25519PrivateKey.from_private_bytes(_decode(text))
        if not isinstance(key, Ed25519PrivateKey):
            raise ConnectionConfigError(
                "the signing key is no Ed25519 private key: 32 bytes in base64, or PEM without a password; "
                "`airflow-mlops signing-key` makes one"
            )
        return cls(seed=key.private_bytes_raw())

    @property
    def public_key(self) -> bytes:
        """The 32 bytes of the public key."""
        return self._key().public_key().public_bytes_raw()

    def to_text(self) -> str:
        """Give the key on one line; it is a secret."""
        return base64.b64encode(self.seed).decode()

    def public_text(self) -> str:
        """Give the public key on one line."""
        return base64.b64encode(self.public_key).decode()

    def sign(self, *, model_name: str, package_digest: str) -> PackageSignature:
        """Vouch for a package as a version of a model; the same twice gives the same signature."""
        signature = self._key().sign(_statement(model_name, package_digest))
        return PackageSignature(
            model_name=model_name,
            package_digest=package_digest,
            key_id=key_id_of(self.public_key),
            signature=base64.b64encode(signature).decode(),
        )

    def _key(self) -> Ed25519PrivateKey:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return Ed25519PrivateKey.from_private_bytes(self.seed)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trust:
    """Whose signature a package needs before it is loaded, and as which model.

    :param model_name: registered model the package is about to be used as.
    :param keys: public keys by id; a signature of any of them is enough, so that keys can be changed.
    """

    model_name: str
    keys: dict[str, bytes]

    @classmethod
    def of(cls, public_keys: str | None, model_name: str) -> Self | None:
        """Read public keys, each 32 bytes in base64 or a PEM block, separated by white space or commas.

        :returns: ``None`` when none are configured: digests are checked then, signatures are not.
        :raises ConnectionConfigError: the text holds something else, or nothing.
        """
        return cls(model_name=model_name, keys=parse_public_keys(public_keys)) if public_keys else None

    def require(self, signature: PackageSignature | None, *, package_digest: str, where: str) -> None:
        """Check a signature.

        :param signature: what came with the package.
        :param package_digest: digest of the manifest that was read.
        :param where: the package, for the message.
        :raises ArtifactIntegrityError: there is none, or it is not by a trusted key for this package and model.
        """
        problem = self._problem(signature, package_digest)
        if problem:
            raise ArtifactIntegrityError(
                f"{where} {problem}; it was not loaded. Trusted keys: {', '.join(self.keys)}. If you vouch for this "
                "package, register it again with the signing connection; if its key was replaced, add the old public "
                "key to the connection"
            )

    def _problem(self, signature: PackageSignature | None, package_digest: str) -> str | None:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        if signature is None:
            return f"is not signed as a version of {self.model_name!r}"
        if (signature.model_name, signature.package_digest) != (self.model_name, package_digest):
            return (
                f"carries a signature for {signature.model_name!r} {signature.package_digest}, "
                f"not for {self.model_name!r} {package_digest}"
            )
        key = self.keys.get(signature.key_id)
        if key is None:
            return f"is signed with key {signature.key_id}, which is not trusted here"
        try:
            Ed25519PublicKey.from_public_bytes(key).verify(
                _decode(signature.signature), _statement(self.model_name, package_digest)
            )
        except (InvalidSignature, ValueError):
            return f"has a signature that key {signature.key_id} did not make"
        return None


def parse_public_keys(text: str) -> dict[str, bytes]:
    """Read public keys, 32 bytes each, by their id.

    :raises ConnectionConfigError: one is none; or there is none at all.
    """
    blocks = _PEM_BLOCK.findall(text)
    keys = [_public_key(item) for item in [*blocks, *_PEM_BLOCK.sub(" ", text).replace(",", " ").split()]]
    if not keys:
        raise ConnectionConfigError(
            "public keys are configured but none is given; leave them out to check digests only"
        )
    return {key_id_of(key): key for key in keys}


def key_id_of(public_key: bytes) -> str:
    """Name a key: the first 16 hex digits of the SHA-256 of the public key."""
    return hashlib.sha256(public_key).hexdigest()[:16]


def _public_key(text: str) -> bytes:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    key: object = None
    with contextlib.suppress(ValueError, UnsupportedAlgorithm):
        if "-----BEGIN" in text:
            key = load_pem_public_key(text.encode())
        else:
            key = Ed25519PublicKey.from_public_bytes(_decode(text))
    if not isinstance(key, Ed25519PublicKey):
        # What stands there may be a private key, so it is not shown.
        raise ConnectionConfigError(
            f"one of the public keys ({len(text)} characters) is no Ed25519 public key: 32 bytes in base64, or PEM"
        )
    return key.public_bytes_raw()


def _statement(model_name: str, package_digest: str) -> bytes:
    """Give the bytes that are signed."""
    parts = {"statement": _STATEMENT, "model_name": model_name, "package_digest": package_digest}
    return canonical_json(parts).encode()


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text.strip(), validate=True)
    except binascii.Error as err:
        raise ValueError("not base64") from err
