//! The one error type of the project: what was found and expected, where, and what to do.
//!
//! Inner code knows *what*; callers add *where* on the way up (`in_file`, `in_tensor`, `at_byte`); only the
//! binary prints. The kind decides the exit code, so that a script can tell "never retry" from "try again".

use std::fmt;
use std::path::{Path, PathBuf};

/// Result of everything that can fail in moepack.
pub type Result<T> = std::result::Result<T, Error>;

/// What sort of failure it is, and so which exit code the process ends with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A gate or an integrity check did not hold.
    Finding,
    /// The command line makes no sense.
    Usage,
    /// Input data is wrong; the same input never works.
    BadData,
    /// An input file or directory is not there.
    Missing,
    /// The output cannot be created.
    CannotCreate,
    /// Reading or writing failed.
    Io,
    /// It may work later: no space, lock held, stopped by SIGTERM.
    Temporary,
    /// The operating system refuses access.
    Permission,
    /// Recipe or plan is impossible.
    Plan,
    /// Stopped by the user.
    Interrupted,
}

impl Kind {
    /// The process exit code of this kind.
    pub const fn exit_code(self) -> u8 {
        match self {
            Kind::Finding => 1,
            Kind::Usage => 2,
            Kind::BadData => 65,
            Kind::Missing => 66,
            Kind::CannotCreate => 73,
            Kind::Io => 74,
            Kind::Temporary => 75,
            Kind::Permission => 77,
            Kind::Plan => 78,
            Kind::Interrupted => 130,
        }
    }

    /// What usually helps, for an error that has nothing better to say.
    pub const fn usual_hint(self) -> Option<&'static str> {
        match self {
            Kind::Finding | Kind::Interrupted => None,
            Kind::Usage => Some("the command's --help has examples"),
            Kind::BadData => Some(
                "the file is damaged, or not what it is taken for; fetch or make it again, and compare its sha256",
            ),
            Kind::Missing => Some("check the path"),
            Kind::CannotCreate => Some("choose another place for the output"),
            Kind::Io => Some("look at the disk and at the system's log, then run the same command again"),
            Kind::Temporary => Some("run the same command again later"),
            Kind::Permission => Some("look at the owner and the mode of that file and its directory"),
            Kind::Plan => Some("change the recipe or the limit; `moepack plan` shows what one takes"),
        }
    }
}

/// What went wrong, where, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Error {
    kind: Kind,
    detail: Box<Detail>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Detail {
    what: String,
    file: Option<PathBuf>,
    tensor: Option<String>,
    byte: Option<u64>,
    hint: Option<String>,
}

impl Error {
    /// An error of this kind; `what` says what was found and what was expected.
    pub fn new(kind: Kind, what: impl Into<String>) -> Self {
        Error { kind, detail: Box::new(Detail { what: what.into(), ..Detail::default() }) }
    }

    /// Input data is wrong (exit code 65).
    pub fn bad_data(what: impl Into<String>) -> Self {
        Error::new(Kind::BadData, what)
    }

    /// An input is not there (exit code 66).
    pub fn missing(what: impl Into<String>) -> Self {
        Error::new(Kind::Missing, what)
    }

    /// The command line makes no sense (exit code 2).
    pub fn usage(what: impl Into<String>) -> Self {
        Error::new(Kind::Usage, what)
    }

    /// Recipe or plan is impossible (exit code 78).
    pub fn plan(what: impl Into<String>) -> Self {
        Error::new(Kind::Plan, what)
    }

    /// An operating system error while `doing` something ("read", "create", "fsync" …) with `path`.
    pub fn io(error: &std::io::Error, doing: &str, path: &Path) -> Self {
        use std::io::ErrorKind as E;
        let kind = match error.kind() {
            E::NotFound | E::NotADirectory => Kind::Missing,
            E::PermissionDenied => Kind::Permission,
            E::StorageFull | E::QuotaExceeded | E::FileTooLarge => Kind::Temporary,
            E::ReadOnlyFilesystem | E::AlreadyExists => Kind::CannotCreate,
            _ => Kind::Io,
        };
        let new = Error::new(kind, format!("cannot {doing}: {error}")).in_file(path);
        match error.kind() {
            E::FileTooLarge => new
                .hint("this file system or `ulimit -f` allows no larger file; raise that or write elsewhere"),
            _ if kind == Kind::Temporary => new.hint("free some space and run the same command again"),
            _ => new,
        }
    }

    /// As [`Error::io`] for something that is being written: a missing or unsuitable directory means that the output
    /// cannot be created, not that input is missing.
    pub fn output(error: &std::io::Error, doing: &str, path: &Path) -> Self {
        use std::io::ErrorKind as E;
        let mut new = Error::io(error, doing, path);
        let unsuitable = matches!(error.kind(), E::IsADirectory | E::InvalidFilename);
        if new.kind == Kind::Missing || unsuitable {
            new.kind = Kind::CannotCreate;
        }
        new
    }

    /// Names the file, unless an inner caller already did.
    pub fn in_file(mut self, path: impl AsRef<Path>) -> Self {
        self.detail.file.get_or_insert_with(|| path.as_ref().to_path_buf());
        self
    }

    /// Names the tensor or record, unless an inner caller already did.
    pub fn in_tensor(mut self, name: impl Into<String>) -> Self {
        self.detail.tensor.get_or_insert_with(|| name.into());
        self
    }

    /// Gives the byte offset in the file, unless an inner caller already did.
    pub fn at_byte(mut self, offset: u64) -> Self {
        self.detail.byte.get_or_insert(offset);
        self
    }

    /// Says what to do, unless an inner caller already did.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.detail.hint.get_or_insert_with(|| hint.into());
        self
    }

    /// The kind, and with it the exit code.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// What to do, as said so far.
    pub fn hint_text(&self) -> Option<&str> {
        self.detail.hint.as_deref()
    }

    /// What was found and expected, without place and hint.
    pub fn what(&self) -> &str {
        &self.detail.what
    }

    /// The file named so far.
    pub fn file(&self) -> Option<&Path> {
        self.detail.file.as_deref()
    }

    /// The tensor or record named so far.
    pub fn tensor(&self) -> Option<&str> {
        self.detail.tensor.as_deref()
    }

    /// The byte offset named so far.
    pub fn byte(&self) -> Option<u64> {
        self.detail.byte
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let d = &self.detail;
        f.write_str(&printable(&d.what))?;
        let mut place = Vec::new();
        place.extend(d.file.as_ref().map(|p| printable(&p.to_string_lossy())));
        place.extend(d.tensor.as_ref().map(|t| format!("tensor {}", printable(t))));
        place.extend(d.byte.map(|b| format!("byte {b}")));
        if !place.is_empty() {
            write!(f, "\n  in {}", place.join(", "))?;
        }
        match &d.hint {
            Some(hint) => write!(f, "\n  hint: {}", printable(hint)),
            None => Ok(()),
        }
    }
}

/// Text that is safe on a terminal: control characters and bidirectional overrides are escaped, and what a
/// stranger made endless is cut.
pub fn printable(text: &str) -> String {
    const CHARS_MAX: usize = 2000;
    let risky = |c: char| {
        (c.is_control() && c != '\n')
            || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{200e}' | '\u{200f}')
    };
    let mut out = String::new();
    for (n, c) in text.chars().enumerate() {
        if n == CHARS_MAX {
            out.push('…');
            break;
        }
        if risky(c) { out.extend(c.escape_unicode()) } else { out.push(c) }
    }
    out
}

/// Adds the place to an error on its way up.
pub trait Context<T> {
    /// Names the file.
    fn in_file(self, path: impl AsRef<Path>) -> Result<T>;
    /// Names the tensor or record.
    fn in_tensor(self, name: &str) -> Result<T>;
    /// Gives the byte offset in the file.
    fn at_byte(self, offset: u64) -> Result<T>;
}

impl<T> Context<T> for Result<T> {
    fn in_file(self, path: impl AsRef<Path>) -> Result<T> {
        self.map_err(|e| e.in_file(path))
    }
    fn in_tensor(self, name: &str) -> Result<T> {
        self.map_err(|e| e.in_tensor(name))
    }
    fn at_byte(self, offset: u64) -> Result<T> {
        self.map_err(|e| e.at_byte(offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_says_what_where_and_what_to_do() {
        let e = Error::bad_data("524288 bytes, but shape [128, 4096] of bf16 takes 1048576")
            .in_file("model-00003.safetensors")
            .in_tensor("layers.7.mlp.gate")
            .at_byte(8841216)
            .hint("the download may be cut short; compare its sha256");
        let text = "524288 bytes, but shape [128, 4096] of bf16 takes 1048576\n  \
                    in model-00003.safetensors, tensor layers.7.mlp.gate, byte 8841216\n  \
                    hint: the download may be cut short; compare its sha256";
        assert_eq!(e.to_string(), text);
        assert_eq!(e.kind().exit_code(), 65);
    }

    #[test]
    fn the_inner_place_wins() {
        let e = Error::bad_data("x").in_file("inner").in_file("outer");
        assert_eq!(e.file(), Some(Path::new("inner")));
    }

    #[test]
    fn a_name_cannot_write_to_the_terminal() {
        assert_eq!(printable("a\u{1b}[31mb\u{202e}"), "a\\u{1b}[31mb\\u{202e}");
    }
}
