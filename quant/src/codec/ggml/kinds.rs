//! The table of block types: what a block of each holds.

use super::blocks::{iq4_xs, legacy, q2_k, q3_k, q4_k, q6_k};
use super::levels::{Levels, Table};

/// Numbers of the largest block; ggml's QK_K.
pub const SUPER_BLOCK: usize = 256;
/// Groups of the block that has most of them.
pub const GROUPS_MAX: usize = 16;

/// Facts of a block type.
#[derive(Debug)]
pub struct Kind {
    /// Which one it is, for the code that moves its bits.
    pub id: Id,
    /// Name in [`super::super::CODECS`].
    pub name: &'static str,
    /// Number of the type in a GGUF file (`enum ggml_type`).
    pub type_id: u32,
    /// Numbers a block.
    pub block: usize,
    /// Bytes a block.
    pub block_bytes: usize,
    /// Neighbouring numbers that share scale and minimum.
    pub group: usize,
    /// What codes mean.
    pub levels: Levels,
    /// Scales of groups, in units of the block's.
    pub scales: (i8, i8),
    /// Minimums of groups, in units of the block's.
    pub mins: Mins,
}

/// What is subtracted from the numbers of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mins {
    /// Nothing.
    None,
    /// A number of either sign a block: −1 × the block's.
    Block,
    /// 0 … max times that of the block.
    Groups(i8),
}

/// Names of the block types, ggml's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "ggml's names, each described in its file")]
pub enum Id {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Iq4Nl,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
    Iq4Xs,
}

const SMALL: Kind = Kind {
    id: Id::Q4_0,
    name: "q4_0",
    type_id: 2,
    block: 32,
    block_bytes: 18,
    group: 32,
    levels: Levels::linear(-8, 7),
    scales: (1, 1),
    mins: Mins::None,
};
const SUPER: Kind = Kind { block: SUPER_BLOCK, ..SMALL };

/// Every block type there is here.
pub const KINDS: &[Kind] = &[
    SMALL,
    Kind {
        id: Id::Q4_1,
        name: "q4_1",
        type_id: 3,
        block_bytes: 20,
        levels: Levels::linear(0, 15),
        mins: Mins::Block,
        ..SMALL
    },
    Kind {
        id: Id::Q5_0,
        name: "q5_0",
        type_id: 6,
        block_bytes: 22,
        levels: Levels::linear(-16, 15),
        ..SMALL
    },
    Kind {
        id: Id::Q5_1,
        name: "q5_1",
        type_id: 7,
        block_bytes: 24,
        levels: Levels::linear(0, 31),
        mins: Mins::Block,
        ..SMALL
    },
    // A level of −128 is decoded, but ggml never writes it, nor do we.
    Kind {
        id: Id::Q8_0,
        name: "q8_0",
        type_id: 8,
        block_bytes: 34,
        levels: Levels::linear(-128, 127).but_the_lowest(),
        ..SMALL
    },
    Kind { id: Id::Iq4Nl, name: "iq4_nl", type_id: 20, levels: Levels::Table(Table), ..SMALL },
    Kind {
        id: Id::Q2K,
        name: "q2_k",
        type_id: 10,
        block_bytes: q2_k::BYTES,
        group: 16,
        levels: Levels::linear(0, 3),
        scales: (0, 15),
        mins: Mins::Groups(15),
        ..SUPER
    },
    Kind {
        id: Id::Q3K,
        name: "q3_k",
        type_id: 11,
        block_bytes: q3_k::BYTES,
        group: 16,
        levels: Levels::linear(-4, 3),
        scales: (-32, 31),
        ..SUPER
    },
    Kind {
        id: Id::Q4K,
        name: "q4_k",
        type_id: 12,
        block_bytes: q4_k::Q4_BYTES,
        levels: Levels::linear(0, 15),
        scales: (0, 63),
        mins: Mins::Groups(63),
        ..SUPER
    },
    Kind {
        id: Id::Q5K,
        name: "q5_k",
        type_id: 13,
        block_bytes: q4_k::Q5_BYTES,
        levels: Levels::linear(0, 31),
        scales: (0, 63),
        mins: Mins::Groups(63),
        ..SUPER
    },
    Kind {
        id: Id::Q6K,
        name: "q6_k",
        type_id: 14,
        block_bytes: q6_k::BYTES,
        group: 16,
        levels: Levels::linear(-32, 31),
        scales: (-128, 127),
        ..SUPER
    },
    Kind {
        id: Id::Iq4Xs,
        name: "iq4_xs",
        type_id: 23,
        block_bytes: iq4_xs::BYTES,
        levels: Levels::Table(Table),
        scales: (-32, 31),
        ..SUPER
    },
];

impl Kind {
    /// The block type of that name.
    pub(super) const fn of(id: Id) -> &'static Kind {
        let mut i = 0;
        while KINDS[i].id as u8 != id as u8 {
            i += 1;
        }
        &KINDS[i]
    }

    /// Groups a block.
    #[inline(always)]
    pub fn n_groups(&self) -> usize {
        self.block / self.group
    }
}

/// A block, taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Parts {
    /// Scale of the block, f16.
    pub d: u16,
    /// Minimum of the block, f16.
    pub dmin: u16,
    pub scales: [i8; GROUPS_MAX],
    pub mins: [i8; GROUPS_MAX],
    /// One code a byte, from 0 on.
    pub codes: [u8; SUPER_BLOCK],
}

impl Parts {
    /// What stands where the block type says nothing: scales of 1 and no minimums.
    pub const EMPTY: Parts =
        Parts { d: 0, dmin: 0, scales: [1; GROUPS_MAX], mins: [0; GROUPS_MAX], codes: [0; SUPER_BLOCK] };

    /// Reads a block of `kind.block_bytes`.
    #[inline(always)]
    pub fn read(&mut self, kind: &Kind, block: &[u8]) {
        match kind.id {
            Id::Q4_0 | Id::Q4_1 | Id::Q5_0 | Id::Q5_1 | Id::Q8_0 | Id::Iq4Nl => {
                legacy::read(kind.id, block, self)
            }
            Id::Q2K => q2_k::read(block, self),
            Id::Q3K => q3_k::read(block, self),
            Id::Q4K => q4_k::read(block, self),
            Id::Q5K => q4_k::read5(block, self),
            Id::Q6K => q6_k::read(block, self),
            Id::Iq4Xs => iq4_xs::read(block, self),
        }
    }

    /// Writes a block of `kind.block_bytes`.
    #[inline(always)]
    pub fn write(&self, kind: &Kind, block: &mut [u8]) {
        match kind.id {
            Id::Q4_0 | Id::Q4_1 | Id::Q5_0 | Id::Q5_1 | Id::Q8_0 | Id::Iq4Nl => {
                legacy::write(kind.id, self, block)
            }
            Id::Q2K => q2_k::write(self, block),
            Id::Q3K => q3_k::write(self, block),
            Id::Q4K => q4_k::write(self, block),
            Id::Q5K => q4_k::write5(self, block),
            Id::Q6K => q6_k::write(self, block),
            Id::Iq4Xs => iq4_xs::write(self, block),
        }
    }
}
