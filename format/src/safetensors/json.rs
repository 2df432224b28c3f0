//! The JSON of a header, streamed straight into [`TensorInfo`]s: no tree of values is built, no field is
//! guessed, no depth is followed. Offsets are still those of the header, from the end of the header.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

use super::{METADATA, TensorInfo, check_name};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::limits::DIMS_MAX;

/// String table and tensors of a header.
pub(super) type Parsed = (BTreeMap<String, String>, Vec<TensorInfo>);

/// Parses `text`, which starts at byte `text_offset` of its file.
pub(super) fn parse(text: &str, text_offset: u64) -> Result<Parsed> {
    let mut state = State::default();
    let mut json = serde_json::Deserializer::from_str(text);
    let outcome = json.deserialize_map(HeaderVisitor(&mut state)).and_then(|()| json.end());
    match outcome {
        Ok(()) => Ok((state.metadata.unwrap_or_default(), state.tensors)),
        Err(e) => Err(explain(&e, state, text, text_offset)),
    }
}

/// What was read so far; after a failure also where it came and, if it is ours, what it was.
#[derive(Default)]
struct State {
    metadata: Option<BTreeMap<String, String>>,
    tensors: Vec<TensorInfo>,
    current: Option<String>,
    refusal: Option<Error>,
}

impl State {
    /// Remembers our own refusal, which serde could only carry as text.
    fn refuse<E: serde::de::Error>(&mut self, error: Error) -> E {
        self.refusal = Some(error);
        E::custom("refused")
    }
}

fn explain(error: &serde_json::Error, state: State, text: &str, text_offset: u64) -> Error {
    let at = byte_of(text, error.line(), error.column());
    let text = error.to_string();
    let what = text.rsplit_once(" at line ").map_or(text.as_str(), |(what, _)| what);
    let mut out = state.refusal.unwrap_or_else(|| Error::bad_data(format!("header: {what}")));
    if let Some(name) = state.current {
        out = out.in_tensor(name);
    }
    out.at_byte(text_offset.saturating_add(at))
}

/// Byte offset in `text` of a line and column as serde_json counts them, from one.
fn byte_of(text: &str, line: usize, column: usize) -> u64 {
    let lines_before = text.split_inclusive('\n').take(line.saturating_sub(1));
    let start: usize = lines_before.map(str::len).sum();
    start.saturating_add(column.saturating_sub(1)) as u64
}

/// `{"__metadata__": …, NAME: …, …}`
struct HeaderVisitor<'a>(&'a mut State);

impl<'de> Visitor<'de> for HeaderVisitor<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<(), A::Error> {
        let state = self.0;
        while let Some(name) = map.next_key::<String>()? {
            if name == METADATA {
                state.current = Some(name);
                if state.metadata.is_some() {
                    return Err(state.refuse(Error::bad_data("this key is used twice")));
                }
                state.metadata = Some(map.next_value_seed(Strings(state))?);
                continue;
            }
            check_name(&name, state.tensors.len()).map_err(|e| state.refuse(e))?;
            state.current = Some(name);
            let (dtype, shape, [start, end]) = map.next_value_seed(Entry(state))?;
            let name = state.current.take().unwrap_or_default();
            state.tensors.push(TensorInfo { name, dtype, shape, start, end });
        }
        state.current = None;
        Ok(())
    }
}

/// `{"key": "value", …}`
struct Strings<'a>(&'a mut State);

impl<'de> DeserializeSeed<'de> for Strings<'_> {
    type Value = BTreeMap<String, String>;
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> std::result::Result<Self::Value, D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Strings<'_> {
    type Value = BTreeMap<String, String>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object of strings")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Self::Value, A::Error> {
        let mut out = BTreeMap::new();
        while let Some((key, value)) = map.next_entry::<String, String>()? {
            if out.contains_key(&key) {
                return Err(self.0.refuse(Error::bad_data(format!("key {key:?} is used twice"))));
            }
            out.insert(key, value);
        }
        Ok(out)
    }
}

/// `{"dtype": …, "shape": […], "data_offsets": [start, end]}`
struct Entry<'a>(&'a mut State);

type EntryValue = (Dtype, Vec<u64>, [u64; 2]);

impl<'de> DeserializeSeed<'de> for Entry<'_> {
    type Value = EntryValue;
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> std::result::Result<EntryValue, D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Entry<'_> {
    type Value = EntryValue;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object with dtype, shape and data_offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<EntryValue, A::Error> {
        let state = self.0;
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        while let Some(key) = map.next_key_seed(Text)? {
            let before = match key.as_str() {
                "dtype" => {
                    let name = map.next_value_seed(Text)?;
                    let new = Dtype::from_name(&name).map_err(|e| state.refuse(e))?;
                    dtype.replace(new).is_some()
                }
                "shape" => shape.replace(map.next_value_seed(Numbers { state, max: DIMS_MAX })?).is_some(),
                "data_offsets" => {
                    let pair = map.next_value_seed(Numbers { state, max: 2 })?;
                    let pair = <[u64; 2]>::try_from(pair).map_err(|found| {
                        state.refuse(Error::bad_data(format!("data_offsets {found:?}, expected two numbers")))
                    })?;
                    offsets.replace(pair).is_some()
                }
                _ => return Err(state.refuse(Error::bad_data(format!("unknown field {key:?}")))),
            };
            if before {
                return Err(state.refuse(Error::bad_data(format!("field {key:?} is given twice"))));
            }
        }
        let missing = |field| A::Error::missing_field(field);
        let dtype = dtype.ok_or_else(|| missing("dtype"))?;
        let shape = shape.ok_or_else(|| missing("shape"))?;
        Ok((dtype, shape, offsets.ok_or_else(|| missing("data_offsets"))?))
    }
}

/// A short string; unlike `String` it says what it expected.
struct Text;

impl<'de> DeserializeSeed<'de> for Text {
    type Value = String;
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> std::result::Result<String, D::Error> {
        d.deserialize_str(self)
    }
}

impl Visitor<'_> for Text {
    type Value = String;
    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a string")
    }
    fn visit_str<E: serde::de::Error>(self, text: &str) -> std::result::Result<String, E> {
        Ok(text.to_owned())
    }
}

/// A list of at most `max` whole numbers.
struct Numbers<'a> {
    state: &'a mut State,
    max: usize,
}

impl<'de> DeserializeSeed<'de> for Numbers<'_> {
    type Value = Vec<u64>;
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> std::result::Result<Vec<u64>, D::Error> {
        d.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Numbers<'_> {
    type Value = Vec<u64>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a list of whole numbers")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Vec<u64>, A::Error> {
        let mut found = [0; DIMS_MAX];
        let mut n = 0;
        while let Some(number) = seq.next_element_seed(Number)? {
            match found.get_mut(n).filter(|_| n < self.max) {
                Some(slot) => *slot = number,
                None => {
                    let what = format!("a list of more than {} numbers", self.max);
                    return Err(self.state.refuse(Error::bad_data(what)));
                }
            }
            n = n.saturating_add(1);
        }
        // Exactly as long as needed: a checkpoint has a hundred thousand of these.
        Ok(found.get(..n).unwrap_or_default().to_vec())
    }
}

/// One whole number; floats and negative ones are no numbers here.
struct Number;

impl<'de> DeserializeSeed<'de> for Number {
    type Value = u64;
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> std::result::Result<u64, D::Error> {
        d.deserialize_u64(self)
    }
}

impl Visitor<'_> for Number {
    type Value = u64;
    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a whole number below 2^64")
    }
    fn visit_u64<E>(self, number: u64) -> std::result::Result<u64, E> {
        Ok(number)
    }
}
