"""What a file says about its origin: C2PA manifests, signed and read with c2pa-python (extra
`provenance`), and the comment that every generated mp4 carries.

A manifest is a signed statement inside the file, bound to its bytes. Ours says that a trained model
created the video: the action ``c2pa.created`` with IPTC's digital source type
``trainedAlgorithmicMedia`` (C2PA specification 2, section on actions). Nothing here asks the
network: no time stamp, no status of certificates, no manifests from elsewhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rest_lightning.constants import VERSION
from rest_lightning.errors import UserError
from rest_lightning.extras import install_command, missing
from rest_lightning.media.container import open_media

TRAINED_ALGORITHMIC_MEDIA = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_FORMAT = "video/mp4"
_OFFLINE = {"verify": {"remote_manifest_fetch": False, "ocsp_fetch": False}}
_UNTRUSTED = "signingCredential.untrusted"
_CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}


@dataclass(frozen=True)
class Signer:
    """A certificate with its key, checked. :func:`load_signer` makes it.

    Attributes:
        chain: the certificate, then those that vouch for it, PEM.
        key: of the certificate, PKCS #8 PEM.
        algorithm: C2PA's name of it, such as ``es256``.
        name: whom the certificate names, for messages.
    """

    chain: bytes
    key: bytes = field(repr=False)
    algorithm: str
    name: str

    def sign(self, source: Path, target: Path, title: str) -> None:
        """Writes the mp4 ``source`` with a signed manifest to ``target``.

        Args:
            source: a whole mp4, fragmented or not.
            target: another name; a file there is replaced.
            title: what the manifest calls the video.

        Raises:
            UserError: the library refuses the certificate, such as one that is not for signing.
            OSError: the system refuses.
        """
        c2pa = _c2pa()
        manifest = {
            "claim_generator_info": [{"name": "rest_lightning", "version": VERSION}],
            "title": title,
            "assertions": [
                {
                    "label": "c2pa.actions.v2",
                    "data": {
                        "actions": [
                            {
                                "action": "c2pa.created",
                                "digitalSourceType": TRAINED_ALGORITHMIC_MEDIA,
                            }
                        ]
                    },
                }
            ],
        }
        info = c2pa.C2paSignerInfo(
            alg=self.algorithm.encode(), sign_cert=self.chain, private_key=self.key, ta_url=None
        )
        try:
            with (
                c2pa.Context.from_dict(_OFFLINE) as context,
                c2pa.Signer.from_info(info) as signer,
                c2pa.Builder(manifest, context) as builder,
                source.open("rb") as reading,
                target.open("w+b") as writing,
            ):
                builder.sign(signer, _FORMAT, reading, writing)
                writing.flush()
                os.fsync(writing.fileno())
        except c2pa.C2paError as error:
            raise UserError(
                f"expected a certificate that may sign C2PA manifests, got {self.name} "
                f"({_reason(error)}): use one for signing (digitalSignature, with an extended key "
                "usage), followed by the certificates that vouch for it"
            ) from error


def load_signer(certificate: str | os.PathLike[str], key: str | os.PathLike[str]) -> Signer:
    """Returns the signer of two PEM files.

    Args:
        certificate: the certificate, followed by those that vouch for it, without the root.
        key: its private key, without a password: RSA, EC (P-256, P-384, P-521) or Ed25519.

    Raises:
        UserError: no such file, no certificate or key in it, one that has expired or is not valid
            yet, a key that belongs to another certificate, or of a kind that C2PA has not.
    """
    _c2pa()
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    chain, secret = _read(certificate, "a certificate"), _read(key, "a private key")
    try:
        certificates = x509.load_pem_x509_certificates(chain)
    except ValueError:
        raise UserError(
            f"expected a certificate (PEM), got {certificate}, which holds none: name the file "
            "that begins with -----BEGIN CERTIFICATE-----"
        ) from None
    try:
        private = serialization.load_pem_private_key(secret, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise UserError(
            f"expected a private key (PEM, without a password), got {key}, which holds none: "
            "openssl pkcs8 -topk8 -nocrypt -in KEY -out key.pem makes one of yours"
        ) from None
    leaf = certificates[0]
    name = leaf.subject.rfc4514_string()
    now = datetime.now(UTC)
    if now > leaf.not_valid_after_utc:
        raise UserError(
            f"expected a valid certificate, got {certificate}, which expired on "
            f"{leaf.not_valid_after_utc:%Y-%m-%d}: renew it"
        )
    if now < leaf.not_valid_before_utc:
        raise UserError(
            f"expected a valid certificate, got {certificate}, which is valid from "
            f"{leaf.not_valid_before_utc:%Y-%m-%d} on: check the clock, or use another one"
        )
    if private.public_key() != leaf.public_key():
        raise UserError(
            f"expected the key of the certificate {certificate}, got {key}, which belongs to "
            "another one: give the two that were made together"
        )
    pkcs8 = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return Signer(chain, pkcs8, _algorithm(private, key), name)


@dataclass(frozen=True)
class Provenance:
    """What an mp4 says about its origin.

    Attributes:
        comment: the container's comment; None where there is none.
        is_marked: whether the comment names IPTC's type for media made by a trained model.
        manifest: the active C2PA manifest; None where there is none, or nothing that could read it.
        is_intact: whether signature and bytes fit; None without a manifest.
        is_trusted: whether the certificate leads to a root that c2pa-python was told to trust; None
            without a manifest.
        failures: what does not fit, in C2PA's words.
        can_read_manifests: whether c2pa-python is there.
    """

    comment: str | None
    is_marked: bool
    manifest: Mapping[str, Any] | None
    is_intact: bool | None
    is_trusted: bool | None
    failures: tuple[str, ...]
    can_read_manifests: bool

    @property
    def actions(self) -> list[dict[str, str]]:
        """What the manifest says was done, such as ``c2pa.created``, each with its source type."""
        found = []
        for assertion in (self.manifest or {}).get("assertions", ()):
            if assertion["label"].startswith("c2pa.actions"):
                for action in assertion["data"]["actions"]:
                    source = str(action.get("digitalSourceType", ""))
                    found.append({"action": action["action"], "source": source.rpartition("/")[2]})
        return found

    def lines(self) -> list[str]:
        """Returns it in words, one line each."""
        said = f"says that it is synthetic: {self.comment}" if self.is_marked else "no such mark"
        lines = [f"metadata   {said}"]
        if not self.can_read_manifests:
            return [*lines, f"signature  not looked at: {install_command('provenance')}"]
        if self.manifest is None:
            return [*lines, "signature  none"]
        info = self.manifest.get("signature_info", {})
        signer = ", ".join(str(info[key]) for key in ("common_name", "issuer") if key in info)
        trust = "trusted" if self.is_trusted else "not on a list of trust: anyone can make one"
        lines.append(f"signature  {'intact' if self.is_intact else 'BROKEN'}")
        lines.append(f"signed by  {signer or 'not told'} ({trust})")
        if "time" in info:
            lines.append(f"signed at  {info['time']}")
        lines += [
            f"action     {action['action']} ({action['source'] or 'no source type'})"
            for action in self.actions
        ]
        return lines + [f"problem    {failure}" for failure in self.failures]


def read_provenance(path: str | os.PathLike[str]) -> Provenance:
    """Returns what an mp4 says about its origin, and whether it has been changed since.

    Raises:
        UserError: no such file, or no video.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"expected a video, but {path} is no file: check the name")
    with open_media(path) as container:
        comment = container.metadata.get("comment")
    is_marked = comment is not None and TRAINED_ALGORITHMIC_MEDIA in comment
    try:
        c2pa = _c2pa()
    except UserError:
        return Provenance(comment, is_marked, None, None, None, (), False)
    try:
        with (
            path.open("rb") as file,
            c2pa.Context.from_dict(_OFFLINE) as context,
            c2pa.Reader(_FORMAT, file, context=context) as reader,
        ):
            store, state = json.loads(reader.json()), reader.get_validation_state()
    except c2pa.C2paError.ManifestNotFound:
        return Provenance(comment, is_marked, None, None, None, (), True)
    except c2pa.C2paError as error:
        return Provenance(comment, is_marked, {}, False, False, (_reason(error),), True)
    failures = [
        each.get("explanation") or each["code"]
        for each in store.get("validation_status", ())
        if each["code"] != _UNTRUSTED
    ]
    return Provenance(
        comment,
        is_marked,
        store["manifests"][store["active_manifest"]],
        state in ("Valid", "Trusted"),
        state == "Trusted",
        tuple(failures),
        True,
    )


def _c2pa() -> Any:
    try:
        import c2pa
    except ModuleNotFoundError as error:
        raise missing(error.name, "provenance", "signatures") from None
    return c2pa


def _read(path: str | os.PathLike[str], what: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        reason = (error.strerror or "unreadable").lower()
        raise UserError(f"expected {what} (PEM), got {path} ({reason}): check the name") from None


def _algorithm(private: Any, path: str | os.PathLike[str]) -> str:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if isinstance(private, ec.EllipticCurvePrivateKey) and private.curve.name in _CURVES:
        return _CURVES[private.curve.name]
    if isinstance(private, rsa.RSAPrivateKey):
        return "ps256"
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return "ed25519"
    raise UserError(
        f"expected a key of RSA, EC (P-256, P-384, P-521) or Ed25519, got another kind in {path}: "
        "C2PA knows no other"
    )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
