//! The forward pass against figures that transformers computed in f32.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::path::{Path, PathBuf};

use moepack_convert::{Model, OpenOptions};
use moepack_quant::Isa;
use moepack_verify::forward::{self, Head, LayerWeights, MoePass, Observer, RoutedSum, Stream, Weights};
use moepack_verify::tokens::Windows;
use safetensors::SafeTensors;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures")
}

fn open(dir: &Path) -> Model {
    Model::open(dir, &OpenOptions::default()).unwrap_or_else(|e| panic!("{}: {e:#?}", dir.display()))
}

/// `golden.safetensors`: windows of the same length and the logits of all their positions, `[tokens, vocab]`.
struct Golden {
    windows: Windows,
    logits: Vec<f32>,
}

impl Golden {
    fn read(dir: &Path) -> Golden {
        let bytes = std::fs::read(dir.join("golden.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let ids = tensors.tensor("input_ids").unwrap();
        let id = |b: &[u8]| i64::from_le_bytes(b.try_into().unwrap()) as u32;
        let tokens: Vec<u32> = ids.data().chunks_exact(8).map(id).collect();
        let logits = tensors.tensor("logits").unwrap();
        let value = |b: &[u8]| f32::from_le_bytes(b.try_into().unwrap());
        let &[n_windows, len] = ids.shape() else { panic!("input_ids of shape {:?}", ids.shape()) };
        Golden {
            windows: Windows { lens: vec![len; n_windows], tokens },
            logits: logits.data().chunks_exact(4).map(value).collect(),
        }
    }
}

/// The stream after the last layer, driven as the engine drives it: one expert after the other.
fn stream(isa: Isa, weights: &dyn Weights, windows: &Windows) -> Stream {
    let mut stream = forward::embed(weights, windows).unwrap();
    for l in 0..weights.spec().layers.len() {
        let layer = LayerWeights::load(isa, weights, l).unwrap();
        layer.attention(windows, &mut stream).unwrap();
        if layer.n_experts() == 0 {
            layer.dense(&mut stream).unwrap();
            continue;
        }
        let pass = MoePass::begin(&layer, &windows.tokens, &stream).unwrap();
        let mut sum = RoutedSum::new(&pass);
        for e in 0..layer.n_experts() {
            let mlp = layer.pack_expert(&weights.expert(l, e).unwrap()).unwrap();
            sum.add(&pass.run_expert(e, &mlp, None).unwrap());
        }
        let delta = pass.finish(sum).unwrap();
        stream.add(isa, &delta);
    }
    stream
}

fn logits(isa: Isa, weights: &dyn Weights, windows: &Windows) -> Vec<f32> {
    let stream = stream(isa, weights, windows);
    Head::load(isa, weights).unwrap().logits(&stream.hidden, &mut Default::default()).to_vec()
}

fn families() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(fixtures().join("random")).unwrap();
    let mut dirs: Vec<_> =
        entries.map(|e| e.unwrap().path()).filter(|p| p.join("config.json").exists()).collect();
    dirs.sort();
    assert!(dirs.len() >= 6, "the fixtures of the six families are missing");
    dirs
}

#[test]
fn logits_of_every_random_model_are_those_of_transformers() {
    let mut worst = Vec::new();
    for dir in families() {
        let golden = Golden::read(&dir);
        let got = logits(Isa::get(), &open(&dir), &golden.windows);
        assert_eq!(got.len(), golden.logits.len(), "{}", dir.display());
        assert!(got.iter().all(|v| v.is_finite()), "{}: a logit is no number", dir.display());
        let difference = got.iter().zip(&golden.logits).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        eprintln!("{}: {difference:e}", dir.display());
        if difference > 1e-4 {
            worst.push(format!("{}: {difference}", dir.display()));
        }
    }
    assert!(worst.is_empty(), "logits differ by more than 1e-4: {worst:#?}");
}

/// `golden.json` of a trained model: token ids and NLLs of a few windows.
fn trained(dir: &Path) -> Vec<(Vec<u32>, Vec<f64>)> {
    let json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(dir.join("golden.json")).unwrap()).unwrap();
    let numbers =
        |v: &serde_json::Value| v.as_array().unwrap().iter().map(|n| n.as_f64().unwrap()).collect::<Vec<_>>();
    let window = |w: &serde_json::Value| {
        let ids = numbers(&w["token_ids"]).into_iter().map(|n| n as u32).collect();
        let nlls = w.as_object().unwrap().iter().find(|(k, _)| k.starts_with("nll_of_tokens")).unwrap().1;
        (ids, numbers(nlls))
    };
    json["windows"].as_array().unwrap().iter().map(window).collect()
}

fn windows_of(list: &[(Vec<u32>, Vec<f64>)]) -> Windows {
    Windows {
        lens: list.iter().map(|(ids, _)| ids.len()).collect(),
        tokens: list.iter().flat_map(|(ids, _)| ids.clone()).collect(),
    }
}

#[test]
fn nlls_of_a_trained_model_are_those_of_transformers() {
    for name in ["tiny-deepseek-v3", "tiny-deepseek-v4"] {
        let dir = fixtures().join(name);
        let golden = trained(&dir);
        let nlls = forward::run(Isa::get(), &open(&dir), &windows_of(&golden), &|_| Ok(())).unwrap();
        assert_eq!(nlls.len(), golden.len());
        let mut worst = 0.0_f64;
        for (w, (got, (_, expected))) in nlls.iter().zip(&golden).enumerate() {
            assert_eq!(got.len(), expected.len(), "{name} window {w}");
            for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
                let at = format!("{name} window {w}, token {}", i + 1);
                assert!((got - expected).abs() <= 2e-3, "{at}: {got}, but {expected}");
                worst = worst.max((got - expected).abs());
            }
        }
        eprintln!("{name}: largest difference {worst:e}");
    }
}

/// All bits of a run, with `run` and its threads instead of one expert after the other.
fn nll_bits(isa: Isa, threads: usize, weights: &dyn Weights, windows: &Windows) -> Vec<u64> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let nlls = pool.install(|| forward::run(isa, weights, windows, &|_| Ok(()))).unwrap();
    nlls.into_iter().flatten().map(f64::to_bits).collect()
}

/// Uneven windows of arbitrary ids, longer than a block of queries.
fn some_windows(vocab: usize) -> Windows {
    let lens = vec![70, 2, 131, 49];
    let n: usize = lens.iter().sum();
    Windows { tokens: (0..n).map(|i| (i * i * 7 + i / 3) as u32 % vocab as u32).collect(), lens }
}

#[test]
fn threads_and_instruction_sets_do_not_change_a_bit() {
    for dir in families() {
        let model = open(&dir);
        let windows = some_windows(model.spec().vocab);
        let one_by_one = stream(Isa::SCALAR, &model, &windows);
        let head = Head::load(Isa::SCALAR, &model).unwrap();
        let expected = head.nll(&windows, &one_by_one, &|_, _| ()).unwrap();
        let expected: Vec<u64> = expected.into_iter().flatten().map(f64::to_bits).collect();
        let best = [1, 2, 5].map(|threads| (Isa::get(), threads));
        for (isa, threads) in Isa::available().into_iter().map(|isa| (isa, 2)).chain(best) {
            let got = nll_bits(isa, threads, &model, &windows);
            assert!(got == expected, "{}: {} with {threads} threads differs", dir.display(), isa.name());
        }
    }
}

#[test]
fn a_long_window_is_split_among_threads_without_changing_a_bit() {
    let families = [
        "mixtral_window",
        "deepseek_v3",
        "deepseek_v4",
        "glm_moe_dsa",
        "llama4",
        "cohere2_moe",
        "nemotron_h",
        "jamba",
        "minimax",
    ];
    for family in families {
        let model = open(&fixtures().join("random").join(family));
        let n = 1500;
        let tokens = (0..n).map(|i| (i * 31 + i / 7) % model.spec().vocab as u32).collect();
        let windows = Windows { tokens, lens: vec![n as usize] };
        let of = |threads| nll_bits(Isa::get(), threads, &model, &windows);
        assert!(of(1) == of(3), "{family}: threads change bits");
        // Causality: a prefix does not know what follows.
        let prefix = Windows { tokens: windows.tokens[..200].to_vec(), lens: vec![200] };
        assert_eq!(nll_bits(Isa::get(), 2, &model, &prefix), of(2)[..199], "{family}");
    }
}

#[test]
fn a_window_does_not_see_the_one_before() {
    let model = open(&fixtures().join("random/gpt_oss"));
    let windows = some_windows(model.spec().vocab);
    let all = forward::run(Isa::get(), &model, &windows, &|_| Ok(())).unwrap();
    let alone = Windows { tokens: windows.tokens[72..203].to_vec(), lens: vec![131] };
    assert_eq!(forward::run(Isa::get(), &model, &alone, &|_| Ok(())).unwrap()[0], all[2]);
}

/// Remembers all that it is shown.
#[derive(Default)]
struct Seen {
    x: Vec<f32>,
    a: Vec<f32>,
    weights: Vec<f32>,
}

impl Observer for Seen {
    fn block(&mut self, x: &[f32], a: &[f32], weights: &[f32]) {
        self.x.extend(x);
        self.a.extend(a);
        self.weights.extend(weights);
    }
}

#[test]
fn an_observer_sees_the_inputs_of_every_product_in_the_order_of_tokens() {
    let model = open(&fixtures().join("random/qwen3_moe"));
    let tokens: Vec<u32> = (0..900).map(|i| (i * i) % model.spec().vocab as u32).collect();
    let windows = Windows { lens: vec![tokens.len()], tokens };
    let layer = LayerWeights::load(Isa::get(), &model, 0).unwrap();
    let mut stream = forward::embed(&model, &windows).unwrap();
    layer.attention(&windows, &mut stream).unwrap();
    let pass = MoePass::begin(&layer, &windows.tokens, &stream).unwrap();
    let routing = pass.routing();
    assert_eq!(routing.counts().iter().sum::<u64>(), (windows.tokens.len() * routing.n_used) as u64);
    for e in 0..layer.n_experts() {
        let expert = model.expert(0, e).unwrap().decode(Isa::get()).unwrap();
        let mlp = layer.pack_expert(&expert).unwrap();
        let mut seen = Seen::default();
        let output = pass.run_expert(e, &mlp, Some(&mut seen)).unwrap();
        assert_eq!(
            output.rows,
            pass.run_expert(e, &mlp, None).unwrap().rows,
            "expert {e}: watching changes it"
        );
        let weights: Vec<f32> = routing.tokens_of(e).iter().map(|t| t.weight).collect();
        assert_eq!(seen.weights, weights, "expert {e}");
        let gate = expert.gate.as_ref().unwrap();
        let (hidden, inter, n) = (stream.width, gate.len() / stream.width, weights.len());
        assert_eq!((seen.x.len(), seen.a.len()), (n * hidden, n * inter), "expert {e}");
        // What was shown reproduces the output: down · a, with a = silu(gate · x) · (up · x).
        for (i, (x, a)) in seen.x.chunks(hidden).zip(seen.a.chunks(inter)).enumerate().step_by(37) {
            let dot = |w: &[f32], x: &[f32]| w.iter().zip(x).map(|(w, x)| f64::from(w * x)).sum::<f64>();
            for (j, &a) in a.iter().enumerate() {
                let row = j * hidden..(j + 1) * hidden;
                let (g, up) = (dot(&gate[row.clone()], x), dot(&expert.up[row], x));
                let expected = g / (1.0 + (-g).exp()) * up;
                assert!((f64::from(a) - expected).abs() < 1e-4, "expert {e} row {i}: {a}, but {expected}");
            }
            for (j, &out) in output.rows[i * hidden..][..hidden].iter().enumerate() {
                let expected = dot(&expert.down[j * inter..][..inter], a);
                assert!(
                    (f64::from(out) - expected).abs() < 1e-4,
                    "expert {e} row {i}: {out}, but {expected}"
                );
            }
        }
    }
}

#[test]
fn experts_that_are_missing_or_out_of_order_are_refused() {
    let model = open(&fixtures().join("random/olmoe"));
    let windows = some_windows(model.spec().vocab);
    let layer = LayerWeights::load(Isa::get(), &model, 0).unwrap();
    let stream = forward::embed(&model, &windows).unwrap();
    let pass = MoePass::begin(&layer, &windows.tokens, &stream).unwrap();
    let output = |e: usize| {
        let expert = Weights::expert(&model, 0, e).unwrap();
        pass.run_expert(e, &layer.pack_expert(&expert).unwrap(), None).unwrap()
    };
    let with = |order: Vec<usize>| {
        let mut sum = RoutedSum::new(&pass);
        order.into_iter().for_each(|e| sum.add(&output(e)));
        pass.finish(sum)
    };
    let n = layer.n_experts();
    assert!(with((0..n).collect()).is_ok());
    assert!(with((1..n).collect()).unwrap_err().what().contains("rows of experts were added"));
    let error = with((0..n).rev().collect()).unwrap_err();
    assert_eq!(error.what(), format!("expert {} was added after expert {}", n - 2, n - 1));
    assert!(
        pass.run_expert(n, &layer.pack_expert(&Weights::expert(&model, 0, 0).unwrap()).unwrap(), None)
            .is_err()
    );
}

#[test]
fn the_consumer_of_logits_sees_each_scored_row_once() {
    let dir = fixtures().join("random/olmoe");
    let (model, golden) = (open(&dir), Golden::read(&dir));
    let head = Head::load(Isa::get(), &model).unwrap();
    let stream = stream(Isa::get(), &model, &golden.windows);
    let seen = std::sync::Mutex::new(std::collections::BTreeMap::new());
    let show = |row: usize, logits: &[f32]| {
        assert!(seen.lock().unwrap().insert(row, logits.to_vec()).is_none(), "row {row} twice");
    };
    let nlls = head.nll(&golden.windows, &stream, &show).unwrap();
    let seen = seen.into_inner().unwrap();
    let rows: Vec<usize> = golden.windows.ranges().flat_map(|r| r.start..r.end - 1).collect();
    assert_eq!(seen.keys().copied().collect::<Vec<_>>(), rows);
    for ((row, logits), nll) in seen.iter().zip(nlls.iter().flatten()) {
        let sum: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
        let expected = sum.ln() - f64::from(logits[golden.windows.tokens[row + 1] as usize]);
        assert!((nll - expected).abs() < 1e-6, "row {row}: {nll}, but {expected}");
    }
}

#[test]
fn tokens_beyond_the_vocabulary_and_wrong_streams_are_refused() {
    let model = open(&fixtures().join("random/olmoe"));
    let vocab = model.spec().vocab;
    let beyond = Windows { tokens: vec![1, vocab as u32], lens: vec![2] };
    let error = forward::run(Isa::get(), &model, &beyond, &|_| Ok(())).unwrap_err();
    assert!(error.what().contains(&format!("token id {vocab}")), "{error}");
    let windows = Windows { tokens: vec![1, 2, 3], lens: vec![3] };
    let mut short = Stream::new(model.spec().hidden, vec![0.0; 2 * model.spec().hidden]);
    let layer = LayerWeights::load(Isa::get(), &model, 0).unwrap();
    assert!(layer.attention(&windows, &mut short).is_err());
    assert!(layer.dense(&mut short).is_err(), "this layer has experts");
    assert!(Head::load(Isa::get(), &model).unwrap().nll(&windows, &short, &|_, _| ()).is_err());
    assert!(LayerWeights::load(Isa::get(), &model, model.spec().layers.len()).is_err());
    let interrupted = forward::run(Isa::get(), &model, &windows, &|_| {
        Err(moepack_format::Error::new(moepack_format::Kind::Interrupted, "stopped"))
    });
    assert_eq!(interrupted.unwrap_err().kind(), moepack_format::Kind::Interrupted);
}
