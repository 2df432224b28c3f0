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
        what: "a sparse file, as long as the file system has them",
        of: QWEN3,
        exit: 65,
        says: &["bytes behind the last tensor", WEIGHTS],
        make: |m| {
            let file = fs::File::options().write(true).open(m.path(WEIGHTS)).unwrap();
            // An exbibyte, where that is possible.
            let longest = (40..=60).rev().find(|bits| file.set_len(1 << bits).is_ok());
            assert!(longest.is_some(), "no file of a tebibyte can be made");
        },
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
        what: "a FIFO in place of config.json",
        of: QWEN3,
        exit: 65,
        says: &["a FIFO, expected a regular file", "config.json"],
        make: |m| {
            fs::remove_file(m.path("config.json")).unwrap();
            let made = std::process::Command::new("mkfifo").arg(m.path("config.json")).status().unwrap();
            assert!(made.success());
        },
    },
    Fault {
        what: "a config.json of a gibibyte",
        of: QWEN3,
        exit: 65,
        says: &["1073741824 bytes, expected at most", "config.json"],
        make: |m| fs::File::create(m.path("config.json")).unwrap().set_len(1 << 30).unwrap(),
    },
    Fault {
        what: "a file name that is not UTF-8",
        of: QWEN3,
        exit: 65,
        says: &["a weight file's name is not UTF-8"],
        make: |m| {
            let name = std::os::unix::ffi::OsStringExt::from_vec(b"m\xff.safetensors".to_vec());
            fs::copy(m.path(WEIGHTS), m.dir.join::<std::ffi::OsString>(name)).map(drop).unwrap();
        },
    },
    Fault {
        what: "a config.json that is a symlink out of the checkpoint",
        of: QWEN3,
        exit: 65,
        says: &["config.json", "symlink"],
        make: |m| {
            fs::rename(m.path("config.json"), m.path("../elsewhere")).unwrap();
            symlink("../elsewhere", m.path("config.json")).unwrap();
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
