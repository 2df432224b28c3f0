#!/usr/bin/env python3
"""Bundles and OpenSSF model signing: both see the same digests, and each verifies what the other says.

    python tests/peers/test_signing.py target/debug/moepack

Needs the packages of requirements-signing.txt. Keys are made here; nothing goes over the network.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf import json_format
from in_toto_attestation.v1 import statement_pb2
from model_signing import hashing, signing, verifying
from model_signing._signing import sign_ec_key
from model_signing._signing.signing import Payload, dsse_payload_to_manifest

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"


def main():
    moepack = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        bundle, statement = work / "q", work / "q.intoto.json"
        run(moepack, "quantize", FIXTURES / "random/qwen3_moe_sharded", "-o", bundle, "--codec", "int4-g32")
        run(moepack, "check", bundle, "--statement", statement)
        ours = json.loads(statement.read_text())
        private, public = keys(work)
        for check in (digests_are_the_same, their_signature_verifies, our_statement_signed_verifies):
            check(bundle, ours, private, public)
            print(f"ok {check.__name__.replace('_', ' ')}")
        run(moepack, "check", bundle)
        print("ok a signed bundle is sound")
    print("4 passed, 0 failed")


# ---- what must hold


def digests_are_the_same(bundle, ours, *_):
    """Resource by resource, and the digest over all of them."""
    theirs = json.loads(json_format.MessageToJson(Payload(hashing.Config().hash(bundle)).statement.pb))
    assert ours["_type"] == theirs["_type"]
    assert ours["predicateType"] == theirs["predicateType"]
    assert ours["subject"] == theirs["subject"]
    assert ours["predicate"]["resources"] == theirs["predicate"]["resources"]
    assert len(ours["predicate"]["resources"]) == len(list(bundle.iterdir()))
    assert dsse_payload_to_manifest(ours) == hashing.Config().hash(bundle)


def their_signature_verifies(bundle, _, private, public):
    """Signed by model signing where it usually puts its signature, in the bundle; a flipped bit is refused."""
    signature = bundle / "model.sig"
    config = hashing.Config().set_ignored_paths(paths=[signature], ignore_git_paths=True)
    signing.Config().use_elliptic_key_signer(private_key=private).set_hashing_config(config).sign(bundle, signature)
    refuses_damage(bundle, signature, public)


def our_statement_signed_verifies(bundle, ours, private, public):
    """A signature over the statement that moepack wrote, by someone who never sees the weights."""
    payload = Payload.__new__(Payload)
    pb = statement_pb2.Statement()
    json_format.ParseDict(ours, pb)
    payload.statement = type("Statement", (), {"pb": pb})()
    signature = bundle.parent / "ours.sig"
    sign_ec_key.Signer(private).sign(payload).write(signature)
    refuses_damage(bundle, signature, public)


# ---- how


def refuses_damage(bundle, signature, public):
    """Verifies, and verifies no more after one bit is flipped in a bank."""
    verifier = verifying.Config().use_elliptic_key_verifier(public_key=public)
    verifier.verify(bundle, signature)
    bank = bundle / "experts-00001.safetensors"
    good = bank.read_bytes()
    bank.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    try:
        verifying.Config().use_elliptic_key_verifier(public_key=public).verify(bundle, signature)
    except ValueError:
        bank.write_bytes(good)
    else:
        raise AssertionError("a flipped bit was not noticed")


def keys(work):
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = work / "key.pem", work / "key.pub"
    pem = serialization.Encoding.PEM
    plain = serialization.NoEncryption()
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


def run(*command):
    subprocess.run(command, check=True, capture_output=True, text=True)


if __name__ == "__main__":
    main()
