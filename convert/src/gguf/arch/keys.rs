//! The list of keys as it grows.

use moepack_format::{Error, Result};

use crate::gguf::Value;
use crate::gguf::value;

/// Keys of a file, those of an architecture under its name.
pub struct Keys<'a> {
    arch: &'static str,
    /// Names and values, in order.
    pub list: Vec<(String, Value)>,
    /// What people should know.
    pub notes: &'a mut Vec<String>,
}

impl<'a> Keys<'a> {
    /// None yet.
    pub fn new(arch: &'static str, notes: &'a mut Vec<String>) -> Keys<'a> {
        Keys { arch, list: Vec::new(), notes }
    }

    /// A key of no architecture.
    pub fn general(&mut self, key: &str, value: Value) {
        self.list.push((format!("general.{key}"), value));
    }

    /// A count.
    ///
    /// # Errors
    /// One beyond 32 bits.
    pub fn number(&mut self, key: &str, n: usize) -> Result<()> {
        let n = u32::try_from(n).map_err(|_| Error::plan(format!("{key} {n} does not fit 32 bits")))?;
        self.own(key, Value::U32(n));
        Ok(())
    }

    /// Several counts.
    ///
    /// # Errors
    /// One beyond 32 bits.
    pub fn numbers(&mut self, counts: &[(&str, usize)]) -> Result<()> {
        counts.iter().try_for_each(|(key, n)| self.number(key, *n))
    }

    /// A number of each layer.
    pub fn floats(&mut self, key: &str, all: impl IntoIterator<Item = f32>) {
        self.own(key, Value::Array(value::F32, all.into_iter().map(Value::F32).collect()));
    }

    /// A count of each layer.
    ///
    /// # Errors
    /// One beyond 32 bits.
    pub fn counts(&mut self, key: &str, all: impl IntoIterator<Item = usize>) -> Result<()> {
        let one = |n: usize| {
            i32::try_from(n)
                .map(Value::I32)
                .map_err(|_| Error::plan(format!("{key} {n} does not fit 32 bits")))
        };
        let all = all.into_iter().map(one).collect::<Result<_>>()?;
        self.own(key, Value::Array(value::I32, all));
        Ok(())
    }

    /// A real number.
    pub fn float(&mut self, key: &str, v: f32) {
        self.own(key, Value::F32(v));
    }

    /// Yes or no.
    pub fn flag(&mut self, key: &str, v: bool) {
        self.own(key, Value::Bool(v));
    }

    /// A word.
    pub fn text(&mut self, key: &str, v: &str) {
        self.own(key, Value::String(v.to_owned()));
    }

    fn own(&mut self, key: &str, value: Value) {
        self.list.push((format!("{}.{key}", self.arch), value));
    }
}
