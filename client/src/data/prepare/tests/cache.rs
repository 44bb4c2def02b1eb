//! Tests of the cache: what is found again, what is made anew, what is removed.

use std::{
    collections::HashSet,
    path::Path,
    time::{Duration, SystemTime},
};

use super::{super::super::cache::Cache, *};

#[test]
fn other_shares_find_the_same_shards() {
    let (site, mut request) = two_sources();
    let before = prepare(&request, &|_| {}, &|| false).unwrap();
    request.sources[1].share = Share::ReplayPercent(5.0);
    let after = prepare(&request, &|progress| panic!("tokenises again: {progress:?}"), &|| false).unwrap();
    assert_eq!((before.cache_key, after.train.parts()[1].share), (after.cache_key, 0.05));
    assert_ne!(before.key, after.key, "a cursor belongs to the shares as well");
    for change in [|source: &mut Source| source.name += "2", |source: &mut Source| source.text_key += "2"] {
        let mut changed = request.clone();
        change(&mut changed.sources[0]);
        assert_ne!(cache_key(&changed, &Files::list(&changed.sources).unwrap()), after.cache_key);
    }
    // Damage that the sizes do not show.
    let stats = site.cached_file(&after, "stats.json");
    let mut json: Stats = serde_json::from_slice(&fs::read(&stats).unwrap()).unwrap();
    json.sources.truncate(1);
    fs::write(&stats, serde_json::to_vec(&json).unwrap()).unwrap();
    assert_eq!(prepare(&request, &|_| {}, &|| false).unwrap().train.parts().len(), 2);
}

#[test]
fn a_second_start_finds_the_shards() {
    let site = Site::with_lines(0.2);
    let first = site.prepare().unwrap();
    let modified =
        |dataset| site.cached_file(dataset, "train-0.tokens").metadata().unwrap().modified().unwrap();
    let written = modified(&first);
    let second =
        prepare(&site.request(), &|progress| panic!("tokenises again: {progress:?}"), &|| false).unwrap();
    assert_eq!((first.cache_key, written), (second.cache_key, modified(&second)));
    assert_eq!(first.stats, second.stats);
    assert_eq!(tokens(train(&first)), tokens(train(&second)));
}

#[test]
fn a_change_of_the_source_or_the_request_is_noticed() {
    let site = Site::with_lines(0.2);
    let key = |request: &PrepareRequest| cache_key(request, &Files::list(&request.sources).unwrap());
    let request = site.request();
    let mut keys = vec![key(&request), key(&PrepareRequest { held_out_fraction: 0.3, ..request.clone() })];
    site.write("b.jsonl", lines(0..1));
    keys.push(key(&request));
    let file = fs::File::options().write(true).open(site.text().join("b.jsonl")).unwrap();
    file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1)).unwrap();
    keys.push(key(&request));
    fs::rename(site.text().join("b.jsonl"), site.text().join("c.jsonl")).unwrap();
    keys.push(key(&request));
    assert_eq!(keys.iter().collect::<HashSet<_>>().len(), keys.len());
}

#[test]
fn damaged_shards_are_made_anew() {
    let site = Site::with_lines(0.2);
    let dataset = site.prepare().unwrap();
    let expected = tokens(train(&dataset));
    let check = |name: &str, damage: &dyn Fn(&Path)| {
        // Under a new name: what is mapped must not change.
        let path = site.cached_file(&dataset, name);
        let content = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, content).unwrap();
        damage(&path);
        assert_eq!(tokens(train(&site.prepare().unwrap())), expected, "{name}");
        assert_eq!(site.cached().len(), 1);
    };
    check("train-0.tokens", &|path| {
        fs::File::options().write(true).open(path).unwrap().set_len(100).unwrap();
    });
    check("held_out.tokens", &|path| fs::write(path, b"").unwrap());
    check("stats.json", &|path| fs::write(path, b"{").unwrap());
    check("train-0.tokens", &|path| fs::remove_file(path).unwrap());
}

#[test]
fn what_a_killed_process_left_is_removed() {
    let site = Site::with_lines(0.2);
    let leftover = site.cache().join("preparing");
    fs::create_dir_all(&leftover).unwrap();
    fs::write(leftover.join("train-0.tokens"), b"half").unwrap();
    let dataset = site.prepare().unwrap();
    assert_eq!(site.cached(), [dataset.cache_key.to_string()]);
}

#[test]
fn the_keys_used_last_are_kept() {
    let site = Site::with_lines(0.2);
    let with = |fraction: f64| {
        prepare(&PrepareRequest { held_out_fraction: fraction, ..site.request() }, &|_| {}, &|| false)
            .unwrap()
    };
    let age = |dataset: &Dataset, hours: u64| {
        let folder = fs::File::open(site.cache().join(dataset.cache_key.to_string())).unwrap();
        folder.set_modified(SystemTime::now() - Duration::from_secs(3_600 * hours)).unwrap();
    };
    let datasets = [0.1, 0.2, 0.3, 0.4].map(with);
    for (dataset, hours) in datasets.iter().zip([9, 8, 7, 6]) {
        age(dataset, hours);
    }
    with(0.1); // used again, no longer the oldest
    let newest = with(0.5);
    let mut expected: Vec<String> = [0, 2, 3]
        .map(|index: usize| datasets[index].cache_key.to_string())
        .into_iter()
        .chain([newest.cache_key.to_string()])
        .collect();
    expected.sort();
    assert_eq!(site.cached(), expected);
    // What was removed is still mapped.
    assert!(!tokens(train(&datasets[1])).is_empty());
}

#[test]
fn two_processes_cannot_prepare_in_one_cache() {
    let site = Site::with_lines(0.2);
    let other = Cache::open(&site.cache()).unwrap();
    let error = site.prepare().unwrap_err();
    assert!(matches!(error, DataError::Busy { .. }), "{error}");
    drop(other);
    assert!(site.prepare().is_ok());
}
