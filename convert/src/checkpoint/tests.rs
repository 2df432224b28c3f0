//! Files, indexes and directories that are not what they should be, each with its exact complaint.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use moepack_format::{Error, Kind};
use serde_json::{Value, json};

use super::*;
use crate::testing::{TestCheckpoint, safetensors, tensor, write_index};

const FIRST: &str = "model-00001-of-00002.safetensors";
const SECOND: &str = "model-00002-of-00002.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// What is wrong, the exit code, the complaint, the file it names, and what makes it of two sound shards.
struct Fault {
    what: &'static str,
    exit: u8,
    says: &'static str,
    file: &'static str,
    make: fn(&Path),
}

const FAULTS: &[Fault] = &[
    Fault {
        what: "both shards missing",
        exit: 66,
        says: "2 of 2 weight files are missing:\n    model-00001-of-00002.safetensors\n    \
               model-00002-of-00002.safetensors",
        file: "",
        make: |dir| {
            fs::remove_file(dir.join(FIRST)).unwrap();
            fs::remove_file(dir.join(SECOND)).unwrap();
        },
    },
    Fault {
        what: "wrong file in the index",
        exit: 65,
        says: "the index is wrong about 1 tensors:\n    lm_head.weight is in model-00002-of-00002.safetensors, not in \
               model-00001-of-00002.safetensors",
        file: INDEX,
        make: |dir| edit(dir, |index| index["weight_map"]["lm_head.weight"] = json!(FIRST)),
    },
    Fault {
        what: "ghost in the index",
        exit: 65,
        says: "the index is wrong about 1 tensors:\n    ghost is not in model-00001-of-00002.safetensors, nor in any \
               other file",
        file: INDEX,
        make: |dir| edit(dir, |index| index["weight_map"]["ghost"] = json!(FIRST)),
    },
    Fault {
        what: "tensor in two shards",
        exit: 65,
        says: "this tensor is also in model-00001-of-00002.safetensors",
        file: SECOND,
        make: |dir| {
            let twice = tensor("model.embed_tokens.weight", Dtype::Bf16, &[10, 8]);
            fs::write(dir.join(SECOND), safetensors(&[twice])).unwrap();
        },
    },
    Fault {
        what: "directory for a shard",
        exit: 65,
        says: "a directory, expected a regular file",
        file: SECOND,
        make: |dir| {
            fs::remove_file(dir.join(SECOND)).unwrap();
            fs::create_dir(dir.join(SECOND)).unwrap();
        },
    },
    Fault {
        what: "pickle under another name",
        exit: 65,
        says: "header length 144115188143180624, expected at most 100000000",
        file: SECOND,
        make: |dir| fs::write(dir.join(SECOND), b"PK\x03\x04\x00\x00\x00\x02 and much more").unwrap(),
    },
    Fault {
        what: "pickles only",
        exit: 65,
        says: "only PyTorch pickles, which can run code when they are read",
        file: "pytorch_model.bin",
        make: |dir| {
            clear(dir);
            fs::write(dir.join("pytorch_model.bin"), b"PK").unwrap();
        },
    },
    Fault {
        what: "GGUF only",
        exit: 65,
        says: "a GGUF file, expected a checkpoint in safetensors files",
        file: "model.Q4_K_M.gguf",
        make: |dir| {
            clear(dir);
            fs::write(dir.join("model.Q4_K_M.gguf"), b"GGUF").unwrap();
        },
    },
    Fault { what: "nothing", exit: 66, says: "no weights: no .safetensors file here", file: "", make: clear },
    Fault {
        what: "no tensor at all",
        exit: 66,
        says: "no weights: the safetensors files hold no tensor",
        file: "",
        make: |dir| {
            clear(dir);
            fs::write(dir.join("model.safetensors"), safetensors(&[])).unwrap();
        },
    },
    Fault {
        what: "empty index",
        exit: 66,
        says: "no weights: weight_map is empty",
        file: INDEX,
        make: |dir| write_index(dir, &json!({ "weight_map": {} })),
    },
    Fault {
        what: "index without a map",
        exit: 65,
        says: "weight_map is missing or no object",
        file: INDEX,
        make: |dir| write_index(dir, &json!({ "weight_map": [] })),
    },
    Fault {
        what: "index to a pickle",
        exit: 65,
        says: "\"pytorch_model.bin\" is no .safetensors file",
        file: INDEX,
        make: |dir| write_index(dir, &json!({ "weight_map": { "a": "pytorch_model.bin" } })),
    },
    Fault {
        what: "LFS pointer for an index",
        exit: 66,
        says: "a Git LFS pointer, expected the file it stands for",
        file: INDEX,
        make: |dir| {
            fs::write(dir.join(INDEX), "version https://git-lfs.github.com/spec/v1\noid sha256:0\n").unwrap()
        },
    },
    Fault {
        what: "symlink out",
        exit: 65,
        says: "a symlink to /dev/null, outside the checkpoint",
        file: SECOND,
        make: |dir| {
            fs::remove_file(dir.join(SECOND)).unwrap();
            symlink("/dev/null", dir.join(SECOND)).unwrap();
        },
    },
];

#[test]
fn each_fault_has_its_own_complaint() {
    for fault in FAULTS {
        let temp = tempfile::tempdir().unwrap();
        let dir = TestCheckpoint::qwen3().write_shards(&temp.path().join("model"), 2);
        (fault.make)(&dir);
        let e = Checkpoint::open(&dir).map(|_| ()).unwrap_err();
        assert_eq!(e.what(), fault.says, "{}", fault.what);
        assert_eq!(e.kind().exit_code(), fault.exit, "{}", fault.what);
        assert_eq!(e.file(), Some(&*dir.join(fault.file)), "{}", fault.what);
        assert!(e.to_string().contains("hint: ") || fault.exit == 65 || fault.what == "empty index", "{e}");
    }
}

#[test]
fn a_name_in_the_index_stays_inside() {
    let names = [
        "../x.safetensors",
        "/etc/passwd",
        "a/../../b",
        "a/b.safetensors",
        "C:\\x",
        "a\\b",
        "x\0y",
        "..",
        ".",
        "",
        "a/",
    ];
    for name in names {
        let temp = tempfile::tempdir().unwrap();
        let dir = TestCheckpoint::qwen3().write_shards(&temp.path().join("model"), 2);
        edit(&dir, |index| index["weight_map"]["lm_head.weight"] = json!(name));
        let e = Checkpoint::open(&dir).map(|_| ()).unwrap_err();
        assert_eq!(e.what(), format!("{name:?} is no plain file name"));
        assert_eq!((e.kind(), e.tensor()), (Kind::BadData, Some("lm_head.weight")), "{name:?}");
    }
}

#[test]
fn what_is_only_odd_is_a_warning() {
    let temp = tempfile::tempdir().unwrap();
    let model = TestCheckpoint::qwen3();
    let warnings = |dir: &Path| Checkpoint::open(dir).unwrap().warnings().to_vec();
    let dir = model.write_shards(&temp.path().join("a"), 2);
    assert_eq!(warnings(&dir), Vec::<String>::new());

    fs::write(dir.join("mtp.safetensors"), "not even read").unwrap();
    assert_eq!(
        warnings(&dir),
        ["1 weight files are not in the index and are not read:\n    mtp.safetensors"]
    );

    fs::remove_file(dir.join("mtp.safetensors")).unwrap();
    edit(&dir, |index| drop(index["weight_map"].as_object_mut().unwrap().shift_remove("lm_head.weight")));
    assert_eq!(warnings(&dir), ["1 tensors are in the shards but not in the index:\n    lm_head.weight"]);

    fs::remove_file(dir.join(INDEX)).unwrap();
    assert_eq!(warnings(&dir), ["no model.safetensors.index.json: took the tensors of all 2 weight files"]);
    assert_eq!(Checkpoint::open(&dir).unwrap().tensors().len(), model.tensors.len());

    let dir = model.write(&temp.path().join("b"));
    fs::write(dir.join("consolidated.safetensors"), "").unwrap();
    assert_eq!(
        warnings(&dir),
        ["1 weight files beside model.safetensors are not read:\n    consolidated.safetensors"]
    );
}

#[test]
fn a_cache_directory_is_its_current_snapshot() {
    let temp = tempfile::tempdir().unwrap();
    let files = TestCheckpoint::qwen3().write(&temp.path().join("files"));
    let cache = temp.path().join("models--org--name");
    for revision in ["abc", "def"] {
        let snapshot = cache.join("snapshots").join(revision);
        fs::create_dir_all(&snapshot).unwrap();
        fs::create_dir_all(cache.join("blobs")).unwrap();
        for name in ["config.json", "model.safetensors"] {
            fs::copy(files.join(name), cache.join("blobs").join(name)).unwrap();
            symlink(Path::new("../../blobs").join(name), snapshot.join(name)).unwrap();
        }
    }
    let refusal = |path: &Path| Checkpoint::open(path).map(|_| ()).unwrap_err();
    let e = refusal(&cache);
    assert_eq!((e.what(), e.kind()), ("2 snapshots and no refs/main that says which", Kind::Missing));
    fs::create_dir(cache.join("refs")).unwrap();
    fs::write(cache.join("refs/main"), "def\n").unwrap();
    assert_eq!(Checkpoint::open(&cache).unwrap().place().root(), cache.join("snapshots/def"));
    assert_eq!(Checkpoint::open(&cache.join("snapshots/abc")).unwrap().files().len(), 1);
    fs::write(cache.join("refs/main"), "123").unwrap();
    assert_eq!(refusal(&cache).what(), "refs/main names revision 123, whose snapshot is not there");
    fs::write(cache.join("refs/main"), "../../files").unwrap();
    assert_eq!(refusal(&cache).what(), "\"../../files\" is no plain file name");
    // A link to another repository's blobs is a way out.
    fs::remove_file(cache.join("snapshots/abc/model.safetensors")).unwrap();
    symlink(files.join("model.safetensors"), cache.join("snapshots/abc/model.safetensors")).unwrap();
    assert!(refusal(&cache.join("snapshots/abc")).what().ends_with("outside the checkpoint"));
}

#[test]
fn a_path_that_is_no_directory_is_explained() {
    let temp = tempfile::tempdir().unwrap();
    let dir = TestCheckpoint::qwen3().write(&temp.path().join("model"));
    let refusal = |path: &Path| -> Error { Checkpoint::open(path).map(|_| ()).unwrap_err() };
    assert_eq!(
        refusal(&dir.join("model.safetensors")).what(),
        "a file, expected the directory of a checkpoint"
    );
    assert_eq!(refusal(&dir.join("nowhere")).kind(), Kind::Missing);
}

#[test]
fn tensors_are_read_where_they_are() {
    let temp = tempfile::tempdir().unwrap();
    let model = TestCheckpoint::qwen3();
    let dir = model.write_shards(&temp.path().join("model"), 40);
    let checkpoint = Checkpoint::open(&dir).unwrap();
    assert!(checkpoint.files().len() > OPEN_FILES_MAX);
    for t in model.tensors.iter().chain(model.tensors.iter().rev()) {
        let found = &checkpoint.tensors()[checkpoint.find(&t.name).unwrap()];
        assert_eq!((&*found.shape, found.dtype), (&t.shape[..], t.dtype), "{}", t.name);
        assert_eq!(checkpoint.bytes(found).unwrap(), t.bytes, "{}", t.name);
        let mut two = [0; 2];
        checkpoint.read(found, 2, &mut two).unwrap();
        assert_eq!(two, t.bytes[2..4], "{}", t.name);
        assert!(checkpoint.read(found, found.bytes() - 1, &mut two).is_err());
        assert!(checkpoint.read(found, u64::MAX, &mut two).is_err());
    }
    assert_eq!(checkpoint.find("model.norm"), None);
}

#[test]
fn a_source_that_changes_is_noticed() {
    let temp = tempfile::tempdir().unwrap();
    let dir = TestCheckpoint::qwen3().write(&temp.path().join("model"));
    let checkpoint = Checkpoint::open(&dir).unwrap();
    checkpoint.check_unchanged().unwrap();
    let path = dir.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    let (was, is) = (bytes.len(), bytes.len() - 1);
    let says = format!("the source changed while it was being read: it had {was} bytes, has {is}");
    assert_eq!(checkpoint.check_unchanged().unwrap_err().what(), says);
    // A file that was not open yet is compared when it is opened.
    let e = checkpoint.bytes(&checkpoint.tensors()[0]).unwrap_err();
    assert_eq!((e.what(), e.kind()), (&*says, Kind::BadData));
}

#[test]
fn more_than_any_memory_is_refused() {
    let e = zeroed::<u32>(1 << 60).unwrap_err();
    assert_eq!((e.what(), e.kind()), ("4611686018427387904 bytes of memory are not to be had", Kind::Plan));
    assert_eq!(zeroed::<u8>(3), Ok(vec![0; 3]));
}

#[test]
fn side_files_travel_and_code_does_not() {
    let temp = tempfile::tempdir().unwrap();
    let dir = TestCheckpoint::qwen3().write(&temp.path().join("model"));
    for name in ["tokenizer.json", "LICENSE.txt", "LICENSE.py", "modeling_x.py", "README.md", "notes.txt"] {
        fs::write(dir.join(name), "x").unwrap();
    }
    fs::create_dir(dir.join("merges.txt")).unwrap();
    let mut notes = Vec::new();
    let files = Place::find(&dir).unwrap().side_files(&mut notes).unwrap();
    let names: Vec<_> = files.iter().map(|f| f.name.as_str()).collect();
    assert_eq!(names, ["LICENSE.txt", "README.md", "config.json", "tokenizer.json"]);
    assert_eq!(notes, ["merges.txt is no regular file and is not copied"]);
    symlink("/etc/passwd", dir.join("vocab.json")).unwrap();
    let e = Place::find(&dir).unwrap().side_files(&mut notes).unwrap_err();
    assert_eq!(e.what(), "a symlink to /etc/passwd, outside the checkpoint");
}

/// Changes the index.
fn edit(dir: &Path, change: impl FnOnce(&mut Value)) {
    let mut index = serde_json::from_slice(&fs::read(dir.join(INDEX)).unwrap()).unwrap();
    change(&mut index);
    write_index(dir, &index);
}

/// Takes the weights away.
fn clear(dir: &Path) {
    for name in [FIRST, SECOND, INDEX] {
        fs::remove_file(dir.join(name)).unwrap();
    }
}
