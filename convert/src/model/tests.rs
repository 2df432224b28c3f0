//! What a model hands out, against bytes that the test wrote and against numbers of other tools.
#![allow(clippy::excessive_precision, reason = "goldens are written as their tool prints them")]

use std::path::Path;

use moepack_format::bank::bank_name;
use moepack_format::manifest::{
    BUNDLE_FORMAT, FORMAT_VERSION, FileEntry, LayerEntry, LeftOut, PartCodecs, Provenance, Tool, Totals,
    TrunkEntry,
};
use moepack_format::{
    ALIGN_DEFAULT, BankWriter, Dtype, FileSummary, InputFile, Kind, Manifest, PartBytes, PartSpec, PlaneSpec,
    TrunkWriter, trunk_name,
};
use moepack_quant::Isa;
use serde_json::json;

use super::*;
use crate::coded::CodedExpert;
use crate::spec::{Attention, Mlp, Part};
use crate::testing::{TestCheckpoint, f32s, fixture};

mod outline;

const GATE: &str = "model.layers.1.mlp.experts.2.gate_proj.weight";

#[test]
fn experts_come_as_they_are_stored() {
    let mut model = TestCheckpoint::qwen3();
    let dir = tempfile::tempdir().unwrap();
    let opened = Model::open(&model.write_shards(dir.path(), 7), &OpenOptions::default()).unwrap();
    for (layer, e) in [(0, 0), (0, 2), (1, 1)] {
        let expert = opened.expert(layer, e).unwrap();
        let names = ["gate_proj", "up_proj", "down_proj"];
        for (part, name) in expert.parts.iter().zip(names) {
            let stored = model.find(&format!("model.layers.{layer}.mlp.experts.{e}.{name}.weight"));
            assert_eq!(part.planes.concat(), stored.bytes, "{layer} {e} {name}");
            assert_eq!([part.rows as u64, part.cols as u64], stored.shape[..]);
            assert_eq!(
                (part.codec.name(), part.part.name(), &part.source.tensor),
                ("bf16".into(), name, &stored.name)
            );
        }
        let parts = opened.expert_parts(layer, e).unwrap();
        let shapes: Vec<_> = parts.iter().map(|p| (p.part, p.codec.name(), p.rows, p.cols)).collect();
        let read: Vec<_> = expert.parts.iter().map(|p| (p.part, p.codec.name(), p.rows, p.cols)).collect();
        assert_eq!(shapes, read);
    }
    for (layer, expert) in [(0, 3), (2, 0), (usize::MAX, usize::MAX)] {
        let e = opened.expert(layer, expert).map(|_| ()).unwrap_err();
        assert_eq!(e.what(), format!("no expert {expert} in layer {layer}"));
    }
}

#[test]
fn the_trunk_is_decoded_whole_or_by_rows() {
    let mut model = TestCheckpoint::qwen3();
    let values: Vec<f32> = (0..80).map(|i| i as f32 * 0.25 - 3.0).collect();
    *model.find("lm_head.weight") = f32s("lm_head.weight", &[10, 8], &values);
    let opened = model.open_kept();
    let head = opened.model.trunk(None, Role::LmHead).unwrap();
    assert_eq!((&head.shape[..], &head.data), (&[10, 8][..], &values));
    let rows = opened.model.trunk_rows(None, Role::LmHead, 3..5).unwrap();
    assert_eq!((&rows.shape[..], &rows.data[..]), (&[2, 8][..], &values[24..40]));
    assert!(opened.model.trunk_rows(None, Role::LmHead, 9..11).is_err());
    assert!(opened.model.has(Some(1), Role::Router) && !opened.model.has(Some(1), Role::SharedUp));
    let e = opened.model.trunk(Some(1), Role::SharedUp).unwrap_err();
    assert_eq!(e.what(), "no tensor for SharedUp in layer 1");
    let norm = opened.model.trunk(None, Role::FinalNorm).unwrap();
    assert_eq!(norm.shape, [8]);
}

#[test]
fn a_long_tensor_is_decoded_in_chunks() {
    // More than one chunk: 600 000 rows of 8 numbers of 2 bytes.
    let mut model = TestCheckpoint::qwen3();
    model.config["vocab_size"] = json!(600_000);
    for name in ["model.embed_tokens.weight", "lm_head.weight"] {
        *model.find(name) = crate::testing::tensor(name, Dtype::Bf16, &[600_000, 8]);
    }
    let opened = model.open_kept();
    let whole = opened.model.trunk(None, Role::Embed).unwrap();
    let bytes = &model.find("model.embed_tokens.weight").bytes;
    let expected = |i: usize| f32::from_bits(u32::from_le_bytes([0, 0, bytes[2 * i], bytes[2 * i + 1]]));
    assert!(whole.data.iter().enumerate().all(|(i, &v)| v == expected(i)));
    let rows = opened.model.trunk_rows(None, Role::Embed, 299_999..599_999).unwrap();
    assert_eq!(rows.data, whole.data[299_999 * 8..599_999 * 8]);
}

#[test]
fn raw_bytes_can_be_copied() {
    let mut model = TestCheckpoint::deepseek();
    model.store_as_fp8("model.layers.1.self_attn.kv_b_proj.weight");
    let opened = model.open_kept();
    for t in opened.model.trunk_tensors() {
        let stored = model.find(&t.name);
        let mut bytes = vec![0; t.bytes as usize];
        opened.model.read_raw(t, 0, &mut bytes).unwrap();
        assert_eq!((&bytes, t.dtype, &t.shape), (&stored.bytes, stored.dtype, &stored.shape), "{}", t.name);
        assert!(opened.model.read_raw(t, 1, &mut bytes).is_err());
    }
}

#[test]
fn a_missing_head_is_the_embedding() {
    let mut model = TestCheckpoint::qwen3();
    let head = model.remove("lm_head.weight");
    assert_eq!(model.refusal().what(), "1 tensors are missing:\n    lm_head.weight");
    // Absent key and absent head, or the key says so.
    for tie in [None, Some(true)] {
        let map = model.config.as_object_mut().unwrap();
        map.shift_remove("tie_word_embeddings");
        map.extend(tie.map(|t| ("tie_word_embeddings".to_owned(), json!(t))));
        let opened = model.open_kept();
        assert!(opened.model.spec().tied_head);
        assert!(opened.model.has(None, Role::LmHead));
        let embed = opened.model.trunk(None, Role::Embed).unwrap();
        assert_eq!(opened.model.trunk(None, Role::LmHead).unwrap(), embed);
    }
    // Tied, but with a head of its own: the same bytes are tied, others are not.
    let mut same = head.clone();
    same.bytes = model.find("model.embed_tokens.weight").bytes.clone();
    model.tensors.push(same);
    let opened = model.open_kept();
    assert!(opened.model.spec().tied_head && opened.model.warnings().is_empty());
    *model.find("lm_head.weight") = head;
    let opened = model.open_kept();
    assert!(!opened.model.spec().tied_head);
    let says = ["config.json ties the head to the embedding, but lm_head.weight differs; it is used"];
    assert_eq!(opened.model.warnings(), says);
}

#[test]
fn numbers_that_are_none_are_refused_where_they_are() {
    let mut model = TestCheckpoint::qwen3();
    let stored = model.find(GATE);
    // Row 2, column 3 becomes NaN, and the one after infinite.
    stored.bytes[2 * (2 * 8 + 3)..2 * (2 * 8 + 5)].copy_from_slice(&[0xc0, 0x7f, 0x80, 0xff]);
    let opened = model.open_kept();
    let e = opened.model.expert(1, 2).unwrap().decode(Isa::get()).unwrap_err();
    assert_eq!(e.what(), "2 weights are NaN or infinite, the first is NaN at row 2, column 3");
    assert_eq!((e.kind().exit_code(), e.tensor()), (65, Some(GATE)));
    assert!(e.file().unwrap().ends_with("model.safetensors"));
    // It passes through untouched.
    assert_eq!(opened.model.expert(1, 2).unwrap().parts[0].planes[0], model.find(GATE).bytes);

    let mut model = TestCheckpoint::qwen3();
    model.find("model.norm.weight").bytes[10..12].copy_from_slice(&[0x80, 0x7f]);
    let opened = model.open_kept();
    let e = opened.model.trunk(None, Role::FinalNorm).unwrap_err();
    assert_eq!(e.what(), "1 weights are NaN or infinite, the first is inf at row 0, column 5");
    assert_eq!(e.tensor(), Some("model.norm.weight"));
}

#[test]
fn scales_that_are_none_are_refused_where_they_are() {
    let scales = format!("{GATE}_scale_inv");
    for (value, shown) in [
        (0.0, "0"),
        (-1.0, "-1"),
        (f32::NAN, "NaN"),
        (f32::INFINITY, "inf"),
        (1e-40, "0.0000000000000000000000000000000000000001"),
    ] {
        let mut model = TestCheckpoint::qwen3();
        model.store_as_fp8(GATE);
        model.store_as_fp8("model.layers.0.self_attn.o_proj.weight");
        model.find(&scales).bytes[12..16].copy_from_slice(&value.to_le_bytes());
        model.find("model.layers.0.self_attn.o_proj.weight_scale_inv").bytes[..4]
            .copy_from_slice(&value.to_le_bytes());
        let opened = model.open_kept();
        let e = opened.model.expert(1, 2).map(|_| ()).unwrap_err();
        let says = format!("is {shown}, expected a positive, finite, normal number");
        assert_eq!(e.what(), format!("scale 3 {says}"));
        assert_eq!((e.kind().exit_code(), e.tensor()), (65, Some(&*scales)));
        for e in [
            opened.model.check_trunk_scales().unwrap_err(),
            opened.model.trunk(Some(0), Role::O).unwrap_err(),
        ] {
            assert_eq!(e.what(), format!("scale 0 {says}"));
            assert_eq!(e.tensor(), Some("model.layers.0.self_attn.o_proj.weight_scale_inv"));
        }
        opened.model.expert(1, 1).unwrap();
    }
    let mut model = TestCheckpoint::gpt_oss();
    model.find("model.layers.0.mlp.experts.down_proj_scales").bytes[64 + 9] = 255;
    let opened = model.open_kept();
    opened.model.expert(0, 0).unwrap();
    let e = opened.model.expert(0, 1).map(|_| ()).unwrap_err();
    assert_eq!(e.what(), "scale 73 is 255, which is NaN, expected a positive, finite, normal number");
    assert_eq!(e.tensor(), Some("model.layers.0.mlp.experts.down_proj_scales"));
}

#[test]
fn fp8_is_numbers_times_scales() {
    // torch 2.15, with t = all tensors of both files:
    //   n = "model.layers.1.mlp.experts.3.down_proj.weight"; s = t[n + "_scale_inv"]
    //   x = t[n].float() * s.repeat_interleave(128, 0)[:160].repeat_interleave(128, 1)[:, :64]
    //   x[0, :4], x[130, :4], x.double().abs().sum()
    // and the same for "model.layers.0.self_attn.o_proj.weight".
    let model = open_fixture("random/deepseek_v3_fp8");
    let expert = model.expert(1, 3).unwrap();
    let part = expert.part(Part::Down).unwrap();
    assert_eq!((part.codec.name().as_str(), part.rows, part.cols), ("fp8-block", 160, 64));
    let x = part.decode(Isa::get()).unwrap();
    assert_eq!(
        x[..4],
        [0.03540002554655075, -0.011378578841686249, -0.050571464002132416, 0.05562860891222954]
    );
    let row = 130 * 64;
    assert_eq!(
        x[row..row + 4],
        [-0.024008383974432945, -0.11349417269229889, -0.17460642755031586, -0.03928644582629204]
    );
    assert_eq!(magnitude(&x), 1228.1373155969054);
    let o = model.trunk(Some(0), Role::O).unwrap();
    assert_eq!(o.shape, [160, 40]);
    assert_eq!(o.data[120..123], [0.09032858908176422, 0.09635049849748611, 0.28905150294303894]);
    assert_eq!(o.data[5600..5603], [-0.005841243080794811, -0.20768864452838898, 0.3323018252849579]);
    assert_eq!(magnitude(&o.data), 970.9814335568735);
    let rows = model.trunk_rows(Some(0), Role::O, 139..142).unwrap();
    assert_eq!(rows.data, o.data[139 * 40..142 * 40]);
}

#[test]
fn gpt_oss_blocks_are_the_matrices_of_transformers() {
    // transformers 5.23.0, integrations/mxfp4.py:
    //   t = load_file("model.safetensors"); p = "model.layers.1.mlp.experts."
    //   of = lambda n: convert_moe_packed_tensors(
    //       t[p + n + "_blocks"], t[p + n + "_scales"], dtype=torch.float32)
    //   w = of("gate_up_proj")[2], which is [in, out]; w[:8, 10], w[:8, 11], w[-4:, 62]
    //   d = of("down_proj")[2]; d[:8, 7]; sums of magnitudes of w[:, 0::2], w[:, 1::2] and d
    let expert = open_fixture("random/gpt_oss_mxfp4").expert(1, 2).unwrap();
    assert!(expert.parts[..3].iter().all(|p| p.codec.name() == "mxfp4"));
    let got = expert.decode(Isa::get()).unwrap();
    let row = |m: &[f32], r: usize, cols: usize| m[r * cols..(r + 1) * cols].to_vec();
    assert_eq!(
        row(got.gate.as_ref().unwrap(), 5, 64)[..8],
        [0.375, -0.375, 0.5, 0.0, 0.5, -0.125, 0.1875, 0.1875]
    );
    assert_eq!(
        row(&got.up, 5, 64)[..8],
        [0.1875, -0.0, 0.0625, -0.1875, 0.125, -0.015625, 0.015625, 0.09375]
    );
    assert_eq!(row(got.gate.as_ref().unwrap(), 31, 64)[60..], [-0.0625, 0.09375, -0.0078125, -0.0234375]);
    assert_eq!(
        row(&got.down, 7, 32)[..8],
        [0.09375, -0.0625, -0.0, -0.03125, 0.09375, -0.0625, -0.0, -0.0078125]
    );
    assert_eq!(
        [got.gate.as_ref().unwrap(), &got.up, &got.down].map(|m| magnitude(m)),
        [187.45703125, 202.8203125, 238.62890625]
    );
    // t[p + "gate_up_proj_bias"][2][0::2], [1::2], t[p + "down_proj_bias"][2]
    assert_eq!(got.gate_bias.unwrap()[..4], [-0.2373046875, -0.40625, -0.0224609375, 0.359375]);
    assert_eq!(got.up_bias.unwrap()[..4], [0.302734375, -0.26953125, 0.138671875, -0.51171875]);
    assert_eq!(got.down_bias.unwrap()[..3], [-0.07470703125, -0.05615234375, 0.306640625]);
}

#[test]
fn gpt_oss_as_transformers_saves_it_is_turned() {
    // With t and p as above, of the decoded checkpoint:
    //   g = t[p + "gate_up_proj"][2]; g[:4, 10], g[:4, 11]; d = t[p + "down_proj"][2]; d[:4, 7]
    //   sums of magnitudes of g[:, 0::2], g[:, 1::2] and d, in f64
    let expert = open_fixture("random/gpt_oss").expert(1, 2).unwrap();
    let shapes: Vec<_> = expert.parts.iter().map(|p| (p.part, p.rows, p.cols)).collect();
    let (inter, hidden) = (32, 64);
    assert_eq!(
        shapes,
        [
            (Part::Gate, inter, hidden),
            (Part::Up, inter, hidden),
            (Part::Down, hidden, inter),
            (Part::GateBias, 1, inter),
            (Part::UpBias, 1, inter),
            (Part::DownBias, 1, hidden),
        ]
    );
    let got = expert.decode(Isa::get()).unwrap();
    let gate = [-0.02615860477089882, 0.04051067680120468, -0.20960687100887299, -0.10052478313446045];
    assert_eq!(got.gate.as_ref().unwrap()[5 * 64..5 * 64 + 4], gate);
    let up = [0.1420581042766571, -0.17520715296268463, 0.04366970807313919, -0.061743613332509995];
    assert_eq!(got.up[5 * 64..5 * 64 + 4], up);
    let down = [-0.002971458248794079, -0.140972301363945, 0.04096072539687157, 0.13050276041030884];
    assert_eq!(got.down[7 * 32..7 * 32 + 4], down);
    let sums = [got.gate.as_ref().unwrap(), &got.up, &got.down].map(|m| magnitude(m));
    for (sum, expected) in sums.into_iter().zip([202.77353637348006, 207.9325781455691, 287.8286417382187]) {
        assert!((sum - expected).abs() < 1e-9, "{sum} {expected}");
    }
}

#[test]
fn every_random_family_opens_and_decodes() {
    let mut n_models = 0;
    for entry in std::fs::read_dir(fixture("random")).unwrap() {
        let path = entry.unwrap().path();
        let model = Model::open(&path, &OpenOptions::default()).unwrap();
        for (l, layer) in model.spec().layers.iter().enumerate() {
            if let Some(moe) = layer.mlp.moe() {
                model.expert(l, moe.n_experts - 1).unwrap().decode(Isa::get()).unwrap();
            }
        }
        for t in model.trunk_tensors().iter().filter(|t| t.role != Role::Carried) {
            match t.role.is_table() {
                true => assert!(!model.trunk_integers(t.layer, t.role).unwrap().is_empty()),
                false => assert!(!model.trunk(t.layer, t.role).unwrap().data.is_empty()),
            }
        }
        // These save what nobody reads.
        let saves_more = ["minimax", "longcat_flash"].contains(&model.spec().family);
        assert_eq!(!model.catalog().left_out.is_empty(), saves_more, "{}", path.display());
        n_models += 1;
    }
    assert!(n_models >= 6, "{n_models} models in fixtures/random");
}

#[test]
fn plain_numbers_go_back_into_tensors_of_the_shape_that_they_came_in() {
    for entry in std::fs::read_dir(fixture("random")).unwrap() {
        let path = entry.unwrap().path();
        let model = Model::open(&path, &OpenOptions::default()).unwrap();
        let Some((layer, _)) = model.spec().moe_layers().next() else { continue };
        let expert = model.expert(layer, 0).unwrap();
        for piece in 0..model.n_pieces(layer).unwrap() {
            let released = model.released_piece(layer, 0, piece).unwrap();
            let plain = model.plain_piece(layer, 0, piece).unwrap();
            let [tensor] = &released.tensors[..] else { continue };
            assert_eq!(plain.tensors[0].name, tensor.name, "{}", path.display());
            assert_eq!(plain.tensors[0].shape, tensor.shape, "{}: {}", path.display(), tensor.name);
            let bytes = model.plain_bytes(layer, 0, piece, &expert).unwrap();
            assert_eq!(bytes.len(), 1, "{}: {}", path.display(), tensor.name);
        }
    }
}

#[test]
fn a_trained_model_is_described() {
    let model = open_fixture("tiny-deepseek-v3");
    let spec = model.spec();
    assert_eq!((spec.family, spec.hidden, spec.layers.len()), ("deepseek_v3", 128, 4));
    let Attention::Mla(mla) = &spec.layers[3].attention else { panic!("latent attention") };
    assert_eq!((mla.q_lora, mla.kv_lora, mla.rope.inv_freq.len()), (Some(96), 64, 8));
    assert!(matches!(spec.layers[0].mlp, Mlp::Dense { inter: 512, .. }));
    let moe = spec.layers[1].mlp.moe().expect("experts");
    assert_eq!((moe.n_experts, moe.n_experts_used, moe.inter), (16, 4, 128));
    assert_eq!(moe.router.groups.map(|g| (g.n_groups, g.n_groups_used)), Some((4, 2)));
    assert_eq!(model.expert(3, 15).unwrap().bytes(), 3 * 128 * 128 * 2);
    assert_eq!(model.warnings(), [] as [&str; 0]);
}

#[test]
fn strict_makes_warnings_errors() {
    let mut model = TestCheckpoint::deepseek();
    model.tensors.retain(|t| !t.name.starts_with("model.layers.2."));
    let dir = tempfile::tempdir().unwrap();
    let path = model.write(dir.path());
    assert!(Model::open(&path, &OpenOptions::default()).is_ok());
    let e =
        Model::open(&path, &OpenOptions { strict: true, ..OpenOptions::default() }).map(|_| ()).unwrap_err();
    assert!(e.what().contains("multi-token-prediction"), "{e}");
}

#[test]
fn a_config_that_is_not_there_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let path = TestCheckpoint::qwen3().write(dir.path());
    std::fs::remove_file(path.join("config.json")).unwrap();
    let e = Model::open(&path, &OpenOptions::default()).map(|_| ()).unwrap_err();
    assert_eq!((e.what(), e.kind()), ("config.json is not there", Kind::Missing));
}

#[test]
fn no_flipped_byte_panics() {
    let dir = tempfile::tempdir().unwrap();
    let path = TestCheckpoint::deepseek().write_shards(dir.path(), 2);
    let mut n_refused = 0;
    for name in ["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"] {
        let sound = std::fs::read(path.join(name)).unwrap();
        for i in 0..400 {
            let mut bytes = sound.clone();
            let at = i * 7919 % bytes.len().min(6000);
            bytes[at] ^= 1 << (i % 8);
            std::fs::write(path.join(name), bytes).unwrap();
            if let Err(e) = Model::open(&path, &OpenOptions::default()) {
                assert!(matches!(e.kind().exit_code(), 65 | 66), "{name} byte {at}: {e}");
                n_refused += 1;
            }
        }
        std::fs::write(path.join(name), sound).unwrap();
    }
    assert!(n_refused > 600, "{n_refused} of 1200 were refused");
    assert!(Model::open(&path, &OpenOptions::default()).is_ok());
}

#[test]
fn many_threads_may_read() {
    let model = open_fixture("random/qwen3_moe_sharded");
    let expected = model.expert(1, 3).unwrap().decode(Isa::get()).unwrap();
    std::thread::scope(|s| {
        for _ in 0..8 {
            s.spawn(|| {
                for _ in 0..20 {
                    assert_eq!(model.expert(1, 3).unwrap().decode(Isa::get()).unwrap(), expected);
                }
            });
        }
    });
}

#[test]
fn a_bundle_is_a_model_too() {
    for mut test in [TestCheckpoint::deepseek(), TestCheckpoint::gpt_oss()] {
        if test.config["model_type"] == "deepseek_v3" {
            test.store_as_fp8("model.layers.1.mlp.experts.0.up_proj.weight");
            test.store_as_fp8("model.layers.0.self_attn.o_proj.weight");
        }
        let source = test.open_kept();
        let dir = tempfile::tempdir().unwrap();
        write_bundle(&source.model, dir.path());
        let bundle = Model::open(dir.path(), &OpenOptions::default()).unwrap();
        assert!(bundle.bundle().is_some());
        assert_eq!(bundle.spec(), source.model.spec());
        assert_eq!(bundle.trunk_tensors().len(), source.model.trunk_tensors().len());
        for t in source.model.trunk_tensors().iter().filter(|t| t.role != Role::Carried && !t.is_scale) {
            let (a, b) = (source.model.trunk(t.layer, t.role), bundle.trunk(t.layer, t.role));
            assert_eq!(a.unwrap(), b.unwrap(), "{}", t.name);
        }
        for (l, layer) in source.model.spec().layers.iter().enumerate() {
            let Some(moe) = layer.mlp.moe() else { continue };
            for e in 0..moe.n_experts {
                let (a, b) = (source.model.expert(l, e).unwrap(), bundle.expert(l, e).unwrap());
                assert_eq!(describe_parts(&a), describe_parts(&b), "layer {l} expert {e}");
                assert_eq!(bundle.expert_parts(l, e).unwrap().len(), a.parts.len());
            }
        }
        assert_eq!(bundle.catalog().left_out, [("gone".to_owned(), "a test".to_owned())]);
    }
}

#[test]
fn a_bundle_that_contradicts_its_config_is_refused() {
    let source = TestCheckpoint::qwen3().open_kept();
    let dir = tempfile::tempdir().unwrap();
    write_bundle(&source.model, dir.path());
    let refusal = |edit: &dyn Fn(&mut Manifest)| {
        let mut manifest = Manifest::read(dir.path()).unwrap();
        edit(&mut manifest);
        manifest.write(dir.path()).unwrap();
        Model::open(dir.path(), &OpenOptions::default()).map(|_| ()).unwrap_err().what().to_owned()
    };
    let says = "the manifest says family \"olmoe\", config.json says \"qwen3_moe\"";
    assert_eq!(refusal(&|m| m.family = "olmoe".to_owned()), says);
    let says = "banks of 1 layers, config.json has 2 with experts";
    assert_eq!(
        refusal(&|m| {
            m.family = "qwen3_moe".to_owned();
            m.layers.pop();
        }),
        says
    );
}

/// An opened checkpoint with the directory it lies in.
struct Kept {
    model: Model,
    _dir: tempfile::TempDir,
}

impl TestCheckpoint {
    fn open_kept(&self) -> Kept {
        let dir = tempfile::tempdir().unwrap();
        let model = Model::open(&self.write(dir.path()), &OpenOptions::default()).unwrap();
        Kept { model, _dir: dir }
    }
}

fn open_fixture(name: &str) -> Model {
    Model::open(&fixture(name), &OpenOptions::default()).unwrap()
}

fn magnitude(values: &[f32]) -> f64 {
    values.iter().map(|v| f64::from(v.abs())).sum()
}

type PartParts = (Part, String, usize, usize, Vec<Vec<u8>>);

fn describe_parts(expert: &CodedExpert) -> Vec<PartParts> {
    expert.parts.iter().map(|p| (p.part, p.codec.name(), p.rows, p.cols, p.planes.clone())).collect()
}

/// Writes the model as a bundle, every number as it is.
fn write_bundle(model: &Model, dir: &Path) {
    let mut layers = Vec::new();
    let mut files = Vec::new();
    for (l, layer) in model.spec().layers.iter().enumerate() {
        let Some(moe) = layer.mlp.moe() else { continue };
        let (l, n_experts) = (l as u32, moe.n_experts as u32);
        let mut bank = BankWriter::create(&dir.join(bank_name(l)), l, n_experts, ALIGN_DEFAULT, 64).unwrap();
        for e in 0..n_experts {
            let expert = model.expert(l as usize, e as usize).unwrap();
            let parts: Vec<PartBytes> = expert.parts.iter().map(part_bytes).collect();
            bank.write_expert(e, &parts).unwrap();
        }
        let summary = bank.finish().unwrap();
        files.push(FileEntry {
            path: summary.file.clone(),
            bytes: summary.bytes,
            sha256: summary.sha256.clone(),
        });
        layers.push(LayerEntry {
            layer: l,
            bank: summary.file,
            n_experts,
            record_stride: summary.stride,
            max_record_bytes: summary.max_record_bytes,
            payload_bytes: summary.payload_bytes,
            padding_bytes: summary.padding_bytes,
            usage: None,
            codecs: [("gate_proj".to_owned(), PartCodecs::Same("bf16".to_owned()))].into(),
            error: None,
            header_crc32c: summary.header_crc32c,
            experts: std::collections::BTreeMap::new(),
        });
    }
    let specs: Vec<_> =
        model.trunk_tensors().iter().map(|t| PlaneSpec::new(&t.name, t.dtype, &t.shape)).collect();
    let name = trunk_name(1, 1);
    let mut trunk = TrunkWriter::create(&dir.join(&name), &specs).unwrap();
    for t in model.trunk_tensors() {
        let mut bytes = vec![0; t.bytes as usize];
        model.read_raw(t, 0, &mut bytes).unwrap();
        trunk.write(&t.name, &bytes).unwrap();
    }
    let FileSummary { bytes, sha256, header_crc32c, crc32c, .. } = trunk.finish().unwrap();
    files.push(FileEntry { path: name.clone(), bytes, sha256 });
    for side in model.side_files(&mut Vec::new()).unwrap() {
        std::fs::copy(&side.path, dir.join(&side.name)).unwrap();
        let sha256 = InputFile::open(&side.path).unwrap().sha256(&|| false).unwrap();
        files.push(FileEntry { path: side.name, bytes: side.bytes, sha256 });
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    let trunk = vec![TrunkEntry { file: name, header_crc32c, crc32c }];
    let totals = Totals::sum(&files, &layers, &trunk, 1, 1);
    let manifest = Manifest {
        format: BUNDLE_FORMAT.to_owned(),
        format_version: FORMAT_VERSION,
        features_required: Vec::new(),
        features_optional: Vec::new(),
        tool: Tool { name: "test".to_owned(), version: "0".to_owned() },
        align: ALIGN_DEFAULT,
        family: model.spec().family.to_owned(),
        provenance: Provenance::default(),
        recipe: json!({}),
        files,
        layers,
        trunk,
        trunk_codecs: Default::default(),
        trunk_errors: Default::default(),
        left_out: vec![LeftOut { name: "gone".to_owned(), reason: "a test".to_owned() }],
        totals,
        crc32c: String::new(),
        sha256: String::new(),
    };
    manifest.write(dir).unwrap();
}

fn part_bytes(part: &crate::coded::CodedPart) -> PartBytes<'_> {
    let specs = part.codec.planes(part.rows, part.cols).unwrap();
    PartBytes {
        spec: PartSpec {
            name: part.part.name().to_owned(),
            codec: part.codec.name(),
            rows: part.rows as u64,
            cols: part.cols as u64,
        },
        planes: specs.into_iter().zip(part.planes.iter().map(Vec::as_slice)).collect(),
    }
}
