//! Takes a sound checkpoint apart and puts it together with one fault in it.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

/// The file of a checkpoint with one shard.
pub const WEIGHTS: &str = "model.safetensors";
/// The index of a sharded checkpoint.
pub const INDEX: &str = "model.safetensors.index.json";

/// A copy of a fixture that may be damaged.
pub struct Model {
    /// Where it lies.
    pub dir: PathBuf,
}

/// One tensor of a file.
pub struct Tensor {
    pub name: String,
    pub dtype: String,
    pub shape: Vec<u64>,
    pub bytes: Vec<u8>,
}

impl Model {
    /// Copies `from` to `dir`, leaving out what is no part of a checkpoint.
    pub fn copy(from: &Path, dir: PathBuf) -> Model {
        fs::create_dir_all(&dir).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            if entry.file_name() != "golden.safetensors" {
                fs::copy(entry.path(), dir.join(entry.file_name())).unwrap();
            }
        }
        Model { dir }
    }

    pub fn path(&self, file: &str) -> PathBuf {
        self.dir.join(file)
    }

    /// Changes the bytes of a file.
    pub fn bytes(&self, file: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = fs::read(self.path(file)).unwrap();
        change(&mut bytes);
        fs::write(self.path(file), bytes).unwrap();
    }

    /// Changes a JSON file, keeping the order of its keys.
    pub fn json(&self, file: &str, change: impl FnOnce(&mut Map<String, Value>)) {
        self.bytes(file, |bytes| {
            let mut map = serde_json::from_slice(bytes).unwrap();
            change(&mut map);
            *bytes = serde_json::to_vec(&map).unwrap();
        });
    }

    /// Sets one key of config.json.
    pub fn config(&self, key: &str, value: Value) {
        self.json("config.json", |c| drop(c.insert(key.to_owned(), value)));
    }

    /// Changes the header of the weights as text; tensor data stay as they are.
    pub fn header(&self, change: impl FnOnce(String) -> String) {
        self.bytes(WEIGHTS, |bytes| {
            let (header, data) = split(bytes);
            *bytes = file_of(change(header.to_owned()).as_bytes(), data);
        });
    }

    /// Replaces the header by bytes of any kind.
    pub fn raw_header(&self, header: &[u8]) {
        self.bytes(WEIGHTS, |bytes| *bytes = file_of(header, split(bytes).1));
    }

    /// Changes one field of one tensor in the header.
    pub fn field(&self, tensor: &str, field: &str, value: Value) {
        self.header(|text| {
            let mut header: Map<String, Value> = serde_json::from_str(&text).unwrap();
            header[tensor][field] = value;
            serde_json::to_string(&header).unwrap()
        });
    }

    /// Changes the list of tensors of a file and writes it as a sound file again.
    pub fn tensors(&self, file: &str, change: impl FnOnce(&mut Vec<Tensor>)) {
        self.bytes(file, |bytes| {
            let mut tensors = parse(bytes);
            change(&mut tensors);
            *bytes = unparse(&tensors);
        });
    }

    /// Changes one tensor of the weights.
    pub fn tensor(&self, name: &str, change: impl FnOnce(&mut Tensor)) {
        self.tensors(WEIGHTS, |tensors| change(find(tensors, name)));
    }

    /// Takes tensors away.
    pub fn without(&self, gone: impl Fn(&str) -> bool) {
        self.tensors(WEIGHTS, |tensors| {
            let before = tensors.len();
            tensors.retain(|t| !gone(&t.name));
            assert!(tensors.len() < before, "nothing was taken away");
        });
    }

    /// Adds a tensor of F32 zeros.
    pub fn with(&self, name: &str, shape: &[u64]) {
        self.tensors(WEIGHTS, |tensors| tensors.push(zeros(name, shape)));
    }
}

impl Tensor {
    /// Overwrites one F32 value.
    pub fn set_f32(&mut self, idx: usize, value: f32) {
        assert_eq!(self.dtype, "F32");
        self.bytes[4 * idx..4 * idx + 4].copy_from_slice(&value.to_le_bytes());
    }
}

/// The tensor of this name.
pub fn find<'a>(tensors: &'a mut [Tensor], name: &str) -> &'a mut Tensor {
    tensors.iter_mut().find(|t| t.name == name).unwrap_or_else(|| panic!("no tensor {name}"))
}

/// An F32 tensor of zeros.
pub fn zeros(name: &str, shape: &[u64]) -> Tensor {
    let values = shape.iter().product::<u64>() as usize;
    Tensor {
        name: name.to_owned(),
        dtype: "F32".to_owned(),
        shape: shape.to_vec(),
        bytes: vec![0; 4 * values],
    }
}

/// Tensors of a sound file, in the order of their bytes.
pub fn parse(bytes: &[u8]) -> Vec<Tensor> {
    let (header, data) = split(bytes);
    let header: Map<String, Value> = serde_json::from_str(header).unwrap();
    let number = |v: &Value| v.as_u64().unwrap();
    let mut placed: Vec<(u64, Tensor)> = Vec::new();
    for (name, entry) in header.iter().filter(|(name, _)| *name != "__metadata__") {
        let (start, end) = (number(&entry["data_offsets"][0]), number(&entry["data_offsets"][1]));
        let shape = entry["shape"].as_array().unwrap().iter().map(number).collect();
        let bytes = data[start as usize..end as usize].to_vec();
        let dtype = entry["dtype"].as_str().unwrap().to_owned();
        placed.push((start, Tensor { name: name.clone(), dtype, shape, bytes }));
    }
    placed.sort_by_key(|(start, _)| *start);
    placed.into_iter().map(|(_, tensor)| tensor).collect()
}

pub fn unparse(tensors: &[Tensor]) -> Vec<u8> {
    let mut header = Map::new();
    let mut data = Vec::new();
    for t in tensors {
        let start = data.len();
        data.extend_from_slice(&t.bytes);
        let entry = json!({ "dtype": t.dtype, "shape": t.shape, "data_offsets": [start, data.len()] });
        assert!(header.insert(t.name.clone(), entry).is_none(), "{} twice", t.name);
    }
    let mut header = serde_json::to_vec(&header).unwrap();
    header.resize(header.len().next_multiple_of(8), b' ');
    file_of(&header, &data)
}

/// Header text and tensor data of a sound file.
fn split(bytes: &[u8]) -> (&str, &[u8]) {
    let (length, rest) = bytes.split_at(8);
    let (header, data) = rest.split_at(u64::from_le_bytes(length.try_into().unwrap()) as usize);
    (std::str::from_utf8(header).unwrap().trim_end(), data)
}

fn file_of(header: &[u8], data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header, data].concat()
}
