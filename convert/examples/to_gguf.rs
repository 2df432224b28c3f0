//! `to_gguf MODEL OUT_DIR NAME [SPLIT_BYTES_MAX]`: a checkpoint or a bundle as GGUF.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "an example may stop at a mistake")]

use std::path::Path;

use moepack_convert::{Model, OpenOptions, gguf};

fn main() -> moepack_format::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let model = Model::open(Path::new(&args[0]), &OpenOptions::default())?;
    let split = args.get(3).map(|n| n.parse().unwrap());
    let written = gguf::export(&model, Path::new(&args[1]), &args[2], split)?;
    written.files.iter().for_each(|f| println!("{}", f.display()));
    written.left_out.iter().for_each(|t| println!("left out: {t}"));
    Ok(())
}
