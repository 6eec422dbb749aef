"""Certificates to sign videos with, made by an authority that nobody trusts."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID


@dataclass(frozen=True)
class Files:
    certificate: Path
    key: Path

    @property
    def words(self) -> list[str]:
        return ["--sign", str(self.certificate), str(self.key)]


def name_of(common_name: str) -> x509.Name:
    names = {NameOID.COMMON_NAME: common_name, NameOID.ORGANIZATION_NAME: "A studio"}
    return x509.Name([x509.NameAttribute(oid, text) for oid, text in names.items()])


def usage(signs: bool, vouches: bool) -> x509.KeyUsage:
    return x509.KeyUsage(signs, False, False, False, False, vouches, vouches, False, False)


def make_files(
    folder: Path, begins_in_days: int = -1, ends_in_days: int = 30, for_signing: bool = True
) -> Files:
    """A certificate of a studio behind an authority, with its key, as C2PA asks for them."""
    folder.mkdir()
    now = datetime.now(UTC)
    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root_name = name_of("An authority")
    of_root = x509.SubjectKeyIdentifier.from_public_key(root_key.public_key())
    root = (
        x509.CertificateBuilder(root_name, root_name, root_key.public_key(), 1)
        .not_valid_before(now - timedelta(days=400))
        .not_valid_after(now + timedelta(days=400))
        .add_extension(x509.BasicConstraints(True, None), True)
        .add_extension(usage(False, True), True)
        .add_extension(of_root, False)
        .sign(root_key, hashes.SHA256())
    )
    leaf = (
        x509.CertificateBuilder(root_name, name_of("A signer"), key.public_key(), 2)
        .not_valid_before(now + timedelta(days=begins_in_days))
        .not_valid_after(now + timedelta(days=ends_in_days))
        .add_extension(x509.BasicConstraints(False, None), True)
        .add_extension(usage(for_signing, False), True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(of_root), False
        )
        .sign(root_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    files = Files(folder / "cert.pem", folder / "key.pem")
    files.certificate.write_bytes(leaf.public_bytes(pem) + root.public_bytes(pem))
    # the older form: C2PA wants PKCS #8, which is made of it
    form = serialization.PrivateFormat.TraditionalOpenSSL
    files.key.write_bytes(key.private_bytes(pem, form, serialization.NoEncryption()))
    return files
