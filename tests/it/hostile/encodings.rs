//! Quantized releases whose scales, zero points, group indices or shapes do not fit, or mean nothing.

use super::*;

const INT4: &str = "encodings/ct_int4";
const INT8: &str = "encodings/ct_int8";
const ACT_ORDER: &str = "encodings/ct_int4_act_order";
const MX4: &str = "encodings/ct_mxfp4";
const MX8: &str = "encodings/mxfp8_scale_inv";
const NVFP4: &str = "encodings/ct_nvfp4";
const MODELOPT: &str = "encodings/modelopt_nvfp4";
const CHANNEL: &str = "encodings/ct_fp8_channel";
const GPTQ: &str = "encodings/gptq_v1";
const AWQ: &str = "encodings/awq";

const UP: &str = "model.layers.1.mlp.experts.2.up_proj";

/// What headers show.
pub const HEADERS: &[Fault] = &[
    Fault {
        what: "packed integers without their scales",
        of: INT4,
        exit: 65,
        says: &["ends in weight_scale", "experts.2.up_proj.weight_packed", WEIGHTS, "hint:"],
        make: |m| gone(m, "weight_scale"),
    },
    Fault {
        what: "scales without the integers they scale",
        of: INT4,
        exit: 65,
        says: &["2 scales without the numbers", "experts.2.up_proj.weight_scale of"],
        make: |m| gone(m, "weight_packed"),
    },
    Fault {
        what: "integer scales that are turned",
        of: INT4,
        exit: 65,
        says: &["experts.2.up_proj.weight_scale", "BF16 [2, 32]", "[32, groups of 64 columns]", WEIGHTS],
        make: |m| part(m, "weight_scale", |t| t.shape.reverse()),
    },
    Fault {
        what: "packed rows of another width",
        of: INT4,
        exit: 65,
        says: &["experts.2.up_proj.weight_packed", "[32, 8]", "[32, 7]"],
        make: |m| {
            part(m, "weight_packed", |t| {
                t.shape = vec![32, 7];
                t.bytes.truncate(32 * 7 * 4);
            })
        },
    },
    Fault {
        what: "a shape of three numbers",
        of: INT4,
        exit: 65,
        says: &["experts.2.up_proj.weight_shape is I64 [3]", "[2]", WEIGHTS],
        make: |m| {
            part(m, "weight_shape", |t| {
                t.shape = vec![3];
                t.bytes.resize(24, 0);
            })
        },
    },
    Fault {
        what: "NVFP4 without the scale of all",
        of: NVFP4,
        exit: 65,
        says: &["ends in weight_global_scale", "experts.2.up_proj.weight_packed", WEIGHTS],
        make: |m| gone(m, "weight_global_scale"),
    },
    Fault {
        what: "ModelOpt's NVFP4 without the second scale",
        of: MODELOPT,
        exit: 65,
        says: &["ends in weight_scale_2", "experts.2.up_proj.weight", WEIGHTS],
        make: |m| gone(m, "weight_scale_2"),
    },
    Fault {
        what: "NVFP4 scales for every 32 columns",
        of: NVFP4,
        exit: 65,
        says: &["experts.2.up_proj.weight_scale", "[32, 2]", "[32, 4]", WEIGHTS],
        make: |m| {
            part(m, "weight_scale", |t| {
                t.shape = vec![32, 2];
                t.bytes.truncate(64);
            })
        },
    },
    Fault {
        what: "FP8 rows with too few scales",
        of: CHANNEL,
        exit: 65,
        says: &["experts.2.up_proj.weight_scale", "BF16 [31, 1]", WEIGHTS],
        make: |m| {
            part(m, "weight_scale", |t| {
                t.shape = vec![31, 1];
                t.bytes.truncate(62);
            })
        },
    },
    Fault {
        what: "GPTQ without zero points",
        of: GPTQ,
        exit: 65,
        says: &["ends in qzeros", "experts.2.up_proj.qweight", WEIGHTS],
        make: |m| gone(m, "qzeros"),
    },
    Fault {
        what: "GPTQ zero points of another shape",
        of: GPTQ,
        exit: 65,
        says: &["experts.2.up_proj.qzeros is I32 [2, 8]", "I32 [4, 4]", WEIGHTS],
        make: |m| part(m, "qzeros", |t| t.shape = vec![2, 8]),
    },
    Fault {
        what: "GPTQ group indices of half the columns",
        of: GPTQ,
        exit: 65,
        says: &["experts.2.up_proj.g_idx is I32 [32]", "I32 [64]", WEIGHTS],
        make: |m| {
            part(m, "g_idx", |t| {
                t.shape = vec![32];
                t.bytes.truncate(128);
            })
        },
    },
    Fault {
        what: "AWQ scales that are integers",
        of: AWQ,
        exit: 65,
        says: &["experts.2.up_proj.scales", "I16", "expected F16, BF16 or F32", WEIGHTS],
        make: |m| part(m, "scales", |t| t.dtype = "I16".to_owned()),
    },
    Fault {
        what: "an AWQ packing that is not read",
        of: AWQ,
        exit: 65,
        says: &["quantization_config.version is \"gemv\"", "config.json"],
        make: |m| m.json("config.json", |c| c["quantization_config"]["version"] = json!("gemv")),
    },
];

/// What only values show.
pub const VALUES: &[Fault] = &[
    Fault {
        what: "an E8M0 scale of 255 in MXFP4",
        of: MX4,
        exit: 65,
        says: &["scale 7 is 255, which is NaN", "experts.2.up_proj.weight_scale", WEIGHTS],
        make: |m| part(m, "weight_scale", |t| t.bytes[7] = 255),
    },
    Fault {
        what: "an E8M0 scale of 255 in MXFP8",
        of: MX8,
        exit: 65,
        says: &["scale 0 is 255, which is NaN", "experts.2.up_proj.weight_scale_inv", WEIGHTS],
        make: |m| part(m, "weight_scale_inv", |t| t.bytes[0] = 255),
    },
    Fault {
        what: "an integer scale that is NaN",
        of: INT4,
        exit: 65,
        says: &["scale 3 is NaN", "experts.2.up_proj.weight_scale", WEIGHTS],
        make: |m| part(m, "weight_scale", |t| t.bytes[6..8].copy_from_slice(&[0xc0, 0x7f])),
    },
    Fault {
        what: "an integer scale of zero in the trunk",
        of: INT4,
        exit: 65,
        says: &["scale 0 is 0", "layers.0.self_attn.q_proj.weight_scale", WEIGHTS],
        make: |m| m.tensor("model.layers.0.self_attn.q_proj.weight_scale", |t| t.bytes[..2].fill(0)),
    },
    Fault {
        what: "an NVFP4 scale that is NaN",
        of: NVFP4,
        exit: 65,
        says: &["scale 9 is NaN", "experts.2.up_proj.weight_scale", WEIGHTS],
        make: |m| part(m, "weight_scale", |t| t.bytes[9] = 0x7f),
    },
    Fault {
        what: "an NVFP4 scale of all that is infinite",
        of: NVFP4,
        exit: 65,
        says: &["scale 0 is inf", "experts.2.up_proj.weight_global_scale", WEIGHTS],
        make: |m| part(m, "weight_global_scale", |t| t.set_f32(0, f32::INFINITY)),
    },
    Fault {
        what: "a shape that config.json does not have",
        of: INT4,
        exit: 65,
        says: &["the matrix is [32, 65]", "[32, 64]", "experts.2.up_proj.weight_shape", WEIGHTS],
        make: |m| part(m, "weight_shape", |t| t.bytes[8] = 65),
    },
    Fault {
        what: "a GPTQ column in a group that does not exist",
        of: GPTQ,
        exit: 65,
        says: &["column 5 is in group 4, expected 0 to 3", "experts.2.up_proj.g_idx", WEIGHTS],
        make: |m| part(m, "g_idx", |t| t.bytes[20] = 4),
    },
    Fault {
        what: "a column in a negative group",
        of: ACT_ORDER,
        exit: 65,
        says: &["column 0 is in group -1", "experts.2.up_proj.weight_g_idx", WEIGHTS],
        make: |m| part(m, "weight_g_idx", |t| t.bytes[..4].fill(255)),
    },
    Fault {
        what: "a zero point beyond the bits of config.json",
        of: INT8,
        exit: 65,
        says: &["zero point 100 at row 2, column 0, expected -64 to 63", "experts.0.up_proj.weight", WEIGHTS],
        make: |m| {
            m.json("config.json", |c| c["quantization_config"]["bits"] = json!(7));
            m.tensors(WEIGHTS, |tensors| {
                tensors.iter_mut().filter(|t| t.dtype == "I8").for_each(|t| t.bytes.fill(1));
                find(tensors, "model.layers.0.mlp.experts.0.up_proj.weight_zero_point").bytes[2] = 100;
            });
        },
    },
    Fault {
        what: "an FP8 number that is NaN",
        of: CHANNEL,
        exit: 65,
        says: &["NaN", "experts.2.up_proj.weight", WEIGHTS],
        make: |m| part(m, "weight", |t| t.bytes[5] = 0xff),
    },
];

/// Changes one tensor of the matrix that the faults are about.
fn part(m: &Model, ending: &str, change: impl FnOnce(&mut Tensor)) {
    m.tensor(&format!("{UP}.{ending}"), change);
}

/// Takes one of them away.
fn gone(m: &Model, ending: &str) {
    m.without(|name| name == format!("{UP}.{ending}"));
}
