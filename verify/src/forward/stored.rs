//! A stream as bytes, so that another process goes on with it between two layers.
//!
//! ```text
//! width, values, windows             u64 each
//! hidden                             f32, [tokens, width]
//! for each window: keys, queries + 1 u64 each; keys u32; where those of each query begin u32
//! ```
//!
//! All numbers are little-endian. What a layer keeps for itself, a parallel attention that waits or experts on a shortcut,
//! is gone between layers and is never stored.

use std::io::{self, ErrorKind, Read, Write};

use super::Stream;
use super::attention::Chosen;

/// Values converted at a time.
const VALUES: usize = 1 << 16;

impl Stream {
    /// Writes a stream that is between two layers.
    ///
    /// # Errors
    /// A failed write; a stream inside a layer.
    pub fn write_to(&self, to: &mut dyn Write) -> io::Result<()> {
        if self.pending.is_some() || self.shortcut.is_some() {
            return Err(invalid("a stream inside a layer cannot be stored".to_owned()));
        }
        let head = [self.width, self.hidden.len(), self.chosen.len()];
        head.iter().try_for_each(|&n| write_len(to, n))?;
        write_all(to, &self.hidden, |v| v.to_le_bytes())?;
        self.chosen.iter().try_for_each(|chosen| chosen.write_to(to))
    }

    /// Reads a stream of `n_tokens` tokens in at most `n_windows` windows, whose rows have `width` values.
    ///
    /// # Errors
    /// A failed read (`UnexpectedEof` where bytes lack), or another stream (`InvalidData`).
    pub fn read_from(
        from: &mut dyn Read,
        width: usize,
        n_tokens: usize,
        n_windows: usize,
    ) -> io::Result<Stream> {
        let expected = [Some(width), n_tokens.checked_mul(width)];
        for (name, expected) in ["width", "values"].iter().zip(expected) {
            let found = read_len(from)?;
            if Some(found) != expected {
                return Err(invalid(format!("{name} {found}, expected {}", expected.unwrap_or(0))));
            }
        }
        let n_chosen = read_len(from)?;
        let hidden = read_all(from, n_tokens * width, f32::from_le_bytes)?;
        if n_chosen > n_windows {
            return Err(invalid(format!("keys of {n_chosen} windows, expected at most {n_windows}")));
        }
        let chosen = (0..n_chosen).map(|_| Chosen::read_from(from, n_tokens)).collect::<io::Result<_>>()?;
        Ok(Stream { chosen, ..Stream::new(width, hidden) })
    }

    /// Takes the rows of the first `n_tokens` tokens in `n_windows` windows off, the stream being between two layers.
    pub fn take_first(&mut self, n_tokens: usize, n_windows: usize) -> Stream {
        let hidden = self.hidden.drain(..(n_tokens * self.width).min(self.hidden.len())).collect();
        let chosen = self.chosen.drain(..n_windows.min(self.chosen.len())).collect();
        Stream { chosen, ..Stream::new(self.width, hidden) }
    }
}

impl Chosen {
    fn write_to(&self, to: &mut dyn Write) -> io::Result<()> {
        let (keys, starts) = self.parts();
        write_len(to, keys.len())?;
        write_len(to, starts.len())?;
        write_all(to, keys, |v| v.to_le_bytes())?;
        let starts: Vec<u32> = starts.iter().map(|&s| s as u32).collect();
        write_all(to, &starts, |v| v.to_le_bytes())
    }

    fn read_from(from: &mut dyn Read, n_tokens: usize) -> io::Result<Chosen> {
        let (n_keys, n_starts) = (read_len(from)?, read_len(from)?);
        // A query sees the keys before it and itself.
        if n_starts > n_tokens + 1 || n_keys > n_tokens.saturating_mul(n_tokens) {
            return Err(invalid(format!("{n_keys} keys of {n_starts} queries for {n_tokens} tokens")));
        }
        let keys = read_all(from, n_keys, u32::from_le_bytes)?;
        let starts: Vec<usize> =
            read_all(from, n_starts, u32::from_le_bytes)?.into_iter().map(|s| s as usize).collect();
        Chosen::of_parts(keys, starts).ok_or_else(|| invalid("keys that no query chose".to_owned()))
    }
}

fn invalid(what: String) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what)
}

fn write_len(to: &mut dyn Write, n: usize) -> io::Result<()> {
    to.write_all(&(n as u64).to_le_bytes())
}

fn read_len(from: &mut dyn Read) -> io::Result<usize> {
    let mut bytes = [0; 8];
    from.read_exact(&mut bytes)?;
    usize::try_from(u64::from_le_bytes(bytes)).map_err(|_| invalid("a length beyond memory".to_owned()))
}

fn write_all<T: Copy>(to: &mut dyn Write, values: &[T], bytes: fn(T) -> [u8; 4]) -> io::Result<()> {
    values.chunks(VALUES).try_for_each(|chunk| {
        let bytes: Vec<u8> = chunk.iter().flat_map(|&v| bytes(v)).collect();
        to.write_all(&bytes)
    })
}

/// Memory grows with what is really there, whatever `n` says.
fn read_all<T>(from: &mut dyn Read, n: usize, value: fn([u8; 4]) -> T) -> io::Result<Vec<T>> {
    let (mut values, mut chunk) = (Vec::new(), vec![0; 4 * VALUES.min(n)]);
    while values.len() < n {
        let part = chunk.get_mut(..4 * (n - values.len()).min(VALUES)).unwrap_or_default();
        from.read_exact(part)?;
        values.extend(part.as_chunks::<4>().0.iter().map(|b| value(*b)));
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream() -> Stream {
        let mut chosen = Chosen::default();
        chosen.clear();
        chosen.push([0].into_iter());
        chosen.push([0, 1].into_iter());
        let hidden = (0..12).map(|i| i as f32 / 7.0).collect();
        Stream { chosen: vec![chosen, Chosen::default()], ..Stream::new(3, hidden) }
    }

    #[test]
    fn what_is_read_is_what_was_written() {
        let mut bytes = Vec::new();
        stream().write_to(&mut bytes).unwrap();
        assert_eq!(Stream::read_from(&mut &bytes[..], 3, 4, 2).unwrap(), stream());
        for cut in 0..bytes.len() {
            assert!(Stream::read_from(&mut &bytes[..cut], 3, 4, 2).is_err(), "cut to {cut} bytes");
        }
        for (width, n_tokens, n_windows) in [(4, 3, 2), (3, 5, 2), (3, 4, 1)] {
            assert!(Stream::read_from(&mut &bytes[..], width, n_tokens, n_windows).is_err());
        }
        let inside = Stream { pending: Some(Vec::new()), ..stream() };
        assert!(inside.write_to(&mut Vec::new()).is_err());
    }

    #[test]
    fn parts_put_together_are_the_whole() {
        let mut rest = stream();
        let mut first = rest.take_first(2, 1);
        assert_eq!((first.n_tokens(), rest.n_tokens()), (2, 2));
        first.append(rest);
        assert_eq!(first, stream());
    }
}
