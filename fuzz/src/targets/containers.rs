//! Files of a bundle, one by one.

use std::path::Path;

use moepack_format::{
    Bank, BankWriter, Dtype, Header, InputFile, PartBytes, PartSpec, PlaneSpec, Result, TrunkFile,
    TrunkWriter,
};

use super::{Ready, put};
use crate::corpus::{Seed, fixture};

/// Headers of strangers.
pub(super) fn safetensors(dir: &Path) -> Result<Ready> {
    let mut seeds = vec![
        Seed::new("empty", [&8_u64.to_le_bytes()[..], b"{}      "].concat()),
        Seed::new("metadata", framed(br#"{"__metadata__":{"format":"pt","a":"[1]"},"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[0,3],"data_offsets":[8,8]}}"#, 8)),
    ];
    for name in ["ct_int4_asym", "gptq_2_3_8", "ct_mxfp4"] {
        seeds.push(Seed::file(name, &fixture("encodings").join(name).join("model.safetensors"))?);
    }
    let path = dir.join("model.safetensors");
    Ready::new(seeds, move |_, bytes| {
        put(&path, bytes)?;
        let header = Header::read(&InputFile::open(&path)?)?;
        for tensor in &header.tensors {
            assert_eq!(header.get(&tensor.name), Some(tensor), "the reader finds what it has");
            assert!(tensor.end <= bytes.len() as u64, "no tensor ends behind the file");
        }
        Ok(())
    })
}

fn framed(json: &[u8], data: usize) -> Vec<u8> {
    [&(json.len() as u64).to_le_bytes()[..], json, &vec![7; data]].concat()
}

/// Banks with records of the same and of different lengths.
pub(super) fn bank(dir: &Path) -> Result<Ready> {
    let seeds = vec![
        Seed::file("same", &written_bank(&dir.join("same"), 0)?)?,
        Seed::file("other", &written_bank(&dir.join("other"), 3000)?)?,
    ];
    let path = dir.join("bank.safetensors");
    Ready::new(seeds, move |_, bytes| {
        put(&path, bytes)?;
        let bank = Bank::open(&path)?;
        let (stride, pads) = (bank.stride(), bank.pads().len());
        assert!(stride.is_none_or(|s| s <= bytes.len() as u64) && pads <= bytes.len());
        bank.payload_bytes();
        for expert in 0..bank.n_experts() {
            let record = bank.read(expert, true)?;
            for part in record.parts() {
                for (info, plane) in part.infos.iter().zip(&part.planes) {
                    assert_eq!(info.bytes, plane.len() as u64, "a plane is whole");
                }
            }
        }
        Ok(())
    })
}

fn written_bank(path: &Path, more: usize) -> Result<std::path::PathBuf> {
    const N_EXPERTS: u32 = 3;
    let mut writer = BankWriter::create(path, 7, N_EXPERTS, 4096, 12)?;
    for expert in 0..N_EXPERTS {
        let codes = vec![expert as u8; 640 + more * expert as usize];
        let part = |name: &str, codec: &str| {
            let spec = PartSpec { name: name.to_owned(), codec: codec.to_owned(), rows: 2, cols: 64 };
            let scales = PlaneSpec::new("scales", Dtype::F16, &[2, 1]);
            let planes = vec![
                (PlaneSpec::new("codes", Dtype::U8, &[codes.len() as u64]), &codes[..]),
                (scales, &[1, 2, 3, 4][..]),
            ];
            PartBytes { spec, planes }
        };
        writer.write_expert(expert, &[part("gate_proj", "int4-g64"), part("down_proj", "int8-g64")])?;
    }
    writer.finish()?;
    Ok(path.to_path_buf())
}

/// A trunk file, some of whose tensors are planes of a coded matrix.
pub(super) fn trunk(dir: &Path) -> Result<Ready> {
    let path = dir.join("trunk.safetensors");
    let specs = [
        PlaneSpec::new("norm", Dtype::Bf16, &[9]),
        PlaneSpec::new("q.codes", Dtype::U8, &[300]),
        PlaneSpec::new("q.scales", Dtype::F16, &[2, 1]),
        PlaneSpec::new("empty", Dtype::F32, &[0, 3]),
    ];
    let mut writer = TrunkWriter::create_coded(&path, &specs, &[("q".to_owned(), [2, 150])].into())?;
    for spec in specs.iter().filter(|s| s.name != "empty") {
        writer.write(&spec.name, &vec![1; usize::try_from(spec.bytes()?).unwrap_or(0)])?;
    }
    writer.finish()?;
    let seeds = vec![Seed::file("trunk", &path)?];
    Ready::new(seeds, move |_, bytes| {
        put(&path, bytes)?;
        let file = TrunkFile::open(&path)?;
        file.shapes()?;
        assert!(file.pads().all(|(start, end)| start <= end && end <= bytes.len() as u64));
        Ok(())
    })
}
