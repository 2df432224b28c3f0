//! Every scheme is told apart, and what does not fit is refused with what would.

use super::*;

fn tensor(name: &str, dtype: Dtype, shape: &[u64]) -> SourceTensor {
    let end = dtype.bytes(shape).unwrap();
    SourceTensor { name: name.into(), dtype, file: 0, shape: shape.into(), start: 0, end }
}

fn with<'a>(tensor: &'a SourceTensor, companions: &[(Companion, &'a SourceTensor)]) -> Encoded<'a> {
    Encoded { tensor, companions: companions.to_vec() }
}

fn fp8_name(shape: [u64; 2], scale: Dtype, grid: &[u64], block: Option<[u64; 2]>) -> Result<String> {
    let weight = tensor("x.weight", Dtype::F8E4m3, &shape);
    let scales = tensor("x.weight_scale_inv", scale, grid);
    let hints = Hints { block, ..Hints::default() };
    let encoded = with(&weight, &[(Companion::Scale, &scales)]);
    encoding(&encoded, Holding::plain((shape[0], shape[1])), hints).map(|e| e.name())
}

#[test]
fn the_block_comes_from_the_shapes() {
    let cases: &[([u64; 2], Dtype, &[u64], &str)] = &[
        ([256, 512], Dtype::F32, &[2, 4], "fp8-block"),
        ([576, 7168], Dtype::F32, &[5, 56], "fp8-block"),
        ([64, 64], Dtype::F32, &[1, 1], "fp8-block"),
        ([256, 512], Dtype::Bf16, &[2, 4], "fp8-block-bf16"),
        ([256, 512], Dtype::F8E8m0, &[8, 16], "fp8-block-32x32-e8m0"),
        ([300, 512], Dtype::F32, &[300, 1], "fp8-block-1x512"),
        ([300, 100], Dtype::F32, &[5, 2], "fp8-block-64x64"),
    ];
    for (shape, dtype, grid, name) in cases {
        assert_eq!(fp8_name(*shape, *dtype, grid, None).unwrap(), *name, "{shape:?} {grid:?}");
    }
}

#[test]
fn a_matrix_of_no_rows_and_endless_columns_is_refused() {
    for block in [None, Some([128, 128])] {
        assert!(fp8_name([0, u64::MAX], Dtype::F32, &[0, 1], block).is_err());
    }
}

#[test]
fn fp4_pairs_in_bytes_have_a_scale_for_every_32_columns() {
    let weight = tensor("e.w1.weight", Dtype::I8, &[8, 32]);
    let name = |dtype, grid: &[u64]| {
        let scales = tensor("e.w1.scale", dtype, grid);
        let encoded = with(&weight, &[(Companion::Scale, &scales)]);
        encoding(&encoded, Holding::plain((8, 64)), Hints::default())
            .map(|e| e.name())
            .map_err(|e| e.what().to_owned())
    };
    assert_eq!(stored_shape(&weight, None, 8, 64, Hints::default()), [8, 32]);
    assert_eq!(name(Dtype::F8E8m0, &[8, 2]).unwrap(), "mxfp4");
    assert_eq!(
        name(Dtype::F8E8m0, &[8, 1]).unwrap_err(),
        "scales e.w1.scale are F8_E8M0 [8, 1], expected [8, 2], one for every 32 columns"
    );
    let e = name(Dtype::F32, &[8, 2]).unwrap_err();
    assert_eq!(e, "scales e.w1.scale are F32 [8, 2], expected F8_E8M0, one for every 32 columns");
}

#[test]
fn scales_that_do_not_fit_are_refused() {
    let cases: &[(Dtype, &[u64], &str)] = &[
        (
            Dtype::F32,
            &[3, 4],
            "F32 [3, 4], expected as many as blocks of a power of two need to cover [256, 512]",
        ),
        (
            Dtype::F32,
            &[0, 4],
            "F32 [0, 4], expected as many as blocks of a power of two need to cover [256, 512]",
        ),
        (Dtype::F32, &[8], "F32 [8], expected two dimensions, one scale for every block"),
        (Dtype::I32, &[2, 4], "I32 [2, 4], expected F32, BF16, F16, F8_E8M0 or U8"),
    ];
    for (dtype, grid, expected) in cases {
        let e = fp8_name([256, 512], *dtype, grid, None).unwrap_err();
        assert_eq!(e.what(), format!("scales x.weight_scale_inv are {expected}"));
        assert_eq!((e.kind().exit_code(), e.tensor()), (65, Some("x.weight")));
    }
}

#[test]
fn the_block_size_of_config_json_binds() {
    let block = Some([128, 128]);
    assert_eq!(fp8_name([64, 160], Dtype::F32, &[1, 2], block).unwrap(), "fp8-block");
    let e = fp8_name([64, 160], Dtype::F32, &[2, 1], block).unwrap_err();
    let expected = "[1, 2], one for every 128x128 of [64, 160] as config.json says";
    assert_eq!(e.what(), format!("scales x.weight_scale_inv are F32 [2, 1], expected {expected}"));
}

#[test]
fn numbers_and_scales_need_each_other() {
    let refused = |encoded: &Encoded<'_>| {
        encoding(encoded, Holding::plain((4, 4)), Hints::default()).unwrap_err().what().to_owned()
    };
    let weight = tensor("x.weight", Dtype::F8E4m3, &[4, 4]);
    let missing = "packed numbers without their scales, expected a tensor that ends in weight_scale_inv, weight_scale or scale";
    assert_eq!(refused(&with(&weight, &[])), missing);
    let (weight, scales) =
        (tensor("x.weight", Dtype::Bf16, &[4, 4]), tensor("x.weight_scale_inv", Dtype::F32, &[1, 1]));
    let e = refused(&with(&weight, &[(Companion::Scale, &scales)]));
    assert_eq!(e, "x.weight_scale_inv beside numbers of BF16, which need no scales");
    let table = tensor("x", Dtype::I64, &[4]);
    assert_eq!(refused(&with(&table, &[])), "numbers of I64, expected BF16, F16, F32 or F8_E4M3 with scales");
}

/// Ending, dtype and shape of numbers.
type Numbers<'a> = (&'a str, Dtype, &'a [u64]);
/// What lies beside them.
type Beside<'a> = Vec<(Companion, Dtype, &'a [u64])>;

/// Name and packing of numbers in a tensor of that ending, dtype and shape, with what lies beside them.
fn found(
    numbers: (&str, Dtype, &[u64]),
    beside: &[(Companion, Dtype, &[u64])],
    shape: (u64, u64),
    hints: Hints,
) -> std::result::Result<(String, Packing), String> {
    let numbers = tensor(&format!("x{}", numbers.0), numbers.1, numbers.2);
    let beside: Vec<_> =
        beside.iter().map(|(c, dtype, shape)| (*c, tensor(c.name(), *dtype, shape))).collect();
    let companions: Vec<_> = beside.iter().map(|(c, t)| (*c, t)).collect();
    let encoded = with(&numbers, &companions);
    let expected = stored_shape(&numbers, None, shape.0, shape.1, hints);
    if *expected != *numbers.shape {
        return Err(format!("expected {expected:?}"));
    }
    let found = encoding(&encoded, Holding::plain(shape), hints);
    found.map(|e| (e.name(), e.packing)).map_err(|e| e.what().to_owned())
}

#[test]
fn every_scheme_is_told_by_endings_dtypes_and_shapes() {
    use Companion::{Divisor, Global, GroupIndex, Scale, Shape, Zero};
    let as_planes = |name: &str| Ok((name.to_owned(), Packing::AsPlanes));
    let none = Hints::default();
    let e4m3 = (".weight", Dtype::F8E4m3, &[64, 96][..]);
    let bytes = (".weight", Dtype::U8, &[64, 48][..]);
    let packed = (".weight_packed", Dtype::U8, &[64, 48][..]);
    let words = (".weight_packed", Dtype::I32, &[64, 12][..]);
    let cases: Vec<(Numbers<'_>, Beside<'_>, _)> = vec![
        (e4m3, vec![(Scale, Dtype::Bf16, &[64, 1])], as_planes("fp8-block-1x128-bf16")),
        (e4m3, vec![(Scale, Dtype::F32, &[64])], as_planes("fp8-block-1x96")),
        (e4m3, vec![(Scale, Dtype::F32, &[])], as_planes("fp8-block-64x96")),
        (e4m3, vec![(Scale, Dtype::F16, &[1])], as_planes("fp8-block-64x96-f16")),
        (e4m3, vec![(Scale, Dtype::U8, &[64, 3])], as_planes("fp8-block-1x32-e8m0")),
        (bytes, vec![(Scale, Dtype::U8, &[64, 3])], as_planes("mxfp4")),
        (packed, vec![(Scale, Dtype::U8, &[64, 3])], as_planes("mxfp4")),
        (packed, vec![(Scale, Dtype::F8E4m3, &[64, 6]), (Divisor, Dtype::F32, &[1])], as_planes("nvfp4-div")),
        (bytes, vec![(Scale, Dtype::F8E4m3, &[64, 6]), (Global, Dtype::F32, &[])], as_planes("nvfp4")),
        (
            words,
            vec![(Scale, Dtype::Bf16, &[64, 3]), (Shape, Dtype::I64, &[2])],
            Ok(("affine4-g32-bf16".into(), Packing::Rows { bits: 4, in_bytes: false })),
        ),
        (
            words,
            vec![(Scale, Dtype::F16, &[64, 1]), (Zero, Dtype::I32, &[8, 1]), (GroupIndex, Dtype::I32, &[96])],
            Ok(("affine4-g96-asym-idx".into(), Packing::Rows { bits: 4, in_bytes: false })),
        ),
        (
            (".weight", Dtype::I8, &[64, 96]),
            vec![(Scale, Dtype::F32, &[64, 1])],
            Ok(("affine8-g96-f32".into(), Packing::Bytes { said: 8 })),
        ),
        (
            (".qweight", Dtype::I32, &[12, 64]),
            vec![(Scale, Dtype::F16, &[3, 64]), (Zero, Dtype::I32, &[3, 8]), (GroupIndex, Dtype::I32, &[96])],
            Ok(("affine4-g32-asym-idx".into(), Packing::Columns(4, crate::packing::Words::Gptq))),
        ),
        (
            (".qweight", Dtype::I32, &[96, 8]),
            vec![(Scale, Dtype::F16, &[3, 64]), (Zero, Dtype::I32, &[3, 8])],
            Ok(("affine4-g32-asym".into(), Packing::Columns(4, crate::packing::Words::Awq))),
        ),
    ];
    for (numbers, beside, expected) in cases {
        assert_eq!(found(numbers, &beside, (64, 96), none), expected, "{numbers:?} {beside:?}");
    }
}

#[test]
fn what_does_not_fit_is_refused_with_what_would() {
    use Companion::{Divisor, GroupIndex, Scale, Zero};
    let words = (".weight_packed", Dtype::I32, &[64, 12][..]);
    let scale = (Scale, Dtype::Bf16, &[64, 3][..]);
    let cases: Vec<(Numbers<'_>, Beside<'_>, &str)> = vec![
        (words, vec![], "packed numbers without their scales, expected a tensor that ends in weight_scale"),
        ((".weight_packed", Dtype::I32, &[64, 13]), vec![scale], "expected [64, 12]"),
        (
            words,
            vec![(Scale, Dtype::Bf16, &[3, 64])],
            "scales scales are BF16 [3, 64], expected [64, groups of 96 columns]",
        ),
        (
            words,
            vec![(Scale, Dtype::I32, &[64, 3])],
            "scales scales are I32 [64, 3], expected F16, BF16 or F32",
        ),
        (words, vec![scale, (Zero, Dtype::I32, &[64, 3])], "zero points is I32 [64, 3], expected I32 [8, 3]"),
        (words, vec![scale, (GroupIndex, Dtype::I32, &[64])], "group indices is I32 [64], expected I32 [96]"),
        (
            (".weight_packed", Dtype::U8, &[64, 48]),
            vec![(Scale, Dtype::F8E4m3, &[64, 6])],
            "packed numbers without their global scale, expected a tensor that ends in weight_global_scale",
        ),
        (
            (".weight_packed", Dtype::U8, &[64, 48]),
            vec![(Scale, Dtype::F8E4m3, &[64, 3]), (Divisor, Dtype::F32, &[1])],
            "scales scales are F8_E4M3 [64, 3], expected F8_E4M3 [64, 6], one for every 16 columns",
        ),
        (
            (".qweight", Dtype::I32, &[12, 64]),
            vec![(Scale, Dtype::F16, &[3, 64])],
            "packed numbers without their zero points, expected a tensor that ends in qzeros",
        ),
    ];
    for (numbers, beside, expected) in cases {
        assert_eq!(found(numbers, &beside, (64, 96), Hints::default()).unwrap_err(), expected);
    }
}

#[test]
fn config_json_decides_where_few_columns_fit_several_widths() {
    let of = |said| bits(24, 3, said);
    assert_eq!((of(Some(4)), of(Some(3)), of(None).is_err()), (Ok(4), Ok(3), true));
    assert_eq!((bits(4096, 384, None), bits(4096, 384, Some(8))), (Ok(3), Ok(3)));
}

fn bits(cols: u64, words: u64, said: Option<u32>) -> Result<u32> {
    integers::bits_of_words(cols, words, said)
}
