//! What holds for codecs that code a matrix column by column.

use super::*;

#[test]
fn columns_decode_to_what_was_said_at_every_level() {
    for_all(|what, codec, w| {
        let Some(expected) = by_columns(Isa::SCALAR, codec, w) else { return };
        let found = decode_all(Isa::SCALAR, codec, &expected.0, w.rows, w.cols);
        assert_same(what, &found, &expected.1);
        for isa in Isa::available() {
            let (planes, decoded) = by_columns(isa, codec, w).unwrap();
            assert!(planes == expected.0, "{what}: {} wrote other bytes than scalar", isa.name());
            assert_same(&format!("{what}, {}", isa.name()), &decoded, &expected.1);
        }
    });
}

#[test]
fn codecs_with_scales_of_their_own_code_columns_as_the_whole() {
    for_all(|what, codec, w| {
        let name = codec.name();
        let by_columns = by_columns(Isa::get(), codec, w);
        if ["int", "mxfp4", "nvfp4", "fp8", "q", "iq"].iter().any(|n| name.starts_with(n)) {
            let roots: Vec<f32> = importance(w.cols).iter().map(|v| v.sqrt()).collect();
            let expected = codec.encode(Isa::get(), w, Some(&roots)).unwrap();
            assert!(by_columns.unwrap().0 == expected, "{what}");
        }
    });
}

#[test]
fn columns_that_are_missing_or_no_numbers_are_refused() {
    for codec in all() {
        let cols = width(&*codec);
        let (data, ones, order) = (vec![1.0; 2 * cols], vec![1.0; cols], (0..cols).collect::<Vec<_>>());
        let w = Matrix { rows: 2, cols, data: &data };
        let plan = ColumnPlan { order: &order, cost: &ones, importance: &ones };
        let Some(mut coder) = codec.columns(Isa::get(), w, plan).unwrap() else { continue };
        let name = codec.name();
        assert!(coder.code(0, &[1.0, f32::NAN], &mut [0.0; 2]).is_err(), "{name}");
        assert!(coder.code(0, &[1.0], &mut [0.0; 2]).is_err(), "{name}");
        assert!(coder.code(cols, &[1.0; 2], &mut [0.0; 2]).is_err(), "{name}");
        for column in 0..cols - 1 {
            coder.code(column, &[1.0; 2], &mut [0.0; 2]).unwrap();
        }
        let e = coder.finish().unwrap_err();
        assert!(e.what().contains(&(cols - 1).to_string()), "{name}: {e}");
    }
}

/// Codes the columns of `w` from right to left as they are, and returns what they were said to decode to.
fn by_columns(isa: Isa, codec: &dyn Codec, w: Matrix<'_>) -> Option<(Planes, Vec<f32>)> {
    let (order, importance) = ((0..w.cols).rev().collect::<Vec<_>>(), importance(w.cols));
    let plan = ColumnPlan { order: &order, cost: &vec![1.0; w.cols], importance: &importance };
    let mut coder = codec.columns(isa, w, plan).unwrap()?;
    let (mut decoded, mut column_decoded) = (vec![0.0; w.data.len()], vec![0.0; w.rows]);
    for &c in &order {
        let wanted: Vec<f32> = w.data.chunks(w.cols).map(|row| row[c]).collect();
        coder.code(c, &wanted, &mut column_decoded).unwrap();
        decoded.chunks_mut(w.cols).zip(&column_decoded).for_each(|(row, &d)| row[c] = d);
    }
    Some((coder.finish().unwrap(), decoded))
}
