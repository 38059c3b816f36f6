"""Ed25519 signatures over certificates, in a DSSE envelope beside them. Needs the extra ``sign``."""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Final

from per_instance_accountant.errors import CertificateError, MissingDependencyError, UsageError
from per_instance_accountant.results.files import write_private
from per_instance_accountant.unlearning.canonical import canonical, read_bytes, unreadable
from per_instance_accountant.unlearning.certificate import Certificate

PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"


def generate_keys(private_path: str | os.PathLike[str], public_path: str | os.PathLike[str]) -> None:
    """Write a new key pair as PEM, both readable by the owner only. Raises MissingDependencyError PIA061."""
    ed25519, serialization = _library()
    key = ed25519.Ed25519PrivateKey.generate()
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_private(private_path, private)
    public_format = serialization.PublicFormat.SubjectPublicKeyInfo
    write_private(public_path, key.public_key().public_bytes(pem, public_format))


def sign(certificate: Certificate, private_key: str | os.PathLike[str]) -> dict[str, Any]:
    """The DSSE envelope of ``certificate``: ``{"payloadType", "payload", "signatures": [{"keyid", "sig"}]}``.

    private_key: PEM file of an unencrypted Ed25519 key. The signature is over the pre-authentication encoding
    of DSSE v1 of the canonical bytes. Raises MissingDependencyError PIA061, UsageError PIA071 (not such a
    key), CertificateError PIA051 (the file cannot be read).
    """
    ed25519, serialization = _library()
    try:
        key = serialization.load_pem_private_key(read_bytes(private_key), password=None)
    except (ValueError, TypeError) as error:
        raise _no_key("private", error) from None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise _no_key("private", None)
    payload = canonical(certificate.to_dict())
    signature = {
        "keyid": _key_id(key.public_key(), serialization),
        "sig": base64.b64encode(key.sign(_encoding(payload))).decode("ascii"),
    }
    return {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(payload).decode("ascii"),
        "signatures": [signature],
    }


def save_envelope(envelope: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write canonical JSON, readable by the owner only."""
    write_private(path, canonical(dict(envelope)))


def signature_problem(
    certificate: Certificate,
    envelope: Mapping[str, Any] | str | os.PathLike[str],
    public_key: str | os.PathLike[str],
) -> str | None:
    """Why ``envelope`` does not sign exactly this certificate under ``public_key``; None if it does.

    Raises MissingDependencyError PIA061, UsageError PIA071 (not an Ed25519 public key), CertificateError
    PIA051 (a file cannot be read).
    """
    ed25519, serialization = _library()
    from cryptography.exceptions import InvalidSignature

    try:
        key = serialization.load_pem_public_key(read_bytes(public_key))
    except ValueError as error:
        raise _no_key("public", error) from None
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise _no_key("public", None)
    try:
        payload, signature, key_id = _parts(envelope)
    except CertificateError as error:
        return error.happened
    if payload != canonical(certificate.to_dict()):
        return "the signature is of another certificate"
    if key_id != _key_id(key, serialization):
        return "the signature names another key"
    try:
        key.verify(signature, _encoding(payload))
    except InvalidSignature:
        return "the signature was not made with this key"
    return None


def _parts(envelope: Mapping[str, Any] | str | os.PathLike[str]) -> tuple[bytes, bytes, str]:
    """Payload, signature and key id of a well-formed envelope with one signature and nothing else."""
    try:
        content = envelope if isinstance(envelope, Mapping) else json.loads(read_bytes(envelope))
        if set(content) != {"payloadType", "payload", "signatures"} or content["payloadType"] != PAYLOAD_TYPE:
            raise ValueError
        (one,) = content["signatures"]
        if set(one) != {"keyid", "sig"} or not isinstance(one["keyid"], str):
            raise ValueError
        payload, signature = (
            base64.b64decode(text, validate=True) for text in (content["payload"], one["sig"])
        )
        # Only the one canonical spelling of the base64 text, so that no byte of the file is free.
        for raw, text in ((payload, content["payload"]), (signature, one["sig"])):
            if base64.b64encode(raw).decode("ascii") != text:
                raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError, binascii.Error):
        raise unreadable("this is not a signature envelope", "pia sign, or sign(certificate, key)") from None
    return payload, signature, one["keyid"]


def _encoding(payload: bytes) -> bytes:
    """DSSE v1 pre-authentication encoding.

    >>> _encoding(b"{}")
    b'DSSEv1 28 application/vnd.in-toto+json 2 {}'
    """
    kind = PAYLOAD_TYPE.encode("ascii")
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _key_id(key: Any, serialization: Any) -> str:
    raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return "sha256:" + sha256(raw).hexdigest()


def _library() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "PIA061",
            "cryptography is not installed",
            "No signature can be made or checked; everything else of a certificate can",
            'pip install "per-instance-accountant[sign]"',
        ) from error
    return ed25519, serialization


def _no_key(kind: str, error: Exception | None) -> UsageError:
    cause = f" ({type(error).__name__})" if error else ""
    return UsageError(
        "PIA071",
        f"the file is not an unencrypted Ed25519 {kind} key in PEM{cause}",
        "Nothing was signed or checked",
        "generate_keys(private_path, public_path)",
    )
