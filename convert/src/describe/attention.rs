//! Attention kinds, layer by layer.

use moepack_format::Result;

use super::blocks::{Block, mixers};
use super::compressed::compressed;
use super::delta::delta;
use super::heads::{Wide, check_groups, gate, head_dim, heads_of_layers, wide_heads};
use super::indexed::{
    blocks_of_layers, check_first_choice, indexer, shared_choices, with_blocks, with_pools,
};
use super::recurrent::mixer;
use super::{Base, factor, norm, positive, switch};
use crate::family::{
    AttentionRule, DeltaRule, Family, GqaRule, MixedLayers, MixerRule, MlaRule, NopeRule, Sinks, Switch,
    WindowRule,
};
use crate::hparams::Config;
use crate::limits::{EXPERTS_MAX, HEAD_DIM_MAX, HEADS_MAX, LAYERS_MAX, POSITIONS_MAX, RANK_MAX};
use crate::rope::{Source, rope};
use crate::spec::{Attention, Gqa, KeyChoice, Mla, Mlp, Pairing, QkNorm, Rope, RoutedAttention, Temperature};

/// The attention of each layer.
pub(super) fn attentions(
    family: &Family,
    config: &Config,
    base: &Base,
    mlps: &[Mlp],
) -> Result<Vec<Attention>> {
    match family.attention {
        AttentionRule::Gqa(rule) => {
            let spans = spans(&rule, config, base.n_layers)?;
            let nope = nope(&rule, config, &spans, mlps)?;
            let heads = heads_of_layers(&rule, config, base)?;
            let blocks = blocks_of_layers(&rule, config, base)?;
            let one = |(((span, nope), n_heads), blocks)| {
                let base = Base { n_heads, ..*base };
                let gqa = gqa(family, &rule, config, &base, span, nope)?;
                Ok(Attention::Gqa(with_blocks(config, gqa, blocks)?))
            };
            spans.into_iter().zip(nope).zip(heads).zip(blocks).map(one).collect()
        }
        AttentionRule::Hybrid(full, linear) => hybrid(family, &full, linear, config, base),
        AttentionRule::HybridMla(full, linear) => hybrid_mla(family, &full, linear, config, base),
        AttentionRule::Routed => {
            let routed = routed(family, config, base)?;
            Ok(vec![Attention::Routed(routed); base.n_layers])
        }
        AttentionRule::Mixed(full, other, layers) => {
            mixed(family, (&full, &other, layers), config, base, mlps)
        }
        AttentionRule::Mla(rule) => {
            let mla = mla(family, &rule, config, base)?;
            let shared = shared_choices(&rule, config, base.n_layers)?;
            let one = |shared: bool| match shared {
                true => Mla { choice: KeyChoice::AsBefore, ..mla.clone() },
                false => mla.clone(),
            };
            let layers: Vec<_> = shared.into_iter().map(|shared| Attention::Mla(one(shared))).collect();
            check_first_choice(config, &layers)?;
            Ok(layers)
        }
        AttentionRule::Carried => Ok(vec![Attention::Carried; base.n_layers]),
        AttentionRule::Compressed(rule) => {
            let layers = compressed(family, &rule, config, base)?;
            Ok(layers.into_iter().map(Attention::Compressed).collect())
        }
    }
}

/// Full attention in some layers, linear attention in the others.
fn hybrid(
    family: &Family,
    full: &GqaRule,
    linear: DeltaRule,
    config: &Config,
    base: &Base,
) -> Result<Vec<Attention>> {
    let every = || -> Result<Vec<bool>> {
        let n = config.uint_opt(&["full_attention_interval"], 1, LAYERS_MAX)?.unwrap_or(4);
        Ok((0..base.n_layers).map(|l| (l + 1) % n != 0).collect())
    };
    let listed = linear_layers(full.pools, config, base.n_layers)?;
    let gqa = gqa(family, full, config, base, Span::default(), false)?;
    let gqa = if full.pools { with_pools(config, gqa)? } else { gqa };
    let delta = delta(linear, config)?;
    let one = |linear: bool| match linear {
        true => Attention::Delta(delta.clone()),
        false => Attention::Gqa(gqa.clone()),
    };
    Ok(listed.map_or_else(every, Ok)?.into_iter().map(one).collect())
}

/// Latent attention in some layers, linear attention in the others.
fn hybrid_mla(
    family: &Family,
    full: &MlaRule,
    linear: DeltaRule,
    config: &Config,
    base: &Base,
) -> Result<Vec<Attention>> {
    let listed = linear_layers(full.indexer.is_some(), config, base.n_layers)?;
    let from_one = config.uints_opt(&["linear_attn_config.full_attn_layers"], LAYERS_MAX)?;
    let group = linear.group.map(|(key, _)| config.uint_opt(&[key], 1, LAYERS_MAX)).transpose()?.flatten();
    let is_linear = |l: usize| match (&listed, &from_one) {
        (Some(listed), _) => listed.get(l).copied().unwrap_or(false),
        (None, Some(full)) => !full.contains(&(l + 1)),
        (None, None) => match linear.group {
            Some((_, n)) => !(l + 1).is_multiple_of(group.unwrap_or(n)),
            None => l == 0 || !l.is_multiple_of(4),
        },
    };
    let (mla, delta) = (mla(family, full, config, base)?, delta(linear, config)?);
    let shared = shared_choices(full, config, base.n_layers)?;
    let one = |(l, shared): (usize, bool)| match (is_linear(l), shared) {
        (true, _) => Attention::Delta(delta.clone()),
        (false, true) => Attention::Mla(Mla { choice: KeyChoice::AsBefore, ..mla.clone() }),
        (false, false) => Attention::Mla(mla.clone()),
    };
    let layers: Vec<_> = shared.into_iter().enumerate().map(one).collect();
    check_first_choice(config, &layers)?;
    Ok(layers)
}

/// Which layers `layer_types` calls linear; those with an indexer are `indexed_attention`.
fn linear_layers(has_indexer: bool, config: &Config, n_layers: usize) -> Result<Option<Vec<bool>>> {
    const LINEAR: &str = "linear_attention";
    let Some(types) = config.strings_opt(&["layer_types"], n_layers)? else { return Ok(None) };
    if !has_indexer || !types.contains(&"indexed_attention") {
        return layer_types(config, n_layers, LINEAR);
    }
    match types.iter().find(|t| ![LINEAR, "indexed_attention", "full_attention"].contains(t)) {
        Some(odd) => {
            Err(config.error(format!("layer_types has {odd:?}, which is no attention of this family")))
        }
        None => Ok(Some(types.iter().map(|t| *t == LINEAR).collect())),
    }
}

/// Attention in some layers, another mixer in others, neither in those that are an MLP alone.
fn mixed(
    family: &Family,
    (full, other, layers): (&GqaRule, &MixerRule, MixedLayers),
    config: &Config,
    base: &Base,
    mlps: &[Mlp],
) -> Result<Vec<Attention>> {
    let spans = spans(full, config, base.n_layers)?;
    let nope = nope(full, config, &spans, mlps)?;
    let kinds = mixers(layers, config, base.n_layers)?;
    let one = |(l, ((kind, span), nope)): (usize, ((Block, &Span), bool))| match kind {
        Block::Full => gqa(family, full, config, base, *span, nope).map(Attention::Gqa),
        Block::Mixer => mixer(other, full, config, base, l),
        Block::Moe | Block::Dense => Ok(Attention::None),
    };
    kinds.into_iter().zip(&spans).zip(nope).enumerate().map(one).collect()
}

/// What a query sees.
#[derive(Clone, Copy, Debug, Default)]
struct Span {
    window: Option<usize>,
    chunk: Option<usize>,
}

impl Span {
    fn is_limited(&self) -> bool {
        self.window.is_some() || self.chunk.is_some()
    }
}

fn gqa(family: &Family, rule: &GqaRule, config: &Config, base: &Base, span: Span, nope: bool) -> Result<Gqa> {
    let n_heads = base.n_heads;
    let times = if span.window.is_some() { rule.kv_heads_in_window } else { 1 };
    let n_kv_heads = config.uint_opt(rule.n_kv_heads, 1, HEADS_MAX)?.unwrap_or(n_heads) * times;
    let wide = match rule.wide_if {
        Some(key) if !span.is_limited() => wide_heads(config, key, n_kv_heads)?,
        _ => Wide { n_kv_heads, head_dim: head_dim(rule, config, base)?, k_is_v: false },
    };
    let Wide { n_kv_heads, head_dim, k_is_v } = wide;
    check_groups(config, n_heads, n_kv_heads)?;
    let scale = match rule.scale {
        Some(rule) => factor(config, rule, base)?,
        None => (1.0 / (head_dim as f64).sqrt()) as f32,
    };
    let has_qk_norm = switch(config, rule.qk_norm_if)?;
    // The unweighted one is part of the position encoding.
    let has_qk_norm = has_qk_norm && !(nope && rule.qk_norm == QkNorm::Unweighted);
    let sinks = match rule.sinks {
        Sinks::None => false,
        Sinks::All => true,
        Sinks::InWindow => span.window.is_some(),
    };
    Ok(Gqa {
        n_heads,
        n_kv_heads,
        head_dim,
        v_dim: config.uint_opt(rule.v_dim, 1, HEAD_DIM_MAX)?.unwrap_or(head_dim),
        fused: rule.fused,
        k_is_v,
        v_norm: rule.v_norm,
        qk_norm: if has_qk_norm { rule.qk_norm } else { QkNorm::None },
        qk_norm_late: rule.qk_norm_late,
        qkv_bias: switch(config, rule.qkv_bias)?,
        o_bias: switch(config, rule.o_bias)?,
        clip: positive(config, rule.clip)?,
        window: span.window,
        chunk: span.chunk,
        sinks,
        scale,
        temperature: if rule.temperature && nope { temperature(config)? } else { None },
        v_scale: factor(config, rule.v_scale, base)?,
        gate: gate(rule, config)?,
        gate_by: rule.gate_by,
        blocks: None,
        pools: None,
        rope: if nope { Rope::NONE } else { gqa_rope(family, rule, config, base, span, head_dim)? },
    })
}

fn routed(family: &Family, config: &Config, base: &Base) -> Result<RoutedAttention> {
    let head_dim = config.uint(&["kv_channels", "head_dim"], 1, HEAD_DIM_MAX)?;
    rotary_pairs(config, "kv_channels", head_dim)?;
    let source = Source::new(config, "")?;
    let dim = source.rotary_dim(family.rope, "rotary_dim", head_dim)?;
    let n_experts = config.uint(family.moe.n_experts, 1, EXPERTS_MAX)?;
    Ok(RoutedAttention {
        n_experts,
        n_used: config.uint(family.moe.n_experts_used, 1, n_experts)?,
        n_kv_heads: config.uint(&["num_key_value_heads"], 1, HEADS_MAX)?,
        head_dim,
        scale: (1.0 / (head_dim as f64).sqrt()) as f32,
        rope: rope(source, family.rope, None, Pairing::Half, dim, base.positions)?.rope,
    })
}

fn gqa_rope(
    family: &Family,
    rule: &GqaRule,
    config: &Config,
    base: &Base,
    span: Span,
    head_dim: usize,
) -> Result<Rope> {
    rotary_pairs(config, "head_dim", head_dim)?;
    let label = if span.window.is_some() { "sliding_attention" } else { "full_attention" };
    let source = Source::new(config, label)?;
    if family.rope.by_layers && !source.is_part(label) {
        return Err(config.error(format!("rope_parameters has no part {label}")));
    }
    let theta = match family.rope.window_theta {
        Some((key, default)) if span.window.is_some() && !source.is_part(label) => {
            Some(config.number_opt(&[key])?.unwrap_or(default))
        }
        _ => None,
    };
    let dim = if source.is_proportional()? {
        head_dim
    } else {
        source.rotary_dim(family.rope, "rotary_dim", head_dim)?
    };
    Ok(rope(source, family.rope, theta, rule.pairing, dim, base.positions)?.rope)
}

fn temperature(config: &Config) -> Result<Option<Temperature>> {
    if !config.flag(&["attn_temperature_tuning"], true)? {
        return Ok(None);
    }
    let beta = positive(config, &["attn_scale"])?.unwrap_or(0.1);
    let floor = positive(config, &["floor_scale"])?.unwrap_or(8192.0);
    Ok(Some(Temperature { beta, floor, shift: 1.0 }))
}

fn mla(family: &Family, rule: &MlaRule, config: &Config, base: &Base) -> Result<Mla> {
    let nope_dim = config.uint(&["qk_nope_head_dim"], 1, HEAD_DIM_MAX)?;
    let rope_dim = config.uint(&["qk_rope_head_dim"], usize::from(!rule.nope), HEAD_DIM_MAX)?;
    rotary_pairs(config, "qk_rope_head_dim", rope_dim)?;
    let pairing = pairing(config, rule.adjacent)?;
    let scaled = rope(Source::new(config, "")?, family.rope, None, pairing, rope_dim, base.positions)?;
    // A missing q_lora_rank would mean V3's 1536 to transformers, null means a direct projection: both are
    // written.
    let q_lora = config.uint_opt(&["q_lora_rank"], 1, RANK_MAX)?;
    let q_lora = q_lora.filter(|_| !rule.direct_q);
    if q_lora.is_none() && !rule.direct_q && !config.mentions(&["q_lora_rank"]) {
        return Err(
            config.error("q_lora_rank is missing; null means that queries have no low-rank projection")
        );
    }
    let kv_lora = config.uint(&["kv_lora_rank"], 1, RANK_MAX)?;
    let gain = |rank: usize| if rule.gain { (base.hidden as f64 / rank as f64).sqrt() } else { 1.0 };
    // The gain of queries is one of logits.
    let scale = 1.0 / ((nope_dim + rope_dim) as f64).sqrt() * scaled.logit_factor * q_lora.map_or(1.0, gain);
    Ok(Mla {
        n_heads: base.n_heads,
        q_lora,
        kv_lora,
        kv_gain: gain(kv_lora) as f32,
        nope_dim,
        rope_dim,
        v_dim: config.uint(&["v_head_dim"], 1, HEAD_DIM_MAX)?,
        latent_eps: match rule.latent_eps {
            Some(eps) => eps as f32,
            None => norm(family, config)?.eps(),
        },
        bias: switch(config, rule.bias)?,
        scale: scale as f32,
        temperature: if rule.temperature { rope_temperature(config)? } else { None },
        choice: match rule.indexer {
            None => KeyChoice::All,
            Some(rule) => KeyChoice::Indexed(indexer(family, config, base, &rule, rope_dim)?),
        },
        gate: rule.gate,
        sinks: rule.sinks,
        rope: if rule.nope { Rope::NONE } else { scaled.rope },
    })
}

/// Growth of queries that the rotary encoding's section asks for.
fn rope_temperature(config: &Config) -> Result<Option<Temperature>> {
    let Some(section) = Source::new(config, "")?.section else { return Ok(None) };
    let beta = section.number_opt("llama_4_scaling_beta")?;
    let floor = section.number_opt("original_max_position_embeddings")?.filter(|&n| n > 0.0);
    let growing = beta.zip(floor).map(|(beta, floor)| (beta as f32, floor as f32));
    Ok(growing.map(|(beta, floor)| Temperature { beta, floor, shift: 0.0 }))
}

fn pairing(config: &Config, adjacent: Switch) -> Result<Pairing> {
    Ok(if switch(config, adjacent)? { Pairing::Adjacent } else { Pairing::Half })
}

pub(super) fn rotary_pairs(config: &Config, key: &str, dim: usize) -> Result<()> {
    if dim.is_multiple_of(2) {
        return Ok(());
    }
    Err(config.error(format!("{key} is {dim}, expected an even number: dimensions rotate in pairs")))
}

/// What a query sees in each layer.
fn spans(rule: &GqaRule, config: &Config, n_layers: usize) -> Result<Vec<Span>> {
    let rule = rule.window;
    if let WindowRule::Chunks { default } = rule {
        return chunks(config, n_layers, default);
    }
    // transformers 5 writes 0 for "not used".
    let size = config.uint_opt(&["sliding_window"], 0, POSITIONS_MAX)?;
    let unused = size == Some(0);
    let size = size.filter(|&n| n > 0);
    let used = config.flag(&["use_sliding_window"], false)?;
    let every_other = |until: usize| (0..n_layers).map(|l| l % 2 == 0 && l < until).collect::<Vec<_>>();
    let listed = || layer_types(config, n_layers, "sliding_attention");
    let max_window_layers = |default| -> Result<usize> {
        Ok(config.uint_opt(&["max_window_layers"], 0, LAYERS_MAX)?.unwrap_or(default))
    };
    let (size, slides) = match rule {
        WindowRule::None | WindowRule::Chunks { .. } => (None, Vec::new()),
        WindowRule::All => (size, vec![true; n_layers]),
        // transformers' default where the key is missing but used.
        WindowRule::IfUsed => (size.or(Some(4096)), vec![used; n_layers]),
        WindowRule::LayerTypes { default } => {
            (size.or(Some(default)), listed()?.unwrap_or_else(|| every_other(n_layers)))
        }
        WindowRule::Listed { default } => {
            (size.or(Some(default)), listed()?.unwrap_or_else(|| vec![false; n_layers]))
        }
        WindowRule::LayerTypesIfUsed => {
            let until = max_window_layers(28)?;
            let listed = listed()?.unwrap_or_else(|| every_other(until));
            (size.or(Some(4096)).filter(|_| used), listed)
        }
        WindowRule::LayerTypesFrom { default } => {
            let from = max_window_layers(default)?;
            let size = if config.mentions(&["sliding_window"]) { size } else { Some(4096) };
            (size, listed()?.unwrap_or_else(|| (0..n_layers).map(|l| l >= from).collect()))
        }
        WindowRule::AllButLast { n, default } => {
            let mut listed =
                listed()?.unwrap_or_else(|| (0..n_layers).map(|l| !(l + 1).is_multiple_of(n)).collect());
            listed.iter_mut().skip(n_layers - 1).for_each(|l| *l = false);
            (size.or(Some(default)), listed)
        }
        WindowRule::AllBut { every, n, first_too, default } => {
            // MiMo's releases count the keys before the query.
            let before = config.uint_opt(&["sliding_window_size"], 1, POSITIONS_MAX)?;
            let size = if config.mentions(&["sliding_window"]) { size } else { Some(default) };
            let size = before.map(|n| n + 1).or(size);
            if let Some(listed) = listed()? {
                (size, listed)
            } else {
                let n = config.uint_opt(&[every], 1, LAYERS_MAX)?.unwrap_or(n);
                (size, (0..n_layers).map(|l| (l + 1) % n != 0 && !(first_too && l == 0)).collect())
            }
        }
    };
    let size = size.filter(|_| !unused);
    let window = |l: usize| size.filter(|_| slides.get(l).copied().unwrap_or(false));
    Ok((0..n_layers).map(|l| Span { window: window(l), chunk: None }).collect())
}

fn chunks(config: &Config, n_layers: usize, default: usize) -> Result<Vec<Span>> {
    let size = config.uint_opt(&["attention_chunk_size"], 1, POSITIONS_MAX)?;
    let size = if config.mentions(&["attention_chunk_size"]) { size } else { Some(default) };
    let chunked = match layer_types(config, n_layers, "chunked_attention")? {
        Some(listed) => listed,
        None => nope_listed(config, n_layers)?.into_iter().map(|nope| !nope).collect(),
    };
    Ok(chunked.into_iter().map(|c| Span { window: None, chunk: size.filter(|_| c) }).collect())
}

/// Which layers `layer_types` calls this.
pub(super) fn layer_types(config: &Config, n_layers: usize, limited: &str) -> Result<Option<Vec<bool>>> {
    let Some(types) = config.strings_opt(&["layer_types"], n_layers)? else { return Ok(None) };
    let one =
        |t: &&str| match *t {
            t if t == limited => Ok(true),
            "full_attention" => Ok(false),
            other => Err(config
                .error(format!("layer_types has {other:?}, expected \"full_attention\" or \"{limited}\""))),
        };
    types.iter().map(one).collect::<Result<_>>().map(Some)
}

/// Which layers have no position encoding.
fn nope(rule: &GqaRule, config: &Config, spans: &[Span], mlps: &[Mlp]) -> Result<Vec<bool>> {
    let n_layers = spans.len();
    let without_window = |l: &Span| !l.is_limited();
    Ok(match rule.nope {
        NopeRule::None => vec![false; n_layers],
        NopeRule::All => vec![true; n_layers],
        NopeRule::UnlessAsked => {
            let kind = config.find(&["position_embedding_type"]).and_then(|(_, v)| v.as_str());
            vec![kind != Some("rope"); n_layers]
        }
        NopeRule::WithoutWindow => {
            // Without `sliding_window` there is no pattern, and every layer rotates.
            let windows = !config.mentions(&["sliding_window"]) || config.find(&["sliding_window"]).is_some();
            spans.iter().map(|l| windows && without_window(l)).collect()
        }
        NopeRule::WithoutWindowUnlessDense => {
            let pattern = config.uint_opt(&["prefix_dense_sliding_window_pattern"], 1, LAYERS_MAX)?;
            let rotates = |mlp: &Mlp| mlp.moe().is_none() && pattern.unwrap_or(1) == 1;
            spans.iter().zip(mlps).map(|(l, mlp)| without_window(l) && !rotates(mlp)).collect()
        }
        NopeRule::Listed => nope_listed(config, n_layers)?,
    })
}

fn nope_listed(config: &Config, n_layers: usize) -> Result<Vec<bool>> {
    let listed = config.uints_opt(&["no_rope_layers"], 2)?.filter(|l| !l.is_empty());
    if let Some(listed) = listed {
        if listed.len() < n_layers {
            let what = format!("no_rope_layers has {} entries for {n_layers} layers", listed.len());
            return Err(config.error(what));
        }
        return Ok(listed.into_iter().take(n_layers).map(|rotates| rotates == 0).collect());
    }
    let every = config.uint_opt(&["no_rope_layer_interval"], 1, LAYERS_MAX)?.unwrap_or(4);
    Ok((0..n_layers).map(|l| (l + 1) % every == 0).collect())
}
