//! The text of the experiments: that of `deploy/corpora`, as much of each domain as of every other, cut into
//! pieces of similar length, and dealt to sites.
//!
//! The held-out documents are chosen by their content, so that they are the same however the text is dealt, and
//! one folder with all of it measures every model on the same documents.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use consort_common::ids::Digest;
use serde::Serialize;
use serde_json::{Value, json};

/// Longest document in bytes, so that the held-out part is even: longer ones are cut at ends of lines.
const DOCUMENT_BYTES_MAX: usize = 8192;

/// How the text lies at the sites.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) enum Split {
    /// Each site has documents of all domains.
    Mixed,
    /// Each site has documents of one domain.
    ByDomain,
}

/// The text, and where it is dealt out.
#[derive(Debug)]
pub(super) struct Corpora {
    folder: PathBuf,
    /// By domain, in an order that depends on the documents alone.
    domains: Vec<Vec<String>>,
}

impl Corpora {
    /// Reads what `deploy/corpora` left in `source`; dealt text is written below `folder`.
    pub(super) fn open(source: &Path, folder: &Path) -> Result<Self> {
        let sites = source.join("sites");
        let list = fs::read_to_string(&sites).with_context(|| {
            format!("there is no text: {} cannot be read; run deploy/corpora", sites.display())
        })?;
        let names = list.lines().filter_map(|line| line.split('\t').next());
        let mut domains: Vec<Vec<String>> =
            names.map(|name| documents(&source.join(name))).collect::<Result<_>>()?;
        let least = domains.iter().map(|documents| bytes(documents)).min().unwrap_or_default();
        for documents in &mut domains {
            // The order is that of the content's digests: as good as shuffled, and always the same.
            documents.sort_by_cached_key(|text| Digest::of(text.as_bytes()).to_string());
            documents.dedup();
            let mut total = 0;
            documents.retain(|text| {
                total += text.len();
                total <= least
            });
        }
        Ok(Self { folder: folder.to_owned(), domains })
    }

    /// What the text is, for the identity of what was trained on it.
    pub(super) fn digest(&self) -> String {
        let digests: Vec<String> =
            self.domains.iter().flatten().map(|text| Digest::of(text.as_bytes()).to_string()).collect();
        Digest::of(digests.concat().as_bytes()).to_string()
    }

    /// The folder with all text.
    pub(super) fn all(&self) -> Result<PathBuf> {
        Ok(self.dealt("all", vec![self.domains.concat()])?.remove(0))
    }

    /// One folder for each of `sites` sites.
    pub(super) fn sites(&self, split: Split, sites: usize) -> Result<Vec<PathBuf>> {
        let mut hands: Vec<Vec<String>> = vec![Vec::new(); sites];
        match split {
            Split::Mixed => {
                for documents in &self.domains {
                    deal(documents, hands.iter_mut().collect());
                }
            }
            Split::ByDomain => {
                let domains = self.domains.len();
                ensure!(sites.is_multiple_of(domains), "{sites} sites cannot share {domains} domains evenly");
                for (at, documents) in self.domains.iter().enumerate() {
                    deal(documents, hands.iter_mut().skip(at).step_by(domains).collect());
                }
            }
        }
        self.dealt(&format!("{split:?}-{sites}").to_lowercase(), hands)
    }

    fn dealt(&self, name: &str, hands: Vec<Vec<String>>) -> Result<Vec<PathBuf>> {
        let write = |(at, hand): (usize, Vec<String>)| {
            let folder = self.folder.join(name).join((at + 1).to_string());
            fs::create_dir_all(&folder)?;
            let lines: Vec<String> = hand.iter().map(|text| json!({ "text": text }).to_string()).collect();
            fs::write(folder.join("text.jsonl"), lines.join("\n"))?;
            Ok(folder.canonicalize()?)
        };
        hands.into_iter().enumerate().map(write).collect()
    }
}

/// Deals documents one by one to whoever has least.
fn deal(documents: &[String], mut hands: Vec<&mut Vec<String>>) {
    let mut dealt = vec![0; hands.len()];
    for text in documents {
        let least = (0..hands.len()).min_by_key(|at| dealt[*at]).unwrap_or_default();
        dealt[least] += text.len();
        hands[least].push(text.clone());
    }
}

fn bytes(documents: &[String]) -> usize {
    documents.iter().map(String::len).sum()
}

/// The documents of a folder of `.txt` and `.jsonl`, none longer than [`DOCUMENT_BYTES_MAX`] unless a line is.
fn documents(folder: &Path) -> Result<Vec<String>> {
    let mut documents = Vec::new();
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        if path.extension().is_some_and(|extension| extension == "jsonl") {
            for line in text.lines() {
                let document: Value = serde_json::from_str(line)?;
                cut(document["text"].as_str().context("a line has a text")?, &mut documents);
            }
        } else {
            cut(&text, &mut documents);
        }
    }
    Ok(documents)
}

fn cut(text: &str, documents: &mut Vec<String>) {
    let mut document = String::new();
    for line in text.split_inclusive('\n') {
        if !document.is_empty() && document.len() + line.len() > DOCUMENT_BYTES_MAX {
            documents.push(std::mem::take(&mut document));
        }
        document += line;
    }
    if !document.trim().is_empty() {
        documents.push(document);
    }
}
