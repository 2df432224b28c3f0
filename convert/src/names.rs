//! From a tensor's name to what the family says it is.
//!
//! Templates hold `{L}` for the layer and `{E}` for the expert. A name is turned into its template by
//! replacing its first two numbers, then looked up: each name costs one search, however many rules there are.

use std::borrow::Cow;
use std::collections::BTreeMap;

use crate::family::{Family, Piece, Rule};

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Meaning {
    /// A trunk tensor.
    Trunk(&'static Rule),
    /// Piece `piece` of expert layout `layout`; several layouts may share a piece.
    Expert {
        /// Bit `i` is set where layout `i` of the family has this tensor.
        layouts: u32,
        /// The piece, the same in all of them.
        piece: &'static Piece,
    },
}

/// A name taken apart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Place {
    /// What it stands for.
    pub meaning: Meaning,
    /// Layer, where its template has one.
    pub layer: Option<usize>,
    /// Expert, where its template has one.
    pub expert: Option<usize>,
}

/// All names of a family.
#[derive(Debug)]
pub struct Names {
    templates: BTreeMap<String, Meaning>,
    layer_prefix: &'static str,
    spellings: &'static [(&'static str, &'static str)],
}

/// What a tensor gives to the numbers beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Companion {
    /// Factors of blocks, groups, rows or all.
    Scale,
    /// A factor of all scales.
    Global,
    /// What all scales are divided by.
    Divisor,
    /// Zero points of groups.
    Zero,
    /// The group of each column.
    GroupIndex,
    /// Rows and columns.
    Shape,
}

impl Companion {
    /// For messages.
    pub fn name(self) -> &'static str {
        match self {
            Companion::Scale => "scales",
            Companion::Global | Companion::Divisor => "global scale",
            Companion::Zero => "zero points",
            Companion::GroupIndex => "group indices",
            Companion::Shape => "shape",
        }
    }
}

/// Endings of numbers, and the endings of what belongs to them.
const COMPANIONS: &[(&str, &str, Companion)] = &[
    (".weight", ".weight_scale_inv", Companion::Scale),
    (".weight", ".weight_scale", Companion::Scale),
    (".weight", ".scale", Companion::Scale),
    (".weight", ".weight_scale_2", Companion::Global),
    (".weight", ".weight_zero_point", Companion::Zero),
    (".weight_packed", ".weight_scale", Companion::Scale),
    (".weight_packed", ".weight_global_scale", Companion::Divisor),
    (".weight_packed", ".weight_zero_point", Companion::Zero),
    (".weight_packed", ".weight_g_idx", Companion::GroupIndex),
    (".weight_packed", ".weight_shape", Companion::Shape),
    (".qweight", ".scales", Companion::Scale),
    (".qweight", ".qzeros", Companion::Zero),
    (".qweight", ".g_idx", Companion::GroupIndex),
    ("_blocks", "_scales", Companion::Scale),
    // Experts in one tensor, whose name is the parameter's.
    ("_proj", "_proj_scale_inv", Companion::Scale),
    ("_proj", "_proj_scale", Companion::Scale),
];

/// Endings under which the numbers of a `.weight` may be stored.
const PACKED: &[&str] = &[".weight_packed", ".qweight"];

/// Ending of packed MXFP4 levels, `[…, out, in/32, 16]`, whose plain numbers have a name without it.
const BLOCKS: &str = "_blocks";

/// Endings of what a runtime quantizes activations and caches with. They belong to no number of the weights.
const ACTIVATIONS: &[&str] = &[
    ".input_scale",
    ".output_scale",
    ".input_global_scale",
    ".input_zero_point",
    ".output_zero_point",
    ".k_scale",
    ".v_scale",
    ".q_scale",
    ".k_zero_point",
    ".v_zero_point",
];

impl Names {
    /// The names of `family`.
    pub fn of(family: &'static Family) -> Names {
        let mut templates = BTreeMap::new();
        for rule in family.rules.iter().copied().flatten() {
            let name = match rule.role.is_global() {
                true => rule.name.to_owned(),
                false => format!("{}{}", family.layer_prefix, rule.name),
            };
            templates.insert(name, Meaning::Trunk(rule));
        }
        for (layout, bit) in family.experts.iter().zip((0..32).map(|i| 1u32 << i)) {
            for piece in layout.pieces {
                let name = format!("{}{}", family.layer_prefix, piece.name);
                let seen = templates.get(&name).and_then(|m| match m {
                    Meaning::Expert { layouts, .. } => Some(*layouts),
                    Meaning::Trunk(_) => None,
                });
                templates.insert(name, Meaning::Expert { layouts: bit | seen.unwrap_or(0), piece });
            }
        }
        Names { templates, layer_prefix: family.layer_prefix, spellings: family.spellings }
    }

    /// The name in this family's own spelling.
    pub fn canonical<'a>(&self, name: &'a str) -> Cow<'a, str> {
        let mut canonical = Cow::Borrowed(name);
        for (found, means) in self.spellings {
            let other = match found.starts_with('.') {
                true => canonical.contains(found).then(|| canonical.replacen(found, means, 1)),
                false => canonical.strip_prefix(found).map(|rest| format!("{means}{rest}")),
            };
            if let Some(other) = other {
                canonical = Cow::Owned(other);
            }
        }
        as_weight(&canonical).map_or(canonical, Cow::Owned)
    }

    /// What `name` in the family's own spelling stands for, if the family has it.
    pub fn find(&self, name: &str) -> Option<Place> {
        if let Some(meaning) = self.templates.get(name).filter(|_| !name.contains('{')) {
            return Some(Place { meaning: *meaning, layer: None, expert: None });
        }
        // A second number is an expert's, or part of the name.
        [2, 1].into_iter().find_map(|n| {
            let (template, layer, expert) = template(name, n)?;
            let meaning = *self.templates.get(&template)?;
            Some(Place { meaning, layer: Some(layer), expert })
        })
    }

    /// The layer whose prefix `name` has, and what follows the prefix.
    pub fn layer_of<'a>(&self, name: &'a str) -> Option<(usize, &'a str)> {
        let (before, after) = self.layer_prefix.split_once("{L}")?;
        let rest = name.strip_prefix(before)?;
        let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let (digits, rest) = (rest.get(..end)?, rest.get(end..)?);
        Some((number(digits)?, rest.strip_prefix(after)?))
    }
}

/// The names of the numbers that a tensor of this name may belong to.
pub fn numbers_of(name: &str) -> impl Iterator<Item = String> {
    COMPANIONS.iter().filter_map(move |(of, own, _)| Some(format!("{}{of}", name.strip_suffix(own)?)))
}

/// The names that tensors beside these numbers may have.
pub fn companions_of(name: &str) -> impl Iterator<Item = (String, Companion)> {
    COMPANIONS
        .iter()
        .filter_map(move |(of, own, what)| Some((format!("{}{own}", name.strip_suffix(of)?), *what)))
}

/// The endings of what gives this to numbers of that name, for messages.
pub fn endings_of(name: &str, companion: Companion) -> Vec<&'static str> {
    let ending = |(of, own, what): &(&str, &'static str, Companion)| {
        let own = own.trim_start_matches("_proj").trim_start_matches('.');
        (name.ends_with(of) && *what == companion).then_some(own)
    };
    COMPANIONS.iter().filter_map(ending).collect()
}

/// The name of a tensor once its numbers are plain.
pub fn plain(name: &str) -> Cow<'_, str> {
    as_weight(name).map_or(Cow::Borrowed(name.strip_suffix(BLOCKS).unwrap_or(name)), Cow::Owned)
}

fn as_weight(name: &str) -> Option<String> {
    let stem = PACKED.iter().find_map(|ending| name.strip_suffix(ending))?;
    Some(format!("{stem}.weight"))
}

/// Whether a name is one of MXFP4 levels.
pub fn is_blocks(name: &str) -> bool {
    name.ends_with(BLOCKS)
}

/// Whether a name is one of packed numbers.
pub fn is_packed(name: &str) -> bool {
    PACKED.iter().any(|ending| name.ends_with(ending))
}

/// Whether a tensor of this name is for activations or caches.
pub fn is_of_activations(name: &str) -> bool {
    ACTIVATIONS.iter().any(|ending| name.ends_with(ending))
}

/// A name with its template's numbers put in.
pub fn fill(template: &str, layer: usize, expert: usize) -> String {
    template.replacen("{L}", &layer.to_string(), 1).replacen("{E}", &expert.to_string(), 1)
}

/// The name with its first number replaced by `{L}` and, if `n_numbers` is 2, its second by `{E}`.
pub fn template(name: &str, n_numbers: usize) -> Option<(String, usize, Option<usize>)> {
    let mut text = String::with_capacity(name.len() + 4);
    let (mut layer, mut expert) = (None, None);
    for (n, word) in name.split('.').enumerate() {
        if n > 0 {
            text.push('.');
        }
        match (number(word), layer, expert) {
            (Some(l), None, _) => {
                layer = Some(l);
                text.push_str("{L}");
            }
            (Some(e), Some(_), None) if n_numbers > 1 => {
                expert = Some(e);
                text.push_str("{E}");
            }
            _ => text.push_str(word),
        }
    }
    Some((text, layer?, expert))
}

/// A number written the only way we would write it.
fn number(word: &str) -> Option<usize> {
    let plain = word.bytes().all(|b| b.is_ascii_digit()) && (word == "0" || !word.starts_with('0'));
    if plain && word.len() <= 9 { word.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::family::FAMILIES;
    use crate::spec::Role;

    fn names(family: &str) -> Names {
        Names::of(FAMILIES.iter().find(|f| f.name() == family).unwrap())
    }

    #[test]
    fn names_are_taken_apart() {
        let names = names("deepseek_v3");
        let place = names.find("model.layers.12.self_attn.kv_b_proj.weight").unwrap();
        assert!(matches!(place.meaning, Meaning::Trunk(r) if r.role == Role::KvB));
        assert_eq!((place.layer, place.expert), (Some(12), None));
        let place = names.find("model.layers.3.mlp.experts.255.up_proj.weight").unwrap();
        assert!(
            matches!(place.meaning, Meaning::Expert { layouts: 1, piece } if piece.name.contains("up_proj"))
        );
        assert_eq!((place.layer, place.expert), (Some(3), Some(255)));
        let place = names.find("lm_head.weight").unwrap();
        assert_eq!((place.layer, place.expert), (None, None));
        assert_eq!(names.layer_of("model.layers.61.eh_proj.weight"), Some((61, "eh_proj.weight")));
    }

    #[test]
    fn only_the_exact_name_counts() {
        let names = names("qwen3_moe");
        for name in [
            "model.layers.03.mlp.gate.weight",
            "model.layers.+3.mlp.gate.weight",
            "model.layers.3.mlp.gate.weight.",
            "model.layers.3.mlp.gate_proj.weights",
            "layers.3.mlp.gate.weight",
            "model.layers.3.mlp.experts.1.2.up_proj.weight",
            "model.layers.{L}.mlp.gate.weight",
            "model.layers.99999999999999999999.mlp.gate.weight",
        ] {
            assert_eq!(names.find(name), None, "{name}");
        }
    }

    #[test]
    fn other_spellings_mean_the_same() {
        let v4 = names("deepseek_v4");
        for (found, means) in [
            ("layers.2.attn.wkv.weight", "layers.2.attn.wkv.weight"),
            ("model.layers.2.attn.norm.weight", "layers.2.attn.kv_norm.weight"),
            ("model.layers.2.attn.compressor.norm.weight", "layers.2.attn.compressor.norm.weight"),
            ("model.embed_tokens.weight", "embed.weight"),
            ("model.hc_head.hc_fn", "hc_head_fn"),
            ("lm_head.weight", "head.weight"),
        ] {
            assert_eq!(v4.canonical(found), means);
            assert!(v4.find(means).is_some(), "{means}");
        }
        let qwen = names("qwen3_5_moe");
        let found = "model.language_model.layers.0.linear_attn.A_log";
        assert_eq!(qwen.canonical(found), "model.layers.0.linear_attn.A_log");
        assert_eq!(names("llama4_text").canonical("language_model.lm_head.weight"), "lm_head.weight");
    }

    #[test]
    fn what_lies_beside_numbers_is_told_by_endings() {
        let of = |name: &str| companions_of(name).map(|(name, _)| name).collect::<Vec<_>>();
        assert_eq!(of("a.w1.weight")[..3], ["a.w1.weight_scale_inv", "a.w1.weight_scale", "a.w1.scale"]);
        assert_eq!(of("a.q_proj.qweight"), ["a.q_proj.scales", "a.q_proj.qzeros", "a.q_proj.g_idx"]);
        assert_eq!(numbers_of("a.w1.scale").collect::<Vec<_>>(), ["a.w1.weight"]);
        let both = ["a.x.weight", "a.x.weight_packed"];
        assert_eq!(numbers_of("a.x.weight_scale").collect::<Vec<_>>(), both);
        assert_eq!(numbers_of("hc_attn_scale").next(), None);
        assert_eq!(endings_of("a.weight_packed", Companion::Scale), ["weight_scale"]);
    }

    #[test]
    fn packed_numbers_are_those_of_the_weight() {
        let names = names("qwen3_moe");
        for ending in ["weight_packed", "qweight"] {
            let name = format!("model.layers.3.mlp.experts.5.up_proj.{ending}");
            assert_eq!(names.canonical(&name), "model.layers.3.mlp.experts.5.up_proj.weight");
            assert_eq!(plain(&name), "model.layers.3.mlp.experts.5.up_proj.weight");
        }
        assert_eq!(plain("mlp.experts.down_proj_blocks"), "mlp.experts.down_proj");
        assert_eq!(plain("mlp.gate.weight"), "mlp.gate.weight");
    }

    #[test]
    fn gpt_oss_layouts_share_their_biases() {
        let names = names("gpt_oss");
        let layouts = |name: &str| match names.find(name).unwrap().meaning {
            Meaning::Expert { layouts, piece } => (layouts, piece.transposed),
            Meaning::Trunk(_) => panic!("{name}"),
        };
        assert_eq!(layouts("model.layers.0.mlp.experts.gate_up_proj_blocks"), (1, false));
        assert_eq!(layouts("model.layers.0.mlp.experts.gate_up_proj"), (2, true));
        assert_eq!(layouts("model.layers.0.mlp.experts.down_proj_bias"), (3, false));
        let blocks = numbers_of("a.experts.down_proj_scales").next();
        assert_eq!(blocks.as_deref(), Some("a.experts.down_proj_blocks"));
    }
}
