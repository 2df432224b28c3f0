//! Where the bits of each block type lie: a page a type, `read` and its inverse `write`.
//!
//! Layouts as in ggml (`ggml-common.h`, `ggml-quants.c`); goldens made with gguf-py hold us to them. A slice that is
//! shorter than a block is left alone.

pub mod iq4_xs;
pub mod legacy;
pub mod q2_k;
pub mod q3_k;
pub mod q4_k;
pub mod q6_k;

#[cfg(test)]
mod tests {
    use crate::codec::ggml::kinds::{KINDS, Mins, Parts};

    /// Every bit of a block has one place in its parts.
    #[test]
    fn what_is_read_is_written_back() {
        let mut state = 1u32;
        let mut byte = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        for kind in KINDS {
            for _ in 0..200 {
                let block: Vec<u8> = (0..kind.block_bytes).map(|_| byte()).collect();
                let mut parts = Parts::EMPTY;
                parts.read(kind, &block);
                let mut back = vec![0; block.len()];
                parts.write(kind, &mut back);
                assert_eq!(back, block, "{}", kind.name);
                let groups = kind.n_groups();
                let within = |codes: &[i8], (lo, hi)| codes.iter().all(|c| (lo..=hi).contains(c));
                assert!(within(&parts.scales[..groups], kind.scales), "{}: {:?}", kind.name, parts.scales);
                if let Mins::Groups(most) = kind.mins {
                    assert!(within(&parts.mins[..groups], (0, most)), "{}: {:?}", kind.name, parts.mins);
                }
            }
        }
    }
}
