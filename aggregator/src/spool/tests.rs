use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    sync::LazyLock,
};

use consort_common::{chunk::ChunkPlan, codec::Encoding};
use futures::TryStreamExt;
use proptest::prelude::*;
use tempfile::TempDir;
use tokio::runtime::Runtime;

use super::{error::is_full, *};
use crate::aligned::AlignedVec;

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

/// Where requests to the store in memory run.
static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().unwrap());

fn in_directory(limits: SpoolLimits) -> (TempDir, Spool) {
    let folder = tempfile::tempdir().unwrap();
    let spool = Spool::new(folder.path().join("spool"), limits);
    (folder, spool)
}

fn in_storage(limits: SpoolLimits) -> (Storage, Spool) {
    let storage = Storage::in_memory(RUNTIME.handle().clone());
    let spool = RUNTIME.block_on(Spool::in_storage(storage.clone(), limits)).unwrap();
    (storage, spool)
}

/// Runs a test on a spool in a directory and on one in an object store.
fn on_both(limits: SpoolLimits, test: impl Fn(&Spool)) {
    test(&in_directory(limits).1);
    test(&in_storage(limits).1);
}

/// What another process sees.
fn restarted(spool: &Spool) -> Spool {
    match &spool.deltas {
        Deltas::Directory(directory) => Spool::new(directory.root(), spool.limits),
        Deltas::Objects(objects) => {
            RUNTIME.block_on(Spool::in_storage(objects.storage().clone(), spool.limits)).unwrap()
        }
    }
}

/// The delta's file.
fn path(spool: &Spool, key: &ContributionKey) -> PathBuf {
    match &spool.deltas {
        Deltas::Directory(directory) => directory.path(key),
        Deltas::Objects(_) => panic!("there is no file"),
    }
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

/// The names of what is in a store.
fn objects(storage: &Storage) -> Vec<String> {
    let objects: Vec<_> = RUNTIME.block_on(storage.list("spool").try_collect()).unwrap();
    objects.into_iter().map(|(name, _): (String, u64)| name).collect()
}

fn read(delta: &SpooledDelta, index: u32) -> Result<Vec<u8>, SpoolError> {
    let mut payload = AlignedVec::default();
    payload.resize(100);
    payload.fill(b'x'); // left from before, and longer than any payload
    delta.read(index, &mut payload).map(|_| payload.to_vec())
}

#[test]
fn chunks_come_back_as_they_were_written_whatever_the_order() {
    on_both(SpoolLimits::default(), |spool| {
        let key = key(3, "north");
        let delta = put(spool, &key, &[4, 0, 2, 11, 2, 0]);
        for (spool, delta) in
            [(spool, delta), (&restarted(spool), restarted(spool).stored(&key, layout()).unwrap())]
        {
            assert_eq!(held(spool, &key), [0, 2, 4, 11]);
            assert_eq!(read(&delta, 4).unwrap(), payload(4, 1));
            assert_eq!(read(&delta, 11).unwrap(), payload(11, 1));
            assert!(matches!(read(&delta, 3), Err(SpoolError::Missing { index: 3, .. })));
            assert!(matches!(read(&delta, CHUNKS), Err(SpoolError::Missing { index: CHUNKS, .. })));
        }
    });
}

#[test]
fn what_was_written_is_not_held_before_it_is_durable() {
    let (_folder, spool) = in_directory(SpoolLimits::default());
    let delta = put(&spool, &key(1, "north"), &[0]);
    write(&delta, 1, &payload(1, 1));
    write(&delta, 2, &payload(2, 1));
    assert_eq!(delta.held(), [0]);
    assert!(matches!(read(&delta, 1), Err(SpoolError::Missing { .. })));
    // Nor is what takes its place.
    write(&delta, 0, &payload(0, 9));
    assert_eq!(delta.held(), [0; 0]);
    assert_eq!(delta.sync(|index| index == 0).unwrap(), [0]);
    // Each call that shares an upload is told of its own chunks.
    assert_eq!(delta.sync(|index| index == 2).unwrap(), [2]);
    assert_eq!(delta.sync(|index| index == 2).unwrap(), [0; 0]);
    assert_eq!(delta.held(), [0, 2]);
    assert_eq!(delta.sync(|_| true).unwrap(), [1]);
}

#[test]
fn a_chunk_that_is_there_is_acknowledged_again_and_another_payload_replaces_it() {
    on_both(SpoolLimits::default(), |spool| {
        let delta = put(spool, &key(1, "north"), &[0]);
        write(&delta, 0, &payload(0, 1));
        assert_eq!(delta.held(), [0]);
        assert_eq!(delta.sync(|_| true).unwrap(), [0]);
        write(&delta, 0, &payload(0, 9));
        delta.sync(|_| true).unwrap();
        assert_eq!(read(&delta, 0).unwrap(), payload(0, 9));
    });
}

#[test]
fn a_sealed_delta_takes_nothing() {
    on_both(SpoolLimits::default(), |spool| {
        let delta = put(spool, &key(1, "north"), &[0]);
        delta.seal();
        let other = payload(0, 9);
        assert!(matches!(delta.write(0, &other, Digest::of(&other)), Err(SpoolError::Sealed { .. })));
        assert_eq!(read(&delta, 0).unwrap(), payload(0, 1));
        delta.unseal();
        write(&delta, 0, &other);
    });
}

/// Damages the file; chunk 1 must then be refused, by this process and by the next, and sending it again
/// must mend it. Chunk 0 is still there.
fn check_damage(damage: impl FnOnce(&File)) {
    let (_folder, spool) = in_directory(SpoolLimits::default());
    let key = key(1, "north");
    let delta = put(&spool, &key, &[0, 1]);
    damage(&File::options().read(true).write(true).open(path(&spool, &key)).unwrap());
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
        let (_folder, spool) = in_directory(SpoolLimits::default());
        let key = key(1, "north");
        fs::create_dir_all(path(&spool, &key).parent().unwrap()).unwrap();
        fs::write(path(&spool, &key), bytes).unwrap();
        prop_assert_eq!(spool.receive(&key, layout()).unwrap().held(), [0; 0]);
    }
}

#[test]
fn a_delta_that_does_not_fit_is_refused_in_words_before_it_begins() {
    let check = |spool: &Spool, word: &str| {
        let error = spool.receive(&key(1, "north"), layout()).unwrap_err();
        assert!(matches!(error, SpoolError::Full { .. }) && error.to_string().contains(word), "{error}");
        assert!(held(spool, &key(1, "north")).is_empty());
    };
    let limits = SpoolLimits { disk_reserve_bytes: u64::MAX, ..SpoolLimits::default() };
    let (_folder, spool) = in_directory(limits);
    check(&spool, "the aggregator's disk has");
    assert!(!path(&spool, &key(1, "north")).exists());
    for (limits, word) in [
        (SpoolLimits { total_bytes_max: 800, ..SpoolLimits::default() }, "limits.spool_bytes_max"),
        (SpoolLimits { site_bytes_max: 800, ..SpoolLimits::default() }, "limits.spool_bytes_per_site_max"),
    ] {
        on_both(limits, |spool| check(spool, word));
    }

    // Two deltas fit, and the second may go on though nothing is left for a third.
    let check = |spool: &Spool| {
        put(spool, &key(1, "north"), &[0]);
        put(spool, &key(1, "south"), &[0]);
        assert!(matches!(spool.receive(&key(1, "west"), layout()), Err(SpoolError::Full { .. })));
        put(&restarted(spool), &key(1, "south"), &[1]);
        spool.discard_round(&key(1, "north").run, 1).unwrap();
        put(spool, &key(2, "west"), &[0]);
    };
    // Blocks on a disk; entries and payloads in a store.
    check(&in_directory(SpoolLimits { total_bytes_max: 2 * 8192, ..SpoolLimits::default() }).1);
    check(&in_storage(SpoolLimits { total_bytes_max: 2 * 860, ..SpoolLimits::default() }).1);
}

#[test]
fn a_delta_that_was_discarded_takes_nothing_into_the_object_store() {
    let (storage, spool) = in_storage(SpoolLimits::default());
    let delta = put(&spool, &key(1, "north"), &[0]);
    spool.discard_rounds_through(&key(1, "north").run, 1, &BTreeSet::new()).unwrap();
    let late = payload(1, 1);
    assert!(matches!(delta.write(1, &late, Digest::of(&late)), Err(SpoolError::Missing { index: 1, .. })));
    assert!(matches!(read(&delta, 0), Err(SpoolError::Missing { index: 0, .. })));
    assert_eq!(objects(&storage), [""; 0]);
}

#[test]
fn an_object_that_is_not_the_chunk_that_was_stored_is_refused() {
    let (storage, spool) = in_storage(SpoolLimits::default());
    let key = key(1, "north");
    let delta = put(&spool, &key, &[0, 1, 2, 3]);
    let name = |index: u32| format!("spool/pilot/1/north/{}/{index}", key.delta);
    let (other_objects, other) = in_storage(SpoolLimits::default());
    let delta_of_others = other.receive(&key, layout()).unwrap();
    write(&delta_of_others, 1, &payload(1, 9));
    delta_of_others.sync(|_| true).unwrap();
    let whole_but_other = RUNTIME.block_on(other_objects.get(&name(1), 1000)).unwrap();
    let mut flipped = RUNTIME.block_on(storage.get(&name(2), 1000)).unwrap().to_vec();
    *flipped.last_mut().unwrap() ^= 1;
    for (index, object) in [(0, vec![0; 72]), (1, whole_but_other.to_vec()), (2, flipped), (3, vec![0; 71])] {
        RUNTIME.block_on(storage.put(&name(index), object.into())).unwrap();
        let error = read(&delta, index).unwrap_err();
        assert!(matches!(&error, SpoolError::Corrupt { .. }), "{error}");
    }
    // The next process goes by the entries: two of them are right.
    for name in ["4/5", "x", "12", "-1", "+5"] {
        let name = format!("spool/pilot/1/north/{}/{name}", key.delta);
        RUNTIME.block_on(storage.put(&name, vec![0; 72].into())).unwrap();
    }
    let delta = restarted(&spool).stored(&key, layout()).unwrap();
    assert_eq!(delta.held(), [1, 2]);
    assert_eq!(read(&delta, 1).unwrap(), payload(1, 9));
    assert!(matches!(read(&delta, 2), Err(SpoolError::Corrupt { index: 2, .. })));
}

#[test]
fn a_delta_is_identified_by_its_chunks_in_order() {
    on_both(SpoolLimits::default(), |spool| {
        let all: Vec<u32> = (0..CHUNKS).collect();
        let digests: Vec<u8> =
            all.iter().flat_map(|index| *Digest::of(&payload(*index, 1)).as_bytes()).collect();
        let backwards: Vec<u32> = all.iter().rev().copied().collect();
        for (site, order) in [("north", &all), ("south", &backwards)] {
            let summary = put(spool, &key(1, site), order).summary().unwrap();
            assert_eq!(summary, DeltaSummary { digest: Digest::of(&digests), bytes: 23 * 4 });
        }
        let error = put(spool, &key(1, "west"), &all[..3]).summary().unwrap_err();
        assert!(matches!(error, SpoolError::Missing { index: 3, .. }));
    });
}

#[test]
fn two_deltas_of_a_site_are_not_mixed_and_the_older_can_be_discarded() {
    on_both(SpoolLimits::default(), |spool| {
        let first = key(1, "north");
        let second = ContributionKey { delta: [8; 16].into(), ..first.clone() };
        put(spool, &first, &[0]);
        put(spool, &second, &[1]);
        assert_eq!((held(spool, &first), held(spool, &second)), (vec![0], vec![1]));
        spool.discard_other_deltas(&second).unwrap();
        assert_eq!((held(spool, &first), held(spool, &second)), (vec![], vec![1]));
        // What was discarded can come again.
        put(spool, &first, &[0]);
        assert_eq!(held(spool, &first), [0]);
    });
}

#[test]
fn discarding_forgets_what_was_named_and_nothing_else() {
    on_both(SpoolLimits::default(), |spool| {
        let keys = [key(1, "north"), key(1, "south"), key(2, "north"), key(10, "north")];
        let run = &keys[0].run;
        let counts = |spool: &Spool| keys.each_ref().map(|key| held(spool, key).len());
        for key in &keys {
            put(spool, key, &[0]);
        }
        spool.discard_round(run, 1).unwrap();
        spool.discard_round(run, 1).unwrap();
        assert_eq!(counts(spool), [0, 0, 1, 1]);
        put(spool, &keys[1], &[0]);
        spool.discard_rounds_through(run, 2, &BTreeSet::from([1])).unwrap();
        assert_eq!(counts(spool), [0, 1, 0, 1]);
        spool.discard_rounds_through(run, 2, &BTreeSet::new()).unwrap();
        assert_eq!(counts(spool), [0, 0, 0, 1]);
        spool.discard_rounds_through(run, 10, &BTreeSet::new()).unwrap();
        assert_eq!(counts(spool), [0, 0, 0, 0]);
    });
}

#[test]
fn a_full_disk_is_told_from_other_failures() {
    assert!(is_full(&io::ErrorKind::StorageFull.into()));
    assert!(is_full(&io::ErrorKind::QuotaExceeded.into()));
    assert!(!is_full(&io::ErrorKind::PermissionDenied.into()));
}

#[test]
fn many_threads_write_the_same_chunks() {
    on_both(SpoolLimits::default(), |spool| {
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| put(spool, &key(1, "north"), &[0, 1, 2]));
            }
        });
        let delta = spool.stored(&key(1, "north"), layout()).unwrap();
        for index in 0..3 {
            assert_eq!(read(&delta, index).unwrap(), payload(index, 1));
        }
    });
}
