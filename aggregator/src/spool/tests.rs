use tempfile::TempDir;

use super::*;

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
    let spool = Spool::new(folder.path().join("spool"), 0);
    (folder, spool)
}

fn put(spool: &Spool, key: &ContributionKey, index: u32, payload: &[u8]) {
    spool.put(key, index, payload, Digest::of(payload)).unwrap();
}

fn read(spool: &Spool, key: &ContributionKey, index: u32) -> Result<Vec<u8>, SpoolError> {
    let mut payload = b"left from before".to_vec();
    spool.read(key, index, &mut payload).map(|_| payload)
}

#[test]
fn chunks_come_back_as_they_were_put_whatever_the_order() {
    let (_folder, spool) = spool();
    let key = key(3, "north");
    for index in [4, 0, 2, 2, 0] {
        put(&spool, &key, index, format!("payload {index}").as_bytes());
    }
    put(&spool, &key, 1, b"");
    assert_eq!(spool.held(&key).unwrap(), [0, 1, 2, 4]);
    assert_eq!(read(&spool, &key, 4).unwrap(), b"payload 4");
    assert_eq!(read(&spool, &key, 1).unwrap(), b"");
    assert!(matches!(read(&spool, &key, 3), Err(SpoolError::Missing { index: 3, .. })));
    // A new process sees the same.
    assert_eq!(Spool::new(&spool.root, 0).held(&key).unwrap(), [0, 1, 2, 4]);
}

#[test]
fn a_payload_with_another_digest_is_not_stored() {
    let (_folder, spool) = spool();
    let error = spool.put(&key(1, "north"), 0, b"payload", Digest::of(b"other")).unwrap_err();
    assert!(matches!(error, SpoolError::WrongDigest { index: 0, .. }), "{error}");
    assert!(spool.held(&key(1, "north")).unwrap().is_empty());
}

#[test]
fn another_payload_replaces_the_chunk() {
    let (_folder, spool) = spool();
    put(&spool, &key(1, "north"), 0, b"first");
    put(&spool, &key(1, "north"), 0, b"second");
    assert_eq!(read(&spool, &key(1, "north"), 0).unwrap(), b"second");
}

#[test]
fn what_a_crash_left_half_written_is_not_held() {
    let (_folder, spool) = spool();
    let key = key(1, "north");
    put(&spool, &key, 7, b"payload");
    for leftover in [".00000008.chunk.partial", "notes", "x.chunk"] {
        fs::write(spool.delta(&key).join(leftover), b"half").unwrap();
    }
    assert_eq!(spool.held(&key).unwrap(), [7]);
}

/// Damages a stored chunk; it must then be refused, and sending it again must mend it.
fn check_damage(damage: impl FnOnce(&mut Vec<u8>)) {
    let (_folder, spool) = spool();
    let key = key(1, "north");
    put(&spool, &key, 0, b"payload");
    let mut bytes = fs::read(spool.chunk(&key, 0)).unwrap();
    damage(&mut bytes);
    fs::write(spool.chunk(&key, 0), bytes).unwrap();
    let error = read(&spool, &key, 0).unwrap_err();
    assert!(matches!(error, SpoolError::Corrupt { index: 0, .. }), "{error}");
    assert!(error.to_string().contains("north"), "{error}");
    put(&spool, &key, 0, b"payload");
    assert_eq!(read(&spool, &key, 0).unwrap(), b"payload");
}

#[test]
fn a_damaged_chunk_is_refused_and_can_be_sent_again() {
    check_damage(|bytes| bytes.truncate(HEADER_BYTES + 3));
    check_damage(|bytes| bytes.truncate(HEADER_BYTES - 1));
    check_damage(Vec::clear);
    check_damage(|bytes| bytes[HEADER_BYTES + 2] ^= 0x10);
    check_damage(|bytes| bytes[5] ^= 0x01);
    check_damage(|bytes| bytes.push(0));
}

#[test]
fn a_chunk_that_would_use_the_reserve_is_refused_in_words() {
    let folder = tempfile::tempdir().unwrap();
    let spool = Spool::new(folder.path().join("spool"), u64::MAX);
    let error = spool.put(&key(1, "north"), 0, b"payload", Digest::of(b"payload")).unwrap_err();
    assert!(matches!(error, SpoolError::Full { reserve_bytes: u64::MAX, .. }), "{error}");
    assert!(error.to_string().contains("the aggregator's disk has"), "{error}");
    assert!(spool.held(&key(1, "north")).unwrap().is_empty());
}

#[test]
fn a_delta_is_identified_by_its_chunks_in_order() {
    let (_folder, spool) = spool();
    let payloads: [&[u8]; 2] = [b"a", b"bcd"];
    let digest = Digest::of(&payloads.map(|payload| *Digest::of(payload).as_bytes()).concat());
    for (site, order) in [("north", [0, 1]), ("south", [1, 0])] {
        for index in order {
            put(&spool, &key(1, site), index, payloads[index as usize]);
        }
        assert_eq!(spool.summary(&key(1, site), 2).unwrap(), DeltaSummary { digest, bytes: 4 });
    }
    assert!(matches!(spool.summary(&key(1, "north"), 3), Err(SpoolError::Missing { index: 2, .. })));
}

#[test]
fn two_deltas_of_a_site_are_not_mixed_and_the_older_can_be_discarded() {
    let (_folder, spool) = spool();
    let first = key(1, "north");
    let second = ContributionKey { delta: [8; 16].into(), ..first.clone() };
    put(&spool, &first, 0, b"payload");
    put(&spool, &second, 1, b"payload");
    assert_eq!((spool.held(&first).unwrap(), spool.held(&second).unwrap()), (vec![0], vec![1]));
    spool.discard_other_deltas(&second).unwrap();
    assert_eq!((spool.held(&first).unwrap(), spool.held(&second).unwrap()), (vec![], vec![1]));
    // What was discarded can come again.
    put(&spool, &first, 0, b"payload");
    assert_eq!(spool.held(&first).unwrap(), [0]);
}

#[test]
fn discarding_forgets_what_was_named_and_nothing_else() {
    let (_folder, spool) = spool();
    let keys = [key(1, "north"), key(1, "south"), key(2, "north"), key(10, "north")];
    let run = &keys[0].run;
    let held = |spool: &Spool| keys.each_ref().map(|key| spool.held(key).unwrap().len());
    for key in &keys {
        put(&spool, key, 0, b"payload");
    }
    spool.discard_round(run, 1).unwrap();
    spool.discard_round(run, 1).unwrap();
    assert_eq!(held(&spool), [0, 0, 1, 1]);
    put(&spool, &keys[1], 0, b"payload");
    spool.discard_rounds_through(run, 2).unwrap();
    assert_eq!(held(&spool), [0, 0, 0, 1]);
    spool.discard_run(run).unwrap();
    spool.discard_rounds_through(run, 10).unwrap();
    assert_eq!(held(&spool), [0, 0, 0, 0]);
}

#[test]
fn a_full_disk_is_told_from_other_failures() {
    assert!(is_full(&io::ErrorKind::StorageFull.into()));
    assert!(is_full(&io::ErrorKind::QuotaExceeded.into()));
    assert!(!is_full(&io::ErrorKind::PermissionDenied.into()));
    // Linux has a device that is always full.
    if let Ok(mut file) = File::options().write(true).open("/dev/full") {
        assert!(is_full(&file.write_all(b"payload").unwrap_err()));
    }
}

#[test]
fn many_threads_put_the_same_chunk() {
    let (_folder, spool) = spool();
    let key = key(1, "north");
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| put(&spool, &key, 0, b"payload"));
        }
    });
    assert_eq!(read(&spool, &key, 0).unwrap(), b"payload");
    assert_eq!(names(&spool.delta(&key)).unwrap().len(), 1);
}
