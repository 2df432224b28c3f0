//! Faults on purpose, for tests: the n-th call on a file fails, tears or is the last thing the process does.
//!
//! In a debug build the environment variable `MOEPACK_FAULT` names one: `CALL:N:WHAT`, where CALL is `any` or a kind of call
//! (`open`, `create`, `read`, `write`, `sync`, `stat`, `list`, `remove`, `rename`, `lock`, `change` for all that change something), N
//! counts such calls from 1 (`N+`: that and every later one), and WHAT is
//!
//! - `eio`, `enospc`, `edquot`, `efbig`, `erofs`, `eacces`, `emfile`, `enolck`: the call fails with this error and does nothing;
//! - `torn-enospc` and so on: a write writes half of its bytes and then fails;
//! - `kill`: the process gets SIGKILL instead of the call; `killed-after`: right after it; `torn-kill`: with half of a
//!   write done.
//!
//! A release build has none of this.

use std::io;

/// A kind of call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Call {
    Open,
    Create,
    Read,
    Write,
    Sync,
    Stat,
    List,
    Remove,
    Rename,
    Lock,
}

/// What happens at a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(debug_assertions), allow(dead_code, reason = "release builds have no faults"))]
pub(super) enum Verdict {
    /// Nothing special.
    Go,
    /// It fails.
    Fail(End),
    /// It succeeds, and then this happens.
    After(End),
    /// Half of what is to be written is, and then this happens.
    Torn(End),
}

/// How a call ends that does not go well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(debug_assertions), allow(dead_code, reason = "release builds have no faults"))]
pub(super) enum End {
    /// With this error of the operating system.
    Errno(rustix::io::Errno),
    /// With the process.
    Kill,
}

impl Verdict {
    /// Makes it happen; a call that was to tear and cannot fails whole.
    pub(super) fn happen<T>(self) -> io::Result<T> {
        match self {
            Verdict::Fail(end) | Verdict::After(end) | Verdict::Torn(end) => end.happen(),
            Verdict::Go => Err(io::ErrorKind::Other.into()),
        }
    }
}

impl End {
    /// Makes it happen.
    pub(super) fn happen<T>(self) -> io::Result<T> {
        match self {
            End::Errno(errno) => Err(errno.into()),
            End::Kill => die(),
        }
    }
}

/// What is to happen at this call.
#[cfg(not(debug_assertions))]
pub(super) fn at(_: Call) -> Verdict {
    Verdict::Go
}

#[cfg(not(debug_assertions))]
fn die<T>() -> io::Result<T> {
    Err(io::ErrorKind::Other.into())
}

#[cfg(debug_assertions)]
pub(super) use active::at;
#[cfg(debug_assertions)]
use active::die;

#[cfg(debug_assertions)]
mod active {
    use std::io;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    use rustix::io::Errno;
    use rustix::process::{Signal, getpid, kill_process};

    use super::{Call, End, Verdict};

    const VARIABLE: &str = "MOEPACK_FAULT";

    /// The fault that the environment names.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Fault {
        of: Which,
        n: u64,
        and_later: bool,
        verdict: Verdict,
    }

    /// Calls that count.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Which {
        Any,
        Change,
        Only(Call),
    }

    impl Which {
        fn has(self, call: Call) -> bool {
            match self {
                Which::Any => true,
                Which::Change => !matches!(call, Call::Open | Call::Read | Call::Stat | Call::List),
                Which::Only(kind) => kind == call,
            }
        }
    }

    /// What is to happen at this call.
    pub(in super::super) fn at(call: Call) -> Verdict {
        static FAULT: OnceLock<Option<Fault>> = OnceLock::new();
        static SEEN: AtomicU64 = AtomicU64::new(0);
        let named = || std::env::var(VARIABLE).ok().map(|text| parse(&text));
        match FAULT.get_or_init(named) {
            Some(fault) if fault.of.has(call) => {
                let n = SEEN.fetch_add(1, Ordering::Relaxed).saturating_add(1);
                let is_now = n == fault.n || fault.and_later && n > fault.n;
                if is_now { happens(fault.verdict, call, n) } else { Verdict::Go }
            }
            _ => Verdict::Go,
        }
    }

    /// Tells the test that its fault was met.
    fn happens(verdict: Verdict, call: Call, n: u64) -> Verdict {
        eprintln!("{VARIABLE}: {verdict:?} at {call:?}, call {n}");
        verdict
    }

    pub(super) fn die<T>() -> io::Result<T> {
        kill_process(getpid(), Signal::KILL)?;
        // The signal may take a moment to arrive; nothing may happen in it.
        loop {
            std::thread::sleep(std::time::Duration::from_secs(1));
        }
    }

    /// What a test wrote; a spelling that is none ends the test loudly.
    fn parse(text: &str) -> Fault {
        let fault = try_parse(text);
        #[allow(clippy::panic, reason = "only a test's own mistake comes here, in debug builds")]
        fault.unwrap_or_else(|| panic!("{VARIABLE} is {text:?}, expected CALL:N:WHAT"))
    }

    fn try_parse(text: &str) -> Option<Fault> {
        let mut fields = text.split(':');
        let (of, n, what) = (fields.next()?, fields.next()?, fields.next()?);
        let (number, and_later) = n.strip_suffix('+').map_or((n, false), |number| (number, true));
        let verdict = match what.strip_prefix("torn-") {
            Some(end) => Verdict::Torn(end_of(end)?),
            None if what == "killed-after" => Verdict::After(End::Kill),
            None => Verdict::Fail(end_of(what)?),
        };
        Some(Fault { of: which(of)?, n: number.parse().ok()?, and_later, verdict })
    }

    fn which(name: &str) -> Option<Which> {
        Some(match name {
            "any" => Which::Any,
            "change" => Which::Change,
            "open" => Which::Only(Call::Open),
            "create" => Which::Only(Call::Create),
            "read" => Which::Only(Call::Read),
            "write" => Which::Only(Call::Write),
            "sync" => Which::Only(Call::Sync),
            "stat" => Which::Only(Call::Stat),
            "list" => Which::Only(Call::List),
            "remove" => Which::Only(Call::Remove),
            "rename" => Which::Only(Call::Rename),
            "lock" => Which::Only(Call::Lock),
            _ => return None,
        })
    }

    fn end_of(name: &str) -> Option<End> {
        Some(End::Errno(match name {
            "eio" => Errno::IO,
            "enospc" => Errno::NOSPC,
            "edquot" => Errno::DQUOT,
            "efbig" => Errno::FBIG,
            "erofs" => Errno::ROFS,
            "eacces" => Errno::ACCESS,
            "emfile" => Errno::MFILE,
            "enolck" => Errno::NOLCK,
            "kill" => return Some(End::Kill),
            _ => return None,
        }))
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn a_fault_is_named_by_call_number_and_what_happens() {
            let verdict = Verdict::Torn(End::Errno(Errno::NOSPC));
            let of = Which::Only(Call::Write);
            let expected = Fault { of, n: 7, and_later: true, verdict };
            assert_eq!(try_parse("write:7+:torn-enospc"), Some(expected));
            let expected =
                Fault { of: Which::Any, n: 1, and_later: false, verdict: Verdict::After(End::Kill) };
            assert_eq!(try_parse("any:1:killed-after"), Some(expected));
            for wrong in ["", "write:1", "write:x:eio", "write:1:ouch", "paint:1:eio"] {
                assert_eq!(try_parse(wrong), None, "{wrong}");
            }
        }

        #[test]
        fn reading_changes_nothing() {
            assert!(!Which::Change.has(Call::Read) && Which::Change.has(Call::Rename));
        }
    }
}
