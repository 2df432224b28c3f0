//! Stats as an importance matrix of llama.cpp. Only experts are in it: of other matrices stats know nothing.

use std::path::Path;

use moepack_convert::imatrix::{About, CHUNK_TOKENS, Entry, Form, write};
use moepack_format::{Error, Result};

use super::importance::entry_name;
use super::{Dims, INNER_PLAIN, INPUT_PLAIN, StatsFile, column_stats, name};

/// What was written.
#[derive(Debug)]
pub struct Exported {
    /// Entries of the file.
    pub n_entries: usize,
    /// Experts that no token reached, as layer and expert.
    pub without_tokens: Vec<(usize, usize)>,
}

/// What an entry is made from.
struct Part {
    layer: usize,
    plain: &'static str,
}

/// Writes the importance of the experts of a stats file, streaming an entry at a time.
///
/// # Errors
/// No stats file, one of an earlier version, which has weighted means alone, or of no experts; a failed write.
pub fn export_imatrix(stats: &Path, form: Form, output: &Path) -> Result<Exported> {
    let file = StatsFile::open_alone(stats)?;
    let (mut entries, mut parts, mut without_tokens) = (Vec::new(), Vec::new(), Vec::new());
    for (layer, dims) in file.layers()? {
        let counts = file.counts(layer)?;
        without_tokens.extend(counts.iter().enumerate().filter(|(_, n)| **n == 0).map(|(e, _)| (layer, e)));
        for (tensor, plain, cols) in [
            ("ffn_gate_exps", INPUT_PLAIN, dims.hidden),
            ("ffn_up_exps", INPUT_PLAIN, dims.hidden),
            ("ffn_down_exps", INNER_PLAIN, dims.inter),
        ] {
            entries.push(Entry { name: entry_name(layer, tensor), cols, counts: counts.clone() });
            parts.push(Part { layer, plain });
        }
    }
    let about = file.about();
    let chunk_tokens = about.window_tokens.unwrap_or(CHUNK_TOKENS).max(1);
    let about = About {
        n_chunks: about.n_tokens.div_ceil(chunk_tokens),
        chunk_tokens: Some(chunk_tokens),
        datasets: vec![format!("moepack calibrate, tokens of sha256 {}", about.tokens_sha256)],
    };
    write(output, form, &about, &entries, |i| match parts.get(i) {
        Some(part) => file.means(part),
        None => Ok(Vec::new()),
    })?;
    Ok(Exported { n_entries: entries.len(), without_tokens })
}

impl StatsFile {
    /// The layers that the file knows, and their sizes.
    fn layers(&self) -> Result<Vec<(usize, Dims)>> {
        let numbers =
            self.header.tensors.iter().filter_map(|t| {
                t.name.strip_prefix("layers.")?.strip_suffix(".tokens")?.parse::<usize>().ok()
            });
        let mut layers: Vec<usize> = numbers.collect();
        layers.sort_unstable();
        layers.dedup();
        layers.into_iter().map(|layer| self.dims(layer).map(|dims| (layer, dims))).collect()
    }

    fn dims(&self, layer: usize) -> Result<Dims> {
        let old = |what: &str| {
            let missing = Error::bad_data("not there, so the means that llama.cpp takes are not known");
            let hint = "stats of an earlier version, or of something else; calibrate again";
            missing.in_file(self.file.path()).in_tensor(name(layer, what)).hint(hint)
        };
        let cols = |what: &str| {
            let shape = self.header.get(&name(layer, what)).map(|t| &t.shape[..]);
            match shape {
                Some(&[n, cols]) => Ok((usize::try_from(n).unwrap_or(0), usize::try_from(cols).unwrap_or(0))),
                _ => Err(old(what)),
            }
        };
        let ((n_experts, hidden), (_, inter)) = (cols(INPUT_PLAIN)?, cols(INNER_PLAIN)?);
        let dims = Dims { n_experts, hidden, inter };
        let specs = dims.specs(layer).into_iter().chain(dims.plain_specs(layer));
        specs.into_iter().try_for_each(|spec| self.check(&spec))?;
        Ok(dims)
    }

    fn means(&self, part: &Part) -> Result<Vec<f32>> {
        let tensor = name(part.layer, part.plain);
        let stats = self.bytes(&tensor).and_then(|bytes| column_stats(0, &bytes));
        stats.map(|s| s.second_moment).map_err(|e| e.in_file(self.file.path()).in_tensor(tensor))
    }
}
