//! What lies in a cache of prepared text, and whether it is what was written. Changes nothing there.

use std::path::{Path, PathBuf};

use consort_common::ids::Digest;

use super::{
    cache::{self, HELD_OUT},
    error::DataError,
    shard::Shard,
    stats::Stats,
};

/// Text that was prepared under one key.
#[derive(Debug)]
pub struct Inspected {
    /// What the text and its tokens follow from.
    pub key: Digest,
    /// Where it lies.
    pub folder: PathBuf,
    /// What was found when it was prepared, or why that cannot be told.
    pub stats: Result<Stats, DataError>,
}

/// One file of a prepared text, compared with the digest in it.
#[derive(Debug)]
pub struct Verified {
    /// The file.
    pub path: PathBuf,
    /// Its tokens; 0 if it cannot be opened.
    pub tokens: u64,
    /// What is wrong with it.
    pub damage: Option<DataError>,
}

/// All that lies in a cache, the last used first.
///
/// # Errors
/// If the cache is missing or unreadable, or nothing was prepared in it.
pub fn inspect(cache: &Path) -> Result<Vec<Inspected>, DataError> {
    let found: Vec<Inspected> = cache::keys(cache)?
        .into_iter()
        .map(|(key, folder)| Inspected { key, stats: cache::load_stats(&folder), folder })
        .collect();
    if found.is_empty() {
        return Err(DataError::NothingPrepared { path: cache.to_owned() });
    }
    Ok(found)
}

impl Inspected {
    /// Bytes of its shards on disk, as far as they can be looked at.
    pub fn bytes(&self) -> u64 {
        let sizes =
            self.paths().into_iter().map(|(path, _)| path.metadata().map_or(0, |metadata| metadata.len()));
        sizes.sum()
    }

    /// Reads every file and compares it with its digest; `told` hears how many bytes were read each time.
    pub fn verify(&self, told: &mut dyn FnMut(u64)) -> Vec<Verified> {
        let check = |(path, expected): (PathBuf, u64)| {
            let shard = Shard::open(&path).and_then(|shard| shard.expect_tokens(expected));
            let (tokens, damage) = match shard {
                Ok(shard) => (shard.tokens(), shard.verify(told).err()),
                Err(error) => (0, Some(error)),
            };
            Verified { path, tokens, damage }
        };
        self.paths().into_iter().map(check).collect()
    }

    /// The shards that there must be, with their tokens.
    fn paths(&self) -> Vec<(PathBuf, u64)> {
        let Ok(stats) = &self.stats else { return Vec::new() };
        let train = stats
            .sources
            .iter()
            .enumerate()
            .map(|(source, stats)| (cache::train(source), stats.train.tokens));
        let held_out = (HELD_OUT.to_owned(), stats.total().held_out.tokens);
        train.chain([held_out]).map(|(name, tokens)| (self.folder.join(name), tokens)).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::data::{PrepareRequest, Source, Tokenizer, prepare};

    #[test]
    fn damage_is_found_and_named_and_nothing_else_is() {
        let folder = tempfile::tempdir().unwrap();
        let text: String = (0..300).map(|line| format!("{{\"text\": \"document {line}\"}}\n")).collect();
        fs::write(folder.path().join("a.jsonl"), text).unwrap();
        let cache = folder.path().join("cache");
        let request = PrepareRequest {
            sources: vec![Source::new(folder.path().join("a.jsonl"))],
            cache: cache.clone(),
            tokenizer: Tokenizer::byte(),
            held_out_fraction: 0.1,
            vocabulary_size: 257,
        };
        assert!(matches!(inspect(&cache), Err(DataError::Cache { .. })));
        let dataset = prepare(&request, &|_| {}, &|| false).unwrap();
        let inspected = || inspect(&cache).unwrap().remove(0);
        let found = inspected();
        assert_eq!((found.key, found.stats.as_ref().unwrap()), (dataset.cache_key, &dataset.stats));
        let mut bytes = 0;
        let verified = found.verify(&mut |read| bytes += read);
        assert!(verified.iter().all(|file| file.damage.is_none()), "{verified:?}");
        assert_eq!(verified.iter().map(|file| file.tokens).sum::<u64>(), dataset.stats.total().tokens());
        assert!(bytes > 0 && bytes < found.bytes());

        // A token that is another one, which nothing but the digest shows.
        let path = found.folder.join("train-0.tokens");
        let mut content = fs::read(&path).unwrap();
        *content.last_mut().unwrap() ^= 1;
        let middle = content.len() / 2;
        content[middle] ^= 1;
        // Under a new name: what is mapped must not change.
        fs::remove_file(&path).unwrap();
        fs::write(&path, content).unwrap();
        let verified = inspected().verify(&mut |_| {});
        let damaged: Vec<&Path> =
            verified.iter().filter(|file| file.damage.is_some()).map(|file| file.path.as_path()).collect();
        assert_eq!(damaged, [path.as_path()]);
        fs::remove_file(&path).unwrap();
        assert!(inspected().verify(&mut |_| {})[0].damage.is_some());
        fs::write(found.folder.join("stats.json"), "{").unwrap();
        assert!(matches!(inspected().stats, Err(DataError::Corrupt { .. })));
        fs::remove_dir_all(&found.folder).unwrap();
        assert!(matches!(inspect(&cache), Err(DataError::NothingPrepared { .. })));
    }
}
