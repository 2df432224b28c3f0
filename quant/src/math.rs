//! Elementary functions and row operations with the same bits on every machine.
//!
//! Everything is made of IEEE operations that are exact by definition (add, multiply, fused multiply-add, divide,
//! square root), in a fixed order: sums have sixteen partial sums and a fixed tree, `exp` is our own polynomial, the
//! rest comes from the `libm` crate. Nothing calls the platform's mathematics library.

use crate::isa::Isa;
use crate::per_isa;

/// Partial sums of every sum over a row.
const LANES: usize = 16;

/// e^x, within 1 ulp. 0 below -103.98, infinity above 88.73, NaN for NaN; subnormal results are rounded once.
///
/// x = n·ln 2 + r with |r| <= ln 2 / 2; e^r by a polynomial of degree 7 (relative error 2^-27 before rounding);
/// times 2^n in two steps, so that neither factor leaves the normal numbers.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    /// ln 2 in two parts: as f32, and what is missing. x - n times the first is exact, being fused.
    const LN2: (f32, f32) = (std::f32::consts::LN_2, -1.904_654_2e-9);
    /// 1.5 · 2^23: adding it rounds to an integer, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    // Comparisons with NaN are false, so NaN goes through.
    let x = if x > 89.0 { 89.0 } else { x };
    let x = if x < -104.0 { -104.0 } else { x };
    let rounded = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = rounded.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    let whole = rounded - ROUND;
    let r = whole.mul_add(-LN2.1, whole.mul_add(-LN2.0, x));
    // 1/7! … 1/2!; near enough to the minimax coefficients at this |r|.
    let mut p = 1.984_127e-4_f32;
    for c in [1.388_888_9e-3, 8.333_334e-3, 4.166_666_8e-2, 1.666_666_7e-1, 0.5] {
        p = p.mul_add(r, c);
    }
    // 1 + r + p·r², with what the first sum loses given back.
    let sum = 1.0 + r;
    let e = sum + (p * r).mul_add(r, r - (sum - 1.0));
    let half = n >> 1;
    e * power_of_two(half) * power_of_two(n.wrapping_sub(half))
}

/// 2^n for a normal result.
#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// Natural logarithm, correctly rounded in nearly all cases.
pub fn log(x: f64) -> f64 {
    libm::log(x)
}

/// 1 / (1 + e^-x)
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// x · sigmoid(x)
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// Sine and cosine of an angle in radians that was computed in f32.
pub fn sin_cos(angle: f32) -> (f32, f32) {
    let (sin, cos) = libm::sincos(f64::from(angle));
    (sin as f32, cos as f32)
}

/// Adds lanes in a fixed tree: halves onto halves.
#[inline(always)]
fn tree<T: Copy + std::ops::Add<Output = T>>(mut lanes: [T; LANES]) -> T {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = lanes[i] + lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Largest value; NaN is passed over.
#[inline(always)]
fn max_of(x: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, v);
        }
    }
    rest.iter().chain(&lanes).fold(f32::NEG_INFINITY, |a, &b| larger(a, b))
}

#[inline(always)]
fn sum_squares_body(x: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane = v.mul_add(v, *lane);
        }
    }
    for (lane, &v) in lanes.iter_mut().zip(rest) {
        *lane = v.mul_add(v, *lane);
    }
    tree(lanes)
}

#[inline(always)]
fn exp_sub_body(x: &mut [f32], max: f32) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let (chunks, rest) = x.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *v = exp(*v - max);
            *lane += *v;
        }
    }
    for (lane, v) in lanes.iter_mut().zip(rest) {
        *v = exp(*v - max);
        *lane += *v;
    }
    tree(lanes)
}

#[inline(always)]
fn softmax_body(x: &mut [f32], sink: Option<f32>) {
    let max = max_of(x);
    let max = sink.map_or(max, |s| if s > max { s } else { max });
    let mut sum = exp_sub_body(x, max);
    if let Some(sink) = sink {
        sum += exp(sink - max);
    }
    for v in x {
        *v /= sum;
    }
}

#[inline(always)]
fn log_sum_exp_body(x: &[f32]) -> f64 {
    let max = max_of(x);
    let mut lanes = [0.0_f64; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(exp(v - max));
        }
    }
    for (lane, &v) in lanes.iter_mut().zip(rest) {
        *lane += f64::from(exp(v - max));
    }
    f64::from(max) + log(tree(lanes))
}

#[inline(always)]
fn scaled_body(x: &[f32], factor: f32, weight: &[f32], out: &mut [f32]) {
    for ((out, &x), &w) in out.iter_mut().zip(x).zip(weight) {
        *out = x * factor * w;
    }
}

#[inline(always)]
fn scale_body(x: &mut [f32], factor: f32, weight: &[f32]) {
    for (x, &w) in x.iter_mut().zip(weight) {
        *x = *x * factor * w;
    }
}

#[inline(always)]
fn silu_mul_body(gate: &mut [f32], up: &[f32]) {
    for (g, &u) in gate.iter_mut().zip(up) {
        *g = silu(*g) * u;
    }
}

#[inline(always)]
fn clamped_swish_body(gate: &mut [f32], up: &[f32], alpha: f32, limit: f32) {
    for (g, &u) in gate.iter_mut().zip(up) {
        let gate = if *g > limit { limit } else { *g };
        let up = if u > limit { limit } else { u };
        let up = if up < -limit { -limit } else { up };
        *g = (up + 1.0) * (gate * sigmoid(alpha * gate));
    }
}

#[inline(always)]
fn add_scaled_body(acc: &mut [f32], factor: f32, x: &[f32]) {
    for (acc, &x) in acc.iter_mut().zip(x) {
        *acc = x.mul_add(factor, *acc);
    }
}

#[inline(always)]
fn add_body(acc: &mut [f32], x: &[f32]) {
    for (acc, &x) in acc.iter_mut().zip(x) {
        *acc += x;
    }
}

#[inline(always)]
fn exp_all_body(x: &mut [f32]) {
    for v in x {
        *v = exp(*v);
    }
}

#[inline(always)]
fn sigmoid_all_body(x: &mut [f32]) {
    for v in x {
        *v = sigmoid(*v);
    }
}

per_isa! {
    /// Sum of squares.
    pub fn sum_squares(x: &[f32]) -> f32 = sum_squares_body;
}
per_isa! {
    /// Softmax of a row in place. `sink` is one more logit, which takes its share and gives nothing.
    pub fn softmax(x: &mut [f32], sink: Option<f32>) = softmax_body;
}
per_isa! {
    /// ln Σ e^x of a row of logits, summed in f64. NaN or -infinity alone make NaN.
    pub fn log_sum_exp(x: &[f32]) -> f64 = log_sum_exp_body;
}
per_isa! {
    /// out = x · factor · weight, value by value.
    pub fn scaled(x: &[f32], factor: f32, weight: &[f32], out: &mut [f32]) = scaled_body;
}
per_isa! {
    /// x = x · factor · weight, value by value.
    pub fn scale(x: &mut [f32], factor: f32, weight: &[f32]) = scale_body;
}
per_isa! {
    /// gate = silu(gate) · up
    pub fn silu_mul(gate: &mut [f32], up: &[f32]) = silu_mul_body;
}
per_isa! {
    /// gate = (clamp(up, ±limit) + 1) · g · sigmoid(alpha · g) with g = min(gate, limit)
    pub fn clamped_swish(gate: &mut [f32], up: &[f32], alpha: f32, limit: f32) = clamped_swish_body;
}
per_isa! {
    /// acc += factor · x, fused
    pub fn add_scaled(acc: &mut [f32], factor: f32, x: &[f32]) = add_scaled_body;
}
per_isa! {
    /// acc += x
    pub fn add(acc: &mut [f32], x: &[f32]) = add_body;
}
per_isa! {
    /// [`exp`] of each value in place.
    pub fn exp_all(x: &mut [f32]) = exp_all_body;
}
per_isa! {
    /// [`sigmoid`] of each value in place.
    pub fn sigmoid_all(x: &mut [f32]) = sigmoid_all_body;
}

/// 1 / sqrt(mean(x²) + eps): what a row is multiplied by before the weight of an RMS norm.
pub fn rms_factor(isa: Isa, x: &[f32], eps: f32) -> f32 {
    1.0 / (sum_squares(isa, x) / x.len() as f32 + eps).sqrt()
}

/// out = x · rsqrt(mean(x²) + eps) · weight, for one row.
pub fn rms_norm(isa: Isa, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let factor = rms_factor(isa, x, eps);
    scaled(isa, x, factor, weight, out);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Distance in units of the last place of the true value.
    fn ulps(got: f32, truth: f64) -> f64 {
        let nearest = truth as f32;
        let ulp = f64::from(f32::from_bits(nearest.to_bits() + 1)) - f64::from(nearest);
        (f64::from(got) - truth).abs() / ulp
    }

    #[test]
    fn exp_is_within_one_ulp_over_its_whole_range() {
        let mut worst = (0.0, 0.0);
        for i in -1_039_700..=887_200 {
            let x = i as f32 * 1e-4;
            let error = ulps(exp(x), libm::exp(f64::from(x)));
            worst = if error > worst.0 { (error, x) } else { worst };
        }
        assert!(worst.0 < 1.0, "{} ulp at {}", worst.0, worst.1);
    }

    #[test]
    fn exp_at_its_extremes() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(88.73), f32::INFINITY);
        assert!(exp(88.72).is_finite());
        assert_eq!(exp(f32::MAX), f32::INFINITY);
        assert_eq!(exp(f32::MIN), 0.0);
        assert_eq!(exp(-103.0), libm::exp(-103.0) as f32);
        assert!(exp(f32::NAN).is_nan());
        assert_eq!(exp(f32::MIN_POSITIVE), 1.0);
    }

    fn row(len: usize, seed: u32) -> Vec<f32> {
        let mut s = seed | 1;
        let mut next = || {
            s = s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (s >> 8) as f32 / (1 << 21) as f32 - 4.0
        };
        (0..len).map(|_| next()).collect()
    }

    fn close(got: f32, truth: f64, what: &str) {
        let error = (f64::from(got) - truth).abs();
        assert!(error <= 1e-6 * truth.abs().max(1e-3), "{what}: {got}, but {truth}");
    }

    #[test]
    fn row_operations_agree_with_f64() {
        for len in [1, 5, 16, 17, 100, 1000] {
            let (x, w) = (row(len, 3), row(len, 4));
            let mut out = vec![0.0; len];
            rms_norm(Isa::get(), &x, &w, 1e-6, &mut out);
            let mean = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / len as f64;
            for ((&out, &x), &w) in out.iter().zip(&x).zip(&w) {
                close(out, f64::from(x) * f64::from(w) / (mean + 1e-6).sqrt(), "rms_norm");
            }
            let sum = x.iter().map(|&v| libm::exp(f64::from(v))).sum::<f64>();
            let lse = log_sum_exp(Isa::get(), &x);
            assert!((lse - libm::log(sum)).abs() < 2e-7, "log_sum_exp: {lse}, but {}", libm::log(sum));
            for sink in [None, Some(1.5_f32), Some(-50.0), Some(80.0)] {
                let mut soft = x.clone();
                softmax(Isa::get(), &mut soft, sink);
                let sum = sum + sink.map_or(0.0, |s| libm::exp(f64::from(s)));
                for (&soft, &x) in soft.iter().zip(&x) {
                    let truth = libm::exp(f64::from(x)) / sum;
                    assert!(
                        (f64::from(soft) - truth).abs() <= 1e-6 * truth + 1e-30,
                        "softmax: {soft}, but {truth}"
                    );
                }
            }
        }
    }

    #[test]
    fn activations_agree_with_f64() {
        let (gate, up) = (row(100, 5), row(100, 6));
        let sigmoid = |x: f64| 1.0 / (1.0 + libm::exp(-x));
        let (mut silu, mut swish) = (gate.clone(), gate.clone());
        silu_mul(Isa::get(), &mut silu, &up);
        clamped_swish(Isa::get(), &mut swish, &up, 1.702, 2.5);
        for i in 0..gate.len() {
            let (g, u) = (f64::from(gate[i]), f64::from(up[i]));
            close(silu[i], g * sigmoid(g) * u, "silu");
            let g = g.min(2.5);
            close(swish[i], (u.clamp(-2.5, 2.5) + 1.0) * g * sigmoid(1.702 * g), "clamped swish");
        }
        assert_eq!(super::sigmoid(f32::NEG_INFINITY), 0.0);
        assert_eq!(super::sigmoid(f32::INFINITY), 1.0);
        assert_eq!(super::silu(-200.0), -0.0);
        let (sin, cos) = sin_cos(1234.5);
        close(sin, libm::sin(1234.5), "sin");
        close(cos, libm::cos(1234.5), "cos");
    }

    #[test]
    fn every_level_gives_the_same_bits() {
        for len in [1, 15, 16, 33, 257] {
            let (mut x, w) = (row(len, 7), row(len, 8));
            x[0] = -700.0;
            let of = |isa: Isa| {
                let mut all = vec![sum_squares(isa, &x).to_bits()];
                let lse = log_sum_exp(isa, &x).to_bits();
                all.extend([lse as u32, (lse >> 32) as u32]);
                let mut run = |f: &dyn Fn(&mut [f32])| {
                    let mut y = x.clone();
                    f(&mut y);
                    all.extend(y.iter().map(|v| v.to_bits()));
                };
                run(&|y| softmax(isa, y, None));
                run(&|y| softmax(isa, y, Some(0.25)));
                run(&|y| rms_norm(isa, &x, &w, 1e-5, y));
                run(&|y| scale(isa, y, 0.7, &w));
                run(&|y| silu_mul(isa, y, &w));
                run(&|y| clamped_swish(isa, y, &w, 1.702, 7.0));
                run(&|y| add_scaled(isa, y, 0.3, &w));
                run(&|y| add(isa, y, &w));
                run(&|y| exp_all(isa, y));
                run(&|y| sigmoid_all(isa, y));
                all
            };
            for isa in Isa::available() {
                assert_eq!(of(isa), of(Isa::SCALAR), "{} at {len} values", isa.name());
            }
        }
    }
}
