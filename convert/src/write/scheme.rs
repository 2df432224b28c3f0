//! What a codec's name says, taken apart: targets ask for bits, groups and scale types, not for names.

use moepack_format::Dtype;

/// A codec that some target may hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// Integers on a scale a group: `int` and `affine`.
    Int(Int),
    /// MXFP4.
    Mxfp4,
    /// NVFP4 whose global scale divides.
    NvfpDivided,
    /// FP8 in blocks.
    Fp8 {
        /// Rows and columns of a block.
        block: [u64; 2],
        /// Type of a scale.
        scales: Dtype,
    },
    /// Plain numbers.
    Plain(Dtype),
}

/// Integer codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Int {
    /// Of a code.
    pub bits: u32,
    /// Columns that share a scale.
    pub group: u64,
    /// Type of a scale.
    pub scales: Dtype,
    /// Groups have zero points.
    pub asym: bool,
    /// Columns say which group they belong to.
    pub indexed: bool,
}

impl Scheme {
    /// What the codec of this name is; `None` where no target has anything like it.
    pub fn of(codec: &str) -> Option<Scheme> {
        match codec {
            "bf16" => return Some(Scheme::Plain(Dtype::Bf16)),
            "f16" => return Some(Scheme::Plain(Dtype::F16)),
            "f32" => return Some(Scheme::Plain(Dtype::F32)),
            "mxfp4" => return Some(Scheme::Mxfp4),
            "nvfp4-div" => return Some(Scheme::NvfpDivided),
            _ => {}
        }
        if let Some(rest) = codec.strip_prefix("fp8-block") {
            return fp8(rest);
        }
        let rest = codec.strip_prefix("int").or_else(|| codec.strip_prefix("affine"))?;
        let mut words = rest.split('-');
        let bits = words.next()?.parse().ok().filter(|bits| (2..=8).contains(bits))?;
        let mut int = Int { bits, group: 64, scales: Dtype::F16, asym: false, indexed: false };
        for word in words {
            match word {
                "asym" => int.asym = true,
                "idx" => int.indexed = true,
                "bf16" => int.scales = Dtype::Bf16,
                "f32" => int.scales = Dtype::F32,
                group => int.group = group.strip_prefix('g')?.parse().ok().filter(|g| *g > 0)?,
            }
        }
        Some(Scheme::Int(int))
    }
}

fn fp8(rest: &str) -> Option<Scheme> {
    let (mut block, mut scales) = ([128, 128], Dtype::F32);
    for word in rest.split('-').filter(|w| !w.is_empty()) {
        match word {
            "bf16" => scales = Dtype::Bf16,
            "f16" => scales = Dtype::F16,
            "e8m0" => scales = Dtype::F8E8m0,
            sides => {
                let (rows, cols) = sides.split_once('x')?;
                block = [rows.parse().ok()?, cols.parse().ok()?];
            }
        }
    }
    Some(Scheme::Fp8 { block, scales }).filter(|_| block.iter().all(|&side| side > 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use moepack_quant::codec::CODECS;

    #[test]
    fn every_codec_is_known_or_has_no_like() {
        for name in CODECS.iter().flat_map(|family| family.examples) {
            let canonical = moepack_quant::codec(name).unwrap().name();
            let lonely = canonical.starts_with("tcq") || canonical == "nvfp4";
            // Codecs that come later may be unknown here; those of these families may not.
            let ours = ["int", "affine", "fp8", "mxfp4", "nvfp4-div", "bf16", "f16", "f32"];
            if ours.iter().any(|f| canonical.starts_with(f)) {
                assert_eq!(Scheme::of(&canonical).is_some(), !lonely, "{canonical}");
            }
        }
    }

    #[test]
    fn names_are_taken_apart() {
        let int = Int { bits: 4, group: 128, scales: Dtype::Bf16, asym: true, indexed: false };
        assert_eq!(Scheme::of("affine4-g128-bf16-asym"), Some(Scheme::Int(int)));
        let fp8 = Scheme::Fp8 { block: [1, 32], scales: Dtype::F8E8m0 };
        assert_eq!(Scheme::of("fp8-block-1x32-e8m0"), Some(fp8));
        assert_eq!(Scheme::of("tcq256"), None);
        assert_eq!(Scheme::of("int4-g0"), None);
    }
}
