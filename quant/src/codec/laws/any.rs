//! What holds for matrices, planes and damage that nobody thought of.

use proptest::prelude::*;

use super::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    /// Planes are a stranger's bytes: any of them decode without panic, and to the same bits at every level.
    #[test]
    fn any_bytes_decode_alike(index in any::<prop::sample::Index>(), rows in 1usize..20, cols in columns(), seed: u64) {
        let all = all();
        let codec = index.get(&all);
        let Ok(specs) = codec.planes(rows, cols) else { return Ok(()) };
        let mut r = Random(seed);
        // Mostly noise, sometimes a plane of one byte only: 255 is NaN in most scale types.
        let planes: Planes = specs
            .iter()
            .map(|s| {
                let constant = [None, None, Some(255), Some(0x7f), Some(0)][(r.next() % 5) as usize];
                (0..s.bytes().unwrap()).map(|_| constant.unwrap_or(r.next() as u8)).collect()
            })
            .collect();
        decodes_alike(&**codec, &planes, rows, cols)?;
    }

    /// One byte of a coded matrix is another: it decodes without panic, and alike at every level, or is refused at every level.
    #[test]
    fn damaged_planes_decode_alike(
        index in any::<prop::sample::Index>(), rows in 1usize..40, cols in columns(), seed: u64, at: u32, flip in 1u8..,
    ) {
        let all = all();
        let codec = index.get(&all);
        if !takes(&**codec, rows, cols) { return Ok(()) }
        let mut r = Random(seed);
        let data: Vec<f32> = (0..rows * cols).map(|_| r.normal()).collect();
        let mut planes = codec.encode(Isa::get(), Matrix { rows, cols, data: &data }, None).unwrap();
        let n_planes = planes.len();
        let plane = &mut planes[seed as usize % n_planes];
        let at = at as usize % plane.len();
        plane[at] ^= flip;
        decodes_alike(&**codec, &planes, rows, cols)?;
    }

    /// Shapes and magnitudes nobody thought of.
    #[test]
    fn any_matrix_encodes_alike(
        index in any::<prop::sample::Index>(), rows in 1usize..20, cols in columns(), seed: u64, exponent in -60i32..17,
    ) {
        let all = all();
        let codec = index.get(&all);
        if !takes(&**codec, rows, cols) { return Ok(()) }
        let mut r = Random(seed);
        let scale = 2f32.powi(exponent);
        let data: Vec<f32> = (0..rows * cols).map(|_| r.normal() * scale).collect();
        let w = Matrix { rows, cols, data: &data };
        let Ok(expected) = codec.encode(Isa::SCALAR, w, None) else { return Ok(()) };
        for isa in Isa::available() {
            prop_assert_eq!(&codec.encode(isa, w, None).unwrap(), &expected, "{} {}", codec.name(), isa.name());
        }
        let decoded = decode_all(Isa::get(), &**codec, &expected, rows, cols);
        prop_assert!(decoded.iter().all(|v| v.is_finite()));
    }
}

/// Any number of columns, and often such as all codecs take.
fn columns() -> impl Strategy<Value = usize> {
    prop_oneof![2 => 1usize..300, 1 => Just(256usize)]
}

/// Every level decodes these bytes to the same bits, or refuses them.
fn decodes_alike(
    codec: &dyn Codec,
    planes: &Planes,
    rows: usize,
    cols: usize,
) -> std::result::Result<(), TestCaseError> {
    let planes: Vec<&[u8]> = planes.iter().map(Vec::as_slice).collect();
    let decode = |isa| {
        let mut out = vec![f32::from_bits(0x7fff_1234); rows * cols];
        codec.decode(isa, &planes, rows, cols, 0, &mut out).map(|()| out)
    };
    let expected = decode(Isa::SCALAR);
    prop_assert!(expected.is_ok() || has_rates(codec), "{} refuses bytes", codec.name());
    for isa in Isa::available() {
        let what = format!("{} [{rows}, {cols}], {}", codec.name(), isa.name());
        match (&expected, decode(isa)) {
            (Ok(expected), Ok(found)) => assert_same(&what, &found, expected),
            (Err(_), Err(_)) => {}
            _ => prop_assert!(false, "{what}: refused at one level only"),
        }
    }
    Ok(())
}

/// Whether its planes are as long as the rate says, so that not every bytes are a matrix.
pub(super) fn has_rates(codec: &dyn Codec) -> bool {
    codec.at_rate(2.0).is_some()
}
