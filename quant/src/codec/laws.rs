//! What holds for every codec: run over each example of each row of [`CODECS`], so that a new one is tested on arrival.

use moepack_format::Kind;

use super::*;

mod any;
mod columns;

/// Shapes that every codec takes, and some that only those with ragged groups take.
const SHAPES: &[(usize, usize)] = &[
    (1, 32),
    (3, 64),
    (17, 96),
    (5, 416),
    (130, 160),
    (2, 1),
    (3, 33),
    (7, 200),
    (129, 131),
    (1, 256),
    (9, 512),
];

/// How far a decoded weight may be off, relative to the largest magnitude that can share a scale with it: half a step
/// between levels, or as much as clipping an outlier may cost where that is more.
fn relative_bound(codec: &str) -> f32 {
    match codec {
        "f32" => 0.0,
        "bf16" => 0.0040,
        "f16" => 0.0005,
        "mxfp4" | "nvfp4" | "nvfp4-div" => 0.5,
        _ if codec.starts_with("fp8") => 0.07,
        // The rate decides, and the smallest matrices have hardly any.
        _ if codec.starts_with("tcq") => 1.5,
        "q2_k" | "q3_k" => 0.9,
        "q4_0" | "q4_1" | "q4_k" | "iq4_nl" | "iq4_xs" => 0.3,
        "q5_0" | "q5_1" | "q5_k" => 0.15,
        "q6_k" => 0.1,
        _ if codec.starts_with("int2") || codec.starts_with("affine2") => 0.9,
        _ if codec.starts_with("int3") || codec.starts_with("affine3") => 0.5,
        _ if codec.starts_with("int4") || codec.starts_with("affine4") => 0.3,
        _ if codec.starts_with("int5") || codec.starts_with("affine5") => 0.15,
        _ if codec.starts_with("int6") || codec.starts_with("affine6") => 0.1,
        _ => 0.05,
    }
}

/// Where scales (or numbers) end: weights this small may become zero in a matrix whose largest is `largest`.
fn absolute_bound(codec: &str, largest: f32) -> f32 {
    match codec {
        "f32" | "bf16" => 1e-40,
        "f16" => 3e-8,
        "fp8-block-1x4096-f16" => 3e-8,
        "nvfp4" | "nvfp4-div" => largest * 1e-5 + 1e-37,
        _ if codec.starts_with("int") || is_ggml(codec) => 1e-5,
        _ if codec.starts_with("affine") && !codec.contains("-bf16") && !codec.contains("-f32") => 1e-5,
        _ => 1e-37,
    }
}

fn is_ggml(codec: &str) -> bool {
    codec.starts_with('q') || codec.starts_with("iq")
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
    let other_spellings = [
        ("int4", "int4-g64"),
        ("int8-sym", "int8-g64"),
        ("int3-g32-sym", "int3-g32"),
        ("int2-asym", "int2-g64-asym"),
        ("fp8-block-128x128-f32", "fp8-block"),
    ];
    for (given, canonical) in other_spellings {
        assert_eq!(codec(given).unwrap().name(), canonical);
    }
}

#[test]
fn no_other_name_is_a_codec() {
    let wrong = "int int7 int4- int4-g16 int4-g064 int4-asym-g64 int04 int+4 INT4 int4-g64-asym-asym int4-g64-x mxfp4- \
                 fp8 fp8-block- fp8-block-0x1 fp8-block-01x1 fp8-block-+1x1 fp8-block-1x fp8-block-9999999x1 \
                 fp8-block-99999999999999999999x1 fp8-block-bf16-bf16 affine4 affine9-g8 affine4-g08 bf16-g64 Q4_K q4k q7_0 q4_k_m iq4 bf16\u{a0}";
    for name in wrong.split(' ').chain([""]) {
        assert_eq!(codec(name).map(|c| c.name()).unwrap_err().kind(), Kind::Usage, "{name:?}");
    }
}

#[test]
fn planes_are_as_long_as_they_say_and_bits_per_weight_counts_them() {
    for_all(|what, codec, w| {
        let planes = codec.encode(Isa::get(), w, None).unwrap();
        let most = codec.planes(w.rows, w.cols).unwrap();
        let specs = codec.planes_of(w.rows, w.cols, &planes).unwrap();
        assert_eq!((most.len(), specs.len()), (planes.len(), planes.len()), "{what}");
        for ((spec, most), plane) in specs.iter().zip(&most).zip(&planes) {
            assert_eq!(spec.bytes().unwrap(), plane.len() as u64, "{what}, {}", spec.name);
            assert!(most.bytes().unwrap() >= plane.len() as u64, "{what}, {}", spec.name);
        }
        let bytes: usize = planes.iter().map(Vec::len).sum();
        let found = bytes as f64 * 8.0 / w.data.len() as f64;
        let most = codec.bits_per_weight(w.rows, w.cols).unwrap();
        assert!(found == most || any::has_rates(codec) && found < most, "{what}: {found} of {most} bits");
    });
}

#[test]
fn the_error_is_within_the_bound() {
    for_all(|what, codec, w| {
        let name = codec.name();
        let decoded = round_trip(codec, w, None);
        let largest = |data: &[f32]| data.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let whole = largest(w.data);
        for (r, (decoded, row)) in decoded.chunks(w.cols).zip(w.data.chunks(w.cols)).enumerate() {
            let whole_shares = name.starts_with("fp8") || name.starts_with("tcq");
            let shares_scale = if whole_shares { whole } else { largest(row) };
            let bound = shares_scale * relative_bound(&name) + absolute_bound(&name, whole);
            for (c, (&d, &v)) in decoded.iter().zip(row).enumerate() {
                assert!((d - v).abs() <= bound, "{what}: {v:e} in [{r}, {c}] became {d:e}, bound {bound:e}");
            }
        }
    });
}

#[test]
fn zeros_stay_zeros() {
    for_all(|what, codec, w| {
        if w.data.iter().all(|&v| v == 0.0) {
            assert!(round_trip(codec, w, None).iter().all(|&v| v == 0.0), "{what}");
        }
    });
}

#[test]
fn float_codecs_keep_what_they_once_rounded() {
    for_all(|what, codec, w| {
        if ["bf16", "f16", "f32", "mxfp4"].contains(&codec.name().as_str()) {
            let once = round_trip(codec, w, None);
            let twice = round_trip(codec, Matrix { data: &once, ..w }, None);
            assert_same(what, &twice, &once);
        }
    });
}

#[test]
fn every_level_writes_the_same_bytes_and_reads_the_same_numbers() {
    for_all(|what, codec, w| {
        for importance in [None, Some(importance(w.cols))] {
            let expected = codec.encode(Isa::SCALAR, w, importance.as_deref()).unwrap();
            let numbers = decode_all(Isa::SCALAR, codec, &expected, w.rows, w.cols);
            for isa in Isa::available() {
                let planes = codec.encode(isa, w, importance.as_deref()).unwrap();
                assert!(planes == expected, "{what}: {} wrote other bytes than scalar", isa.name());
                let found = decode_all(isa, codec, &planes, w.rows, w.cols);
                assert_same(&format!("{what}, {}", isa.name()), &found, &numbers);
            }
        }
    });
}

#[test]
fn importance_of_one_everywhere_or_nowhere_is_no_importance() {
    for_all(|what, codec, w| {
        let expected = codec.encode(Isa::get(), w, None).unwrap();
        for alike in [1.0, 0.0, 1e-38, 3e38] {
            let planes = codec.encode(Isa::get(), w, Some(&vec![alike; w.cols])).unwrap();
            assert!(planes == expected, "{what}: importance {alike} everywhere changes bytes");
        }
    });
}

#[test]
fn importance_of_any_ratio_gives_numbers_and_serves_the_important() {
    for_all(|what, codec, w| {
        let weights: Vec<f32> = (0..w.cols).map(|c| [1e-30, 0.0, 1e30, 1.0][c % 4]).collect();
        let decoded = round_trip(codec, w, Some(&weights));
        assert!(decoded.iter().all(|v| v.is_finite()), "{what}");
        if !what.ends_with(" normal") {
            return;
        }
        let error = |decoded: &[f32], column: usize| -> f64 {
            let square = |(d, v): (&f32, &f32)| (f64::from(*d) - f64::from(*v)).powi(2);
            decoded.iter().zip(w.data).skip(column).step_by(4).map(square).sum()
        };
        // Steps of their own cost bits a column, which a few rows do not pay for.
        let pays = w.rows >= 32 || !any::has_rates(codec);
        if w.cols % 4 == 0 && w.data.len() > 1000 && pays {
            let (with, without) = (error(&decoded, 2), error(&round_trip(codec, w, None), 2));
            assert!(with <= without, "{what}: error of the important {with:e} instead of {without:e}");
        }
    });
}

#[test]
fn rows_decode_as_in_the_whole() {
    for_all(|what, codec, w| {
        let planes = codec.encode(Isa::get(), w, None).unwrap();
        let whole = decode_all(Isa::get(), codec, &planes, w.rows, w.cols);
        let planes: Vec<&[u8]> = planes.iter().map(Vec::as_slice).collect();
        for (first, n) in [(0, 1), (w.rows / 2, 1), (w.rows - 1, 1), (w.rows / 3, w.rows / 2), (w.rows, 0)] {
            let mut rows = vec![9.0; n * w.cols];
            codec.decode(Isa::get(), &planes, w.rows, w.cols, first, &mut rows).unwrap();
            assert_same(what, &rows, &whole[first * w.cols..][..n * w.cols]);
        }
    });
}

#[test]
fn what_is_no_number_is_refused_with_its_place() {
    for codec in all() {
        for (value, rest) in [(f32::NAN, 1.0), (f32::INFINITY, 0.0), (f32::NEG_INFINITY, f32::NAN)] {
            let cols = width(&*codec);
            let mut data = vec![0.5; 5 * cols];
            data[3 * cols + 70] = value;
            data[4 * cols] = rest;
            let e = codec.encode(Isa::get(), Matrix { rows: 5, cols, data: &data }, None).unwrap_err();
            assert_eq!(e.kind(), Kind::BadData, "{}", codec.name());
            assert!(
                e.what().contains(&format!("weight {value} at row 3, column 70")),
                "{}: {e}",
                codec.name()
            );
        }
    }
}

#[test]
fn huge_weights_are_coded_or_refused_by_name_but_never_become_infinite() {
    for codec in all() {
        for value in [1e30, -1e38, 3.4e38] {
            let cols = width(&*codec);
            let mut data = vec![0.5; cols];
            data[7] = value;
            let w = Matrix { rows: 1, cols, data: &data };
            match codec.encode(Isa::get(), w, None) {
                Ok(planes) => {
                    let found = decode_all(Isa::get(), &*codec, &planes, 1, cols)[7];
                    let bound = value.abs() * relative_bound(&codec.name());
                    assert!((found - value).abs() <= bound, "{}: {value:e} became {found:e}", codec.name());
                }
                Err(e) => {
                    assert_eq!(e.kind(), Kind::Plan);
                    assert!(e.what().contains(&codec.name()) && e.what().contains("row 0, column 7"), "{e}");
                }
            }
        }
    }
}

#[test]
fn bad_importance_is_refused() {
    for codec in all() {
        let cols = width(&*codec);
        let data = vec![1.0; cols];
        let w = Matrix { rows: 1, cols, data: &data };
        for (i, bad) in [f32::NAN, f32::INFINITY, -1.0].into_iter().enumerate() {
            let mut weights = vec![1.0; cols];
            weights[i] = bad;
            let e = codec.encode(Isa::get(), w, Some(&weights)).unwrap_err();
            assert!(e.what().contains(&format!("of column {i},")), "{e}");
        }
        assert!(codec.encode(Isa::get(), w, Some(&data[1..])).is_err());
    }
}

#[test]
fn planes_that_do_not_fit_are_refused() {
    for codec in all() {
        let cols = width(&*codec);
        let data = vec![1.0; 2 * cols];
        let w = Matrix { rows: 2, cols, data: &data };
        let planes = codec.encode(Isa::get(), w, None).unwrap();
        let planes: Vec<&[u8]> = planes.iter().map(Vec::as_slice).collect();
        let check = |planes: &[&[u8]], first_row, n| {
            let e = codec.decode(Isa::get(), planes, 2, cols, first_row, &mut vec![0.0; n]).unwrap_err();
            assert_eq!(e.kind(), Kind::BadData, "{}: {e}", codec.name());
        };
        for i in 0..planes.len() {
            let mut shorter = planes.clone();
            shorter[i] = &shorter[i][1..];
            check(&shorter, 0, 2 * cols);
        }
        check(&planes[1..], 0, 2 * cols);
        check(&[&planes[..], &planes[..1]].concat(), 0, 2 * cols);
        for (first_row, n) in [(0, 3 * cols), (1, 2 * cols), (3, 0), (usize::MAX, cols), (0, cols - 1)] {
            check(&planes, first_row, n);
        }
        assert!(codec.planes(0, 96).is_err() && codec.planes(96, 0).is_err());
        assert!(codec.planes(1 << 40, 1 << 40).is_err(), "{}", codec.name());
    }
}

/// Encoding reaches what quant-anchor measurements with exhaustive search found on N(0, 1): MSE relative to variance.
#[test]
fn scales_are_near_the_best_on_gaussian_weights() {
    let anchors = [
        ("int2-g128", 0.1320),
        ("int3-g128", 0.0345),
        ("int4-g128", 0.00932),
        ("int2-g32", 0.1100),
        ("int3-g32", 0.02640),
        ("int4-g32", 0.00659),
        ("int4-g64", 0.00808),
        ("int4-g64-asym", 0.00757),
        ("nvfp4", 0.00666),
        ("mxfp4", 0.01246),
    ];
    let (rows, cols) = (256, 2048);
    let mut r = Random(11);
    let data: Vec<f32> = (0..rows * cols).map(|_| r.normal()).collect();
    let w = Matrix { rows, cols, data: &data };
    for (name, expected) in anchors {
        let found = relative_mse(w.data, &round_trip(&*codec(name).unwrap(), w, None));
        assert!(
            found < expected * 1.002 && found > expected * 0.98,
            "{name}: {found:.6} instead of {expected}"
        );
    }
}

/// Calls `check` with every codec, every shape it takes and every content.
fn for_all(check: impl Fn(&str, &dyn Codec, Matrix<'_>)) {
    for codec in all() {
        for (s, &(rows, cols)) in SHAPES.iter().enumerate() {
            if takes(&*codec, rows, cols) {
                for (content, data) in contents(rows * cols, s as u64) {
                    let what = format!("{} [{rows}, {cols}] {content}", codec.name());
                    check(&what, &*codec, Matrix { rows, cols, data: &data });
                }
            }
        }
    }
}

/// Every codec of every row's examples.
fn all() -> Vec<CodecRef> {
    CODECS.iter().flat_map(|family| family.examples).map(|name| codec(name).unwrap()).collect()
}

/// Columns that the codec takes.
fn width(codec: &dyn Codec) -> usize {
    if takes(codec, 1, 96) { 96 } else { 256 }
}

/// Whether a codec holds that shape; if not, the refusal must name an alternative.
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

fn round_trip(codec: &dyn Codec, w: Matrix<'_>, importance: Option<&[f32]>) -> Vec<f32> {
    let planes = codec.encode(Isa::get(), w, importance).unwrap();
    decode_all(Isa::get(), codec, &planes, w.rows, w.cols)
}

/// Decodes into memory that is full of NaN, so that a value left out shows.
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

fn relative_mse(x: &[f32], y: &[f32]) -> f64 {
    let error: f64 = x.iter().zip(y).map(|(&x, &y)| (f64::from(x) - f64::from(y)).powi(2)).sum();
    error / x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>()
}

/// Second moments as calibration finds them: over some orders of magnitude, some zero.
fn importance(cols: usize) -> Vec<f32> {
    let mut r = Random(5);
    (0..cols)
        .map(|c| if c % 9 == 4 { 0.0 } else { r.normal().powi(2) * 10f32.powi(c as i32 % 5 - 2) })
        .collect()
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
        ("minus zero", vec![-0.0; n]),
        ("constant", vec![0.7; n]),
        ("negative", make(&mut |r, _| -0.1 - r.uniform() as f32)),
        ("outliers", make(&mut |r, i| if i % 97 == 5 { 3000.0 } else { r.normal() * 0.01 })),
        ("groups of zeros", make(&mut |r, i| if i / 64 % 2 == 0 { 0.0 } else { r.normal() })),
        ("denormal", make(&mut |r, _| f32::from_bits((r.next() & 0x807f_ffff) as u32))),
        ("tiny", make(&mut |r, _| r.normal() * 1e-7)),
        ("large", make(&mut |r, _| r.normal() * 1e4)),
        ("ties", make(&mut |r, _| ((r.next() % 31) as f32 - 15.0) / 4.0)),
    ]
}

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
