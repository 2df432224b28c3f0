//! config.json of an export: that of the model, with what is true of the numbers now.

use std::collections::{BTreeMap, BTreeSet};

use moepack_format::{Error, Result};
use serde_json::{Map, Value, json};

use super::scheme::Scheme;
use super::{Export, Form, compressed, mlx};
use crate::catalog::TrunkTensor;
use crate::limits::CONFIG_BYTES_MAX;
use crate::spec::Role;

const CONFIG: &str = "config.json";
/// What said how numbers were stored.
const STORAGE: &[&str] = &["quantization_config", "compression_config", "quantization"];

impl Export<'_> {
    /// The text of config.json.
    ///
    /// # Errors
    /// The model's cannot be read.
    pub fn config(&self) -> Result<Vec<u8>> {
        let text = self.data.side_file(CONFIG, CONFIG_BYTES_MAX)?;
        if self.form == Form::Released {
            return Ok(text);
        }
        let bad =
            |e: serde_json::Error| Error::bad_data(e.to_string()).in_file(self.data.root().join(CONFIG));
        let mut root: Map<String, Value> = serde_json::from_slice(&text).map_err(bad)?;
        forget(&mut root);
        match self.form {
            Form::Compressed => {
                root.insert("quantization_config".to_owned(), self.compressed_config()?);
            }
            Form::Mlx => {
                let said = self.mlx_config()?;
                older_words(&mut root);
                root.insert("quantization".to_owned(), said.clone());
                root.insert("quantization_config".to_owned(), said);
            }
            _ => {}
        }
        let mut text = serde_json::to_vec_pretty(&Value::Object(root)).map_err(bad)?;
        text.push(b'\n');
        Ok(text)
    }

    /// The scheme of the experts and a shape of one of their matrices.
    pub(super) fn experts_scheme(&self) -> Result<Option<(Scheme, [u64; 2])>> {
        let Some((layer, _)) = self.data.spec().moe_layers().next() else { return Ok(None) };
        let parts = self.written_parts(layer, 0)?;
        let first = parts.iter().find(|p| p.part.is_matrix());
        Ok(first.and_then(|p| Some((Scheme::of(&p.codec.name())?, [p.rows as u64, p.cols as u64]))))
    }

    /// Experts are the `Linear` modules that are not ignored; a trunk that a bundle coded has groups of its own.
    fn compressed_config(&self) -> Result<Value> {
        let Some((scheme, shape)) = self.experts_scheme()? else { return Ok(Value::Null) };
        let (format, weights) = compressed::arguments(&scheme, shape);
        let group = |targets: Value, format: &str, weights: Value| {
            json!({"targets": targets, "weights": weights, "input_activations": null,
                "output_activations": null, "format": format})
        };
        let mut groups = Map::new();
        groups.insert("group_0".to_owned(), group(json!(["Linear"]), format, weights.clone()));
        let mut others = BTreeMap::<String, (&'static str, Value, BTreeSet<String>)>::new();
        let mut ignore = BTreeSet::from(["lm_head".to_owned()]);
        for tensor in self.data.trunk_tensors() {
            let Some(module) = module_of(tensor) else { continue };
            match self.scheme_of(tensor)?.zip(self.data.trunk_encoded(tensor)) {
                Some((own, shape)) => {
                    let (format, own) = compressed::arguments(&own, shape);
                    if own != weights {
                        let entry = others.entry(own.to_string());
                        entry.or_insert_with(|| (format, own, BTreeSet::new())).2.insert(module);
                    }
                }
                None => drop(ignore.insert(module)),
            }
        }
        let mixed = others.values().any(|(f, _, _)| *f != format);
        for (n, (format, weights, modules)) in others.into_values().enumerate() {
            groups.insert(format!("group_{}", n + 1), group(json!(modules), format, weights));
        }
        Ok(json!({
            "quant_method": "compressed-tensors",
            "format": if mixed { "mixed-precision" } else { format },
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": ignore,
            "kv_cache_scheme": null,
        }))
    }

    /// The commonest arguments, and those of every module.
    fn mlx_config(&self) -> Result<Value> {
        let mut said = Map::new();
        let usual = self.experts_scheme()?.and_then(|(scheme, _)| mlx::arguments(&scheme));
        for (key, value) in usual.as_ref().and_then(Value::as_object).into_iter().flatten() {
            said.insert(key.clone(), value.clone());
        }
        for tensor in self.data.trunk_tensors() {
            let arguments = self.scheme_of(tensor)?.and_then(|scheme| mlx::arguments(&scheme));
            if let (Some(arguments), Some(stem)) = (arguments, tensor.name.strip_suffix(".weight")) {
                said.insert(stem.to_owned(), arguments);
            }
        }
        for (layer, _) in self.data.spec().moe_layers() {
            for part in self.written_parts(layer, 0)?.iter().filter(|p| p.part.is_matrix()) {
                let arguments = Scheme::of(&part.codec.name()).and_then(|scheme| mlx::arguments(&scheme));
                if let Some(arguments) = arguments {
                    said.insert(self.mlx_stem(layer, part.part)?, arguments);
                }
            }
        }
        Ok(Value::Object(said))
    }
}

/// mlx-lm 0.32 reads the keys that releases have; configurations that transformers 5 wrote have others.
fn older_words(root: &mut Map<String, Value>) {
    let theta = root.get("rope_parameters").and_then(|rope| rope.get("rope_theta")).cloned();
    let n_experts = root.get("num_local_experts").cloned();
    for (key, value) in [("rope_theta", theta), ("num_experts", n_experts)] {
        if let Some(value) = value.filter(|_| !root.contains_key(key)) {
            root.insert(key.to_owned(), value);
        }
    }
}

/// Takes out what was true of the released numbers only.
fn forget(root: &mut Map<String, Value>) {
    STORAGE.iter().for_each(|key| drop(root.shift_remove(*key)));
    if let Some(Value::Object(text)) = root.get_mut("text_config") {
        forget(text);
    }
}

/// The module of a matrix of the trunk, as a pattern over layers; `None` where no runtime would quantize it anyway.
fn module_of(tensor: &TrunkTensor) -> Option<String> {
    if tensor.role == Role::Carried {
        let name = match tensor.layer {
            Some(layer) => {
                tensor.name.split_once(&format!(".{layer}.")).map(|(before, _)| format!("{before}.{layer}"))
            }
            None => tensor.name.split('.').next().map(str::to_owned),
        };
        return name.map(|name| format!("re:.*{}\\..*", escaped(&name)));
    }
    let is_matrix = tensor.decoded.len() == 2 && !tensor.is_scale && tensor.role != Role::Embed;
    let endings = [".weight_packed", ".qweight", ".weight"];
    let stem = endings.iter().find_map(|ending| tensor.name.strip_suffix(ending)).filter(|_| is_matrix)?;
    if tensor.layer.is_none() {
        return Some(stem.to_owned());
    }
    let words: Vec<String> =
        stem.split('.').map(|w| if is_number(w) { "\\d+".to_owned() } else { escaped(w) }).collect();
    Some(format!("re:.*{}$", words.join("\\.")))
}

fn is_number(word: &str) -> bool {
    !word.is_empty() && word.bytes().all(|b| b.is_ascii_digit())
}

/// A name as a regular expression.
fn escaped(name: &str) -> String {
    name.chars().flat_map(|c| if c.is_alphanumeric() || c == '_' { vec![c] } else { vec!['\\', c] }).collect()
}
