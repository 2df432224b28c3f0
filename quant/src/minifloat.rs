//! Small floating point numbers, one at a time: bf16, f16, E4M3FN, E8M0 and E2M1 to and from f32.
//!
//! | type    | sign, exponent, mantissa | bias | largest | smallest | special                                  |
//! |---------|--------------------------|------|---------|----------|------------------------------------------|
//! | bf16    | 1, 8, 7                  | 127  | 3.39e38 | 9.2e-41  | as f32                                   |
//! | f16     | 1, 5, 10                 | 15   | 65504   | 2^-24    | as IEEE 754 binary16                     |
//! | E4M3FN  | 1, 4, 3                  | 7    | 448     | 2^-9     | NaN is 0x7f and 0xff; no infinity        |
//! | E8M0    | 0, 8, 0                  | 127  | 2^127   | 2^-127   | NaN is 0xff; no zero                     |
//! | E2M1    | 1, 2, 1                  | 1    | 6       | 0.5      | neither NaN nor infinity                 |
//!
//! Every rounding is to nearest, ties to even. The functions have no table and no branch, so that a loop over them
//! becomes vector code at every level (see [`crate::numbers`]), and none of them depends on whether the CPU flushes
//! subnormal operands to zero. NaN comes out of a decoder as one positive quiet NaN, [`NAN_BITS`], except from bf16
//! and f16, which keep sign and payload. Formats: OCP 8-bit Floating Point (OFP8) 1.0, OCP Microscaling Formats 1.0.

/// The one NaN that decoders of E4M3 and E8M0 give, on every CPU.
pub const NAN_BITS: u32 = 0x7fc0_0000;
/// Largest E4M3FN number.
pub const E4M3_MAX: f32 = 448.0;
/// Largest E2M1 number.
pub const E2M1_MAX: f32 = 6.0;
/// Largest f16 number.
pub const F16_MAX: f32 = 65504.0;

const SIGN: u32 = 0x8000_0000;
const INFINITY_BITS: u32 = 0x7f80_0000;

/// bf16 to f32: the upper half of its bits, exact.
#[inline(always)]
pub fn bf16_to_f32(code: u16) -> f32 {
    f32::from_bits(u32::from(code) << 16)
}

/// f32 to bf16. Overflow gives infinity; NaN stays NaN, made quiet.
#[inline(always)]
pub fn f32_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    let is_nan = bits & !SIGN > INFINITY_BITS;
    (if is_nan { bits | 0x0040_0000 } else { rounded } >> 16) as u16
}

/// f16 to f32, exact; NaN keeps sign and payload.
#[inline(always)]
pub fn f16_to_f32(code: u16) -> f32 {
    let magnitude = u32::from(code & 0x7fff) << 13;
    let normal = magnitude + (112 << 23);
    // A subnormal is m × 2^-24: build 2^-14 + m × 2^-24, which is normal, and take 2^-14 away.
    let least = f32::from_bits(113 << 23);
    let subnormal = (f32::from_bits(magnitude + (113 << 23)) - least).to_bits();
    let special = magnitude | INFINITY_BITS;
    let bits = if magnitude < 1 << 23 { subnormal } else { normal };
    let bits = if magnitude >= 31 << 23 { special } else { bits };
    f32::from_bits(bits | u32::from(code & 0x8000) << 16)
}

/// f32 to f16. Overflow gives infinity; NaN stays NaN, made quiet.
#[inline(always)]
pub fn f32_to_f16(value: f32) -> u16 {
    let bits = value.to_bits();
    let magnitude = bits & !SIGN;
    let normal = magnitude.wrapping_add(0xfff + (magnitude >> 13 & 1)).wrapping_sub(112 << 23) >> 13;
    // Below 2^-14 the step is 2^-24; adding 0.5, whose own step it is, rounds to it.
    let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    let nan = 0x7e00 | (magnitude >> 13 & 0x1ff);
    let code = if magnitude < 113 << 23 { subnormal } else { normal };
    // 65520 and above round to 65536, which f16 does not have.
    let code = if magnitude >= 65520.0f32.to_bits() { 0x7c00 } else { code };
    let code = if magnitude > INFINITY_BITS { nan } else { code };
    (code | (bits & SIGN) >> 16) as u16
}

/// E4M3FN to f32, exact; both NaN codes give [`NAN_BITS`].
#[inline(always)]
pub fn e4m3_to_f32(code: u8) -> f32 {
    let magnitude = u32::from(code & 0x7f) << 20;
    let normal = magnitude + (120 << 23);
    // A subnormal is m × 2^-9: 2^-6 + m × 2^-9, less 2^-6.
    let least = f32::from_bits(121 << 23);
    let subnormal = (f32::from_bits(magnitude + (121 << 23)) - least).to_bits();
    let bits = if magnitude < 1 << 23 { subnormal } else { normal } | u32::from(code & 0x80) << 24;
    f32::from_bits(if code & 0x7f == 0x7f { NAN_BITS } else { bits })
}

/// f32 to E4M3FN, saturating: whatever is above 448, infinity too, gives ±448. NaN gives 0x7f with its sign.
#[inline(always)]
pub fn f32_to_e4m3(value: f32) -> u8 {
    let bits = value.to_bits();
    let given = bits & !SIGN;
    let magnitude = if given < E4M3_MAX.to_bits() { given } else { E4M3_MAX.to_bits() };
    let normal = (magnitude + 0x7_ffff + (magnitude >> 20 & 1)).wrapping_sub(120 << 23) >> 20;
    // Below 2^-6 the step is 2^-9, which is the step of 2^14.
    let step = 16384.0f32;
    let subnormal = (f32::from_bits(magnitude) + step).to_bits().wrapping_sub(step.to_bits());
    let code = if magnitude < 121 << 23 { subnormal } else { normal };
    let code = if given > INFINITY_BITS { 0x7f } else { code };
    (code | (bits & SIGN) >> 24) as u8
}

/// `value` rounded to E4M3FN and back: `e4m3_to_f32(f32_to_e4m3(value))` for finite values.
#[inline(always)]
pub fn round_e4m3(value: f32) -> f32 {
    let bits = value.to_bits();
    let magnitude = bits & !SIGN;
    let magnitude = if magnitude < E4M3_MAX.to_bits() { magnitude } else { E4M3_MAX.to_bits() };
    let normal = (magnitude + 0x7_ffff + (magnitude >> 20 & 1)) & !0xf_ffff;
    let step = 16384.0f32;
    let subnormal = ((f32::from_bits(magnitude) + step) - step).to_bits();
    f32::from_bits(if magnitude < 121 << 23 { subnormal } else { normal } | bits & SIGN)
}

/// E8M0 to f32: 2^(code - 127), exact; 255 gives [`NAN_BITS`].
#[inline(always)]
pub fn e8m0_to_f32(code: u8) -> f32 {
    let bits = if code == 0 { 1 << 22 } else { u32::from(code) << 23 };
    f32::from_bits(if code == 255 { NAN_BITS } else { bits })
}

/// The E8M0 code of the power of two at or below a positive finite `value` (2^-127 for anything smaller).
#[inline(always)]
pub fn e8m0_floor(value: f32) -> u8 {
    (value.to_bits() >> 23 & 0xff) as u8
}

/// E2M1 (the low four bits of `code`) to f32, exact.
#[inline(always)]
pub fn e2m1_to_f32(code: u8) -> f32 {
    let magnitude = u32::from(code & 7);
    let normal = (magnitude << 22) + (126 << 23);
    // 0 and 0.5 are the subnormals.
    let bits = if magnitude < 2 { magnitude * 0.5f32.to_bits() } else { normal };
    f32::from_bits(bits | u32::from(code & 8) << 28)
}

/// f32 to E2M1, saturating at ±6. Not for NaN.
#[inline(always)]
pub fn f32_to_e2m1(value: f32) -> u8 {
    let bits = value.to_bits();
    let given = bits & !SIGN;
    let magnitude = if given < E2M1_MAX.to_bits() { given } else { E2M1_MAX.to_bits() };
    let normal = (magnitude + 0x1f_ffff + (magnitude >> 22 & 1)).wrapping_sub(126 << 23) >> 22;
    // Below 1 the step is 0.5, which is the step of 2^22.
    let step = 4_194_304.0f32;
    let subnormal = (f32::from_bits(magnitude) + step).to_bits().wrapping_sub(step.to_bits());
    let code = if magnitude < 127 << 23 { subnormal } else { normal };
    (code | (bits & SIGN) >> 28) as u8
}

/// `value` rounded to E2M1 and back: `e2m1_to_f32(f32_to_e2m1(value))`.
#[inline(always)]
pub fn round_e2m1(value: f32) -> f32 {
    let bits = value.to_bits();
    let magnitude = bits & !SIGN;
    let magnitude = if magnitude < E2M1_MAX.to_bits() { magnitude } else { E2M1_MAX.to_bits() };
    let normal = (magnitude + 0x1f_ffff + (magnitude >> 22 & 1)) & !0x3f_ffff;
    let step = 4_194_304.0f32;
    let subnormal = ((f32::from_bits(magnitude) + step) - step).to_bits();
    f32::from_bits(if magnitude < 127 << 23 { subnormal } else { normal } | bits & SIGN)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// f32 values that stand for all: every exponent, mantissas around each halfway point, both signs.
    fn values() -> impl Iterator<Item = f32> {
        let mantissas = (0..1u32 << 11).flat_map(|m| [m << 12, (m << 12) + 1, ((m + 1) << 12) - 1]);
        mantissas.flat_map(|m| (0..512u32).map(move |e| f32::from_bits(e << 23 | m)))
    }

    /// The nearest of `table` (codes in ascending order of value, no NaN), ties to the even code: the definition.
    fn nearest(value: f64, table: &[f64]) -> usize {
        let value = value.min(table[table.len() - 1]);
        let above = table.partition_point(|&t| t < value);
        let below = above.saturating_sub(1);
        let (up, down) = ((table[above] - value).abs(), (value - table[below]).abs());
        if up < down || (up == down && above % 2 == 0) { above } else { below }
    }

    #[test]
    fn f16_and_bf16_agree_with_the_half_crate() {
        for code in 0..=u16::MAX {
            let (ours, theirs) = (f16_to_f32(code), half::f16::from_bits(code).to_f32());
            assert!(
                ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan(),
                "f16 {code:#06x}"
            );
            assert_eq!(bf16_to_f32(code).to_bits(), u32::from(code) << 16);
        }
        for value in values().filter(|v| !v.is_nan()) {
            assert_eq!(f32_to_f16(value), half::f16::from_f32_const(value).to_bits(), "f16 of {value:e}");
            assert_eq!(f32_to_bf16(value), half::bf16::from_f32(value).to_bits(), "bf16 of {value:e}");
        }
    }

    #[test]
    fn nan_stays_nan_and_keeps_its_sign() {
        for bits in [0x7f80_0001u32, 0x7fc0_0000, 0x7fff_ffff] {
            let (nan, minus) = (f32::from_bits(bits), f32::from_bits(bits | SIGN));
            assert!(f16_to_f32(f32_to_f16(nan)).is_nan() && bf16_to_f32(f32_to_bf16(nan)).is_nan());
            assert_eq!(f32_to_f16(minus), f32_to_f16(nan) | 0x8000);
            assert_eq!((f32_to_e4m3(nan), f32_to_e4m3(minus)), (0x7f, 0xff));
        }
        assert_eq!(e4m3_to_f32(0x7f).to_bits(), NAN_BITS);
        assert_eq!(e4m3_to_f32(0xff).to_bits(), NAN_BITS);
        assert_eq!(e8m0_to_f32(255).to_bits(), NAN_BITS);
    }

    #[test]
    fn e4m3_is_the_nearest_and_saturates() {
        let formula = |c: u8| match (c >> 3 & 15, f64::from(c & 7)) {
            (0, m) => m / 512.0,
            (e, m) => (1.0 + m / 8.0) * f64::from(2f32.powi(i32::from(e) - 7)),
        };
        let table: Vec<f64> = (0..0x7f).map(formula).collect();
        for code in 0..0x7f {
            assert_eq!(f64::from(e4m3_to_f32(code)), table[usize::from(code)], "{code:#04x}");
            assert_eq!(f64::from(e4m3_to_f32(code | 0x80)), -table[usize::from(code)], "{code:#04x}");
        }
        for value in values().filter(|v| !v.is_nan()) {
            let code = nearest(f64::from(value.abs()), &table) as u8 | ((value.to_bits() >> 24) & 0x80) as u8;
            assert_eq!(f32_to_e4m3(value), code, "{value:e}");
            assert_eq!(round_e4m3(value).to_bits(), e4m3_to_f32(code).to_bits(), "{value:e}");
        }
    }

    #[test]
    fn e2m1_is_the_nearest_and_saturates() {
        let table = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
        for code in 0..8u8 {
            assert_eq!(f64::from(e2m1_to_f32(code)), table[usize::from(code)]);
            assert_eq!(e2m1_to_f32(code | 8).to_bits(), (-e2m1_to_f32(code)).to_bits());
        }
        for value in values().filter(|v| !v.is_nan()) {
            let code = nearest(f64::from(value.abs()), &table) as u8 | ((value.to_bits() >> 28) & 8) as u8;
            assert_eq!(f32_to_e2m1(value), code, "{value:e}");
            assert_eq!(round_e2m1(value).to_bits(), e2m1_to_f32(code).to_bits(), "{value:e}");
        }
    }

    #[test]
    fn e8m0_is_a_power_of_two() {
        for code in 0..255u8 {
            assert_eq!(f64::from(e8m0_to_f32(code)), f64::powi(2.0, i32::from(code) - 127), "{code}");
            assert_eq!(e8m0_floor(e8m0_to_f32(code) * 1.5), code, "{code}");
        }
    }
}
