//! Which instruction set the kernels use, decided once at run time.
//!
//! Every kernel is written once, as portable code over fixed-size lanes, and compiled for each level by
//! [`per_isa!`](crate::per_isa). Rust neither reorders nor fuses floating point operations, so the levels give the
//! same bits by construction; the laws test it all the same. A vector intrinsic is used only where the compiler does
//! not find the instruction.

use std::sync::OnceLock;

/// Instruction set level. A value above `Scalar` proves that this CPU has the instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Isa(Level);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// The environment variable that forces a level: `scalar`, `avx2` or `avx512`.
pub const ISA_ENV: &str = "MOEPACK_ISA";

impl Isa {
    /// The portable level, on every CPU.
    pub const SCALAR: Isa = Isa(Level::Scalar);

    /// AVX2 with FMA, F16C and BMI2, if this CPU has them.
    pub fn avx2() -> Option<Isa> {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
            && is_x86_feature_detected!("bmi2")
        {
            return Some(Isa(Level::Avx2));
        }
        None
    }

    /// AVX-512 F, BW, DQ, VL and VBMI on top of AVX2, if this CPU has them.
    pub fn avx512() -> Option<Isa> {
        #[cfg(target_arch = "x86_64")]
        if Isa::avx2().is_some()
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vbmi")
        {
            return Some(Isa(Level::Avx512));
        }
        None
    }

    /// The level in force: the best this CPU has, or what `MOEPACK_ISA` asks for where the CPU has it.
    pub fn get() -> Isa {
        static ISA: OnceLock<Isa> = OnceLock::new();
        *ISA.get_or_init(|| {
            let best = Isa::avx512().or_else(Isa::avx2).unwrap_or(Isa::SCALAR);
            match std::env::var(ISA_ENV).ok().as_deref() {
                Some("scalar") => Isa::SCALAR,
                Some("avx2") => Isa::avx2().unwrap_or(Isa::SCALAR),
                _ => best,
            }
        })
    }

    /// Every level this CPU has, lowest first: what the laws run over.
    pub fn available() -> Vec<Isa> {
        [Some(Isa::SCALAR), Isa::avx2(), Isa::avx512()].into_iter().flatten().collect()
    }

    /// Name of the level, as `MOEPACK_ISA` spells it.
    pub fn name(self) -> &'static str {
        match self.0 {
            Level::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "avx512",
        }
    }

    /// Whether this is at least AVX2.
    pub fn has_avx2(self) -> bool {
        self.0 > Level::Scalar
    }

    /// Whether this is AVX-512.
    pub fn has_avx512(self) -> bool {
        self.name() == "avx512"
    }
}

/// Compiles one `#[inline(always)]` body for every level and dispatches on an [`Isa`] as first argument.
///
/// `per_isa! { pub fn name(a: &[f32], out: &mut [f32]) -> u32 = body; }` makes `name(isa, a, out)`, where `body` is
/// an `#[inline(always)]` function of the same signature.
#[macro_export]
macro_rules! per_isa {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:path;) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments, reason = "a kernel's operands are its signature")]
        $vis fn $name(isa: $crate::isa::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt")]
                fn avx2($($arg: $ty),*) $(-> $ret)? {
                    $body($($arg),*)
                }
                #[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
                fn avx512($($arg: $ty),*) $(-> $ret)? {
                    $body($($arg),*)
                }
                #[allow(unsafe_code, reason = "the only way to call a function with a target feature")]
                if isa.has_avx512() {
                    // SAFETY: an `Isa` of level avx512 exists only after the CPU was asked for these features.
                    return unsafe { avx512($($arg),*) };
                } else if isa.has_avx2() {
                    // SAFETY: an `Isa` of level avx2 exists only after the CPU was asked for these features.
                    return unsafe { avx2($($arg),*) };
                }
            }
            let _ = isa;
            $body($($arg),*)
        }
    };
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[inline(always)]
    fn sum_of_squares(x: &[f32]) -> f32 {
        x.iter().fold(0.0, |s, &v| v.mul_add(v, s))
    }
    crate::per_isa! { fn square_sum(x: &[f32]) -> f32 = sum_of_squares; }

    #[test]
    fn every_level_gives_the_same_bits() {
        let x: Vec<f32> = (0..1000).map(|i| (i as f32).sin()).collect();
        for isa in Isa::available() {
            assert_eq!(
                square_sum(isa, &x).to_bits(),
                square_sum(Isa::SCALAR, &x).to_bits(),
                "{}",
                isa.name()
            );
        }
    }

    /// The laws compare the levels that this CPU has; where one is missing, nothing was compared, and that is said. In CI
    /// on x86-64 the lack of AVX2 is a failure; AVX-512 is not on every machine that CI runs on.
    #[test]
    fn every_level_is_here_to_be_tested() {
        let levels = [("avx2", Isa::avx2()), ("avx512", Isa::avx512())];
        for (name, _) in levels.iter().filter(|(_, isa)| isa.is_none()) {
            // Past the harness, which keeps the output of tests that pass to itself.
            let _ = writeln!(
                std::io::stderr(),
                "note: this CPU has no {name}, its kernels are not tested in this run"
            );
        }
        let in_ci = std::env::var_os("CI").is_some() && cfg!(target_arch = "x86_64");
        assert!(!in_ci || Isa::avx2().is_some(), "CI must test avx2 on x86-64");
    }
}
