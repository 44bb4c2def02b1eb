use std::os::unix::fs::FileExt;

use consort_common::{chunk::ChunkPlan, codec::Encoding};
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

const CHUNKS: u32 = 12;

/// Twelve chunks of two values, eight bytes; the last has one.
fn layout() -> DeltaLayout {
    DeltaLayout::new(ChunkPlan::new(23, 2), Encoding::Fp32)
}

fn key(round: u32, site: &str) -> ContributionKey {
    ContributionKey {
        run: "pilot".parse().unwrap(),
        round,
        site: site.parse().unwrap(),
        delta: [7; 16].into(),
    }
}

fn spool() -> (TempDir, Spool) {
    let folder = tempfile::tempdir().unwrap();
    let spool = Spool::new(folder.path().join("spool"), SpoolLimits::default());
    (folder, spool)
}

/// What another process sees.
fn restarted(spool: &Spool) -> Spool {
    Spool::new(&spool.root, spool.limits)
}

fn payload(index: u32, seed: u8) -> Vec<u8> {
    vec![seed.wrapping_add(index as u8); layout().payload_bytes(index).unwrap()]
}

fn write(delta: &SpooledDelta, index: u32, payload: &[u8]) {
    delta.write(index, payload, Digest::of(payload)).unwrap();
}

/// Writes chunks and makes them durable.
fn put(spool: &Spool, key: &ContributionKey, indices: &[u32]) -> Arc<SpooledDelta> {
    let delta = spool.receive(key, layout()).unwrap();
    for index in indices {
        write(&delta, *index, &payload(*index, 1));
    }
    delta.sync(|_| true).unwrap();
    delta
}

fn held(spool: &Spool, key: &ContributionKey) -> Vec<u32> {
    spool.stored(key, layout()).map_or_else(|_| Vec::new(), |delta| delta.held())
}

fn read(delta: &SpooledDelta, index: u32) -> Result<Vec<u8>, SpoolError> {
    let mut payload = b"left from before, and longer than any payload".to_vec();
    delta.read(index, &mut payload).map(|_| payload)
}

#[test]
fn chunks_come_back_as_they_were_written_whatever_the_order() {
    let (_folder, spool) = spool();
    let key = key(3, "north");
    let delta = put(&spool, &key, &[4, 0, 2, 11, 2, 0]);
    for (spool, delta) in
        [(&spool, delta), (&restarted(&spool), restarted(&spool).stored(&key, layout()).unwrap())]
    {
        assert_eq!(held(spool, &key), [0, 2, 4, 11]);
        assert_eq!(read(&delta, 4).unwrap(), payload(4, 1));
        assert_eq!(read(&delta, 11).unwrap(), payload(11, 1));
        assert!(matches!(read(&delta, 3), Err(SpoolError::Missing { index: 3, .. })));
        assert!(matches!(read(&delta, CHUNKS), Err(SpoolError::Missing { index: CHUNKS, .. })));
    }
}

#[test]
fn what_was_written_is_not_held_before_it_is_durable() {
    let (_folder, spool) = spool();
    let delta = put(&spool, &key(1, "north"), &[0]);
    write(&delta, 1, &payload(1, 1));
    write(&delta, 2, &payload(2, 1));
    assert_eq!(delta.held(), [0]);
    assert!(matches!(read(&delta, 1), Err(SpoolError::Missing { .. })));
    // Each call that shares an upload is told of its own chunks.
    assert_eq!(delta.sync(|index| index == 2).unwrap(), [2]);
    assert_eq!(delta.sync(|index| index == 2).unwrap(), [0; 0]);
    assert_eq!(delta.held(), [0, 2]);
    assert_eq!(delta.sync(|_| true).unwrap(), [1]);
}

#[test]
fn a_chunk_that_is_there_is_acknowledged_again_and_another_payload_replaces_it() {
    let (_folder, spool) = spool();
    let delta = put(&spool, &key(1, "north"), &[0]);
    write(&delta, 0, &payload(0, 1));
    assert_eq!(delta.held(), [0]);
    assert_eq!(delta.sync(|_| true).unwrap(), [0]);
    write(&delta, 0, &payload(0, 9));
    assert_eq!(delta.held(), [0; 0]);
    delta.sync(|_| true).unwrap();
    assert_eq!(read(&delta, 0).unwrap(), payload(0, 9));
}

#[test]
fn a_sealed_delta_takes_nothing() {
    let (_folder, spool) = spool();
    let delta = put(&spool, &key(1, "north"), &[0]);
    delta.seal();
    let other = payload(0, 9);
    assert!(matches!(delta.write(0, &other, Digest::of(&other)), Err(SpoolError::Sealed { .. })));
    assert_eq!(read(&delta, 0).unwrap(), payload(0, 1));
    delta.unseal();
    write(&delta, 0, &other);
}

/// Damages the file; chunk 1 must then be refused, by this process and by the next, and sending it again
/// must mend it. Chunk 0 is still there.
fn check_damage(damage: impl FnOnce(&File)) {
    let (_folder, spool) = spool();
    let key = key(1, "north");
    let delta = put(&spool, &key, &[0, 1]);
    damage(&File::options().read(true).write(true).open(spool.path(&key)).unwrap());
    if let Err(error) = read(&delta, 1) {
        assert!(matches!(error, SpoolError::Corrupt { index: 1, .. }), "{error}");
        assert!(error.to_string().contains("north"), "{error}");
    }
    let spool = restarted(&spool);
    let delta = spool.receive(&key, layout()).unwrap();
    assert_eq!(delta.held(), [0]);
    write(&delta, 1, &payload(1, 1));
    delta.sync(|_| true).unwrap();
    assert_eq!(held(&restarted(&spool), &key), [0, 1]);
    assert_eq!(read(&delta, 1).unwrap(), payload(1, 1));
}

#[test]
fn a_damaged_chunk_is_refused_and_can_be_sent_again() {
    let second_payload = 4096 + 8;
    let flip = |file: &File, offset| {
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], offset).unwrap();
    };
    for offset in [second_payload, second_payload + 7].into_iter().chain(64..128) {
        check_damage(|file| flip(file, offset));
    }
    // What a power failure leaves of a file whose length was written and whose content was not.
    check_damage(|file| {
        file.set_len(second_payload).unwrap();
    });
}

proptest! {
    /// Whatever is in a file, opening it neither panics nor holds what was not stored.
    #[test]
    fn any_bytes_hold_nothing(bytes in prop::collection::vec(any::<u8>(), 0..6000)) {
        let (_folder, spool) = spool();
        let key = key(1, "north");
        fs::create_dir_all(spool.site(&key)).unwrap();
        fs::write(spool.path(&key), bytes).unwrap();
        prop_assert_eq!(spool.receive(&key, layout()).unwrap().held(), [0; 0]);
    }
}

#[test]
fn a_delta_that_does_not_fit_is_refused_in_words_before_it_begins() {
    let folder = tempfile::tempdir().unwrap();
    let check = |limits, word: &str| {
        let spool = Spool::new(folder.path().join("spool"), limits);
        let error = spool.receive(&key(1, "north"), layout()).unwrap_err();
        assert!(matches!(error, SpoolError::Full { .. }) && error.to_string().contains(word), "{error}");
        assert!(!spool.path(&key(1, "north")).exists());
    };
    check(
        SpoolLimits { disk_reserve_bytes: u64::MAX, ..SpoolLimits::default() },
        "the aggregator's disk has",
    );
    check(SpoolLimits { total_bytes_max: 4000, ..SpoolLimits::default() }, "limits.spool_bytes_max");
    check(SpoolLimits { site_bytes_max: 4000, ..SpoolLimits::default() }, "limits.spool_bytes_per_site_max");

    // Two deltas fit, and the second may go on though nothing is left for a third.
    let limits = SpoolLimits { total_bytes_max: 2 * 8192, ..SpoolLimits::default() };
    let spool = Spool::new(folder.path().join("spool"), limits);
    put(&spool, &key(1, "north"), &[0]);
    put(&spool, &key(1, "south"), &[0]);
    assert!(matches!(spool.receive(&key(1, "west"), layout()), Err(SpoolError::Full { .. })));
    put(&restarted(&spool), &key(1, "south"), &[1]);
    spool.discard_round(&key(1, "north").run, 1).unwrap();
    put(&spool, &key(2, "west"), &[0]);
}

#[test]
fn a_delta_is_identified_by_its_chunks_in_order() {
    let (_folder, spool) = spool();
    let all: Vec<u32> = (0..CHUNKS).collect();
    let digests: Vec<u8> = all.iter().flat_map(|index| *Digest::of(&payload(*index, 1)).as_bytes()).collect();
    let backwards: Vec<u32> = all.iter().rev().copied().collect();
    for (site, order) in [("north", &all), ("south", &backwards)] {
        let summary = put(&spool, &key(1, site), order).summary().unwrap();
        assert_eq!(summary, DeltaSummary { digest: Digest::of(&digests), bytes: 23 * 4 });
    }
    let error = put(&spool, &key(1, "west"), &all[..3]).summary().unwrap_err();
    assert!(matches!(error, SpoolError::Missing { index: 3, .. }));
}

#[test]
fn two_deltas_of_a_site_are_not_mixed_and_the_older_can_be_discarded() {
    let (_folder, spool) = spool();
    let first = key(1, "north");
    let second = ContributionKey { delta: [8; 16].into(), ..first.clone() };
    put(&spool, &first, &[0]);
    put(&spool, &second, &[1]);
    assert_eq!((held(&spool, &first), held(&spool, &second)), (vec![0], vec![1]));
    spool.discard_other_deltas(&second).unwrap();
    assert_eq!((held(&spool, &first), held(&spool, &second)), (vec![], vec![1]));
    // What was discarded can come again.
    put(&spool, &first, &[0]);
    assert_eq!(held(&spool, &first), [0]);
}

#[test]
fn discarding_forgets_what_was_named_and_nothing_else() {
    let (_folder, spool) = spool();
    let keys = [key(1, "north"), key(1, "south"), key(2, "north"), key(10, "north")];
    let run = &keys[0].run;
    let counts = |spool: &Spool| keys.each_ref().map(|key| held(spool, key).len());
    for key in &keys {
        put(&spool, key, &[0]);
    }
    spool.discard_round(run, 1).unwrap();
    spool.discard_round(run, 1).unwrap();
    assert_eq!(counts(&spool), [0, 0, 1, 1]);
    put(&spool, &keys[1], &[0]);
    spool.discard_rounds_through(run, 2).unwrap();
    assert_eq!(counts(&spool), [0, 0, 0, 1]);
    spool.discard_rounds_through(run, 10).unwrap();
    assert_eq!(counts(&spool), [0, 0, 0, 0]);
}

#[test]
fn a_full_disk_is_told_from_other_failures() {
    assert!(is_full(&io::ErrorKind::StorageFull.into()));
    assert!(is_full(&io::ErrorKind::QuotaExceeded.into()));
    assert!(!is_full(&io::ErrorKind::PermissionDenied.into()));
}

#[test]
fn many_threads_write_the_same_chunks() {
    let (_folder, spool) = spool();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| put(&spool, &key(1, "north"), &[0, 1, 2]));
        }
    });
    let delta = spool.stored(&key(1, "north"), layout()).unwrap();
    for index in 0..3 {
        assert_eq!(read(&delta, index).unwrap(), payload(index, 1));
    }
}
