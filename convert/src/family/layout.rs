//! How the experts of a layer are stored.

use crate::spec::Part;

/// One way to store the experts of a layer.
#[derive(Debug)]
pub struct ExpertLayout {
    /// For messages.
    pub name: &'static str,
    /// The tensors. Names with `{E}` hold one expert, the others all of them along the first axis.
    pub pieces: &'static [Piece],
}

/// One tensor of an expert layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Name after the layer's prefix.
    pub name: &'static str,
    /// What it holds.
    pub holds: Holds,
    /// Stored `[in, out]`.
    pub transposed: bool,
    /// All experts' rows along the first axis, not experts along an axis of their own.
    pub flat: bool,
    /// Some writers store it turned, others not: the shape tells, and that of the others in the layer where it is square.
    pub either: bool,
}

/// What an expert tensor holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holds {
    /// One matrix or bias.
    One(Part),
    /// Two, of equally many output rows.
    Two(Part, Part, Split),
}

/// How two matrices share their output rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// First one, then the other.
    Halves,
    /// Even rows are the first, odd rows the second.
    Interleaved,
}

impl Piece {
    /// Whether it holds matrices, not biases.
    pub fn holds_matrix(&self) -> bool {
        match self.holds {
            Holds::One(part) | Holds::Two(part, _, _) => part.is_matrix(),
        }
    }

    /// Whether a tensor that should hold `rows × cols` is stored `[in, out]`; its last two lengths are `shape`.
    pub fn is_transposed(&self, rows: u64, cols: u64, shape: &[u64]) -> bool {
        let straight = self.either && shape.ends_with(&[rows, cols]);
        self.transposed && !straight
    }
}
