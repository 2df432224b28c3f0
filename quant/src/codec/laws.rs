//! What holds for every codec: run over each example of each row of [`CODECS`], so that a new one is tested on arrival.

use moepack_format::Kind;
use proptest::prelude::*;

use super::*;

/// Every codec of every row's examples.
fn all() -> Vec<CodecRef> {
    CODECS.iter().flat_map(|family| family.examples).map(|name| codec(name).unwrap()).collect()
}

/// What a codec promises about its error: half of the largest step between levels, relative to the largest magnitude
/// that shares a scale with the weight, and a little for the rounding of the scale itself.
fn relative_bound(name: &str) -> f32 {
    match name {
        "f32" => 0.0,
        "bf16" => 0.0040,
        "f16" => 0.0005,
        _ if name.starts_with("fp8") => 0.07,
        "mxfp4" | "nvfp4" => 0.5,
        _ => match name.as_bytes()[3] {
            b'2' => 0.9,
            b'3' => 0.5,
            b'4' => 0.25,
            b'5' => 0.1,
            b'6' => 0.05,
            _ => 0.01,
        },
    }
}

/// Shapes that every codec takes, and some that only those with ragged groups take.
const SHAPES: &[(usize, usize)] =
    &[(1, 32), (3, 64), (17, 96), (5, 416), (130, 160), (2, 1), (3, 33), (7, 200), (129, 131)];

/// Reproducible numbers: splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// In (0, 1).
    fn uniform(&mut self) -> f64 {
        ((self.next() >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    /// N(0, 1) by Box and Muller.
    fn normal(&mut self) -> f32 {
        let (radius, angle) = ((-2.0 * self.uniform().ln()).sqrt(), std::f64::consts::TAU * self.uniform());
        (radius * angle.cos()) as f32
    }
}

/// Matrices that are hard in one way each.
fn contents(n: usize, seed: u64) -> Vec<(&'static str, Vec<f32>)> {
    let mut r = Random(seed);
    let mut make =
        |f: &mut dyn FnMut(&mut Random, usize) -> f32| (0..n).map(|i| f(&mut r, i)).collect::<Vec<f32>>();
    vec![
        ("normal", make(&mut |r, _| r.normal() * 0.02)),
        ("uniform", make(&mut |r, _| r.uniform() as f32 - 0.3)),
        ("zero", vec![0.0; n]),
        ("constant", vec![0.7; n]),
        ("negative", make(&mut |r, _| -0.1 - r.uniform() as f32)),
        ("outliers", make(&mut |r, i| if i % 97 == 5 { 3000.0 } else { r.normal() * 0.01 })),
        ("one zero group", make(&mut |r, i| if i / 64 % 2 == 0 { 0.0 } else { r.normal() })),
        (
            "denormal",
            make(&mut |r, _| {
                f32::from_bits((r.next() >> 41) as u32) * if r.next() & 1 == 0 { 1.0 } else { -1.0 }
            }),
        ),
        ("tiny", make(&mut |r, _| r.normal() * 1e-7)),
        ("large", make(&mut |r, _| r.normal() * 1e4)),
        ("minus zero", vec![-0.0; n]),
        ("ties", make(&mut |r, _| ((r.next() % 31) as f32 - 15.0) / 4.0)),
    ]
}

fn takes(codec: &dyn Codec, rows: usize, cols: usize) -> bool {
    match codec.planes(rows, cols) {
        Ok(_) => true,
        Err(e) => {
            assert_eq!(e.kind(), Kind::Plan, "{}: {e}", codec.name());
            assert!(e.to_string().contains("hint:"), "{}: {e}", codec.name());
            false
        }
    }
}

fn decode_all(isa: Isa, codec: &dyn Codec, planes: &Planes, rows: usize, cols: usize) -> Vec<f32> {
    let planes: Vec<&[u8]> = planes.iter().map(Vec::as_slice).collect();
    let mut out = vec![f32::from_bits(0x7fff_1234); rows * cols];
    codec.decode(isa, &planes, rows, cols, 0, &mut out).unwrap();
    out
}

fn assert_same(what: &str, found: &[f32], expected: &[f32]) {
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert_eq!(f.to_bits(), e.to_bits(), "{what}: value {i} is {f:e} instead of {e:e}");
    }
}

/// Calls `check` with every codec, every shape it takes and every content that it takes.
fn for_all(check: impl Fn(&str, &dyn Codec, Matrix<'_>, &Planes)) {
    let isa = Isa::get();
    for codec in all() {
        for (s, &(rows, cols)) in SHAPES.iter().enumerate() {
            if !takes(&*codec, rows, cols) {
                continue;
            }
            for (content, data) in contents(rows * cols, s as u64) {
                let what = format!("{} [{rows}, {cols}] {content}", codec.name());
                let w = Matrix { rows, cols, data: &data };
                let planes = codec.encode(isa, w, None).unwrap_or_else(|e| panic!("{what}: {e}"));
                check(&what, &*codec, w, &planes);
            }
        }
    }
}

#[test]
fn names_parse_back_to_themselves() {
    for family in CODECS {
        for name in family.examples {
            assert_eq!(codec(name).unwrap().name(), *name);
            assert_eq!(
                CODECS.iter().filter(|f| (f.parse)(name).is_some()).count(),
                1,
                "{name} has two meanings"
            );
        }
    }
    for (given, canonical) in [
        ("int4", "int4-g64"),
        ("int8-sym", "int8-g64"),
        ("int3-g32-sym", "int3-g32"),
        ("fp8-block-128x128-f32", "fp8-block"),
    ] {
        assert_eq!(codec(given).unwrap().name(), canonical);
    }
    for wrong in [
        "",
        "int",
        "int7",
        "int4-",
        "int4-g16",
        "int4-g064",
        "int4-asym-g64",
        "int04",
        "int+4",
        "INT4",
        "mxfp4-",
        "fp8",
        "fp8-block-",
        "fp8-block-0x1",
        "fp8-block-01x1",
        "fp8-block-+1x1",
        "fp8-block-1x",
        "fp8-block-9999999x1",
        "bf16 ",
        "int4-g64-asym-asym",
    ] {
        assert!(codec(wrong).is_err(), "{wrong:?}");
    }
}

#[test]
fn planes_are_as_long_as_they_say_and_bits_per_weight_counts_them() {
    for_all(|what, codec, w, planes| {
        let specs = codec.planes(w.rows, w.cols).unwrap();
        assert_eq!(specs.len(), planes.len(), "{what}");
        for (spec, plane) in specs.iter().zip(planes) {
            assert_eq!(spec.bytes().unwrap(), plane.len() as u64, "{what}, {}", spec.name);
        }
        let bytes: usize = planes.iter().map(Vec::len).sum();
        let expected = bytes as f64 * 8.0 / w.data.len() as f64;
        assert_eq!(codec.bits_per_weight(w.rows, w.cols).unwrap(), expected, "{what}");
    });
}

#[test]
fn the_error_is_within_the_bound() {
    for_all(|what, codec, w, planes| {
        let decoded = decode_all(Isa::get(), codec, planes, w.rows, w.cols);
        for (i, (&d, &v)) in decoded.iter().zip(w.data).enumerate() {
            let row = &w.data[i / w.cols * w.cols..][..w.cols];
            let largest = row.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            let whole = w.data.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            let largest = if codec.name().starts_with("fp8") { whole } else { largest };
            // Below this the scales of f16 (and of NVFP4's matrix) end.
            let floor = if codec.name().starts_with("int") {
                1e-5
            } else if codec.name().starts_with('n') {
                whole * 1e-5 + 1e-37
            } else {
                1e-37
            };
            let floor = if codec.name() == "f16" { 3e-8 } else { floor };
            let bound = largest * relative_bound(&codec.name()) + floor;
            assert!((d - v).abs() <= bound, "{what}: value {i} {v:e} became {d:e}, bound {bound:e}");
        }
    });
}
