//! A model as its file or files: one, or `NAME-00001-of-0000N.gguf` … as llama.cpp's gguf-split names them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use moepack_format::{Error, InputFile, Result, storage};

use super::read::Gguf;
use super::value::Value;
use super::{MAGIC, TENSORS_MAX};
use crate::limits::LISTED_MAX;

/// Outlines of all files of the model that `path` belongs to, in order.
///
/// # Errors
/// As [`Gguf::open`]; `Missing` with the list of files that are not there; files whose names, numbers or tensors do not fit
/// together.
pub fn open_all(path: &Path) -> Result<Vec<Gguf>> {
    let found = Gguf::outline(path)?;
    let Some(count) = number(&found, "split.count")?.filter(|&n| n > 1) else { return Ok(vec![found]) };
    let Some(names) = names(path, count) else {
        let what = format!("split.count is {count}, but the name is not NAME-00001-of-{count:05}.gguf");
        return Err(Error::bad_data(what)
            .in_file(path)
            .hint("give the files of a split model the names that they were made with"));
    };
    refuse_missing(&names)?;
    let mut files = Vec::new();
    for (nth, name) in names.iter().enumerate() {
        let file = Gguf::outline(name)?;
        check_number(&file, "split.no", nth as u64)?;
        check_number(&file, "split.count", count)?;
        files.push(file);
    }
    check_tensors(&files)?;
    Ok(files)
}

/// Whether a file begins as a GGUF file does. Directories and what cannot be read do not.
pub fn is_gguf(path: &Path) -> bool {
    let mut magic = [0; 4];
    let read = |file: InputFile| file.read_exact_at(0, &mut magic);
    storage::is_file(path) && InputFile::open(path).and_then(read).is_ok() && magic == MAGIC
}

/// The names of all files, told from one of them.
fn names(path: &Path, count: u64) -> Option<Vec<PathBuf>> {
    let stem = path.file_name()?.to_str()?.strip_suffix(&format!("-of-{count:05}.gguf"))?;
    let (name, nth) = stem.rsplit_once('-')?;
    let is_number = nth.len() == 5 && nth.bytes().all(|b| b.is_ascii_digit());
    let all = (1..=count).map(|n| path.with_file_name(format!("{name}-{n:05}-of-{count:05}.gguf")));
    is_number.then(|| all.collect())
}

fn refuse_missing(names: &[PathBuf]) -> Result<()> {
    let mut missing = Vec::new();
    for name in names {
        if !storage::exists(name)? {
            missing.push(name);
        }
    }
    let Some(first) = missing.first() else { return Ok(()) };
    let listed: Vec<String> =
        missing.iter().take(LISTED_MAX).map(|n| format!("\n    {}", n.display())).collect();
    let what = format!("{} of {} files are not there:{}", missing.len(), names.len(), listed.concat());
    Err(Error::missing(what).in_file(first).hint("fetch all files of the split model"))
}

/// A key that counts; `split.tensors.count` is signed.
fn number(file: &Gguf, key: &str) -> Result<Option<u64>> {
    let Some(value) = file.metadata.get(key) else { return Ok(None) };
    let count = match *value {
        Value::I32(n) => u64::try_from(n).ok(),
        Value::U16(n) => Some(n.into()),
        _ => None,
    };
    let wrong = || Error::bad_data(format!("key {key:?} is {value:?}, expected a 16-bit count"));
    count.filter(|&n| n <= u64::from(u16::MAX)).map(Some).ok_or_else(|| wrong().in_file(&file.path))
}

fn check_number(file: &Gguf, key: &str, expected: u64) -> Result<()> {
    let found = number(file, key)?;
    if found == Some(expected) {
        return Ok(());
    }
    let found = found.map_or("not there".to_owned(), |n| n.to_string());
    Err(Error::bad_data(format!("key {key:?} is {found}, expected {expected}"))
        .in_file(&file.path)
        .hint("the files are of different models, or were renamed"))
}

/// Each tensor is in one file, and there are as many as the files say.
fn check_tensors(files: &[Gguf]) -> Result<()> {
    let mut names = BTreeSet::new();
    for file in files {
        for (tensor, _) in &file.tensors {
            if !names.insert(&tensor.name) {
                let what = "a tensor that another file of the model has too";
                return Err(Error::bad_data(what).in_file(&file.path).in_tensor(&tensor.name));
            }
        }
        if names.len() as u64 > TENSORS_MAX {
            let what = format!("more than {TENSORS_MAX} tensors in all files together");
            return Err(Error::bad_data(what).in_file(&file.path));
        }
    }
    files.iter().try_for_each(|file| check_number(file, "split.tensors.count", names.len() as u64))
}

#[cfg(test)]
mod tests {
    use moepack_format::Kind;

    use super::*;
    use crate::gguf::file::write;
    use crate::gguf::types::Type;
    use crate::gguf::{TensorInfo, Value};

    fn split(dir: &Path, name: &str, n_tensors: usize) -> Vec<PathBuf> {
        let kind = Type::of_codec("f32").unwrap();
        let tensors: Vec<_> =
            (0..n_tensors).map(|i| TensorInfo { name: format!("t{i}"), dims: vec![8], kind }).collect();
        let keys = [("general.architecture".to_owned(), Value::String("x".to_owned()))];
        write(dir, name, &keys, &tensors, Some(32), |_, sink| sink(&[0; 32])).unwrap()
    }

    #[test]
    fn any_file_of_a_split_model_tells_of_all() {
        let dir = tempfile::tempdir().unwrap();
        let paths = split(dir.path(), "m", 3);
        for path in &paths {
            let files = open_all(path).unwrap();
            assert!(files.iter().map(|f| &f.path).eq(&paths) && is_gguf(path));
        }
        assert_eq!(open_all(&split(dir.path(), "one", 1)[0]).unwrap().len(), 1);
        assert!(!is_gguf(dir.path()) && !is_gguf(&dir.path().join("absent")));
    }

    #[test]
    fn files_that_do_not_belong_together_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let paths = split(dir.path(), "m", 3);
        let refused = |kind, what: &str| {
            let e = open_all(&paths[0]).unwrap_err();
            assert!(e.kind() == kind && e.what().contains(what), "{what}: {e}");
        };
        let (second, third) = (std::fs::read(&paths[1]).unwrap(), std::fs::read(&paths[2]).unwrap());
        std::fs::write(&paths[1], &third).unwrap();
        refused(Kind::BadData, "key \"split.no\" is 2, expected 1");
        let at = second.windows(2).position(|w| w == b"t1").unwrap();
        let mut twin = second.clone();
        twin[at + 1] = b'0';
        std::fs::write(&paths[1], twin).unwrap();
        refused(Kind::BadData, "a tensor that another file of the model has too");
        std::fs::remove_file(&paths[1]).unwrap();
        refused(Kind::Missing, "1 of 3 files are not there");
        let alone = dir.path().join("alone.gguf");
        std::fs::rename(&paths[0], &alone).unwrap();
        let e = open_all(&alone).unwrap_err();
        assert!(e.what().contains("the name is not NAME-00001-of-00003.gguf"), "{e}");
    }
}
