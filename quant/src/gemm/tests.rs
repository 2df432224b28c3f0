//! Every level against three obvious lines.

use super::*;

/// Three lines, obviously right.
fn naive(x: &[f32], w: &[f32], t: usize, k: usize, n: usize) -> Vec<f32> {
    let dot = |r: usize, c: usize| (0..k).fold(0.0_f32, |s, i| x[r * k + i].mul_add(w[c * k + i], s));
    (0..t).flat_map(|r| (0..n).map(move |c| dot(r, c))).collect()
}

fn numbers(len: usize, seed: u32) -> Vec<f32> {
    let mut s = seed.wrapping_mul(2654435761).wrapping_add(1);
    let mut next = || {
        s ^= s << 13;
        s ^= s >> 17;
        s ^= s << 5;
        (s >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next() * 2.0_f32.powi((len % 7) as i32)).collect()
}

fn bits(v: &[f32]) -> Vec<u32> {
    v.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn every_level_equals_the_definition_for_every_remainder() {
    let mut shapes = vec![(1, 1, 1), (97, 300, 530), (100, 513, 47), (3, 0, 5), (0, 4, 4), (4, 4, 0)];
    shapes.extend((1..=26).map(|t| (t, 7, 33)));
    shapes.extend((1..=49).map(|n| (5, 19, n)));
    for (t, k, n) in shapes {
        let (x, w) = (numbers(t * k, 1), numbers(n * k, 2));
        let expected = naive(&x, &w, t, k, n);
        for isa in Isa::available() {
            let mut out = vec![f32::NAN; t * n];
            matmul_t(isa, &x, &w, t, k, n, &mut out);
            assert_eq!(bits(&out), bits(&expected), "{} [{t}, {k}] x [{n}, {k}]", isa.name());
        }
    }
}

#[test]
fn parts_of_inputs_and_outputs_are_the_same_chains() {
    let (t, k, n) = (30, 600, 80);
    let (x, w) = (numbers(t * k, 3), numbers(n * k, 4));
    let packed = PackedWeights::pack(&w, n, k);
    let (ns, ks) = (32..70, 10..590);
    for isa in Isa::available() {
        let mut out = vec![7.0_f32; t * 50];
        let rows = Rows { data: &x[ks.start..], stride: k };
        packed.matmul_part(isa, rows, t, ns.clone(), ks.clone(), &mut out, 50);
        for (r, row) in out.chunks(50).enumerate() {
            for (c, value) in row.iter().enumerate() {
                let chain =
                    ks.clone().fold(0.0_f32, |s, i| x[r * k + i].mul_add(w[(32 + c).min(79) * k + i], s));
                let expected = if c < ns.len() { chain } else { 7.0 };
                assert_eq!(value.to_bits(), expected.to_bits(), "{} row {r} column {c}", isa.name());
            }
        }
        let mut pieces = vec![0.0_f32; t * 50];
        for ks in [10..11, 11..300, 300..300, 300..590] {
            let rows = Rows { data: &x[ks.start..], stride: k };
            packed.matmul_part_onto(isa, rows, t, ns.clone(), ks, &mut pieces, 50);
        }
        let inside = |v: &[f32]| v.chunks(50).flat_map(|r| bits(&r[..38])).collect::<Vec<_>>();
        assert_eq!(inside(&pieces), inside(&out), "{} in pieces", isa.name());
    }
}

#[test]
fn packing_the_transpose_of_the_transpose_changes_nothing() {
    let (n, k) = (37, 21);
    let w = numbers(n * k, 5);
    let transposed: Vec<f32> =
        (0..k).flat_map(|i| (0..n).map(move |r| (r, i))).map(|(r, i)| w[r * k + i]).collect();
    let mut packed = PackedWeights::pack(&numbers(64 * 64, 6), 64, 64);
    packed.repack_transposed(Rows { data: &transposed, stride: n }, k, n);
    let x = numbers(3 * k, 7);
    let mut out = vec![0.0; 3 * n];
    packed.matmul(Isa::SCALAR, &x, &mut out);
    assert_eq!(bits(&out), bits(&naive(&x, &w, 3, k, n)));
    assert_eq!((packed.n(), packed.k(), packed.bytes()), (n, k, 3 * 21 * 64));
    let mut by_parts = PackedWeights::zeros(n, k);
    by_parts.set_rows(0, Rows { data: &w, stride: k }, 16);
    by_parts.set_rows(16, Rows { data: &w[16 * k..], stride: k }, n - 16);
    let mut again = vec![0.0; 3 * n];
    by_parts.matmul(Isa::SCALAR, &x, &mut again);
    assert_eq!(bits(&again), bits(&out), "packed by parts");
    let mut by_inputs = PackedWeights::zeros(n, k);
    for (i, column) in transposed.chunks(n).enumerate() {
        by_inputs.set_input(i, column);
    }
    by_inputs.matmul(Isa::SCALAR, &x, &mut again);
    assert_eq!(bits(&again), bits(&out), "packed by inputs");
}

#[test]
fn nan_and_infinity_reach_exactly_the_outputs_they_belong_to() {
    let (t, k, n) = (13, 5, 34);
    let (mut x, mut w) = (vec![1.0_f32; t * k], vec![1.0_f32; n * k]);
    (x[2 * k + 1], w[33 * k]) = (f32::NAN, f32::INFINITY);
    for isa in Isa::available() {
        let mut out = vec![0.0; t * n];
        matmul_t(isa, &x, &w, t, k, n, &mut out);
        for (i, v) in out.iter().enumerate() {
            let (r, c) = (i / n, i % n);
            let right = match (r, c) {
                (2, _) => v.is_nan(),
                (_, 33) => *v == f32::INFINITY,
                _ => *v == 5.0,
            };
            assert!(right, "{} row {r} column {c}: {v}", isa.name());
        }
    }
}
