//! Frequencies against those of transformers, and what makes none.

use super::*;
use std::path::Path;

/// Frequencies as bits, and the factor of cos and sin, of transformers 5.23.0 with torch 2.15: for a
/// configuration `c`, `f, a = ROPE_INIT_FUNCTIONS[c.rope_parameters["rope_type"]](c);
/// f.view(torch.int32), a`.
struct Golden {
    name: &'static str,
    config: &'static str,
    dim: usize,
    positions: usize,
    amplitude: f64,
    inv_freq: &'static [u32],
}

#[rustfmt::skip]
const GPT_OSS_FREQUENCIES: &[u32] = &[
    0x3f800000, 0x3f306535, 0x3ef316a2, 0x3ea77faa, 0x3e66d3fa, 0x3e1f0cfd, 0x3ddb2f9f, 0x3d970764,
    0x3d502194, 0x3d01ddd5, 0x3c9e646f, 0x3c3dec94, 0x3bdea840, 0x3b7cfe14, 0x3b093803, 0x3a89f778,
    0x39ef543c, 0x390799b9, 0x3820adc6, 0x37dd6dfc, 0x37989328, 0x375242fa, 0x3710e12c, 0x36c7a82b,
    0x3689928c, 0x363d9647, 0x3602a245, 0x35b40668, 0x35781728, 0x352af200, 0x34eb93eb, 0x34a252d3,
];

#[rustfmt::skip]
const GOLDENS: &[Golden] = &[
    Golden {
        name: "DeepSeek-V3: DeepseekV3Config(rope_scaling=…, rope_theta=10000, max_position_embeddings=163840)",
        config: r#"{"rope_theta": 10000, "rope_scaling": {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1,
            "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096}}"#,
        dim: 64, positions: 163_840, amplitude: 1.0,
        inv_freq: &[
            0x3f800000, 0x3f3ff911, 0x3f0ff59a, 0x3ed7e89b, 0x3ea1e89b, 0x3e72d423, 0x3e361887, 0x3e088d77,
            0x3dcccccd, 0x3d99940d, 0x3d6655c2, 0x3d1fc5ba, 0x3cdc321b, 0x3c968dc3, 0x3c4bf283, 0x3c088d77,
            0x3bb43959, 0x3b697066, 0x3b136a16, 0x3ab3a2cd, 0x3a4f3e37, 0x39d99312, 0x393a7753, 0x380bd471,
            0x37d1b717, 0x379d43a3, 0x376bdcf0, 0x3730df51, 0x3704a2b3, 0x36c6ecdd, 0x36952c42, 0x365fba4f,
        ],
    },
    Golden {
        name: "DeepseekV3Config(qk_rope_head_dim=8, rope_parameters=…, max_position_embeddings=512)",
        config: r#"{"rope_parameters": {"rope_type": "yarn", "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "mscale": 1.0, "mscale_all_dim": 0.8, "original_max_position_embeddings": 64, "rope_theta": 10000.0}}"#,
        dim: 8, positions: 512, amplitude: 1.0356570849393496,
        inv_freq: &[0x3f800000, 0x3d666667, 0x3aa3d70a, 0x3903126f],
    },
    Golden {
        name: "DeepseekV3Config(qk_rope_head_dim=8, rope_parameters=… with attention_factor)",
        config: r#"{"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128,
            "attention_factor": 1.25, "rope_theta": 50000.0, "beta_fast": 1.0}}"#,
        dim: 8, positions: 512, amplitude: 1.25,
        inv_freq: &[0x3f800000, 0x3d88f541, 0x3a928aff, 0x389ccc77],
    },
    Golden {
        name: "gpt-oss: GptOssConfig(), the class's default",
        config: "{}",
        dim: 64, positions: 131_072, amplitude: 1.3465735902799727,
        inv_freq: GPT_OSS_FREQUENCIES,
    },
    Golden {
        name: "gpt-oss as released: rope_scaling beside rope_theta",
        config: r#"{"rope_theta": 150000, "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0,
            "beta_slow": 1.0, "truncate": false, "original_max_position_embeddings": 4096}}"#,
        dim: 64, positions: 131_072, amplitude: 1.3465735902799727,
        inv_freq: GPT_OSS_FREQUENCIES,
    },
    Golden {
        name: "Qwen3MoeConfig(head_dim=24, rope_theta=1e6)",
        config: r#"{"rope_theta": 1000000.0, "rope_scaling": null}"#,
        dim: 24, positions: 512, amplitude: 1.0,
        inv_freq: &[
            0x3f800000, 0x3ea1e89b, 0x3dcccccc, 0x3d0186e3, 0x3c23d709, 0x3b4f3e39, 0x3a83126f, 0x39a5cb62,
            0x38d1b713, 0x3804a2b2, 0x3727c5b0, 0x36543781,
        ],
    },
    Golden {
        name: "LlamaConfig(hidden_size=64, num_attention_heads=4, rope_scaling linear)",
        config: r#"{"rope_theta": 10000.0, "rope_scaling": {"rope_type": "linear", "factor": 3.0}}"#,
        dim: 16, positions: 2048, amplitude: 1.0,
        inv_freq: &[
            0x3eaaaaab, 0x3dd7e0cf, 0x3d088889, 0x3c2cb3d9, 0x3b5a740d, 0x3a8a297b, 0x39aec33f, 0x38dd0f2b,
        ],
    },
    Golden {
        name: "LlamaConfig(hidden_size=256, num_attention_heads=4, rope_scaling llama3)",
        config: r#"{"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}}"#,
        dim: 64, positions: 2048, amplitude: 1.0,
        inv_freq: &[
            0x3f800000, 0x3f29e1c6, 0x3ee177bc, 0x3e959ee3, 0x3e4693b0, 0x3e03c6a0, 0x3daee4ad, 0x3d681e67,
            0x3ce000ce, 0x3c2e5cfa, 0x3b764922, 0x3ab40d6d, 0x3a6ef74f, 0x3a1e9402, 0x39d27720, 0x398baa41,
            0x39395d21, 0x38f603ea, 0x38a3418d, 0x3858ac81, 0x380fc8f8, 0x37bed4f4, 0x377d45c3, 0x3728126b,
            0x36df10c4, 0x369406cb, 0x36447610, 0x36025f34, 0x35ad07a7, 0x3565a54d, 0x351864a7, 0x34ca41b0,
        ],
    },
];

const GPT_OSS: RopeRule = RopeRule {
    theta: 1.5e5,
    scaling: Some(Yarn { factor: 32.0, original_positions: 4096.0, truncate: false, ..Yarn::DEFAULT }),
    ..RopeRule::PLAIN
};

fn scaled(text: &str, dim: usize, positions: usize) -> Result<Scaled> {
    let config = Config::parse(Path::new("config.json"), text.as_bytes()).unwrap();
    let rule = if text == "{}" { GPT_OSS } else { RopeRule::PLAIN };
    rope(Source::new(&config, "")?, rule, None, Pairing::Half, dim, positions)
}

#[test]
fn frequencies_are_those_of_transformers() {
    for golden in GOLDENS {
        let rope = scaled(golden.config, golden.dim, golden.positions).unwrap().rope;
        assert_eq!(rope.amplitude, golden.amplitude as f32, "{}", golden.name);
        assert_eq!(rope.inv_freq.len(), golden.inv_freq.len(), "{}", golden.name);
        for (i, (ours, theirs)) in rope.inv_freq.iter().zip(golden.inv_freq).enumerate() {
            // torch's vectorized powf is itself off by one unit here and there.
            let ulps = ours.to_bits().abs_diff(*theirs);
            assert!(ulps <= 2, "{} {i}: {ours:e} is {ulps} units from {theirs:#x}", golden.name);
        }
    }
}

#[test]
fn latent_attention_scales_its_logits() {
    // yarn_apply_mscale({"rope_type": "yarn", "factor": 40, "mscale_all_dim": 1.0}, 192**-0.5) of
    // transformers 5.23.0 is 0.1352337788608801.
    let factor = scaled(GOLDENS[0].config, 64, 163_840).unwrap().logit_factor;
    assert!((factor / 192f64.sqrt() - 0.1352337788608801).abs() < 1e-15, "{factor}");
    // The same with factor 8, mscale_all_dim 0.8 and 20**-0.5.
    let factor = scaled(GOLDENS[1].config, 8, 512).unwrap().logit_factor;
    assert!((factor / 20f64.sqrt() - 0.30419127547981484).abs() < 1e-15, "{factor}");
    assert_eq!(scaled(GOLDENS[4].config, 64, 131_072).unwrap().logit_factor, 1.0);
}

#[test]
fn what_makes_no_frequencies_is_refused() {
    let cases = [
        (r#"{"rope_theta": 1}"#, "rope_theta is 1, expected more than 1"),
        (r#"{"rope_theta": "big"}"#, "rope_theta is \"big\", expected a number that fits f32"),
        (r#"{"rope_scaling": "yarn"}"#, "rope_scaling is \"yarn\", expected an object"),
        (
            r#"{"rope_scaling": {"type": "spiral"}}"#,
            "rope type \"spiral\" is not supported; known are default, linear, llama3, longrope and yarn",
        ),
        (r#"{"rope_scaling": {"type": "linear"}}"#, "rope_scaling.factor is missing"),
        (
            r#"{"rope_scaling": {"type": "linear", "factor": 0}}"#,
            "rope_scaling.factor is 0, expected more than 0",
        ),
        (
            r#"{"rope_scaling": {"type": "yarn", "factor": -1}}"#,
            "rope_scaling.factor is -1, expected more than 0",
        ),
        (
            r#"{"rope_parameters": {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 0}}"#,
            "rope_parameters.original_max_position_embeddings is 0, expected more than 0",
        ),
        (
            r#"{"rope_parameters": {"rope_type": "yarn", "factor": 2, "beta_fast": -4}}"#,
            "rope_parameters.beta_fast is -4, expected more than 0",
        ),
    ];
    for (config, expected) in cases {
        assert_eq!(scaled(config, 8, 512).unwrap_err().what(), expected, "{config}");
    }
}
