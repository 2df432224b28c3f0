//! What config.json says about how a checkpoint is quantized, in one line for people.

use moepack_convert::Model;
use moepack_convert::hparams::Config;
use serde::Serialize;
use serde_json::Value;

/// The keys under which releases say it.
const KEYS: &[&str] = &["quantization_config", "compression_config"];

/// How a checkpoint is quantized, as it says itself; what is really stored is in the codecs.
#[derive(Debug, PartialEq, Serialize)]
pub struct Scheme {
    /// `quant_method`, such as `compressed-tensors`.
    pub method: String,
    /// `format`, such as `pack-quantized`.
    pub format: Option<String>,
    /// One for each group of modules: kind and bits, strategy, targets.
    pub groups: Vec<String>,
}

impl Scheme {
    /// What the model's config.json says, if it says anything.
    pub fn of(model: &Model) -> Option<Scheme> {
        Scheme::of_config(model.config())
    }

    fn of_config(config: &Config) -> Option<Scheme> {
        let (_, said) = config.find(KEYS)?;
        let text = |key: &str| said.get(key)?.as_str().map(str::to_owned);
        let groups = match said.get("config_groups").and_then(Value::as_object) {
            Some(groups) => groups.values().filter_map(group).collect(),
            None => plain(said).into_iter().collect(),
        };
        Some(Scheme {
            method: text("quant_method").unwrap_or_else(|| "?".to_owned()),
            format: text("format"),
            groups,
        })
    }

    /// For people.
    pub fn text(&self) -> String {
        let format = self.format.iter().map(String::as_str);
        let groups = self.groups.iter().map(String::as_str);
        std::iter::once(self.method.as_str()).chain(format).chain(groups).collect::<Vec<_>>().join(", ")
    }
}

/// A group of compressed-tensors.
fn group(group: &Value) -> Option<String> {
    let weights = group.get("weights")?;
    let mut words = vec![kind(weights.get("num_bits")?, weights.get("type"))];
    if let Some(strategy) = weights.get("strategy").and_then(Value::as_str) {
        words.push(format!("by {strategy}"));
    }
    words.extend(shape(weights));
    match weights.get("symmetric").and_then(Value::as_bool) {
        Some(true) => words.push("symmetric".to_owned()),
        Some(false) => words.push("with zero points".to_owned()),
        None => {}
    }
    if group.get("input_activations").is_some_and(Value::is_object) {
        words.push("with quantized inputs".to_owned());
    }
    let targets: Vec<&str> =
        group.get("targets")?.as_array()?.iter().filter_map(Value::as_str).take(4).collect();
    words.push(format!("for {}", targets.join(" ")));
    Some(words.join(" "))
}

/// What GPTQ, AWQ and FP8 releases say at the top.
fn plain(said: &Value) -> Option<String> {
    let kind = said.get("bits").map(|bits| kind(bits, None));
    let shape = shape(said);
    (kind.is_some() || shape.is_some()).then(|| kind.into_iter().chain(shape).collect::<Vec<_>>().join(" "))
}

fn kind(bits: &Value, kind: Option<&Value>) -> String {
    format!("{}{bits}", kind.and_then(Value::as_str).unwrap_or("int"))
}

fn shape(said: &Value) -> Option<String> {
    let group = said.get("group_size").and_then(Value::as_i64).filter(|&n| n > 0);
    let block = ["block_structure", "weight_block_size"].iter().find_map(|key| said.get(key)?.as_array());
    let block = block.map(|sides| sides.iter().map(Value::to_string).collect::<Vec<_>>().join("x"));
    group.map(|n| format!("in groups of {n}")).or(block.map(|b| format!("in blocks of {b}")))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;

    fn text(said: Value) -> Option<String> {
        let config = json!({ "quantization_config": said }).to_string();
        let config = Config::parse(Path::new("config.json"), config.as_bytes()).unwrap();
        Scheme::of_config(&config).map(|s| s.text())
    }

    #[test]
    fn a_scheme_is_told_in_one_line() {
        let int4 =
            json!({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": true});
        let group = json!({"weights": int4, "targets": ["Linear"], "input_activations": null});
        let said = json!({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"a": group}});
        let expected =
            "compressed-tensors, pack-quantized, int4 by group in groups of 32 symmetric for Linear";
        assert_eq!(text(said).as_deref(), Some(expected));
        let fp8 = json!({"quant_method": "fp8", "weight_block_size": [128, 128]});
        assert_eq!(text(fp8).as_deref(), Some("fp8, in blocks of 128x128"));
        let gptq = json!({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": false});
        assert_eq!(text(gptq).as_deref(), Some("gptq, int4 in groups of 128"));
        assert_eq!(text(json!({"config_groups": {"a": 1}})).as_deref(), Some("?"));
        let none = Config::parse(Path::new("config.json"), b"{}").unwrap();
        assert_eq!(Scheme::of_config(&none), None);
    }
}
