//! The SHA-256 of every file in forms that other programs read: the in-toto statement that OpenSSF model signing signs and
//! verifies, and a list for `sha256sum -c`.
//!
//! The statement is that of <https://github.com/sigstore/model-transparency>, predicate `https://model_signing/signature/v1.0`:
//! the files sorted by name with their digests, and as the subject's digest the SHA-256 over these digests one behind the
//! other. What `model_signing sign` makes of the bundle has the same digests; what is signed elsewhere (a KMS, a pipeline
//! that never sees the weights) can be made from this file alone.

use std::path::Path;

use moepack_format::check::read_manifest;
use moepack_format::file::{from_hex, hex};
use moepack_format::manifest::{MANIFEST, SIGNATURE};
use moepack_format::{Error, InputFile, Result, storage};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// What is not part of what is signed: the signature, and what version control keeps beside.
const IGNORED: [&str; 5] = [SIGNATURE, ".git", ".gitattributes", ".github", ".gitignore"];

/// Names and digests of all files of a bundle that was found undamaged, sorted by name.
///
/// # Errors
/// A manifest that cannot be read.
pub(super) fn digests(bundle: &Path) -> Result<Vec<(String, String)>> {
    let manifest = read_manifest(bundle)?.manifest;
    let manifest = manifest.ok_or_else(|| Error::bad_data("no manifest that can be read").in_file(bundle))?;
    let itself = InputFile::open(&bundle.join(MANIFEST))?.sha256(&|| false)?;
    let mut digests: Vec<_> = manifest.files.into_iter().map(|f| (f.path, f.sha256)).collect();
    digests.push((MANIFEST.to_owned(), itself));
    digests.sort();
    Ok(digests)
}

/// The in-toto statement about them.
pub(super) fn statement(bundle: &Path, digests: &[(String, String)]) -> Result<Value> {
    let mut root = Sha256::new();
    for (_, digest) in digests {
        root.update(from_hex(digest).ok_or_else(|| Error::bad_data(format!("digest {digest:?}")))?);
    }
    let resource =
        |(name, digest): &(String, String)| json!({"name": name, "algorithm": "sha256", "digest": digest});
    let resources: Vec<Value> = digests.iter().map(resource).collect();
    let name =
        storage::canonicalize(bundle).ok().and_then(|p| Some(p.file_name()?.to_string_lossy().into_owned()));
    Ok(json!({
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": name.unwrap_or_default(), "digest": {"sha256": hex(&root.finalize())}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": false,
                "ignore_paths": IGNORED,
            },
            "resources": resources,
        },
    }))
}

/// The list for `sha256sum -c`, to be run in the bundle's directory. Names of bundle files have no line breaks and no backslashes, which that
/// program would want escaped.
pub(super) fn list(digests: &[(String, String)]) -> String {
    digests.iter().map(|(name, digest)| format!("{digest}  {name}\n")).collect()
}
