//! How the experts of a layer are stored.

use crate::spec::{Moe, Part};

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

    /// Whether one tensor holds all experts.
    pub fn is_stacked(&self) -> bool {
        !self.name.contains("{E}")
    }

    /// How many of `n_experts` one tensor holds along its first axis; `None` where each expert has a tensor of its own.
    pub fn n_stacked(&self, n_experts: usize) -> Option<u64> {
        self.is_stacked().then_some(n_experts as u64)
    }

    /// Output rows and input columns of what it holds of one expert, of a bias its length and 1; a piece that holds two has
    /// the rows of both. `hidden` is the stream's width.
    pub fn dims(&self, moe: &Moe, hidden: usize) -> (u64, u64) {
        let (part, times) = match self.holds {
            Holds::One(part) => (part, 1),
            Holds::Two(part, _, _) => (part, 2),
        };
        let (outside, inter) = (moe.width(hidden) as u64, moe.inter as u64);
        let (rows, cols) = match part {
            Part::Gate | Part::Up => (inter, outside),
            Part::Down => (outside, inter),
            Part::GateBias | Part::UpBias => (inter, 1),
            Part::DownBias => (outside, 1),
        };
        (rows * times, cols)
    }

    /// Lengths of one expert's plain numbers, in the order in which they are stored.
    pub fn lengths(&self, (rows, cols): (u64, u64), is_transposed: bool) -> Vec<u64> {
        match (self.holds_matrix(), is_transposed) {
            (false, _) => vec![rows],
            (true, false) => vec![rows, cols],
            (true, true) => vec![cols, rows],
        }
    }

    /// Shape of a tensor of `n` experts of these lengths each; of one expert's own where there is no `n`.
    pub fn stacked(&self, n: Option<u64>, lengths: &[u64]) -> Vec<u64> {
        match (n, lengths) {
            (Some(n), [rows, cols]) if self.flat => vec![n * rows, *cols],
            _ => n.into_iter().chain(lengths.iter().copied()).collect(),
        }
    }

    /// Whether a tensor that should hold `rows × cols` is stored `[in, out]`; its last two lengths are `shape`.
    pub fn is_transposed(&self, rows: u64, cols: u64, shape: &[u64]) -> bool {
        let straight = self.either && shape.ends_with(&[rows, cols]);
        self.transposed && !straight
    }
}
