//! What codes mean: integers from a lowest one on, or the sixteen numbers of IQ4.

use crate::codec::lanes::{MAGIC, clamp, round};

/// Levels of a block type.
#[derive(Clone, Copy, Debug)]
pub enum Levels {
    /// Code `c` is the integer `base + c`.
    Linear(Linear),
    /// Code `c` is number `c` of the table.
    Table(Table),
}

impl Levels {
    pub(super) const fn linear(lo: i16, hi: i16) -> Levels {
        Levels::Linear(Linear::new(lo, hi))
    }

    /// The same codes, but the lowest is never written.
    pub(super) const fn but_the_lowest(self) -> Levels {
        match self {
            Levels::Linear(levels) => Levels::Linear(Linear { lo: levels.lo + 1.0, ..levels }),
            table => table,
        }
    }

    /// The number that a code stands for.
    #[inline(always)]
    pub(super) fn level(self, code: u8) -> f32 {
        match self {
            Levels::Linear(levels) => f32::from(code) + levels.base,
            Levels::Table(_) => IQ4[usize::from(code & 15)],
        }
    }

    /// The largest magnitude that is a level on both sides of zero, or nearly so.
    pub(super) fn reach(self) -> f32 {
        match self {
            Levels::Linear(levels) => levels.hi.min(-levels.lo),
            Levels::Table(_) => IQ4[15],
        }
    }

    /// The code of the level next to `y`.
    #[inline(always)]
    pub(super) fn code(self, y: f32) -> u8 {
        match self {
            Levels::Linear(levels) => {
                // The low bits of the sum are the level as two's complement, so that no cast is a branch.
                let level = (clamp(y, levels.lo, levels.hi) + MAGIC).to_bits() as u8;
                level.wrapping_add(levels.code_of_zero)
            }
            Levels::Table(_) => MIDDLES.iter().map(|&m| u8::from(y > m)).sum(),
        }
    }
}

/// Rounds to the next level: what a search needs to know of levels.
pub(super) trait Nearest: Copy {
    fn nearest(self, y: f32) -> f32;
}

/// Integers `lo ..= hi`.
#[derive(Clone, Copy, Debug)]
pub struct Linear {
    /// What code 0 stands for.
    pub(super) base: f32,
    pub(super) code_of_zero: u8,
    pub(super) lo: f32,
    pub(super) hi: f32,
}

impl Linear {
    pub(super) const fn new(lo: i16, hi: i16) -> Linear {
        Linear { base: lo as f32, code_of_zero: -lo as u8, lo: lo as f32, hi: hi as f32 }
    }
}

impl Nearest for Linear {
    #[inline(always)]
    fn nearest(self, y: f32) -> f32 {
        round(clamp(y, self.lo, self.hi))
    }
}

/// The numbers of IQ4_NL and IQ4_XS, which lie closer near zero (ggml-common.h, `kvalues_iq4nl`).
#[derive(Clone, Copy, Debug)]
pub struct Table;

pub(super) const IQ4: [f32; 16] = [
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
];

/// Halfway between neighbours.
const MIDDLES: [f32; 15] = {
    let mut out = [0.0; 15];
    let mut i = 0;
    while i < 15 {
        out[i] = (IQ4[i] + IQ4[i + 1]) / 2.0;
        i += 1;
    }
    out
};

impl Nearest for Table {
    /// Each middle that is passed adds the distance between its neighbours: exact, since all are integers.
    #[inline(always)]
    fn nearest(self, y: f32) -> f32 {
        let mut q = IQ4[0];
        for i in 0..15 {
            q += if y > MIDDLES[i] { IQ4[i + 1] - IQ4[i] } else { 0.0 };
        }
        q
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_of_a_level_is_its_own_and_the_nearest_is_near() {
        for levels in [Levels::linear(-8, 7), Levels::linear(0, 31), Levels::Table(Table)] {
            for code in 0..16 {
                assert_eq!(levels.code(levels.level(code)), code, "{levels:?}");
            }
        }
        for y in (-1400..1300).map(|y| y as f32 / 10.0) {
            let least = IQ4.iter().map(|q| (q - y).abs()).fold(f32::INFINITY, f32::min);
            assert_eq!((Table.nearest(y) - y).abs(), least, "{y}");
            assert_eq!(Levels::Table(Table).level(Levels::Table(Table).code(y)), Table.nearest(y), "{y}");
        }
    }
}
