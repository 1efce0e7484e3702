"""The signature over an artifact's receipt: a sigstore bundle, made offline with an elliptic-curve key.

The `model-signing` library signs (OpenSSF Model Signing v1.0: an in-toto statement in a DSSE envelope), so
`model_signing verify key` checks our artifacts as well. Verifying needs only `cryptography`: model-signing imports a
whole client of transparency logs, which would cost a deployment hook seconds.

Source: DSSE protocol v1.0.2, `PAE(type, body) = "DSSEv1" SP len(type) SP type SP len(body) SP body`; the signature
is ECDSA over it with SHA-256, SHA-384 or SHA-512, by the curve P-256, P-384 or P-521.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from bshub.errors import UsageError, printable
from bshub.files import MANIFEST
from bshub.release.finding import INCONCLUSIVE, NOTE, PASS, REFUSED, Finding
from bshub.release.receipt import SIGNATURE, Receipt

_TYPE = "application/vnd.in-toto+json"
_PREDICATE = "https://model_signing/signature/v1.0"
_INSTALL = "pip install 'bshub[sign]'"
_MAX_BYTES = 4 << 20
_KEYS = "openssl ecparam -name prime256v1 -genkey -noout -out key.pem && openssl ec -in key.pem -pubout -out pub.pem"


def check_key(key: Path) -> None:
    """Refuse a signing key early, before any work.

    Raises:
        UsageError: It cannot be read, has a password, or is of a kind that cannot sign here.
    """
    _signer(key)


def sign_receipt(folder: Path, key: Path) -> None:
    """Write ``receipt.sigstore.json`` over ``bshub-report.json``.

    Args:
        folder: Holds a finished artifact.
        key: Private key, PEM without a password, on P-256, P-384 or P-521.

    Raises:
        UsageError: The key cannot be used.
    """
    _signer(key).sign(folder / MANIFEST, folder / SIGNATURE)


def _signer(key: Path) -> Any:
    try:
        from model_signing.signing import Config
    except ImportError:
        raise UsageError("signing needs the library model-signing", hint=_INSTALL) from None
    try:
        return Config().use_elliptic_key_signer(private_key=key)
    except OSError as error:
        raise UsageError(f"{key} cannot be read: {error.strerror}", hint=_KEYS) from None
    except Exception as error:  # the library's and cryptography's kinds: no PEM, a password, another curve
        raise UsageError(f"{key} cannot sign: {printable(error, 160)}", hint=_KEYS) from None


def verify_signature(receipt: Receipt, key: Path | None, wanted: str | None = None) -> Finding:
    """Judge the signature of a receipt.

    Args:
        receipt: Of the artifact.
        key: Public key, PEM.
        wanted: ``sha256:…``, the fingerprint that the key must have; None: any.

    Returns:
        What came of it. Without a key a signature proves nothing, and the finding says so.

    Raises:
        UsageError: The key cannot be read, or is none.
    """
    path = receipt.folder / SIGNATURE
    sign = "bshub sanitize … --sign key.pem signs it"
    if not path.exists() and not path.is_symlink():
        if key is None and wanted is None:
            return Finding("signature", NOTE, "the receipt is not signed, and the policy names no signer")
        return Finding("signature", REFUSED, "the receipt is not signed", sign, SIGNATURE)
    if key is None:
        if wanted is None:
            return Finding("signature", NOTE, "signed; nobody asked by whom", "name the key: --key pub.pem", SIGNATURE)
        return Finding("signature", INCONCLUSIVE, "the signer's public key was not given", "--key pub.pem", SIGNATURE)
    try:
        public, fingerprint = _public_key(key)
    except ImportError:
        return Finding("signature", INCONCLUSIVE, "checking a signature needs cryptography", _INSTALL, SIGNATURE)
    if wanted is not None and wanted != f"sha256:{fingerprint}":
        reason = f"the key {key.name} has the fingerprint sha256:{fingerprint[:12]}…, the policy names another"
        return Finding("signature", REFUSED, reason, "give the key of the signer that the policy names", SIGNATURE)
    try:
        _check(path, public, receipt.digest)
    except (ValueError, LookupError, TypeError, RecursionError, OSError) as error:
        reason = printable(error, 160) or type(error).__name__
        return Finding("signature", REFUSED, f"the signature does not hold: {reason}", sign, SIGNATURE)
    return Finding("signature", PASS, f"signed by sha256:{fingerprint[:16]}…", path=SIGNATURE)


def _public_key(path: Path) -> tuple[Any, str]:
    """The key and its fingerprint: sha256 of its PEM, which the bundle's ``hint`` repeats."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", hint="name the signer's public key") from None
    except Exception:  # cryptography's kinds
        hint = "openssl ec -in key.pem -pubout -out pub.pem"
        raise UsageError(f"{path} is not a public key in PEM", hint=hint) from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise UsageError(f"{path} is not a key on an elliptic curve", hint=_KEYS)
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key, hashlib.sha256(key.public_bytes(serialization.Encoding.PEM, form)).hexdigest()


def _check(path: Path, key: Any, digest: str | None) -> None:
    """Check the bundle's signature, then that what it signs is this receipt.

    Raises:
        ValueError: It does not hold, or the bundle is of another form (as LookupError, TypeError).
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    if path.is_symlink() or not path.is_file() or path.stat().st_size > _MAX_BYTES:
        raise ValueError("it is no plain file")
    envelope = json.loads(path.read_bytes())["dsseEnvelope"]
    body = base64.b64decode(envelope["payload"], validate=True)
    (entry,) = envelope["signatures"]
    if envelope["payloadType"] != _TYPE:
        raise ValueError("it signs something else than a statement")
    sizes: dict[int, hashes.HashAlgorithm] = {256: hashes.SHA256(), 384: hashes.SHA384(), 521: hashes.SHA512()}
    algorithm = sizes.get(key.curve.key_size)
    if algorithm is None:
        raise ValueError(f"the curve {key.curve.name} is not one of P-256, P-384, P-521")
    try:
        signed = b"DSSEv1 %d %s %d %s" % (len(_TYPE), _TYPE.encode(), len(body), body)
        key.verify(base64.b64decode(entry["sig"], validate=True), signed, ec.ECDSA(algorithm))
    except InvalidSignature:
        raise ValueError("another key made it, or it was changed") from None
    statement = json.loads(body)
    predicate = statement["predicate"]
    (resource,) = predicate["resources"]
    if statement["predicateType"] != _PREDICATE or resource["algorithm"] != "sha256" or resource["name"] != ".":
        raise ValueError("it signs something else than one file")
    if digest is None or resource["digest"] != digest:
        raise ValueError("it signs another receipt")
