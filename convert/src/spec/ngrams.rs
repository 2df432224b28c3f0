//! Embeddings of n-grams.

/// Embeddings of hashed n-grams that join a layer's streams before its attention (Qwen4):
///
/// ```text
/// e_t = rows (⊕_{s<n} m_s · id_{t−s}) mod size_h + offset_h, for each head h of each order n
/// key_j = norm(W_k e)_j,  query_j = norm(X_j),  g_j = key_j · query_j / √hidden
/// v_j = sigmoid(√|g_j| sign g_j) W_v e;  X_j += v_j + silu(convolution of norm(v))_j
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ngrams {
    /// Factors of the token and of those before it; as many as the longest n-gram has tokens.
    pub factors: Vec<u64>,
    /// Rows of each head's part of the table, those of the shortest order first.
    pub sizes: Vec<u64>,
    /// Dimensions of a row.
    pub dim: usize,
    /// Rows of the table, the parts of all heads and padding.
    pub n_rows: u64,
    /// Tensors that the table is stored as.
    pub n_parts: usize,
    /// What stands for tokens before the text, and separates texts.
    pub end: u32,
    /// Tokens that the convolution looks at, `factors.len()` apart.
    pub kernel: usize,
}

impl Ngrams {
    /// Heads of each order.
    pub fn heads_of_order(&self) -> usize {
        self.sizes.len() / (self.factors.len() - 1).max(1)
    }

    /// Rows of one of the tensors: all have equally many, but the last has what is left.
    pub fn rows_of_part(&self, part: usize) -> u64 {
        let each = self.n_rows.div_ceil((self.n_parts as u64).max(1));
        each.min(self.n_rows.saturating_sub(each.saturating_mul(part as u64)))
    }

    /// Values of a token's embedding.
    pub fn width(&self) -> usize {
        self.sizes.len() * self.dim
    }
}
