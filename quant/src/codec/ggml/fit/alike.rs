//! Blocks of 32 that ggml rounds by the widest number, without a search: those whose numbers count alike, and Q8_0 always.
//!
//! ggml does that about as fast as memory gives numbers. So there is one trial here (six for Q8_0), of a few operations a
//! number: the scale that just reaches the widest number, or nearly, proposes levels, least squares says what they are
//! worth, and numbers are rounded anew. That loses less than the rounding of ggml, whose scale is the proposal.
//!
//! Blocks are read as they lie. Each sum over a block has eight chains, of every eighth number, that a fixed tree adds up;
//! what is done once a block is done for sixteen of them, a lane each.

use super::{half, inverse};
use crate::codec::ggml::kinds::{Id, Kind, Mins, Parts};
use crate::codec::ggml::levels::{Levels, Linear};
use crate::codec::lanes::{LANES, Lanes, round};
use crate::isa::Isa;
use crate::minifloat::f32_to_f16;

#[cfg(target_arch = "x86_64")]
mod avx2;

/// Numbers a block.
const BLOCK: usize = 32;
/// Chains of a sum.
const CHAINS: usize = 8;
type Block = [f32; BLOCK];

/// Trials: how many levels are taken for each level of the scale that just reaches the widest number.
fn ratios(kind: &Kind) -> &'static [f32] {
    match kind.id {
        Id::Q4_0 => &[1.025],
        Id::Q4_1 => &[1.01],
        Id::Q5_0 => &[1.008],
        // Steps are so small that it is luck which one suits a block, so many are tried.
        Id::Q8_0 => &[0.973, 0.979, 0.985, 0.991, 0.997, 1.0035],
        _ => &[1.0],
    }
}

/// Encodes blocks of a type that [`takes`] names.
#[inline(always)]
pub(in crate::codec::ggml) fn encode(
    isa: Isa,
    kind: &Kind,
    data: &[f32],
    importance: Option<&[f32]>,
    plane: &mut [u8],
) {
    if let Some(importance) = importance {
        let weights = Weights { row: importance.as_chunks().0, first: 0 };
        return encode_as(isa, const { Kind::of(Id::Q8_0) }, data, Some(weights), plane);
    }
    // Each type for itself, so that the compiler knows its levels and what there is to write.
    match kind.id {
        Id::Q4_0 => encode_as(isa, const { Kind::of(Id::Q4_0) }, data, None, plane),
        Id::Q4_1 => encode_as(isa, const { Kind::of(Id::Q4_1) }, data, None, plane),
        Id::Q5_0 => encode_as(isa, const { Kind::of(Id::Q5_0) }, data, None, plane),
        Id::Q5_1 => encode_as(isa, const { Kind::of(Id::Q5_1) }, data, None, plane),
        _ => encode_as(isa, const { Kind::of(Id::Q8_0) }, data, None, plane),
    }
}

/// Whether this is for the type.
pub(in crate::codec::ggml) fn takes(kind: &Kind, importance: bool) -> bool {
    kind.block == BLOCK && matches!(kind.levels, Levels::Linear(_)) && (!importance || kind.id == Id::Q8_0)
}

/// What numbers weigh: the same in every row.
#[derive(Clone, Copy)]
struct Weights<'a> {
    row: &'a [Block],
    /// Which block of the matrix is in the first lane.
    first: usize,
}

impl<'a> Weights<'a> {
    #[inline(always)]
    fn of(&self, lane: usize) -> &'a Block {
        &self.row[(self.first + lane) % self.row.len()]
    }
}

#[inline(always)]
fn encode_as(isa: Isa, kind: &Kind, data: &[f32], mut weights: Option<Weights<'_>>, plane: &mut [u8]) {
    let Levels::Linear(levels) = kind.levels else { return };
    let blocks = data.as_chunks().0.chunks(LANES);
    for (blocks, plane) in blocks.zip(plane.chunks_mut(LANES * kind.block_bytes)) {
        let (scale, low) = match kind.mins {
            Mins::None => (symmetric(isa, kind, levels, blocks, weights), Lanes::ZERO),
            _ => affine(isa, kind, levels, blocks),
        };
        write(isa, kind, levels, blocks, scale, low, plane);
        weights = weights.map(|w| Weights { first: w.first + LANES, ..w });
    }
}

/// Rounds the numbers of up to sixteen blocks.
#[inline(always)]
fn write(isa: Isa, kind: &Kind, levels: Linear, blocks: &[Block], scale: Lanes, low: Lanes, out: &mut [u8]) {
    let inverse = scale.map(inverse);
    let (d, dmin) = (halves(scale), halves(low.map(|m| -m)));
    let mut parts = Parts::EMPTY;
    for (l, (block, out)) in blocks.iter().zip(out.chunks_exact_mut(kind.block_bytes)).enumerate() {
        (parts.d, parts.dmin) = (d[l], dmin[l]);
        let codes = codes(isa, levels, block, inverse.0[l], low.0[l]);
        parts.codes[..BLOCK].copy_from_slice(&codes);
        parts.write(kind, out);
    }
}

/// Scales as f16 has them, numbers being `D q`.
#[inline(always)]
fn symmetric(isa: Isa, kind: &Kind, levels: Linear, blocks: &[Block], weights: Option<Weights<'_>>) -> Lanes {
    let [least, most] = extremes(isa, blocks);
    let start = least.zip(most, |least, most| levels.lo * inverse(if most > -least { most } else { least }));
    let (mut best, mut best_gain) = (Lanes::ZERO, Lanes::ZERO);
    for &ratio in ratios(kind) {
        let by = start.map(|by| by * ratio);
        let [qq, xq] = match weights {
            None => products(isa, blocks, levels.hi, by),
            Some(weights) => weighted_products(isa, blocks, weights, by),
        };
        let scale = xq.zip(qq, |a, b| a / b);
        // NaN, where all levels are zero, is not better than anything.
        let gain = xq.zip(scale, |a, d| a * d);
        best = scale.where_more(gain, best, best_gain);
        best_gain = gain.where_more(gain, best_gain, best_gain);
    }
    half(best)
}

/// `Σ q²` and `Σ x q` over each block, q being the level next to `by × x`. That is no level below the lowest one, as the
/// trials have it.
#[inline(always)]
fn products(isa: Isa, blocks: &[Block], hi: f32, by: Lanes) -> [Lanes; 2] {
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx2() {
        return avx2::products(isa, blocks, hi, by);
    }
    let _ = isa;
    over_blocks(blocks, [Op::Sum; 2], |l, block| {
        let mut chains = [[0.0f32; CHAINS]; 2];
        for x in block.as_chunks::<CHAINS>().0 {
            for c in 0..CHAINS {
                let y = x[c] * by.0[l];
                let q = round(if y < hi { y } else { hi });
                chains[0][c] = q.mul_add(q, chains[0][c]);
                chains[1][c] = q.mul_add(x[c], chains[1][c]);
            }
        }
        chains
    })
}

/// `Σ w q²` and `Σ w x q` over each block, where no number is beyond the levels.
#[inline(always)]
fn weighted_products(isa: Isa, blocks: &[Block], weights: Weights<'_>, by: Lanes) -> [Lanes; 2] {
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx2() {
        return avx2::weighted_products(isa, blocks, weights, by);
    }
    let _ = isa;
    over_blocks(blocks, [Op::Sum; 2], |l, block| {
        let mut chains = [[0.0f32; CHAINS]; 2];
        let weights = weights.of(l).as_chunks::<CHAINS>().0;
        for (x, w) in block.as_chunks::<CHAINS>().0.iter().zip(weights) {
            for c in 0..CHAINS {
                let q = round(x[c] * by.0[l]);
                let wq = w[c] * q;
                chains[0][c] = wq.mul_add(q, chains[0][c]);
                chains[1][c] = wq.mul_add(x[c], chains[1][c]);
            }
        }
        chains
    })
}

/// Scales and minimums as f16 has them, numbers being `D q − M`.
#[inline(always)]
fn affine(isa: Isa, kind: &Kind, levels: Linear, blocks: &[Block]) -> (Lanes, Lanes) {
    let [least, most] = extremes(isa, blocks);
    let start = most.zip(least, |most, least| levels.hi * inverse(most - least));
    let low = least.map(|v| -v);
    let (mut scale, mut min, mut best_gain) = (Lanes::ZERO, half(low), Lanes::ZERO);
    for &ratio in ratios(kind) {
        let (d, m, gain) = least_squares(sums(isa, blocks, start.map(|by| by * ratio), low), low);
        scale = d.where_more(gain, scale, best_gain);
        min = m.where_more(gain, min, best_gain);
        best_gain = gain.where_more(gain, best_gain, best_gain);
    }
    (half(scale), min)
}

/// Sums over each block of `y = x + low`, of the level q next to `by × y`, of q² and of y q. No number lies below `−low`,
/// nor beyond the highest level.
#[inline(always)]
fn sums(isa: Isa, blocks: &[Block], by: Lanes, low: Lanes) -> [Lanes; 4] {
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx2() {
        return avx2::sums(isa, blocks, by, low);
    }
    let _ = isa;
    over_blocks(blocks, [Op::Sum; 4], |l, block| {
        let mut chains = [[0.0f32; CHAINS]; 4];
        for x in block.as_chunks::<CHAINS>().0 {
            for c in 0..CHAINS {
                let y = x[c] + low.0[l];
                let q = round(y * by.0[l]);
                chains[0][c] += y;
                chains[1][c] += q;
                chains[2][c] = q.mul_add(q, chains[2][c]);
                chains[3][c] = q.mul_add(y, chains[3][c]);
            }
        }
        chains
    })
}

/// Scale, minimum and what they gain over `−low` everywhere. The minimum is rounded to f16 before the scale is found, which
/// makes good some of that.
#[inline(always)]
fn least_squares([y, q, qq, yq]: [Lanes; 4], low: Lanes) -> (Lanes, Lanes, Lanes) {
    const N: f32 = BLOCK as f32;
    let mut min = low;
    for l in 0..LANES {
        let (y, q, qq, yq) = (y.0[l], q.0[l], qq.0[l], yq.0[l]);
        let det = N * qq - q * q;
        let both = det > 1e-6 * N * qq;
        min.0[l] += if both { (q * yq - qq * y) / det } else { -y / N };
    }
    min = half(min);
    let (mut scale, mut gain) = (Lanes::ZERO, Lanes::ZERO);
    for l in 0..LANES {
        let (y, q, qq, yq, m) = (y.0[l], q.0[l], qq.0[l], yq.0[l], min.0[l] - low.0[l]);
        let wanted = yq + m * q;
        let d = if qq > 0.0 { wanted / qq } else { 0.0 };
        scale.0[l] = d;
        gain.0[l] = d * wanted - m * (2.0 * y + m * N);
    }
    (scale, min, gain)
}

/// The least and the largest number of each block.
#[inline(always)]
fn extremes(isa: Isa, blocks: &[Block]) -> [Lanes; 2] {
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx2() {
        return avx2::extremes(isa, blocks);
    }
    let _ = isa;
    over_blocks(blocks, [Op::Least, Op::Most], |_, block| {
        let mut chains = [[f32::MAX; CHAINS], [f32::MIN; CHAINS]];
        for x in block.as_chunks::<CHAINS>().0 {
            for c in 0..CHAINS {
                chains[0][c] = Op::Least.of(chains[0][c], x[c]);
                chains[1][c] = Op::Most.of(chains[1][c], x[c]);
            }
        }
        chains
    })
}

/// How chains become one.
#[derive(Clone, Copy)]
enum Op {
    Sum,
    Least,
    Most,
}

impl Op {
    #[inline(always)]
    fn of(self, a: f32, b: f32) -> f32 {
        match self {
            Op::Sum => a + b,
            Op::Least => {
                if b < a {
                    b
                } else {
                    a
                }
            }
            Op::Most => {
                if b > a {
                    b
                } else {
                    a
                }
            }
        }
    }
}

/// The chains of each block, made one: halves onto halves.
#[inline(always)]
fn over_blocks<const N: usize>(
    blocks: &[Block],
    ops: [Op; N],
    chains: impl Fn(usize, &Block) -> [[f32; CHAINS]; N],
) -> [Lanes; N] {
    let mut out = [Lanes::ZERO; N];
    for (l, block) in blocks.iter().enumerate() {
        for ((out, op), v) in out.iter_mut().zip(ops).zip(chains(l, block)) {
            let four: [f32; 4] = std::array::from_fn(|i| op.of(v[i], v[i + 4]));
            let two: [f32; 2] = std::array::from_fn(|i| op.of(four[i], four[i + 2]));
            out.0[l] = op.of(two[0], two[1]);
        }
    }
    out
}

/// Codes of the levels next to `by × (x + low)`.
#[inline(always)]
fn codes(isa: Isa, levels: Linear, block: &Block, by: f32, low: f32) -> [u8; BLOCK] {
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx2() {
        return avx2::codes(isa, levels, block, by, low);
    }
    let _ = isa;
    block.map(|v| Levels::Linear(levels).code((v + low) * by))
}

#[inline(always)]
fn halves(v: Lanes) -> [u16; LANES] {
    let mut out = [0; LANES];
    out.iter_mut().zip(v.0).for_each(|(out, v)| *out = f32_to_f16(v));
    out
}

#[cfg(test)]
mod tests {
    use super::{BLOCK, Block, Id, Kind, Mins};
    use crate::codec::{Matrix, codec};
    use crate::isa::Isa;
    use crate::minifloat::{f16_to_f32, f32_to_f16};

    #[test]
    fn no_type_loses_more_than_by_the_rounding_of_ggml() {
        for kind in [Id::Q4_0, Id::Q4_1, Id::Q5_0, Id::Q5_1, Id::Q8_0].map(Kind::of) {
            for (what, blocks) in contents() {
                let data = blocks.as_flattened();
                let codec = codec(kind.name).unwrap();
                let w = Matrix { rows: blocks.len(), cols: BLOCK, data };
                let planes = codec.encode(Isa::get(), w, None).unwrap();
                let mut decoded = vec![0.0; data.len()];
                codec.decode(Isa::get(), &[&planes[0]], w.rows, w.cols, 0, &mut decoded).unwrap();
                let ours: f64 = data.iter().zip(&decoded).map(|(a, b)| f64::from(a - b).powi(2)).sum();
                let plain: f64 = blocks.iter().map(|block| error_of_plain(kind, block)).sum();
                assert!(ours <= plain, "{} of {what}: {ours:e} instead of {plain:e}", kind.name);
            }
        }
    }

    /// Squared error of what ggml does (ggml-quants.c, `quantize_row_q4_0_ref` and its sisters).
    fn error_of_plain(kind: &Kind, block: &Block) -> f64 {
        let (least, most) = block.iter().fold((f32::MAX, f32::MIN), |(a, b), v| (a.min(*v), b.max(*v)));
        let widest = if most > -least { most } else { least };
        let (lo, hi, min, d) = match kind.id {
            Id::Q4_0 => (-8.0, 7.0, 0.0, widest / -8.0),
            Id::Q5_0 => (-16.0, 15.0, 0.0, widest / -16.0),
            Id::Q8_0 => (-127.0, 127.0, 0.0, widest.abs() / 127.0),
            Id::Q4_1 => (0.0, 15.0, least, (most - least) / 15.0),
            _ => (0.0, 31.0, least, (most - least) / 31.0),
        };
        let by = if d == 0.0 { 0.0 } else { 1.0 / d };
        let half = |v| f16_to_f32(f32_to_f16(v));
        assert!(min == 0.0 || kind.mins == Mins::Block);
        let decode = |v: f32| ((v - min) * by).round().clamp(lo, hi) * half(d) + half(min);
        block.iter().map(|v| f64::from(v - decode(*v)).powi(2)).sum()
    }

    fn contents() -> Vec<(&'static str, Vec<Block>)> {
        let mut state = 1u32;
        let mut uniform = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 16_777_216.0 - 0.5
        };
        let mut blocks = |f: fn(f32, usize) -> f32| -> Vec<Block> {
            let mut number = |i| f(uniform() + uniform() + uniform() + uniform(), i);
            (0..500).map(|_| std::array::from_fn(&mut number)).collect()
        };
        vec![
            ("bells", blocks(|v, _| v * 0.02)),
            ("long tails", blocks(|v, _| v * v * v)),
            ("outliers", blocks(|v, i| if i == 3 { 20.0 * v } else { v })),
            ("numbers above zero", blocks(|v, _| v.abs())),
            ("numbers far from zero", blocks(|v, _| 100.0 + v)),
            ("mostly zeros", blocks(|v, _| if v > 0.7 { v } else { 0.0 })),
            ("two values", blocks(|v, _| if v > 0.0 { 1.0 } else { -0.7 })),
            ("tiny numbers", blocks(|v, _| v * 1e-5)),
        ]
    }
}
