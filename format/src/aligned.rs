//! Memory that O_DIRECT reads into: it starts at a multiple of a page.

/// What the start of a buffer is a multiple of; enough for O_DIRECT everywhere.
pub const MEMORY_ALIGN: usize = 4096;

/// A buffer whose first byte lies at a multiple of [`MEMORY_ALIGN`].
///
/// It owns a vector a little longer than needed and starts inside it. It is never cloned and the vector never
/// grows, since a new allocation would lie elsewhere.
#[derive(Debug, Default)]
pub struct AlignedBuf {
    raw: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuf {
    /// A buffer of `len` zero bytes.
    pub fn new(len: usize) -> AlignedBuf {
        let raw = vec![0; len.saturating_add(MEMORY_ALIGN)];
        let start = raw.as_ptr().align_offset(MEMORY_ALIGN);
        AlignedBuf { raw, start, len }
    }

    /// A buffer of `len` bytes that reuses this one's memory if it is large enough. The bytes are any.
    pub fn resized(self, len: usize) -> AlignedBuf {
        if len > self.capacity() { AlignedBuf::new(len) } else { AlignedBuf { len, ..self } }
    }

    /// Bytes it could hold without a new allocation.
    pub fn capacity(&self) -> usize {
        self.raw.len().saturating_sub(self.start)
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        self.raw.get(self.start..).and_then(|b| b.get(..self.len)).unwrap_or_default()
    }

    /// The bytes, to be filled.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.raw.get_mut(self.start..).and_then(|b| b.get_mut(..self.len)).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_at_a_page_and_has_the_length_asked_for() {
        for len in [0, 1, 4096, 100_000, 40_000_000] {
            let mut buf = AlignedBuf::new(len);
            assert_eq!(buf.bytes().len(), len);
            assert_eq!(buf.bytes_mut().as_ptr() as usize % MEMORY_ALIGN, 0);
            let moved = Box::new(buf);
            assert_eq!(moved.bytes().as_ptr() as usize % MEMORY_ALIGN, 0);
        }
    }

    #[test]
    fn memory_is_reused_when_it_suffices() {
        let buf = AlignedBuf::new(9000);
        let place = buf.bytes().as_ptr();
        let buf = buf.resized(5000);
        assert_eq!((buf.bytes().as_ptr(), buf.bytes().len()), (place, 5000));
        assert_eq!(buf.resized(100_000).bytes().len(), 100_000);
        assert_eq!(AlignedBuf::default().resized(7).bytes(), [0; 7]);
    }
}
