//! The SHA-256 that the hub gave for a file when it was downloaded, where the download left it behind.
//!
//! A cache directory keeps large files under their hash, `snapshots/REVISION/NAME` being a link to `blobs/SHA256`. A download to a
//! directory of one's own leaves `.cache/huggingface/download/NAME.metadata` in it: revision, ETag and time, a line each; the ETag of
//! a large file is its SHA-256. Small files have the hash of a git object (40 digits) in both places, which is not looked at:
//! weights are never small. See <https://huggingface.co/docs/hub/local-cache>.

use std::path::Path;

use moepack_format::{InputFile, Result, storage};

/// No metadata file is longer.
const METADATA_BYTES_MAX: u64 = 1024;

/// The SHA-256 that the hub has of the file at `path`, 64 lower-case hex digits; `None` where that is not recorded.
///
/// # Errors
/// A metadata file that is there and cannot be read.
pub fn recorded_sha256(path: &Path) -> Result<Option<String>> {
    match in_cache(path) {
        Some(sha256) => Ok(Some(sha256)),
        None => in_metadata(path),
    }
}

/// From the name of the blob that the file is a link to.
fn in_cache(path: &Path) -> Option<String> {
    let blob = storage::read_link(path).ok()?;
    let is_blob = blob.parent()?.file_name()? == "blobs";
    sha256(blob.file_name()?.to_str()?).filter(|_| is_blob)
}

/// From what a download wrote beside it.
fn in_metadata(path: &Path) -> Result<Option<String>> {
    let Some((dir, name)) = path.parent().zip(path.file_name().and_then(|n| n.to_str())) else {
        return Ok(None);
    };
    let metadata = dir.join(".cache/huggingface/download").join(format!("{name}.metadata"));
    if !storage::exists(&metadata)? {
        return Ok(None);
    }
    let file = InputFile::open(&metadata)?;
    let n = usize::try_from(file.len().min(METADATA_BYTES_MAX)).unwrap_or(0);
    let mut text = vec![0; n];
    file.read_exact_at(0, &mut text)?;
    let text = String::from_utf8_lossy(&text);
    Ok(text.lines().nth(1).and_then(|etag| sha256(etag.trim().trim_matches('"'))))
}

fn sha256(text: &str) -> Option<String> {
    let digits = text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    (text.len() == 64 && digits).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_into_blobs_and_a_metadata_file_say_it() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let (large, small) = ("ab".repeat(32), "cd".repeat(20));
        for (name, target) in [
            ("large", format!("../../blobs/{large}")),
            ("small", format!("../../blobs/{small}")),
            ("elsewhere", format!("../{large}")),
        ] {
            std::os::unix::fs::symlink(target, at(name)).unwrap();
        }
        assert_eq!(recorded_sha256(&at("large")).unwrap().as_ref(), Some(&large));
        assert_eq!(recorded_sha256(&at("small")).unwrap(), None);
        assert_eq!(recorded_sha256(&at("elsewhere")).unwrap(), None);
        let download = at(".cache/huggingface/download");
        std::fs::create_dir_all(&download).unwrap();
        let metadata = |name: &str, text: &str| std::fs::write(download.join(name), text).unwrap();
        metadata("a.metadata", &format!("{small}\n{large}\n1726498445.95\n"));
        metadata("b.metadata", &format!("{small}\n{small}\n1726498445.95\n"));
        metadata("c.metadata", "");
        assert_eq!(recorded_sha256(&at("a")).unwrap(), Some(large));
        assert_eq!(["b", "c", "none"].map(|n| recorded_sha256(&at(n)).unwrap()), [None, None, None]);
    }
}
