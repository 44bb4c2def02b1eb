//! Tests of preparing as a whole: sources, determinism, cancellation, progress.

mod cache;
mod split;

use std::{
    collections::BTreeMap,
    fs,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
};

use super::{super::mixture::Share, *};

struct Site {
    folder: tempfile::TempDir,
    held_out_fraction: f64,
}

impl Site {
    fn new(held_out_fraction: f64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("text")).unwrap();
        Self { folder, held_out_fraction }
    }

    /// One with 300 lines in two files.
    fn with_lines(held_out_fraction: f64) -> Self {
        let site = Self::new(held_out_fraction);
        site.write("a.jsonl", lines(0..200));
        site.write("b.jsonl", lines(200..300));
        site
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.text().join(name), content).unwrap();
    }

    fn text(&self) -> PathBuf {
        self.folder.path().join("text")
    }

    fn cache(&self) -> PathBuf {
        self.folder.path().join("state/cache")
    }

    fn request(&self) -> PrepareRequest {
        PrepareRequest {
            sources: vec![Source::new(self.text())],
            cache: self.cache(),
            tokenizer: Tokenizer::byte(),
            held_out_fraction: self.held_out_fraction,
            vocabulary_size: 257,
        }
    }

    fn prepare(&self) -> Result<Dataset, DataError> {
        prepare(&self.request(), &|_| {}, &|| false)
    }

    /// Names in the cache's folder, without the lock.
    fn cached(&self) -> Vec<String> {
        let names = fs::read_dir(self.cache())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.filter(|name| name != "lock").collect();
        names.sort();
        names
    }

    fn cached_file(&self, dataset: &Dataset, name: &str) -> PathBuf {
        self.cache().join(dataset.cache_key.to_string()).join(name)
    }
}

fn lines(range: std::ops::Range<u32>) -> String {
    range.map(|line| format!("{{\"text\": \"document {line}\"}}\n")).collect()
}

/// The training text of the only source.
fn train(dataset: &Dataset) -> &Shard {
    &dataset.train.parts()[0].shard
}

fn tokens(shard: &Shard) -> Vec<i64> {
    let mut out = Vec::new();
    shard.copy(0..shard.tokens(), &mut out).unwrap();
    out
}

/// The documents of a shard of the byte tokenizer.
fn texts(shard: &Shard) -> Vec<String> {
    let tokens = tokens(shard);
    let mut texts: Vec<String> = tokens
        .split(|token| *token == 256)
        .map(|ids| String::from_utf8(ids.iter().map(|id| u8::try_from(*id).unwrap()).collect()).unwrap())
        .collect();
    assert_eq!(texts.pop().as_deref(), Some(""), "a shard ends with the end-of-text token");
    texts
}

#[test]
fn a_tokenizer_larger_than_the_model_is_refused_before_anything_is_read() {
    let site = Site::with_lines(0.2);
    let request = PrepareRequest { vocabulary_size: 256, ..site.request() };
    let error = prepare(&request, &|_| {}, &|| false).unwrap_err();
    assert!(matches!(error, DataError::Vocabulary { tokenizer: 257, model: 256 }), "{error}");
}

#[test]
fn large_vocabularies_are_stored_wider() {
    let site = Site::with_lines(0.2);
    let narrow = site.prepare().unwrap();
    let wide =
        prepare(&PrepareRequest { vocabulary_size: 70_000, ..site.request() }, &|_| {}, &|| false).unwrap();
    assert_ne!(narrow.cache_key, wide.cache_key);
    assert_eq!(tokens(train(&narrow)), tokens(train(&wide)));
    assert_eq!(tokens(&narrow.held_out), tokens(&wide.held_out));
}

#[test]
fn shards_are_the_same_bytes_whatever_the_number_of_threads() {
    let site = Site::with_lines(0.2);
    // Several batches, with faults and duplicates among them.
    let text: String =
        (0..900_000).map(|line| format!("a line with the number {}\n", line % 700_000)).collect();
    site.write("long.txt", &text);
    site.write("longer.txt", text + "\n and more \u{1F600}");
    site.write("c.jsonl", "bad\n".to_owned() + &lines(100..400));
    let files_with = |threads: usize| {
        let cache = site.folder.path().join(format!("cache-{threads}"));
        let request = PrepareRequest { cache, ..site.request() };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let dataset = pool.install(|| prepare(&request, &|_| {}, &|| false)).unwrap();
        let folder = request.cache.join(dataset.cache_key.to_string());
        let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        files
            .map(|path| (path.file_name().unwrap().to_owned(), fs::read(&path).unwrap()))
            .collect::<BTreeMap<_, _>>()
    };
    let expected = files_with(1);
    assert_eq!(expected.len(), 3);
    for threads in [2, 5] {
        assert!(files_with(threads) == expected, "{threads} threads");
    }
}

/// A site with two folders; the second repeats some of the first.
fn two_sources() -> (Site, PrepareRequest) {
    let site = Site::with_lines(0.2);
    let other = site.folder.path().join("other");
    fs::create_dir(&other).unwrap();
    let renamed = lines(250..350).replace("\"text\"", "\"body\"");
    fs::write(other.join("a.jsonl"), renamed + "{\"text\": \"of the other key\"}\n").unwrap();
    let old = Source { text_key: "body".to_owned(), share: Share::ReplayPercent(25.0), ..Source::new(other) };
    let request = PrepareRequest { sources: vec![Source::new(site.text()), old], ..site.request() };
    (site, request)
}

#[test]
fn each_source_has_its_shard_and_its_numbers_and_no_document_is_in_two() {
    let (_site, request) = two_sources();
    let dataset = prepare(&request, &|_| {}, &|| false).unwrap();
    let [first, second] = dataset.train.parts() else { panic!("two sources") };
    assert_eq!((first.name.as_str(), first.share), ("text", 0.75));
    assert_eq!((second.name.as_str(), second.share), ("other", 0.25));
    let all = [&first.shard, &second.shard, &dataset.held_out].map(texts);
    let mut documents: Vec<&String> = all.iter().flatten().collect();
    assert_eq!(documents.len(), 350);
    documents.sort();
    documents.dedup();
    assert_eq!(documents.len(), 350);

    let [of_first, of_second] = &dataset.stats.sources[..] else { panic!("two sources") };
    assert_eq!((of_first.documents(), of_first.duplicates, of_first.skipped), (300, 0, 0));
    assert_eq!((of_second.documents(), of_second.duplicates, of_second.skipped), (50, 50, 1));
    for (stats, part) in [(of_first, first), (of_second, second)] {
        assert_eq!(
            (stats.train.tokens, stats.train.text_bytes),
            (part.shard.tokens(), part.shard.text_bytes())
        );
    }
    assert_eq!(of_first.held_out.tokens + of_second.held_out.tokens, dataset.held_out.tokens());
}

#[test]
fn sources_that_do_not_go_together_are_refused() {
    let (_site, mut request) = two_sources();
    request.sources[0].share = Share::ReplayPercent(5.0);
    let error = prepare(&request, &|_| {}, &|| false).unwrap_err();
    assert!(error.to_string().contains("all sources are replayed"), "{error}");
}

#[test]
fn cancelling_leaves_nothing() {
    let site = Site::with_lines(0.2);
    let asked = AtomicUsize::new(0);
    let total = prepare(&site.request(), &|_| {}, &|| {
        asked.fetch_add(1, Ordering::Relaxed);
        false
    });
    drop(total.unwrap());
    fs::remove_dir_all(site.cache()).unwrap();
    let total = asked.load(Ordering::Relaxed);
    assert!(total >= 300, "{total}");
    for stop in [0, 1, 150, total - 1] {
        let asked = AtomicUsize::new(0);
        let result = prepare(&site.request(), &|_| {}, &|| asked.fetch_add(1, Ordering::Relaxed) == stop);
        assert!(matches!(result, Err(DataError::Cancelled)), "{stop}");
        assert!(site.cached().is_empty(), "{stop}: {:?}", site.cached());
    }
}

#[test]
fn progress_grows_to_the_end() {
    let site = Site::with_lines(0.2);
    let text: String = (0..2_000_000).map(|line| format!("the line {line}\n")).collect();
    site.write("long.txt", text);
    let last = AtomicU64::new(0);
    let reports = AtomicUsize::new(0);
    let ended = AtomicUsize::new(0);
    let dataset = prepare(
        &site.request(),
        &|progress| {
            assert!(progress.bytes_read <= progress.bytes_total);
            assert!(last.swap(progress.tokens, Ordering::Relaxed) < progress.tokens);
            reports.fetch_add(1, Ordering::Relaxed);
            ended.store(usize::from(progress.bytes_read == progress.bytes_total), Ordering::Relaxed);
        },
        &|| false,
    )
    .unwrap();
    assert_eq!(last.into_inner(), dataset.stats.total().tokens());
    assert!(reports.into_inner() >= 1);
    assert_eq!(ended.into_inner(), 1);
}
