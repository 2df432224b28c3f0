//! Named caps on what a stranger's file may ask for, each with its reason.
//!
//! A cap is compared before anything is allocated. `SPEC.md` lists them too, and a test compares the two.

/// Bytes of a safetensors header; the stock reader has the same cap.
pub const HEADER_BYTES_MAX: u64 = 100_000_000;

/// Bytes of a safetensors header at least: the stock writer pads `{}` to eight.
pub const HEADER_BYTES_MIN: u64 = 8;

/// Tensors in one file. The largest checkpoint known has 150 000 in all its files together.
pub const TENSORS_MAX: usize = 1_000_000;

/// Bytes of a tensor's name. Real ones have less than 120.
pub const NAME_BYTES_MAX: usize = 1024;

/// Dimensions of a tensor. Real ones have at most 5 (convolutions of vision towers).
pub const DIMS_MAX: usize = 8;

/// Experts in one layer; 896 is the most seen.
pub const EXPERTS_MAX: u32 = 65_536;

/// Parts of an expert: three matrices and three biases are what models have; an index row holds eight codec ids.
pub const PARTS_MAX: usize = 8;

/// Planes of one part; no codec has more than six.
pub const PLANES_MAX: usize = 32;

/// Bytes of one record: an f32 expert of the largest kind seen (6144 × 32768) has 2.4 GB.
pub const RECORD_BYTES_MAX: u64 = 4 << 30;

/// Smallest alignment of records: what O_DIRECT accepts on every disk and file system we know.
pub const ALIGN_MIN: u64 = 4096;

/// Largest alignment of records: a huge page.
pub const ALIGN_MAX: u64 = 2 << 20;

/// Bytes of a manifest: 92 layers of 896 experts with usage counts and codecs for each take 5 MB.
pub const MANIFEST_BYTES_MAX: u64 = 64 << 20;

/// Keys the pager's queue of prefetches holds; more are dropped, since they would come too late anyway.
pub const PREFETCH_QUEUE_MAX: usize = 4096;
