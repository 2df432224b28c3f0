//! What the tests share: the binary, the fixtures, a directory to work in.

use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

/// No command on a fixture takes longer; a hang is a failure with a name.
const TIMEOUT: Duration = Duration::from_secs(120);

/// Address space a command may take, in KiB: an allocation from an unchecked number aborts instead of succeeding lazily.
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
    let limited = format!("ulimit -v {ADDRESS_SPACE_KIB} && exec \"$0\" \"$@\"");
    let mut command = assert_cmd::Command::new("sh");
    command
        .args(["-c", &limited, env!("CARGO_BIN_EXE_moepack")])
        .args(args)
        .current_dir(dir)
        .timeout(TIMEOUT);
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
