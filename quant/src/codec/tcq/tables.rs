//! The probability tables: discrete Gaussians on the even and on the odd numbers, made by integer arithmetic.
//!
//! Table `q` of 0 … 64 belongs to the width `s = 2^((q − 16) / 8)`. With `ρ = exp(−1 / 2s²)` as a 32-bit fraction
//! ([`RHO`]), the weights are `w_j = ρ^(j²)`, by the recurrence
//!
//! ```text
//!  σ = ρ · ρ >> 32     w_0 = 2^32     r_0 = ρ     w_(j+1) = w_j · r_j >> 32     r_(j+1) = r_j · σ >> 32
//! ```
//!
//! For each parity the numbers `|j| ≤ 252` with `w_j · 2^17 ≥ Z`, `Z` the sum of the weights of that parity, get the
//! frequency `max(1, round(w_j · 4094 / Z))`. What then lacks in a sum of 4094, or is too much, goes one by one to or from
//! the numbers from the middle outwards (0, 2, −2, … or 1, −1, 3, …), again and again, where a frequency above one remains.
//! Two escapes of frequency 1 come first, then the numbers in ascending order: 4096 slots.

use std::sync::OnceLock;

use crate::math;

/// Number of tables.
pub const TABLES: usize = 65;
/// Steps of the width an octave.
pub const PER_OCTAVE: f64 = 8.0;
/// The table of width 1.
pub const TABLE_OF_ONE: usize = 16;
/// Slots of a table are `2^PROB_BITS`.
pub const PROB_BITS: u32 = 12;
/// Slots of a table.
pub const SLOTS: usize = 1 << PROB_BITS;
/// The largest magnitude that has a symbol.
pub const LEVEL_MAX: i32 = 252;
/// Symbols of a parity: number `j` has symbol `(j >> 1) + SYMBOL_OF_ZERO`.
pub const SYMBOLS: usize = 256;
/// The symbol of numbers 0 and 1.
pub const SYMBOL_OF_ZERO: i32 = 128;
/// Symbols that stand for numbers without one; the low bit says which of the two subsets of the parity it is of.
pub const ESCAPES: [usize; 2] = [0, 255];
/// Bits that an escape is reckoned to take beside its symbol.
pub const ESCAPE_BITS: f32 = 40.0;

const _: () = assert!(SLOTS == 4096 && TABLES <= 1 << 7);

/// `exp(−1 / 2s²)` as a fraction of 2^32.
const RHO: [u64; TABLES] = [
    1440801, 5145013, 15004422, 36905875, 78665070, 148652826, 253857248, 398132550, 581260615, 799036310,
    1044178424, 1307656790, 1580030169, 1852521207, 2117713904, 2369882518, 2605029347, 2820730047,
    3015876649, 3190386796, 3344923893, 3480652712, 3599040369, 3701703250, 3790295335, 3866431115,
    3931635878, 3987316692, 4034748382, 4075069962, 4109287957, 4138284039, 4162825044, 4183574096,
    4201101925, 4215897841, 4228380000, 4238904802, 4247775344, 4255248918, 4261543595, 4266843974,
    4271306145, 4275061981, 4278222805, 4280882540, 4283120382, 4285003080, 4286586875, 4287919135,
    4289039749, 4289982295, 4290775039, 4291441769, 4292002499, 4292474072, 4292870656, 4293204170,
    4293484642, 4293720503, 4293918848, 4294085643, 4294225905, 4294343854, 4294443040,
];

/// The numbers of one parity.
#[derive(Clone, Debug, PartialEq)]
pub struct Parity {
    /// Frequency of each symbol, 0 where it has none. The sum is [`SLOTS`].
    pub freq: [u16; SYMBOLS],
    /// First slot of each symbol.
    pub start: [u16; SYMBOLS],
    /// What each symbol takes, in bits; of one that is not there, what escaping takes.
    pub bits: [f32; SYMBOLS],
}

/// One table.
#[derive(Clone, Debug, PartialEq)]
pub struct Table {
    /// Even, then odd numbers.
    pub parity: [Parity; 2],
    /// log2 of the sums of `exp(−j² / 2s²)` over even and over odd numbers.
    pub log2_z: [f64; 2],
    /// Bits of a number are about `log2_z + kappa · j²`.
    pub kappa: f64,
    /// The width.
    pub width: f64,
}

/// All tables.
pub fn tables() -> &'static [Table] {
    static TABLES_ONCE: OnceLock<Vec<Table>> = OnceLock::new();
    TABLES_ONCE.get_or_init(|| (0..TABLES).map(table).collect())
}

/// For each table, parity and slot what a decoder needs: frequency − 1 (bits 0–11), place within the symbol (12–23),
/// symbol (24–31). `[TABLES][2][SLOTS]`
pub fn slots() -> &'static [u32] {
    static SLOTS_ONCE: OnceLock<Vec<u32>> = OnceLock::new();
    SLOTS_ONCE.get_or_init(|| {
        let mut all = vec![0; TABLES * 2 * SLOTS];
        let parities = tables().iter().flat_map(|t| &t.parity);
        parities.zip(all.chunks_exact_mut(SLOTS)).for_each(|(parity, slots)| parity.fill(slots));
        all
    })
}

/// What an encoder needs of a symbol.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Symbol {
    /// `2^32 / freq`, rounded down, and below `2^32`: the upper half of its product with a state is the quotient of the state by
    /// `freq`, or one less.
    reciprocal: u32,
    /// Frequency; 0 if there is no such symbol.
    pub freq: u16,
    /// First slot.
    start: u16,
}

impl Symbol {
    fn new(freq: u16, start: u16) -> Symbol {
        let reciprocal = (1u64 << 32) / u64::from(freq.max(1));
        Symbol { reciprocal: reciprocal.min(u32::MAX.into()) as u32, freq, start }
    }

    /// The state of an encoder that had state `x`, below `freq · 2^20`, after this symbol.
    #[inline(always)]
    pub fn state_after(self, x: u32) -> u32 {
        let freq = u32::from(self.freq);
        let mut quotient = ((u64::from(x) * u64::from(self.reciprocal)) >> 32) as u32;
        let mut rest = x.wrapping_sub(quotient.wrapping_mul(freq));
        if rest >= freq {
            (quotient, rest) = (quotient + 1, rest - freq);
        }
        (quotient << PROB_BITS) + rest + u32::from(self.start)
    }

    /// The reciprocal; frequency and start as one word.
    #[cfg(target_arch = "x86_64")]
    pub fn words(self) -> (u32, u32) {
        (self.reciprocal, u32::from(self.freq) | u32::from(self.start) << 16)
    }
}

/// For each table, parity and symbol what an encoder needs. `[TABLES][2][SYMBOLS]`
pub fn symbols() -> &'static [Symbol] {
    static SYMBOLS_ONCE: OnceLock<Vec<Symbol>> = OnceLock::new();
    SYMBOLS_ONCE.get_or_init(|| {
        let symbol = |(&freq, &start): (&u16, &u16)| Symbol::new(freq, start);
        let parities = tables().iter().flat_map(|t| &t.parity);
        parities.flat_map(|p| p.freq.iter().zip(&p.start).map(symbol)).collect()
    })
}

/// The width of table `q`.
pub fn width(q: usize) -> f64 {
    libm::exp2((q as f64 - TABLE_OF_ONE as f64) / PER_OCTAVE)
}

/// The symbol of a number, if it can have one.
#[inline(always)]
pub fn symbol(level: i32) -> Option<usize> {
    (level.abs() <= LEVEL_MAX).then_some(((level >> 1) + SYMBOL_OF_ZERO) as usize)
}

fn table(q: usize) -> Table {
    let weights = weights(RHO[q]);
    let width = width(q);
    let z = [0, 1].map(|odd| {
        weights.iter().skip(odd).step_by(2).sum::<u64>() * 2 - if odd == 0 { weights[0] } else { 0 }
    });
    Table {
        parity: [0, 1].map(|odd| Parity::of(frequencies(&weights, odd, z[odd as usize]))),
        log2_z: z.map(|z| math::log(z as f64 / 4_294_967_296.0) / std::f64::consts::LN_2),
        kappa: std::f64::consts::LOG2_E / (2.0 * width * width),
        width,
    }
}

/// `w_0 …` of the non-negative numbers.
fn weights(rho: u64) -> Vec<u64> {
    let square = (rho * rho) >> 32;
    let (mut w, mut ratio) = (1u64 << 32, rho);
    let next = |_| {
        let this = w;
        w = (w * ratio) >> 32;
        ratio = (ratio * square) >> 32;
        this
    };
    (0..=LEVEL_MAX).map(next).collect()
}

fn frequencies(weights: &[u64], odd: i32, z: u64) -> [u16; SYMBOLS] {
    let total = SLOTS as u64 - ESCAPES.len() as u64;
    let mut freq = [0u16; SYMBOLS];
    // From the middle outwards: 0, 2, −2, … or 1, −1, 3, …
    let mut order: Vec<usize> = Vec::new();
    for magnitude in (odd..=LEVEL_MAX).step_by(2) {
        let w = weights[magnitude as usize];
        if w << 17 < z {
            break;
        }
        let f = ((2 * w * total + z) / (2 * z)).max(1) as u16;
        for level in [magnitude, -magnitude].into_iter().take(if magnitude == 0 { 1 } else { 2 }) {
            let at = ((level >> 1) + SYMBOL_OF_ZERO) as usize;
            freq[at] = f;
            order.push(at);
        }
    }
    let mut lack = total as i64 - freq.iter().map(|&f| i64::from(f)).sum::<i64>();
    while lack != 0 {
        for &at in &order {
            if lack > 0 {
                freq[at] += 1;
                lack -= 1;
            } else if lack < 0 && freq[at] > 1 {
                freq[at] -= 1;
                lack += 1;
            }
        }
    }
    for escape in ESCAPES {
        freq[escape] = 1;
    }
    freq
}

impl Parity {
    fn of(freq: [u16; SYMBOLS]) -> Parity {
        let mut start = [0; SYMBOLS];
        let mut at = 0;
        let numbers = (0..SYMBOLS).filter(|s| !ESCAPES.contains(s));
        for s in ESCAPES.into_iter().chain(numbers) {
            start[s] = at;
            at += freq[s];
        }
        let log2 = |f: u16| (math::log(f64::from(f)) / std::f64::consts::LN_2) as f32;
        let bits = freq.map(|f| PROB_BITS as f32 - log2(f.max(1)) + if f == 0 { ESCAPE_BITS } else { 0.0 });
        Parity { freq, start, bits }
    }

    fn fill(&self, slots: &mut [u32]) {
        for (symbol, (&freq, &start)) in self.freq.iter().zip(&self.start).enumerate() {
            for place in 0..freq {
                slots[usize::from(start + place)] =
                    u32::from(freq - 1) | u32::from(place) << 12 | (symbol as u32) << 24;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_table_fills_its_slots_and_favours_the_middle() {
        for (q, table) in tables().iter().enumerate() {
            for parity in &table.parity {
                assert_eq!(parity.freq.iter().map(|&f| usize::from(f)).sum::<usize>(), SLOTS, "table {q}");
                let middle = SYMBOL_OF_ZERO as usize;
                assert!(parity.freq[middle..].windows(2).all(|f| f[0] >= f[1] || f[1] == 1), "table {q}");
                assert!(ESCAPES.iter().all(|&e| parity.freq[e] == 1), "table {q}");
            }
        }
    }

    /// A table costs little more than the entropy of the discrete Gaussian that it stands for.
    #[test]
    fn a_table_wastes_little() {
        for (q, table) in tables().iter().enumerate() {
            for (odd, parity) in table.parity.iter().enumerate() {
                let (mut mean, mut ideal, mut mass) = (0.0, 0.0, 0.0);
                for j in (-1000..=1000_i32).filter(|j| j.rem_euclid(2) as usize == odd) {
                    let bits = table.log2_z[odd] + table.kappa * f64::from(j * j);
                    let p = libm::exp2(-bits);
                    let cost = symbol(j).map_or(f64::from(ESCAPE_BITS) + 12.0, |s| f64::from(parity.bits[s]));
                    (mean, ideal, mass) = (mean + p * cost, ideal + p * bits, mass + p);
                }
                assert!((mass - 1.0).abs() < 1e-3, "table {q}: mass {mass}");
                let bound = if table.width > 20.0 { 0.035 } else { 0.006 };
                assert!(mean - ideal < bound, "table {q} of parity {odd}: {mean:.4} instead of {ideal:.4}");
            }
        }
    }

    #[test]
    fn quotients_are_exact() {
        for freq in [1, 2, 3, 5, 7, 1000, 2047, 2048, 4093, 4094] {
            let symbol = Symbol::new(freq, 2);
            let freq = u32::from(freq);
            let most = (u64::from(freq) << 20) - 1;
            let near = (0..4096u64).map(|k| most.saturating_sub(k * 104_729 * k));
            for x in near.chain(0..5000).filter_map(|x| u32::try_from(x.min(most)).ok()) {
                assert_eq!(symbol.state_after(x), ((x / freq) << 12) + x % freq + 2, "{x} by {freq}");
            }
        }
    }

    #[test]
    fn slots_lead_back_to_their_symbols() {
        for (parity, slots) in tables().iter().flat_map(|t| &t.parity).zip(slots().chunks(SLOTS)) {
            for (slot, &entry) in slots.iter().enumerate() {
                let symbol = (entry >> 24) as usize;
                assert_eq!(u16::try_from(entry & 4095), Ok(parity.freq[symbol] - 1));
                assert_eq!(usize::from(parity.start[symbol]) + (entry >> 12 & 4095) as usize, slot);
            }
        }
    }
}
