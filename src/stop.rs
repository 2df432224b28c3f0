//! Stopping on request: SIGINT, SIGTERM and SIGUSR1 set a flag that long work looks at between experts.
//!
//! Some steps are longer than a person waits: the tokenizer on a long text, a layer's attention. So a thread watches too:
//! what has not stopped by itself soon is ended, after its temporary files are removed. Nothing is lost by that, because a
//! run can be killed at any point.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use moepack_format::{Error, Kind, Result, atomic};
use signal_hook::iterator::Signals;

use crate::output::say;

/// How long a run may take to stop by itself.
const GRACE: Duration = Duration::from_millis(1200);

/// The flags that the signals set. Cheap to copy around.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    interrupted: Arc<AtomicBool>,
    terminated: Arc<AtomicBool>,
}

impl Stop {
    /// Registers for SIGINT, SIGTERM and SIGUSR1; a second signal of the same kind ends the process at once.
    ///
    /// # Errors
    /// The operating system refuses a handler.
    pub fn on_signals() -> Result<Stop> {
        let stop = Stop::default();
        use signal_hook::consts::{SIGABRT, SIGINT, SIGTERM, SIGUSR1, SIGXFSZ};
        let cannot = |signal| move |e| Error::new(Kind::Io, format!("cannot handle signal {signal}: {e}"));
        for (signal, flag, code) in [
            (SIGINT, &stop.interrupted, 130),
            (SIGTERM, &stop.terminated, 75),
            // What schedulers send some time before they kill.
            (SIGUSR1, &stop.terminated, 75),
        ] {
            // First registered, first run: the shutdown looks at the flag before this signal sets it.
            signal_hook::flag::register_conditional_shutdown(signal, code, flag.clone())
                .and_then(|_| signal_hook::flag::register(signal, flag.clone()))
                .map_err(cannot(signal))?;
        }
        // What cannot be allocated aborts; that is told by an exit code, not by a signal.
        signal_hook::flag::register_conditional_shutdown(SIGABRT, 75, Arc::new(AtomicBool::new(true)))
            .map_err(cannot(SIGABRT))?;
        // A file that outgrows `ulimit -f` is an error of that write, not the end of the process.
        signal_hook::flag::register(SIGXFSZ, Arc::default()).map_err(cannot(SIGXFSZ))?;
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGUSR1]).map_err(cannot(SIGINT))?;
        let watched = stop.clone();
        let watch = move || {
            // Waits without end for the first; the flags say which it is.
            if signals.forever().next().is_some() {
                watched.end_soon();
            }
        };
        std::thread::Builder::new().name("stop".into()).spawn(watch).map_err(cannot(SIGINT))?;
        Ok(stop)
    }

    /// Ends the process if it has not ended by itself after [`GRACE`].
    fn end_soon(&self) {
        std::thread::sleep(GRACE);
        if let Err(e) = self.check() {
            atomic::abandon_all();
            say(&format!("error: {e}"));
            std::process::exit(e.kind().exit_code().into());
        }
    }

    /// Whether to stop.
    pub fn requested(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed) || self.terminated.load(Ordering::Relaxed)
    }

    /// An error if a stop was requested: exit code 130 for SIGINT, 75 for SIGTERM.
    ///
    /// # Errors
    /// A stop was requested.
    pub fn check(&self) -> Result<()> {
        let stopped = |kind, by| {
            Err(Error::new(kind, format!("stopped by {by}")).hint("run the same command again to go on"))
        };
        match () {
            _ if self.interrupted.load(Ordering::Relaxed) => stopped(Kind::Interrupted, "SIGINT"),
            _ if self.terminated.load(Ordering::Relaxed) => stopped(Kind::Temporary, "SIGTERM or SIGUSR1"),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_signal_has_its_exit_code() {
        let stop = Stop::default();
        assert_eq!(stop.check(), Ok(()));
        stop.terminated.store(true, Ordering::Relaxed);
        assert_eq!(stop.check().unwrap_err().kind().exit_code(), 75);
        stop.interrupted.store(true, Ordering::Relaxed);
        assert_eq!(stop.check().unwrap_err().kind().exit_code(), 130);
    }
}
