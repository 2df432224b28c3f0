//! Noise: what a bad disk, a cut download or a careless attacker does.

use crate::random::Random;

use super::binary::INTERESTING;

/// One to eight random changes of bytes.
pub(super) fn noise(random: &mut Random, seed: &[u8], others: &[&[u8]]) -> Vec<u8> {
    let mut file = seed.to_vec();
    let n = 1 + random.below(8) * random.below(2);
    for _ in 0..n {
        once(random, &mut file, others);
    }
    file
}

fn once(random: &mut Random, file: &mut Vec<u8>, others: &[&[u8]]) {
    let at = place(random, file.len());
    match random.below(9) {
        0 | 1 => set(file, at, |b| b ^ (1 << (at % 8))),
        2 => {
            let new = random.number() as u8;
            set(file, at, |_| new);
        }
        3 => file.truncate(at),
        4 => {
            let n = 1 + random.below(16);
            let noise = random.bytes(n);
            let at = at.min(file.len());
            file.splice(at..at, noise);
        }
        5 => {
            let end = file.len().min(at + 1 + random.below(64));
            drop(file.drain(at.min(end)..end));
        }
        6 => number(random, file, at),
        7 => copy_within(random, file, at),
        _ => splice(random, file, at, others),
    }
}

/// Mostly near the beginning, where headers are.
fn place(random: &mut Random, len: usize) -> usize {
    let reach = match random.below(4) {
        0 => 16,
        1 => 512,
        2 => 4096,
        _ => len,
    };
    random.below(reach.min(len))
}

fn set(file: &mut [u8], at: usize, change: impl FnOnce(u8) -> u8) {
    if let Some(byte) = file.get_mut(at) {
        *byte = change(*byte);
    }
}

/// A number that lengths do not expect.
fn number(random: &mut Random, file: &mut [u8], at: usize) {
    let value = random.pick(&INTERESTING).copied().unwrap_or_default();
    let width = [1, 2, 4, 8][random.below(4)];
    for (byte, new) in file.iter_mut().skip(at).zip(value.to_le_bytes()).take(width) {
        *byte = new;
    }
}

fn copy_within(random: &mut Random, file: &mut [u8], at: usize) {
    let n = random.below(64).min(file.len() - at.min(file.len()));
    let to = random.below(file.len().saturating_sub(n));
    if n > 0 {
        file.copy_within(at..at + n, to);
    }
}

/// The beginning of this one and the end of another.
fn splice(random: &mut Random, file: &mut Vec<u8>, at: usize, others: &[&[u8]]) {
    let Some(other) = random.pick(others) else { return };
    let from = place(random, other.len());
    file.truncate(at);
    file.extend(other.iter().skip(from));
}
