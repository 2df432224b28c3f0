//! The model card: README.md with the metadata that hubs read.

use serde_json::Value;

use super::{Export, Form, Target};

/// Metadata of the base model's card that are true of what is made from it too.
const KEPT: &[&str] = &["license", "license_name", "license_link", "language", "pipeline_tag"];

/// The text of a card. `base_model` is a repository on the hub, where it is known; `original` the card of the base model.
pub fn card(export: &Export<'_>, base_model: Option<&str>, original: Option<&str>) -> String {
    let library = match export.wish.target {
        Target::Mlx => "mlx",
        Target::Gguf => "llama.cpp",
        Target::Safetensors | Target::CompressedTensors => "transformers",
    };
    let mut text = String::from("---\n");
    if let Some(base) = base_model {
        text += &format!("base_model: {}\nbase_model_relation: quantized\n", Value::from(base));
    }
    for line in original.map(kept).unwrap_or_default() {
        text += &format!("{line}\n");
    }
    text += &format!("library_name: {library}\ntags:\n- moepack\n");
    match export.form {
        Form::Compressed => text += "- compressed-tensors\n",
        Form::Mlx => text += "- mlx\n",
        Form::Gguf => text += "- gguf\n",
        _ => {}
    }
    text += "---\n\n";
    let base = base_model.unwrap_or("a checkpoint");
    text += &format!("# {base}, as {}\n\n", export.kind());
    text += &format!(
        "Written by [moepack](https://github.com/moepack/moepack) {} with `convert --to {}`.\n",
        env!("CARGO_PKG_VERSION"),
        export.wish.target.name()
    );
    for note in export.notes() {
        text += &format!("\n- {note}\n");
    }
    text
}

/// Lines of the front matter that are kept, with the lists that belong to them.
fn kept(original: &str) -> Vec<&str> {
    let Some(front) = original.strip_prefix("---\n").and_then(|rest| rest.split("\n---").next()) else {
        return Vec::new();
    };
    let mut lines = Vec::new();
    let mut inside = false;
    for line in front.lines() {
        if !line.starts_with([' ', '-']) {
            inside = line.split_once(':').is_some_and(|(key, _)| KEPT.contains(&key));
        }
        if inside {
            lines.push(line);
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn licence_and_languages_travel_along() {
        let original = "---\nlicense: mit\ntags:\n- moe\nlanguage:\n- en\n- de\nbase_model: x\n---\n# Name\nlicense: no\n";
        assert_eq!(kept(original), ["license: mit", "language:", "- en", "- de"]);
        assert!(kept("# Name\n---\nlicense: mit\n---\n").is_empty());
    }
}
