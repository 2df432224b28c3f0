//! Work in any order on all threads, results in ascending order.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use moepack_format::{Error, Result};
use rayon::ScopeFifo;

/// Items in work or waiting for their turn, beyond one for each thread of the pool.
const AHEAD: usize = 1;

/// Calls `work(0) … work(n - 1)` on the current rayon pool and `consume` with each result in ascending order, one at
/// a time. No more items are begun than a few beyond the next one to be consumed, so that results do not pile up.
/// Nothing waits while it holds a thread: items may use the pool themselves.
///
/// # Errors
/// The first that `work` or `consume` returns, in time; later items are not begun.
pub fn ordered<T: Send>(
    n: usize,
    work: impl Fn(usize) -> Result<T> + Sync,
    consume: impl FnMut(usize, T) -> Result<()> + Send,
) -> Result<()> {
    let state =
        State { begun: 0, consumed: 0, waiting: BTreeMap::new(), consume: Some(consume), error: None };
    let queue = Queue { n, ahead: AHEAD + rayon::current_num_threads(), work, state: Mutex::new(state) };
    rayon::scope_fifo(|scope| queue.begin(scope));
    queue.state.into_inner().unwrap_or_else(PoisonError::into_inner).error.map_or(Ok(()), Err)
}

struct Queue<T, W, C> {
    n: usize,
    ahead: usize,
    work: W,
    state: Mutex<State<T, C>>,
}

struct State<T, C> {
    begun: usize,
    consumed: usize,
    /// Finished before their turn.
    waiting: BTreeMap<usize, T>,
    /// Taken out by the thread that is consuming.
    consume: Option<C>,
    error: Option<Error>,
}

impl<T, W, C> Queue<T, W, C>
where
    T: Send,
    W: Fn(usize) -> Result<T> + Sync,
    C: FnMut(usize, T) -> Result<()> + Send,
{
    /// Begins as many items as may be ahead.
    fn begin<'s>(&'s self, scope: &ScopeFifo<'s>) {
        let mut state = self.lock();
        while state.error.is_none() && state.begun < self.n.min(state.consumed + self.ahead) {
            let i = state.begun;
            state.begun += 1;
            scope.spawn_fifo(move |scope| self.item(i, scope));
        }
    }

    fn item<'s>(&'s self, i: usize, scope: &ScopeFifo<'s>) {
        if self.lock().error.is_some() {
            return;
        }
        match (self.work)(i) {
            Ok(result) => {
                self.lock().waiting.insert(i, result);
                self.drain(scope);
            }
            Err(e) => {
                self.lock().error.get_or_insert(e);
            }
        }
    }

    /// Consumes what is due, unless another thread is at it and will see it.
    fn drain<'s>(&'s self, scope: &ScopeFifo<'s>) {
        let mut state = self.lock();
        let Some(mut consume) = state.consume.take() else { return };
        while state.error.is_none() {
            let i = state.consumed;
            let Some(result) = state.waiting.remove(&i) else { break };
            drop(state);
            let consumed = consume(i, result);
            state = self.lock();
            state.consumed += 1;
            state.error = state.error.take().or(consumed.err());
            drop(state);
            self.begin(scope);
            state = self.lock();
        }
        state.consume = Some(consume);
    }

    /// A panic elsewhere ends the scope with that panic; until then the state is as good as before.
    fn lock(&self) -> MutexGuard<'_, State<T, C>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rayon::prelude::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn pool(threads: usize) -> rayon::ThreadPool {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
    }

    #[test]
    fn results_come_in_order_whatever_takes_long() {
        for threads in [1, 2, 5] {
            let mut seen = Vec::new();
            let nested = |i: usize| {
                Ok((0..(37 * i) % 101).into_par_iter().map(|v| v as f64).sum::<f64>() as usize + i)
            };
            pool(threads)
                .install(|| {
                    ordered(200, nested, |i, r| {
                        seen.push((i, r));
                        Ok(())
                    })
                })
                .unwrap();
            let expected: Vec<_> = (0..200).map(|i| (i, (0..(37 * i) % 101).sum::<usize>() + i)).collect();
            assert_eq!(seen, expected, "{threads} threads");
        }
        ordered(0, |_| Ok(()), |_, ()| Ok(())).unwrap();
    }

    #[test]
    fn results_do_not_pile_up_behind_a_slow_item() {
        let begun = AtomicUsize::new(0);
        let work = |i| {
            begun.fetch_add(1, Ordering::SeqCst);
            if i == 0 {
                std::thread::sleep(std::time::Duration::from_millis(50));
                return Ok(begun.load(Ordering::SeqCst));
            }
            Ok(0)
        };
        let mut ahead = 0;
        pool(2)
            .install(|| {
                ordered(100, work, |_, seen| {
                    ahead = ahead.max(seen);
                    Ok(())
                })
            })
            .unwrap();
        assert!(ahead <= 2 + AHEAD, "{ahead} items were begun before the first was consumed");
    }

    #[test]
    fn the_first_error_ends_it() {
        let begun = AtomicUsize::new(0);
        let work = |i| {
            begun.fetch_add(1, Ordering::SeqCst);
            if i == 7 { Err(Error::bad_data("seven")) } else { Ok(i) }
        };
        let error = pool(2).install(|| ordered(1000, work, |_, _| Ok(()))).unwrap_err();
        assert_eq!(error.what(), "seven");
        assert!(begun.load(Ordering::SeqCst) < 20);
        let stop = |i, ()| if i == 3 { Err(Error::bad_data("stop")) } else { Ok(()) };
        assert_eq!(ordered(1000, |_| Ok(()), stop).unwrap_err().what(), "stop");
    }
}
