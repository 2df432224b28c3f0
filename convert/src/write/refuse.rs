//! What a target cannot hold: every layer, projection and run of experts, and the recipe line that would work.

use std::collections::{BTreeMap, BTreeSet};

use moepack_format::{Error, Result};

use super::scheme::Scheme;
use super::{Export, Form, compressed, gguf, mlx};
use crate::checkpoint::listed;

/// Codecs to advise, the first that works.
const CODECS: &[&str] = &["int4-g64", "int4-g32", "mxfp4", "int8-g32"];
const GGML: &[&str] = &["q4_k", "iq4_nl", "bf16"];

impl Export<'_> {
    /// Refuses a model that the target cannot hold as it is.
    ///
    /// # Errors
    /// Kind `Plan`, with all of it.
    pub(super) fn refuse(&self) -> Result<()> {
        if matches!(self.form, Form::Released | Form::Plain) {
            return Ok(());
        }
        let mut complaints = Complaints::default();
        let mut first: Option<String> = None;
        let mut cols_all = BTreeSet::new();
        for (layer, moe) in self.data.spec().moe_layers() {
            let mut of_stack = BTreeMap::new();
            for expert in 0..moe.n_experts {
                for part in self.written_parts(layer, expert)?.iter().filter(|p| p.part.is_matrix()) {
                    let (codec, name) = (part.codec.name(), part.part.name());
                    let shape = [part.rows as u64, part.cols as u64];
                    cols_all.insert(part.cols as u64);
                    let known = first.get_or_insert_with(|| codec.clone());
                    let stacked = of_stack.entry(name).or_insert_with(|| codec.clone());
                    let why = self.refuses(&codec, shape).or_else(|| match self.form {
                        Form::Mlx | Form::Gguf => (*stacked != codec)
                            .then(|| format!("{stacked} is that of other experts in the same tensor")),
                        _ => (*known != codec).then(|| format!("{known} is that of other experts")),
                    });
                    if let Some(why) = why {
                        complaints.add(layer, name, expert, format!("{codec} {why}"));
                    }
                }
            }
        }
        if complaints.is_empty() { Ok(()) } else { Err(self.complaint(&complaints, &cols_all)) }
    }

    /// Why the target cannot hold such a matrix, if it cannot.
    fn refuses(&self, codec: &str, shape: [u64; 2]) -> Option<String> {
        if self.form == Form::Gguf {
            return gguf::refuses(codec, shape, self.wish.dequantize);
        }
        let scheme = Scheme::of(codec);
        if scheme.is_none() {
            return Some("has nothing like it there".to_owned());
        }
        match self.form {
            Form::Mlx => mlx::refuses(scheme.as_ref(), shape),
            _ => compressed::refuses(scheme.as_ref(), shape),
        }
    }

    fn complaint(&self, complaints: &Complaints, cols: &BTreeSet<u64>) -> Error {
        let works = |codec: &&&str| cols.iter().all(|&cols| self.refuses(codec, [1, cols]).is_none());
        let known = if self.form == Form::Gguf { GGML } else { CODECS };
        let codec = known.iter().find(works).or(known.first()).copied().unwrap_or_default();
        let what =
            format!("{} cannot hold these experts:{}", self.wish.target.name(), listed(&complaints.lines()));
        Error::plan(what).in_file(self.data.root()).hint(format!(
            "in a recipe for quantize, this works: tensor = \"layers.*.experts.*.*\", codec = \"{codec}\"; \
             --requantize {codec} codes them anew here, and says what that adds"
        ))
    }
}

/// Experts by layer, reason and projection.
#[derive(Default)]
struct Complaints {
    found: BTreeMap<(usize, String), BTreeMap<&'static str, Vec<usize>>>,
}

impl Complaints {
    fn add(&mut self, layer: usize, part: &'static str, expert: usize, why: String) {
        self.found.entry((layer, why)).or_default().entry(part).or_default().push(expert);
    }

    fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// A line for each layer and reason, projections with the same experts together.
    fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for ((layer, why), parts) in &self.found {
            let mut alike = BTreeMap::<&[usize], Vec<&str>>::new();
            for (part, experts) in parts {
                alike.entry(experts).or_default().push(part);
            }
            for (experts, parts) in alike {
                lines.push(format!(
                    "layer {layer}, {} of experts {}: {why}",
                    parts.join(", "),
                    crate::catalog::ranges(experts)
                ));
            }
        }
        lines
    }
}
