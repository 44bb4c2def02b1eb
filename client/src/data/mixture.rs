//! A site's sources and the share of the training sequences that each of them gives.
//!
//! Which source a sequence comes from follows from its number alone: the fractional parts of
//! *u* + *n*/φ (φ the golden ratio, *u* drawn from the seed) are spread over the unit interval, of which each
//! source owns as much as its share. Additive recurrences of this kind are as even as sequences get (Knuth,
//! The Art of Computer Programming 3, section 6.4, theorem S; the random start is that of Cranley and
//! Patterson, SIAM J. Numer. Anal. 13(6), 1976): over any stretch of *n* sequences a source gives its share of
//! them but for a handful (the difference grows as log *n*; in the first million it stayed below 5 for 60 random
//! shares). Other than with a fixed cycle, so it does over every second or every *k*-th of them, as GPUs see
//! that take turns, but for about *k*.

use std::{path::PathBuf, str::FromStr};

use consort_common::text::TEXT_KEY;

use super::shard::Shard;

/// Most sources of one site.
pub const SOURCES_MAX: usize = 256;
/// 2^64 / φ, to the nearest odd number.
const STRIDE: u64 = 0x9E37_79B9_7F4A_7C15;

/// A source of text, as a site names it.
#[derive(Debug, Clone, PartialEq)]
pub struct Source {
    /// What the site calls it; each source has a name of its own.
    pub name: String,
    /// A directory or a file.
    pub path: PathBuf,
    /// The field or column that holds the text, where there are such.
    pub text_key: String,
    /// How much of the training it is.
    pub share: Share,
}

/// How much of the training sequences a source gives.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Share {
    /// Of what replayed sources leave: in proportion to the source's tokens.
    Tokens,
    /// Of what replayed sources leave: in proportion to this number.
    Weight(f64),
    /// This many of every hundred sequences.
    ReplayPercent(f64),
}

impl Source {
    /// A source by its place alone, with the place's last component as its name.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        Self { name, path, text_key: TEXT_KEY.to_owned(), share: Share::Tokens }
    }
}

/// What is wrong with the sources of one site taken together, each with the source's name.
pub fn problems(sources: &[Source]) -> Vec<String> {
    let mut problems = Vec::new();
    if sources.is_empty() || sources.len() > SOURCES_MAX {
        problems.push(format!("there are {} sources; allowed: 1 to {SOURCES_MAX}", sources.len()));
    }
    let mut replayed = 0.0;
    let [mut weighted, mut by_tokens] = [None; 2];
    for (index, source) in sources.iter().enumerate() {
        let name = &source.name;
        if name.is_empty() || sources[..index].iter().any(|other| other.name == *name) {
            problems.push(format!("source {name:?}: give each source a name of its own"));
        }
        if source.text_key.is_empty() {
            problems.push(format!("source {name:?}: the text's key is empty; leave it out for {TEXT_KEY:?}"));
        }
        match source.share {
            Share::Tokens => by_tokens = Some(name),
            Share::Weight(weight) => {
                weighted = Some(name);
                if !(weight.is_finite() && weight > 0.0) {
                    problems.push(format!("source {name:?}: the weight is {weight}; allowed: more than 0"));
                }
            }
            Share::ReplayPercent(percent) => {
                replayed += percent;
                if !(percent > 0.0 && percent < 100.0) {
                    problems.push(format!(
                        "source {name:?}: {percent} percent are replayed; allowed: more than 0, less than 100"
                    ));
                }
            }
        }
    }
    match (weighted, by_tokens) {
        (Some(weighted), Some(by_tokens)) => problems.push(format!(
            "source {weighted:?} has a weight and source {by_tokens:?} has none: give one to every source that is not \
             replayed, or to none of them"
        )),
        (None, None) if !sources.is_empty() => {
            problems.push("all sources are replayed: one at least must be what is trained on".to_owned());
        }
        _ if replayed >= 100.0 => {
            problems.push(format!("{replayed} percent are replayed in all, which leaves nothing to be trained on"));
        }
        _ => {}
    }
    problems
}

/// The share of each source, of 1 in all, by what was asked and how many tokens each has.
#[allow(clippy::cast_precision_loss)] // a share of one in 2^53 is not missed
fn shares(asked: &[(Share, u64)]) -> Vec<f64> {
    let replayed: f64 = asked.iter().map(|(share, _)| replayed(*share)).sum();
    let weight = |(share, tokens): &(Share, u64)| match share {
        Share::Tokens => *tokens as f64,
        Share::Weight(weight) => *weight,
        Share::ReplayPercent(_) => 0.0,
    };
    let weights: f64 = asked.iter().map(weight).sum();
    let of_the_rest = |source| (1.0 - replayed) * weight(source) / weights.max(f64::MIN_POSITIVE);
    asked.iter().map(|source| replayed_or(source.0, || of_the_rest(source))).collect()
}

fn replayed(share: Share) -> f64 {
    replayed_or(share, || 0.0)
}

fn replayed_or(share: Share, other: impl FnOnce() -> f64) -> f64 {
    if let Share::ReplayPercent(percent) = share { percent / 100.0 } else { other() }
}

/// What is trained on: the sources' shards, each with its share.
#[derive(Debug, Clone)]
pub struct Mixture {
    parts: Vec<Part>,
}

/// One source's training text.
#[derive(Debug, Clone)]
pub struct Part {
    /// The source's name.
    pub name: String,
    /// Its text.
    pub shard: Shard,
    /// Its part of the sequences; all parts together are 1.
    pub share: f64,
}

impl Mixture {
    /// The shards of the sources, in their order.
    pub(super) fn new(sources: &[Source], shards: Vec<Shard>) -> Self {
        let asked: Vec<(Share, u64)> =
            sources.iter().zip(&shards).map(|(source, shard)| (source.share, shard.tokens())).collect();
        let parts = sources.iter().zip(shards).zip(shares(&asked));
        let parts = parts.map(|((source, shard), share)| Part { name: source.name.clone(), shard, share });
        Self { parts: parts.collect() }
    }

    /// The parts, in the order of the sources.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    pub(super) fn into_parts(self) -> Vec<Part> {
        self.parts
    }
}

/// Decides which source each sequence comes from.
#[derive(Debug, Clone)]
pub(super) struct Chooser {
    /// *u*, in units of 2^-64.
    start: u64,
    /// Where each source's part of the unit interval ends, in the same unit; the last one's is 1.
    ends: Vec<u64>,
}

impl Chooser {
    /// For shares that are 1 together.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // what is below 1 fits
    pub(super) fn new(shares: impl Iterator<Item = f64>, start: u64) -> Self {
        let mut end = 0.0;
        let ends = shares.map(|share| {
            end += share;
            (end * 2f64.powi(64)) as u64
        });
        Self { start, ends: ends.collect() }
    }

    /// The source of sequence `number`.
    pub(super) fn source(&self, number: u64) -> usize {
        let at = self.start.wrapping_add(number.wrapping_mul(STRIDE));
        self.ends.iter().position(|end| at < *end).unwrap_or(self.ends.len() - 1)
    }
}

/// `PATH`, or `path=PATH` and more of `name=NAME`, `weight=NUMBER` or `replay=PERCENT`, `key=TEXT`, with commas
/// between them.
impl FromStr for Source {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if !text.starts_with("path=") {
            return if text.is_empty() { Err("a path is missing".to_owned()) } else { Ok(Self::new(text)) };
        }
        let mut source: Option<Self> = None;
        let (mut name, mut key) = (None, None);
        let mut shares = Vec::new();
        for item in text.split(',') {
            let (field, value) =
                item.split_once('=').filter(|(_, value)| !value.is_empty()).ok_or_else(|| {
                    format!("{item:?} is not KEY=VALUE (a path with a comma needs the plain form)")
                })?;
            let number = || value.parse::<f64>().map_err(|_| format!("{field}: {value:?} is not a number"));
            match field {
                "path" if source.is_none() => source = Some(Self::new(value)),
                "name" => name = Some(value.to_owned()),
                "key" => key = Some(value.to_owned()),
                "weight" => shares.push(Share::Weight(number()?)),
                "replay" => shares.push(Share::ReplayPercent(number()?)),
                "path" => return Err("there are two paths: repeat the option for another source".to_owned()),
                _ => {
                    return Err(format!(
                        "there is no key {field:?}; there are path, name, weight, replay, key"
                    ));
                }
            }
        }
        if shares.len() > 1 {
            return Err("give a weight or a percentage to replay, once".to_owned());
        }
        let source = source.ok_or("a path is missing")?;
        Ok(Self {
            name: name.unwrap_or(source.name),
            text_key: key.unwrap_or(source.text_key),
            share: shares.pop().unwrap_or(source.share),
            ..source
        })
    }
}

#[cfg(test)]
mod tests;
