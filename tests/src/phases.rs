//! In which phase of a round a process is, as the files of the federation tell: they tell it of a process
//! that was killed, too, so that a test knows what it has hit.

use std::{
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
};

use consort_common::spec::RunSpec;

use crate::TestFederation;

/// The files of one run, seen with one site.
pub struct Files {
    aggregator_state: PathBuf,
    site_state: PathBuf,
    site: String,
    spec: RunSpec,
}

impl Files {
    /// The files of the run with this specification.
    pub fn new(federation: &TestFederation, site: &str, spec: &str) -> Self {
        Self {
            aggregator_state: federation.aggregator_state(),
            site_state: federation.site_state(site),
            site: site.to_owned(),
            spec: RunSpec::parse(spec).expect("a valid specification"),
        }
    }

    /// The site tokenises its text.
    pub fn preparing(&self) -> bool {
        self.site_state.join("text/preparing").exists()
    }

    /// A part of a global model is at the site.
    pub fn downloading(&self) -> bool {
        self.site_files().iter().any(|name| name.ends_with(".f32.part"))
    }

    /// A global model is at the site, and its held-out loss is not.
    pub fn evaluating(&self) -> bool {
        (0..=self.spec.rounds).any(|version| self.evaluating_version(version))
    }

    /// The last version is at the site, and its held-out loss is not.
    pub fn evaluating_last(&self) -> bool {
        self.evaluating_version(self.spec.rounds)
    }

    fn evaluating_version(&self, version: u32) -> bool {
        let files = self.site_files();
        let has = |name: String| files.contains(&name);
        has(format!("model-{version}.f32")) && !has(format!("evaluation-{version}.json"))
    }

    /// The site has a checkpoint of an unfinished round.
    pub fn training(&self) -> bool {
        self.site_files().iter().any(|name| name == "training.checkpoint")
    }

    /// The aggregator holds some chunks of the site's delta for a round that is not reduced, and not all.
    pub fn uploading(&self) -> bool {
        let run = self.spec.name.as_str();
        let rounds = self.aggregator_state.join("spool").join(run);
        let chunks = self.spec.chunk_plan().chunks() as usize;
        entries(&rounds).iter().any(|round| {
            let site = rounds.join(round).join(&self.site);
            let some = (1..chunks).contains(&chunks_held_in(&site, chunks));
            // What a reduced round leaves in the spool is on its way out.
            some && !self.aggregator_state.join("models").join(run).join(round).exists()
        })
    }

    /// The aggregator has begun to write a version of the model.
    pub fn reducing(&self) -> bool {
        self.has_partial("models")
    }

    /// The aggregator has begun to write a checkpoint.
    pub fn publishing(&self) -> bool {
        self.has_partial("checkpoints")
    }

    fn has_partial(&self, folder: &str) -> bool {
        let folder = self.aggregator_state.join(folder).join(self.spec.name.as_str());
        entries(&folder).iter().any(|name| name.ends_with(".partial"))
    }

    fn site_files(&self) -> Vec<String> {
        entries(&self.site_state.join("runs").join(self.spec.name.as_str()))
    }
}

/// Chunks of the delta that a folder of the spool holds, of which there may be several: of the one with most.
pub fn chunks_held_in(folder: &Path, chunks: usize) -> usize {
    let deltas = entries(folder);
    deltas.iter().map(|delta| chunks_held(&folder.join(delta), chunks)).max().unwrap_or_default()
}

/// Chunks that a delta's file holds: it begins with an entry of 64 bytes for each, zeros where it is missing.
fn chunks_held(delta: &Path, chunks: usize) -> usize {
    let mut table = Vec::new();
    let read = File::open(delta).and_then(|file| file.take(64 * chunks as u64).read_to_end(&mut table));
    // It may be gone already.
    read.map_or(0, |_| table.chunks(64).filter(|entry| entry.starts_with(b"chnk")).count())
}

/// The names in a folder; none if it is not there, or no longer.
fn entries(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}
