//! MLPs, routed experts and routers.

use moepack_format::Result;

use super::blocks::{Block, blocks, periodic};
use super::{positive, switch};
use crate::family::{
    ActivationRule, Factor, Family, HashRule, MoeLayers, MoeRule, RouterRule, ScoreRule, SharedRule,
};
use crate::hparams::{Config, Keys};
use crate::limits::{EXPERTS_MAX, HIDDEN_MAX, INTER_MAX, LAYERS_MAX, SHARED_MAX};
use crate::spec::{
    Activation, Choice, GateUp, GroupScore, Groups, Mlp, Moe, RouteWeights, Router, Score, Shared, SharedSum,
    Shortcut,
};

/// Experts that `sparsemixer` takes, one after the other.
const SPARSE_MIXER_USED: usize = 2;

/// The MLP of each layer.
pub(super) fn mlps(family: &Family, config: &Config, n_layers: usize) -> Result<Vec<Mlp>> {
    if family.moe_layers == MoeLayers::Blocks {
        return of_blocks(family, config);
    }
    let has_experts = moe_layers(family, config, n_layers)?;
    let hashes = hash_layers(family.moe.router.hash, config, n_layers)?;
    let dense = if has_experts.iter().all(|&m| m) { None } else { Some(dense(family, config)?) };
    let moe = if has_experts.contains(&true) { Some(moe(family, config)?) } else { None };
    let one = |(has_experts, by_token): (bool, bool)| match (&moe, &dense) {
        (Some(moe), _) if has_experts => Some(Mlp::Moe(in_layer(moe, by_token))),
        (_, dense) => dense.clone(),
    };
    let mlps = has_experts.into_iter().zip(hashes).map(one).collect::<Option<Vec<_>>>();
    mlps.ok_or_else(|| config.error("a layer is neither dense nor has it experts"))
}

/// The MLPs of a model whose layers are one block each.
fn of_blocks(family: &Family, config: &Config) -> Result<Vec<Mlp>> {
    let one = |block: Block| match block {
        Block::Moe => moe(family, config).map(Mlp::Moe),
        Block::Dense => dense(family, config),
        Block::Mixer | Block::Full => Ok(Mlp::None),
    };
    blocks(config)?.into_iter().map(one).collect()
}

/// The experts of a layer that chooses by token, or of one that does not.
fn in_layer(moe: &Moe, by_token: bool) -> Moe {
    let mut moe = moe.clone();
    if by_token {
        moe.router.choice = Choice::ByToken;
        moe.router.correction = false;
    }
    moe
}

/// Which layers have experts.
fn moe_layers(family: &Family, config: &Config, n_layers: usize) -> Result<Vec<bool>> {
    let rule = family.moe_layers;
    let single = || Ok(config.uint_opt(family.moe.n_experts, 1, EXPERTS_MAX)? == Some(1)) as Result<bool>;
    let zero = || Ok(config.uint_opt(family.moe.n_experts, 0, EXPERTS_MAX)? == Some(0)) as Result<bool>;
    let is_dense = match rule {
        MoeLayers::None => true,
        MoeLayers::Period(..) => single()?,
        MoeLayers::AllUnlessZero => zero()?,
        _ => false,
    };
    if is_dense {
        return Ok(vec![false; n_layers]);
    }
    let layers = match config.strings_opt(&["mlp_layer_types"], n_layers)? {
        Some(types) => types.iter().map(|t| *t != "dense").collect(),
        None => by_rule(rule, config, n_layers)?,
    };
    if layers.contains(&true) {
        return Ok(layers);
    }
    Err(config
        .error(format!("none of {n_layers} layers has experts"))
        .hint("moepack packs Mixture-of-Experts models"))
}

fn by_rule(rule: MoeLayers, config: &Config, n_layers: usize) -> Result<Vec<bool>> {
    Ok(match rule {
        MoeLayers::All | MoeLayers::AllUnlessZero => vec![true; n_layers],
        MoeLayers::None | MoeLayers::Blocks => vec![false; n_layers],
        MoeLayers::Period(period, offset) => {
            let keys = ["expert_layer_period", "expert_layer_offset"];
            let every = periodic(config, keys, [period, offset])?;
            (0..n_layers).map(every).collect()
        }
        MoeLayers::From(key, default) => {
            let first = config.uint_opt(&[key], 0, n_layers)?.unwrap_or(default);
            (0..n_layers).map(|l| l >= first).collect()
        }
        MoeLayers::Sparse => {
            let step = config.uint_opt(&["decoder_sparse_step"], 1, LAYERS_MAX)?.unwrap_or(1);
            let dense = config.uints_opt(&["mlp_only_layers"], LAYERS_MAX)?.unwrap_or_default();
            (0..n_layers).map(|l| (l + 1) % step == 0 && !dense.contains(&l)).collect()
        }
        MoeLayers::Interval => {
            let first = config.uint_opt(&["moe_layer_start_index"], 0, LAYERS_MAX)?.unwrap_or(1);
            let step = config.uint_opt(&["moe_layer_interval"], 1, LAYERS_MAX)?.unwrap_or(1);
            let last = match config.find(&["moe_layer_end_index"]) {
                Some((_, v)) if v.as_i64() == Some(-1) => n_layers - 1,
                _ => config.uint_opt(&["moe_layer_end_index"], 0, LAYERS_MAX)?.unwrap_or(n_layers - 1),
            };
            (0..n_layers).map(|l| (l + 1) % step == 0 && (first..=last).contains(&l)).collect()
        }
        MoeLayers::Flags(key) => match config.uints_opt(&[key], 2)? {
            Some(flags) => (0..n_layers).map(|l| flags.get(l) == Some(&1)).collect(),
            None => vec![true; n_layers],
        },
        MoeLayers::Listed => match config.uints_opt(&["moe_layers"], LAYERS_MAX)? {
            Some(list) => (0..n_layers).map(|l| list.contains(&l)).collect(),
            None => {
                let step = config.uint_opt(&["interleave_moe_layer_step"], 1, LAYERS_MAX)?.unwrap_or(1);
                (0..n_layers).map(|l| (l + 1) % step == 0).collect()
            }
        },
    })
}

/// Which layers choose experts by the token's id.
fn hash_layers(rule: HashRule, config: &Config, n_layers: usize) -> Result<Vec<bool>> {
    let HashRule::First(default) = rule else { return Ok(vec![false; n_layers]) };
    if let Some(types) = config.strings_opt(&["mlp_layer_types"], n_layers)? {
        return Ok(types.iter().map(|t| *t == "hash_moe").collect());
    }
    let n = config.uint_opt(&["num_hash_layers"], 0, LAYERS_MAX)?.unwrap_or(default);
    Ok((0..n_layers).map(|l| l < n).collect())
}

/// What runs beside experts on a shortcut.
pub(super) fn shortcut(family: &Family, config: &Config) -> Result<Shortcut> {
    let activation = activation_elsewhere(&family.moe, config)?;
    Ok(Shortcut { inter: config.uint(family.dense_inter, 1, INTER_MAX)?, activation })
}

fn dense(family: &Family, config: &Config) -> Result<Mlp> {
    let activation = activation_elsewhere(&family.moe, config)?;
    let inter = config.uint(family.dense_inter, 1, INTER_MAX)?;
    let gate_up = if family.moe.shared_fused { GateUp::AsShared } else { GateUp::Two };
    Ok(Mlp::Dense { inter, activation, gate_up })
}

fn moe(family: &Family, config: &Config) -> Result<Moe> {
    let rule = &family.moe;
    let n_experts = config.uint_of_layers(rule.n_experts, 1, EXPERTS_MAX)?;
    let n_experts_used = config.uint_of_layers(rule.n_experts_used, 1, EXPERTS_MAX)?;
    let n_zero = config.uint_opt(rule.n_zero, 0, EXPERTS_MAX)?.unwrap_or(0);
    if n_experts_used > n_experts + n_zero {
        let n = n_experts + n_zero;
        return Err(config.error(format!("a token uses {n_experts_used} experts, but there are {n}")));
    }
    let inter = config.uint_of_layers(rule.inter, 1, INTER_MAX)?;
    Ok(Moe {
        n_experts,
        n_zero,
        n_experts_used,
        inter,
        activation: activation(rule.activation, config)?,
        latent: config.uint_opt(rule.latent, 1, HIDDEN_MAX)?,
        bias: rule.bias,
        sum_bias: rule.sum_bias,
        weighs_input: rule.weighs_input,
        router: router(&rule.router, config, n_experts, n_experts_used)?,
        shared: shared(rule, config, inter)?,
    })
}

/// Of shared experts and dense layers.
fn activation_elsewhere(rule: &MoeRule, config: &Config) -> Result<Activation> {
    if rule.plain_elsewhere { Ok(Activation::Silu) } else { activation(rule.activation, config) }
}

fn activation(rule: ActivationRule, config: &Config) -> Result<Activation> {
    let limit =
        |default: f64| -> Result<f32> { Ok(positive(config, &["swiglu_limit"])?.unwrap_or(default as f32)) };
    Ok(match rule {
        ActivationRule::Silu => Activation::Silu,
        ActivationRule::GeluTanh => Activation::GeluTanh,
        ActivationRule::SquaredRelu => Activation::SquaredRelu,
        ActivationRule::ClampedSilu { limit: default } => Activation::ClampedSilu { limit: limit(default)? },
        ActivationRule::ClampedSwish { alpha, limit: default } => Activation::ClampedSwish {
            alpha: positive(config, &["swiglu_alpha"])?.unwrap_or(alpha as f32),
            limit: limit(default)?,
        },
    })
}

fn router(rule: &RouterRule, config: &Config, n_experts: usize, n_used: usize) -> Result<Router> {
    let scale = match rule.scale {
        Factor::Key(key, default) => positive(config, &[key])?.unwrap_or(default as f32),
        _ => 1.0,
    };
    let wanted = rule.groups_if.is_none_or(|(key, value)| {
        config.find(&[key]).and_then(|(_, v)| v.as_str()).is_some_and(|v| v == value)
    });
    let groups = match rule.groups.filter(|_| wanted) {
        Some(score) => groups(config, n_experts, n_used, score)?,
        None => None,
    };
    if matches!(rule.choice, Choice::SparseMixer(_)) && n_used != SPARSE_MIXER_USED {
        let what = format!("a token uses {n_used} experts, this router chooses {SPARSE_MIXER_USED}");
        return Err(config.error(what));
    }
    let weights = weights(rule, config)?;
    // Softmax already adds up to 1; a sum of sigmoids is what the switch is about.
    let renorm = switch(config, rule.renorm)? && weights != RouteWeights::SoftmaxOverChosen;
    Ok(Router {
        bias: rule.bias,
        softcap: softcap(rule.softcap, config)?,
        own_input: rule.own_input,
        expert_scale: rule.own_input,
        score: score(rule.score, config)?,
        correction: rule.correction && switch(config, rule.correction_if)?,
        choice: choice(rule.choice, config)?,
        groups,
        weights,
        renorm: renorm.then_some(rule.renorm_eps),
        scale,
    })
}

/// A cap of logits, if the key is there and above 0.
pub(super) fn softcap(keys: Keys, config: &Config) -> Result<Option<f32>> {
    Ok(config.number_opt(keys)?.map(|cap| cap as f32).filter(|&cap| cap > 0.0))
}

fn choice(choice: Choice, config: &Config) -> Result<Choice> {
    let Choice::SparseMixer(default) = choice else { return Ok(choice) };
    let jitter = config.number_opt(&["router_jitter_noise"])?.map(|n| 2.0 * n as f32);
    Ok(Choice::SparseMixer(jitter.unwrap_or(default)))
}

fn score(rule: ScoreRule, config: &Config) -> Result<Score> {
    const KEY: &str = "scoring_func";
    let default = match rule {
        ScoreRule::Is(score) => return Ok(score),
        ScoreRule::ScoringFunc(default) => default,
    };
    let Some((_, value)) = config.find(&[KEY]) else { return Ok(default) };
    match value.as_str() {
        Some("sqrtsoftplus") => Ok(Score::SqrtSoftplus),
        Some("sigmoid") => Ok(Score::Sigmoid),
        Some("softmax") => Ok(Score::Softmax),
        _ => Err(config.bad(KEY, value, "\"sqrtsoftplus\", \"sigmoid\" or \"softmax\"")),
    }
}

fn weights(rule: &RouterRule, config: &Config) -> Result<RouteWeights> {
    let Some((key, value)) = rule.weights_key.and_then(|key| config.find(&[key])) else {
        return Ok(rule.weights);
    };
    match value.as_str() {
        Some("softmax") => Ok(RouteWeights::SoftmaxOverChosen),
        Some("sigmoid") => Ok(RouteWeights::Sigmoid),
        _ => Err(config.bad(key, value, "\"softmax\" or \"sigmoid\"")),
    }
}

/// Groups and those kept; `None` where all experts compete with each other.
fn groups(config: &Config, n_experts: usize, n_used: usize, score: GroupScore) -> Result<Option<Groups>> {
    let n = config.uint_opt(&["n_group", "num_expert_group"], 1, EXPERTS_MAX)?.unwrap_or(1);
    let used = config.uint_opt(&["topk_group"], 1, EXPERTS_MAX)?.unwrap_or(1);
    if used > n {
        return Err(config.error(format!("topk_group is {used}, but n_group is {n}")));
    }
    if !n_experts.is_multiple_of(n) {
        return Err(config.error(format!("{n_experts} experts do not divide into {n} groups")));
    }
    if n_experts / n * used < n_used {
        let left = n_experts / n * used;
        return Err(
            config.error(format!("a token uses {n_used} experts, but {used} of {n} groups hold {left}"))
        );
    }
    // The score of a group may be the sum of its two best.
    if n > 1 && n_experts / n < 2 && score == GroupScore::Top2Sum {
        return Err(config.error(format!("{n} groups of {n_experts} experts leave fewer than 2 in a group")));
    }
    Ok((used < n).then_some(Groups { n_groups: n, n_groups_used: used, score }))
}

fn shared(rule: &MoeRule, config: &Config, inter: usize) -> Result<Option<Shared>> {
    let (width, gated) = match rule.shared {
        SharedRule::None => (0, false),
        SharedRule::Count(key, default) => {
            (config.uint_opt(&[key], 0, SHARED_MAX)?.unwrap_or(default) * inter, false)
        }
        SharedRule::Width(keys) => (config.uint_opt(keys, 0, INTER_MAX)?.unwrap_or(0), false),
        SharedRule::Gated(keys) => (config.uint(keys, 1, INTER_MAX)?, true),
    };
    let sum = shared_sum(rule, config)?;
    let activation = activation_elsewhere(rule, config)?;
    let fused = rule.shared_fused;
    Ok((width > 0).then_some(Shared {
        inter: width,
        gated,
        fused,
        activation,
        normed: rule.shared_normed,
        sum,
    }))
}

fn shared_sum(rule: &MoeRule, config: &Config) -> Result<SharedSum> {
    let Some(key) = rule.shared_sum else { return Ok(SharedSum::Sum) };
    match config.find(&[key]).map(|(_, v)| (v, v.as_str())) {
        Some((_, Some("sum"))) => Ok(SharedSum::Sum),
        None | Some((_, Some("average"))) => Ok(SharedSum::Mean),
        Some((value, _)) => Err(config.bad(key, value, "\"sum\" or \"average\"")),
    }
}
