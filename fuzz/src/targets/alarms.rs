//! Readers that fail on purpose: whoever looks for faults must find these.

use std::time::{Duration, Instant};

use moepack_format::Result;

use super::{Ready, Target, target};
use crate::corpus::Seed;
use crate::mutate::Shape;

/// One for each verdict; they are no part of a run of all targets.
pub const ALARMS: &[Target] = &[
    target("alarm_panic", Shape::Bytes, 1, |_| alarm(panics), "panics"),
    target("alarm_hang", Shape::Bytes, 1, |_| alarm(hangs), "does not end"),
    target("alarm_memory", Shape::Bytes, 1, |_| alarm(allocates), "allocates what a file says"),
    target("alarm_crash", Shape::Bytes, 1, |_| alarm(recurses), "recurses until the stack ends"),
];

/// The input of a run that they fail on.
const LENGTH: usize = 1000;

fn alarm(fail: fn()) -> Result<Ready> {
    let seeds = vec![Seed::new("short", [1; LENGTH]), Seed::new("long", [2; LENGTH + 1])];
    Ready::new(seeds, move |_, bytes| {
        if bytes.len() > LENGTH {
            fail();
        }
        Ok(())
    })
}

#[allow(clippy::panic, reason = "this is what it is for")]
fn panics() {
    panic!("an alarm");
}

fn hangs() {
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(60) {
        std::hint::spin_loop();
    }
}

fn allocates() {
    std::hint::black_box(vec![1_u8; (1 << 30) + (1 << 20)]);
}

fn recurses() {
    fn deeper(n: u64) -> u64 {
        let here = std::hint::black_box([n; 64]);
        if n == u64::MAX { n } else { deeper(n + 1) + here[0] }
    }
    std::hint::black_box(deeper(0));
}
