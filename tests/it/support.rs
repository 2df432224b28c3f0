//! What the tests share: the binary, the fixtures, a directory to work in.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

/// No command on a fixture takes longer; a hang is a failure with a name.
const TIMEOUT: Duration = Duration::from_secs(120);

/// Address space a command may take, in KiB: an allocation from an unchecked number aborts instead of succeeding
/// lazily.
const ADDRESS_SPACE_KIB: u64 = 6 << 20;

/// A path under `fixtures/`.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

/// What a run of the binary left behind.
pub struct Run {
    /// Exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// Runs `moepack ARGS` in `dir`.
pub fn moepack<S: AsRef<std::ffi::OsStr>>(dir: &Path, args: &[S]) -> Run {
    moepack_with(dir, &[], args)
}

/// Runs `moepack ARGS` in `dir`, and it exits with 0.
pub fn succeeds<S: AsRef<std::ffi::OsStr>>(dir: &Path, args: &[S]) -> Run {
    let run = moepack(dir, args);
    assert_eq!(run.code, Some(0), "{}{}", run.stdout, run.stderr);
    run
}

/// Runs `moepack ARGS` in `dir` with additions to the environment.
pub fn moepack_with<S: AsRef<std::ffi::OsStr>>(dir: &Path, environment: &[(&str, &str)], args: &[S]) -> Run {
    run(dir, environment, &format!("ulimit -v {ADDRESS_SPACE_KIB}"), args)
}

/// Runs `moepack ARGS` in `dir` as what a stranger made is to be refused: with 200 MiB of address space, so that resident
/// memory is less too, and two seconds of processor time, on two threads.
pub fn confined(dir: &Path, args: &[&str]) -> Run {
    let args = [args, &["--threads", "2"]].concat();
    let started = std::time::Instant::now();
    // Each arena of glibc reserves 64 MiB.
    let run = run(dir, &[("MALLOC_ARENA_MAX", "1")], "ulimit -v 204800 && ulimit -t 2", &args);
    // Waiting takes no processor time. Twenty seconds, because other tests run beside this one.
    assert!(started.elapsed() < Duration::from_secs(20), "{args:?} waited");
    run
}

fn run<S: AsRef<std::ffi::OsStr>>(dir: &Path, environment: &[(&str, &str)], limits: &str, args: &[S]) -> Run {
    let limited = format!("{limits} && exec \"$0\" \"$@\"");
    let mut command = assert_cmd::Command::new("sh");
    command
        .args(["-c", &limited, env!("CARGO_BIN_EXE_moepack")])
        .args(args)
        .current_dir(dir)
        .timeout(TIMEOUT);
    command.envs(environment.iter().copied());
    let Output { status, stdout, stderr } = command.output().expect("the binary starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("output is UTF-8");
    Run { code: status.code(), stdout: text(stdout), stderr: text(stderr) }
}

/// Relative paths of everything under `dir`, sorted; what a symlink points to is not entered.
pub fn listing(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![dir.to_path_buf()];
    while let Some(at) = open.pop() {
        for entry in std::fs::read_dir(at).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                open.push(entry.path());
            }
            found.push(entry.path().strip_prefix(dir).unwrap().to_path_buf());
        }
    }
    found.sort();
    found
}

/// Every file under `dir` with its bytes.
pub fn contents(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let files = listing(dir).into_iter().filter(|path| dir.join(path).is_file());
    files.map(|path| (path.clone(), std::fs::read(dir.join(&path)).unwrap())).collect()
}

/// Two directories hold the same files with the same bytes.
pub fn assert_same(a: &Path, b: &Path, what: &str) {
    let (a, b) = (contents(a), contents(b));
    assert!(!a.is_empty(), "nothing to compare");
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>(), "{what}: other files");
    for (path, bytes) in &a {
        let differs = bytes.iter().zip(&b[path]).position(|(x, y)| x != y);
        assert_eq!(differs, None, "{what}: {} differs at this byte", path.display());
        assert_eq!(bytes.len(), b[path].len(), "{what}: length of {}", path.display());
    }
}

/// The beginning of a fixture's text, up to a whole line.
pub fn text(dir: &Path, of: &str, bytes_max: usize) -> PathBuf {
    let text = std::fs::read_to_string(fixture("text").join(of)).unwrap();
    let end = text.floor_char_boundary(bytes_max);
    let path = dir.join(of);
    std::fs::write(&path, &text[..=text[..end].rfind('\n').unwrap()]).unwrap();
    path
}
