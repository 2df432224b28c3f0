//! The budget holds, every byte is right, and nothing is read twice, from one thread and from many.

use std::time::{Duration, Instant};

use super::*;
use crate::testing::{LAYERS, N_EXPERTS, SmallBundle, byte};

/// A pager with room for `n` of the largest records, and the bundle it reads.
fn pager(n: u64, threads: usize) -> (SmallBundle, Pager) {
    let small = SmallBundle::new();
    let bundle = Arc::new(Bundle::open(&small.dir).unwrap());
    let options = PagerOptions { budget_bytes: n * memory_of(8192), verify: true, direct: true, threads };
    (small, Pager::new(bundle, options).unwrap())
}

fn all_keys() -> Vec<Key> {
    LAYERS.iter().flat_map(|&layer| (0..N_EXPERTS).map(move |expert| (layer, expert))).collect()
}

#[track_caller]
fn check_record(record: &Record, (layer, expert): Key) {
    let part = record.part("gate_proj").unwrap();
    assert!(part.planes[0].iter().enumerate().all(|(i, &b)| b == byte(layer, expert, i)));
    assert_eq!((record.entry().layer, record.entry().expert), (layer, expert));
}

/// Waits for background threads, but not for ever.
fn eventually(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn the_second_time_it_is_in_memory() {
    let (_small, pager) = pager(10, 0);
    for key in all_keys().into_iter().chain(all_keys()) {
        check_record(&pager.get(key.0, key.1).unwrap(), key);
    }
    let stats = pager.stats();
    assert_eq!((stats.hits, stats.misses, stats.reads, stats.evictions), (6, 6, 6, 0));
    assert_eq!(stats.bytes_read, 3 * 4096 + 4096 + 8192 + 8192);
    assert_eq!(pager.bytes(), stats.bytes_read + 6 * MEMORY_ALIGN as u64);
}

#[test]
fn the_least_recently_used_leaves() {
    let (_small, pager) = pager(2, 0);
    let (a, b, c) = ((4, 1), (4, 2), (4, 0));
    for key in [a, b, a, c, a] {
        pager.get(key.0, key.1).unwrap();
    }
    // c made room by sending b away, so a was there all the time.
    assert_eq!((pager.stats().misses, pager.stats().hits, pager.stats().evictions), (3, 2, 1));
    pager.get(4, 2).unwrap();
    assert_eq!(pager.stats().misses, 4);
}

#[test]
fn an_expert_in_use_survives_its_eviction() {
    let (_small, pager) = pager(1, 0);
    let kept = pager.get(4, 1).unwrap();
    for key in all_keys() {
        check_record(&pager.get(key.0, key.1).unwrap(), key);
    }
    check_record(&kept, (4, 1));
}

#[test]
fn a_budget_below_one_expert_is_impossible() {
    let small = SmallBundle::new();
    let bundle = Arc::new(Bundle::open(&small.dir).unwrap());
    let options = PagerOptions { budget_bytes: 8192, verify: false, direct: false, threads: 0 };
    let e = Pager::new(bundle, options).unwrap_err();
    assert_eq!(e.kind(), crate::Kind::Plan);
    assert_eq!(e.what(), "a budget of 8192 bytes, the largest expert needs 12288");
}

#[test]
fn what_was_read_ahead_is_a_hit() {
    let (_small, pager) = pager(10, 2);
    pager.prefetch(&all_keys());
    eventually("all are read ahead", || pager.stats().reads == 6);
    for key in all_keys() {
        check_record(&pager.get(key.0, key.1).unwrap(), key);
    }
    assert_eq!((pager.stats().hits, pager.stats().misses), (6, 0));
}

#[test]
fn a_queue_that_is_full_drops_the_rest() {
    let (_small, pager) = pager(10, 1);
    // Layer 9 does not exist: such keys are skipped, and reported only when asked for.
    let keys: Vec<_> = (0..50_000).map(|expert| (9, expert)).collect();
    pager.prefetch(&keys);
    assert!(pager.stats().dropped > 0);
    assert_eq!(pager.get(9, 0).unwrap_err().what(), "layer 9 has no routed experts");
    assert_eq!(pager.get(1, 3).unwrap_err().what(), "layer 1 has 3 experts, no expert 3");
    check_record(&pager.get(1, 2).unwrap(), (1, 2));
}

#[test]
fn threads_that_ask_for_the_same_expert_read_it_once() {
    let (_small, pager) = pager(10, 1);
    let barrier = std::sync::Barrier::new(8);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                barrier.wait();
                for key in all_keys() {
                    check_record(&pager.get(key.0, key.1).unwrap(), key);
                }
            });
        }
    });
    let stats = pager.stats();
    assert_eq!((stats.reads, stats.misses, stats.hits), (6, 6, 42));
}

#[test]
fn many_threads_share_a_small_budget() {
    for budget in [1, 2, 3] {
        let (_small, pager) = pager(budget, 2);
        let keys = all_keys();
        std::thread::scope(|scope| {
            for seed in 0..6_usize {
                let (pager, keys) = (&pager, &keys);
                scope.spawn(move || {
                    let mut state = seed;
                    for _ in 0..300 {
                        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                        let key = keys[(state >> 33) % keys.len()];
                        pager.prefetch(&[keys[(state >> 40) % keys.len()]]);
                        check_record(&pager.get(key.0, key.1).unwrap(), key);
                        assert!(pager.bytes() <= budget * memory_of(8192));
                    }
                });
            }
        });
        let stats = pager.stats();
        assert_eq!(stats.hits + stats.misses, 1800);
    }
}

#[test]
fn damage_is_an_error_each_time_and_harms_no_other() {
    let (small, _) = pager(10, 0);
    let path = small.dir.join("experts-00001.safetensors");
    let offset = crate::Bank::open(&path).unwrap().record(1).unwrap().offset;
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[offset as usize] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let bundle = Arc::new(Bundle::open(&small.dir).unwrap());
    let options = PagerOptions { budget_bytes: 1 << 20, verify: true, direct: true, threads: 1 };
    let pager = Pager::new(bundle, options).unwrap();
    for _ in 0..2 {
        let e = pager.get(1, 1).unwrap_err();
        assert!(e.what().starts_with("layer 1 expert 1: crc32c is"), "{e}");
    }
    check_record(&pager.get(1, 2).unwrap(), (1, 2));
    assert_eq!(pager.bytes(), memory_of(4096));
    assert_eq!(pager.stats().reads, 3);
}
