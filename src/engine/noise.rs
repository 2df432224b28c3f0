//! White noise on weights: what a quantizer does to a matrix, without one.
//!
//! The noise of an entry is a hash of where it is, so it is the same for any order of work and any number of threads.

use moepack_convert::Expert;
use moepack_convert::spec::Part;

/// What a quantizer does to a matrix.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Disturbance {
    /// White noise: its squared sum relative to that of the matrix.
    pub white: f64,
    /// Weights become smaller by this share.
    pub shrink: f64,
}

/// Disturbs one matrix, if it is there, of the expert that is `index` in its layer.
pub fn disturb_part(
    expert: &mut Expert,
    (layer, index, part): (usize, usize, Part),
    disturbance: Disturbance,
) {
    let matrix = match part {
        Part::Gate => expert.gate.as_mut(),
        Part::Up => Some(&mut expert.up),
        _ => Some(&mut expert.down),
    };
    if let Some(matrix) = matrix {
        disturb(matrix, seed(layer, index, part), disturbance);
    }
}

fn disturb(matrix: &mut [f32], seed: u64, Disturbance { white, shrink }: Disturbance) {
    let squares: f64 = matrix.iter().map(|&w| f64::from(w) * f64::from(w)).sum();
    let rms = (squares / matrix.len().max(1) as f64).sqrt();
    // Uniform between −a and a has the variance a²/3.
    let amplitude = (rms * (3.0 * white).sqrt()) as f32;
    let kept = (1.0 - shrink) as f32;
    for (i, w) in matrix.iter_mut().enumerate() {
        *w = kept * *w + amplitude * unit(mixed(seed.wrapping_add(i as u64)));
    }
}

fn seed(layer: usize, index: usize, part: Part) -> u64 {
    mixed(mixed(mixed(layer as u64) ^ index as u64) ^ part as u64)
}

/// From −1 to 1.
fn unit(hash: u64) -> f32 {
    (hash >> 40) as f32 / (1 << 23) as f32 - 1.0
}

/// The finalizer of splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", §5).
fn mixed(value: u64) -> u64 {
    let z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_has_the_energy_that_was_asked_for_and_no_mean() {
        let w: Vec<f32> = (0..40_000).map(|i| ((i % 7) as f32 - 3.0) * 0.1).collect();
        let mut noisy = w.clone();
        disturb(&mut noisy, seed(3, 17, Part::Up), Disturbance { white: 0.01, shrink: 0.0 });
        let energy = |v: &[f32]| v.iter().map(|&x| f64::from(x * x)).sum::<f64>();
        let noise: Vec<f32> = w.iter().zip(&noisy).map(|(a, b)| b - a).collect();
        let relative = energy(&noise) / energy(&w);
        assert!((relative - 0.01).abs() < 3e-4, "{relative}");
        let mean = noise.iter().sum::<f32>() / noise.len() as f32;
        assert!(mean.abs() < 1e-3, "{mean}");
        assert_ne!(seed(0, 1, Part::Up), seed(1, 0, Part::Up));
    }
}
