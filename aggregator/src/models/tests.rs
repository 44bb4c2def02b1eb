use std::io::Read;

use proptest::prelude::*;
use tempfile::TempDir;

use super::{
    files::{DIGEST_BYTES, DIGESTS_FILE, Digests},
    *,
};

fn run() -> RunName {
    "pilot".parse().unwrap()
}

fn models() -> (TempDir, ModelFiles) {
    let folder = tempfile::tempdir().unwrap();
    let models = ModelFiles::new(folder.path().join("models"));
    (folder, models)
}

fn ramp(length: u16) -> Vec<f32> {
    (0..length).map(|value| f32::from(value) - 3.5).collect()
}

fn layout(plan: ChunkPlan, momentum: bool) -> ModelLayout {
    ModelLayout { plan, encoding: ModelEncoding::Fp32, momentum, second_moment: false, fragments: 1 }
}

/// Ten values in three chunks, without momentum.
fn small() -> ModelLayout {
    layout(ChunkPlan::new(10, 4), false)
}

/// Writes a version with a momentum of zeros, the last chunk first, as several threads may.
fn write(models: &ModelFiles, version: u32, layout: ModelLayout, values: &[f32]) -> ModelVersion {
    let new = models.begin(&run(), version, layout).unwrap();
    let mut records: Vec<_> = (0..layout.plan.chunks())
        .rev()
        .map(|index| {
            let range = layout.plan.range(index).unwrap();
            let parameters = &values[range.start as usize..range.end as usize];
            let momentum = vec![0.0; if layout.momentum { parameters.len() } else { 0 }];
            new.write(index, NewChunk { parameters, momentum: &momentum, ..NewChunk::default() }).unwrap()
        })
        .collect();
    records.reverse();
    new.finish(&records).unwrap()
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn files_of(models: &ModelFiles) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(models.root.join("pilot"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

proptest! {
    /// A record is taken only whole: what is damaged anywhere is none.
    #[test]
    fn any_bytes_are_a_record_as_written_or_none(
        noise in prop::collection::vec(any::<u8>(), 0..300),
        (chunks, parts, update) in (0usize..4, 0usize..3, any::<bool>()),
        flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 1..4),
    ) {
        prop_assert_eq!(Digests::from_bytes(&noise, chunks, parts, update), None);
        let digest = |index: usize| Digest::of(&[index as u8]);
        let record = Digests {
            whole: digest(9),
            chunks: (0..chunks).map(digest).collect(),
            update: (0..if update { chunks } else { 0 }).map(digest).collect(),
            checksums: vec![(0..chunks as u64).collect(); parts],
        };
        let bytes = record.to_bytes();
        let mut damaged = bytes.clone();
        for (place, bit) in flips {
            damaged[place.index(bytes.len())] ^= 1 << bit;
        }
        let read = Digests::from_bytes(&damaged, chunks, parts, update);
        prop_assert_eq!(read, (damaged == bytes).then_some(record));
    }

    #[test]
    fn a_model_has_one_digest_however_it_is_cut(length in 0u16..3000, chunk in 1u32..1200, momentum: bool) {
        let (_folder, models) = models();
        let (plan, values) = (ChunkPlan::new(length.into(), chunk), ramp(length));
        let layout = layout(plan, momentum);
        let version = write(&models, 0, layout, &values);
        prop_assert_eq!(version.digest(), Digest::of(&bytes(&values)));

        let version = models.open(&run(), 0, layout).unwrap();
        let mut read = Vec::new();
        for index in 0..plan.chunks() {
            let (payload, digest) = version.chunk(index).unwrap();
            prop_assert_eq!(Digest::of(&payload), digest);
            read.extend(payload);
        }
        prop_assert_eq!(&read, &bytes(&values));
        prop_assert_eq!(&fs::read(version.parameters_path()).unwrap(), &read);
        let mut whole = Vec::new();
        version.reader().read_to_end(&mut whole).unwrap();
        prop_assert_eq!(whole, read);
        prop_assert!(version.chunk(plan.chunks()).is_err());
    }
}

#[test]
fn what_is_not_written_since_it_is_zero_is_read_as_zero() {
    let (_folder, models) = models();
    let version = write(&models, 0, ModelLayout { momentum: true, ..small() }, &[0.0; 10]);
    for index in 0..3 {
        let mut values = vec![1.0; version.plan().length(index).unwrap()];
        version.read_momentum(index, &mut values).unwrap();
        assert!(values.iter().all(|value| *value == 0.0));
        version.read_parameters(index, &mut values).unwrap();
        assert!(values.iter().all(|value| *value == 0.0));
    }
}

#[test]
fn an_orphan_is_replaced_and_an_unfinished_version_leaves_nothing() {
    let (_folder, models) = models();
    write(&models, 0, small(), &ramp(10));
    write(&models, 0, small(), &[7.0; 10]);
    assert_eq!(models.open(&run(), 0, small()).unwrap().chunk(0).unwrap().0, bytes(&[7.0; 4]));

    // As if killed while writing, then tried again, then given up.
    std::mem::forget(models.begin(&run(), 1, small()).unwrap());
    assert_eq!(files_of(&models), [".1.partial", "0"]);
    drop(models.begin(&run(), 1, small()).unwrap());
    assert_eq!(files_of(&models), ["0"]);
    assert!(matches!(models.open(&run(), 1, small()), Err(ModelError::Missing { version: 1, .. })));
}

#[test]
fn retention_keeps_what_is_named_and_what_is_newer() {
    let (_folder, models) = models();
    for version in [0, 1, 2, 3, 11] {
        write(&models, version, small(), &[0.5; 10]);
    }
    models.retain(&run(), &[1, 3]).unwrap();
    assert_eq!(models.versions(&run()).unwrap(), [1, 3, 11]);
    models.retain(&run(), &[]).unwrap();
    assert_eq!(models.versions(&run()).unwrap(), [1, 3, 11]);
    assert!(models.versions(&"other".parse().unwrap()).unwrap().is_empty());
}

#[test]
fn a_version_of_another_layout_is_refused() {
    let (_folder, models) = models();
    write(&models, 1, small(), &[0.5; 10]);
    let longer = layout(ChunkPlan::new(11, 4), false);
    for other in [longer, ModelLayout { momentum: true, ..small() }] {
        let error = models.open(&run(), 1, other).unwrap_err();
        assert!(matches!(error, ModelError::Corrupt { version: 1, .. }), "{error}");
    }
}

#[test]
fn an_open_version_stays_readable_when_it_is_retired() {
    let (_folder, models) = models();
    let old = write(&models, 0, small(), &ramp(10));
    write(&models, 1, small(), &[0.5; 10]);
    models.retain(&run(), &[1]).unwrap();
    assert_eq!(models.versions(&run()).unwrap(), [1]);
    assert_eq!(old.chunk(2).unwrap().0, bytes(&ramp(10)[8..]));
}

/// Damages one file of a version with momentum; reading every chunk must say which file is damaged.
fn check_damage(name: &str, damage: impl FnOnce(&mut Vec<u8>)) {
    let (_folder, models) = models();
    let layout = ModelLayout { momentum: true, ..small() };
    write(&models, 0, layout, &ramp(10));
    let path = models.directory(&run(), 0).join(name);
    let mut content = fs::read(&path).unwrap();
    damage(&mut content);
    fs::write(&path, content).unwrap();
    let read_all = || -> Result<(), ModelError> {
        let version = models.open(&run(), 0, layout)?;
        for index in 0..3 {
            let mut values = vec![0.0; layout.plan.length(index)?];
            version.read_parameters(index, &mut values)?;
            version.read_momentum(index, &mut values)?;
        }
        Ok(())
    };
    let error = read_all().unwrap_err();
    assert!(matches!(error, ModelError::Corrupt { version: 0, .. }), "{error}");
}

#[test]
fn damage_to_any_file_is_found() {
    for name in [PARAMETERS_FILE, MOMENTUM_FILE] {
        check_damage(name, |content| content[20] ^= 1);
        check_damage(name, |content| content.truncate(39));
        check_damage(name, |content| content.push(0));
    }
    check_damage(DIGESTS_FILE, |content| content[DIGEST_BYTES + 5] ^= 1);
    check_damage(DIGESTS_FILE, |content| content.truncate(DIGEST_BYTES * 4));
    check_damage(DIGESTS_FILE, Vec::clear);
}

#[test]
fn a_reader_gives_no_chunk_that_is_damaged() {
    let (_folder, models) = models();
    let version = write(&models, 0, small(), &ramp(10));
    let mut content = bytes(&ramp(10));
    content[20] ^= 1;
    fs::write(version.parameters_path(), content).unwrap();
    let mut reader = version.reader();
    let mut read = Vec::new();
    reader.read_to_end(&mut read).unwrap_err();
    assert_eq!(read, bytes(&ramp(4)));
    assert!(matches!(reader.into_fault(), Some(ModelError::Corrupt { version: 0, .. })));
}

#[test]
fn a_version_that_does_not_fit_the_disk_is_refused_before_it_is_written() {
    let (_folder, models) = models();
    // 2^60 bytes: more than any disk here.
    let error = models.begin(&run(), 0, layout(ChunkPlan::new(1 << 58, u32::MAX), true)).unwrap_err();
    assert!(matches!(error, ModelError::Full { needed_bytes, .. } if needed_bytes == 1 << 61), "{error}");
    assert!(files_of(&models).is_empty());
}
