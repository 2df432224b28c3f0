//! Files that a file system, a broken download or a careless `git clone` left.

use super::*;

/// What a file system or a broken download does.
pub const FILES: &[Fault] = &[
    Fault {
        what: "a file is cut short",
        of: QWEN3,
        exit: 65,
        says: &["needs", "bytes, has", WEIGHTS, "hint:"],
        make: |m| m.bytes(WEIGHTS, |b| b.truncate(b.len() - 1000)),
    },
    Fault {
        what: "a shard is cut short",
        of: SHARDED,
        exit: 65,
        says: &["needs", SECOND, "hint:"],
        make: |m| m.bytes(SECOND, |b| b.truncate(b.len() / 2)),
    },
    Fault {
        what: "an empty file",
        of: QWEN3,
        exit: 65,
        says: &["0 bytes, expected 8 bytes of header length", WEIGHTS],
        make: |m| m.bytes(WEIGHTS, Vec::clear),
    },
    Fault {
        what: "a file shorter than the length of its header",
        of: QWEN3,
        exit: 65,
        says: &["7 bytes, expected 8 bytes of header length", WEIGHTS],
        make: |m| m.bytes(WEIGHTS, |b| b.truncate(7)),
    },
    Fault {
        what: "a header length of 0",
        of: QWEN3,
        exit: 65,
        says: &["header length 0, expected at least", WEIGHTS],
        make: |m| m.bytes(WEIGHTS, |b| b[..8].copy_from_slice(&0u64.to_le_bytes())),
    },
    Fault {
        what: "a header longer than the file",
        of: QWEN3,
        exit: 65,
        says: &["for the header alone, has", WEIGHTS],
        make: |m| m.bytes(WEIGHTS, |b| b[..8].copy_from_slice(&99_000_000u64.to_le_bytes())),
    },
    Fault {
        what: "a header of 2^60 bytes",
        of: QWEN3,
        exit: 65,
        says: &["header length 1152921504606846976, expected at most 100000000", WEIGHTS],
        make: |m| m.bytes(WEIGHTS, |b| b[..8].copy_from_slice(&(1u64 << 60).to_le_bytes())),
    },
    Fault {
        what: "trailing bytes",
        of: QWEN3,
        exit: 65,
        says: &["3 bytes behind the last tensor", WEIGHTS],
        make: |m| m.bytes(WEIGHTS, |b| b.extend_from_slice(b"zip")),
    },
    Fault {
        what: "a sparse file of a terabyte",
        of: QWEN3,
        exit: 65,
        says: &["bytes behind the last tensor", WEIGHTS],
        make: |m| fs::File::options().write(true).open(m.path(WEIGHTS)).unwrap().set_len(1 << 40).unwrap(),
    },
    Fault {
        what: "a FIFO in place of the weights",
        of: QWEN3,
        exit: 65,
        says: &["a FIFO, expected a regular file", WEIGHTS],
        make: |m| {
            fs::remove_file(m.path(WEIGHTS)).unwrap();
            let made = std::process::Command::new("mkfifo").arg(m.path(WEIGHTS)).status().unwrap();
            assert!(made.success());
        },
    },
    Fault {
        what: "a directory in place of a shard",
        of: SHARDED,
        exit: 65,
        says: &["a directory, expected a regular file", SECOND],
        make: |m| {
            fs::remove_file(m.path(SECOND)).unwrap();
            fs::create_dir(m.path(SECOND)).unwrap();
        },
    },
    Fault {
        what: "a Git LFS pointer in place of the weights",
        of: QWEN3,
        exit: 66,
        says: &["a Git LFS pointer", WEIGHTS, "git lfs pull"],
        make: |m| {
            let pointer =
                "version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 630781\n";
            fs::write(m.path(WEIGHTS), pointer).unwrap();
        },
    },
    Fault {
        what: "only pickles",
        of: QWEN3,
        exit: 65,
        says: &["pytorch_model.bin", "hint:"],
        make: |m| fs::rename(m.path(WEIGHTS), m.path("pytorch_model.bin")).unwrap(),
    },
    Fault {
        what: "no weights at all",
        of: QWEN3,
        exit: 66,
        says: &["safetensors", "model"],
        make: |m| fs::remove_file(m.path(WEIGHTS)).unwrap(),
    },
    Fault {
        what: "a symlink that leaves the checkpoint",
        of: QWEN3,
        exit: 65,
        says: &[WEIGHTS, "symlink"],
        make: |m| {
            fs::rename(m.path(WEIGHTS), m.path("../elsewhere")).unwrap();
            symlink("../elsewhere", m.path(WEIGHTS)).unwrap();
        },
    },
    Fault {
        what: "a symlink to itself",
        of: QWEN3,
        exit: 74,
        says: &[WEIGHTS],
        make: |m| {
            fs::remove_file(m.path(WEIGHTS)).unwrap();
            symlink(WEIGHTS, m.path(WEIGHTS)).unwrap();
        },
    },
    Fault {
        what: "a dangling symlink",
        of: QWEN3,
        exit: 66,
        says: &[WEIGHTS],
        make: |m| {
            fs::remove_file(m.path(WEIGHTS)).unwrap();
            symlink("blob-that-is-gone", m.path(WEIGHTS)).unwrap();
        },
    },
    Fault {
        what: "no checkpoint",
        of: QWEN3,
        exit: 66,
        says: &["model"],
        make: |m| fs::remove_dir_all(&m.dir).unwrap(),
    },
];
