//! Getting ready for a run: its specification, its tokenizer, the site's text as tokens. What was fetched
//! is kept, so that a restarted daemon is ready without the network.

use std::{fs, sync::Arc};

use consort_common::{
    atomic_file::write_atomically,
    chunk::ChunkPlan,
    fragment::Fragment,
    ids::{Digest, SiteName},
    spec::RunSpec,
    units,
};
use consort_proto::v1::{ClientActivity, DescribeRunRequest, DescribeRunResponse, ReportReadyRequest};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    daemon::Context,
    data::{self, Dataset, PrepareProgress, PrepareRequest, Tokenizer},
    link::request,
    state::{RunDirectory, StateError},
    steps::Text,
    transfer::download_tokenizer,
    work::{RunId, WorkError},
};

/// All that work on a run needs.
pub struct Material {
    /// The run.
    pub run: RunId,
    /// This site.
    pub site: SiteName,
    /// The run's specification.
    pub spec: RunSpec,
    /// Its tensors, as both sides derive them.
    pub manifest_digest: Digest,
    /// How its model is cut.
    pub plan: ChunkPlan,
    /// Its files.
    pub directory: RunDirectory,
    /// The site's text.
    pub dataset: Dataset,
}

impl Material {
    /// What makes `version`, from 1, of the one before; the delta of the round of that number is of the same.
    pub fn fragment(&self, version: u32) -> Fragment {
        Fragment::of_round(self.plan, self.spec.fragments(), version)
    }

    /// What the site trains on.
    pub fn training_text(&self) -> Text<'_> {
        Text { spec: &self.spec, dataset: &self.dataset, site: self.site.as_str() }
    }
}

/// What describes a run, as kept on disk beside the specification and the tokenizer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    spec_digest: Digest,
    manifest_digest: Digest,
    tokenizer_digest: Digest,
}

/// Gets ready and says so.
///
/// # Errors
/// If the run and this site do not fit together, or the site's text cannot be used.
pub async fn prepare(context: &Context, run: &RunId, cancel: &CancellationToken) -> Result<(), WorkError> {
    let material = material(context, run, cancel).await?;
    let stats = material.dataset.stats.total();
    let ready = |session_id| ReportReadyRequest {
        session_id,
        run: run.name.to_string(),
        spec_digest: run.spec_digest.to_vec(),
        manifest_digest: material.manifest_digest.to_vec(),
        train_tokens: stats.train.tokens,
        held_out_tokens: stats.held_out.tokens,
        documents: stats.documents(),
    };
    let what = "saying that the site is ready";
    let report = context
        .link
        .call(what, async |mut session| session.client.report_ready(request(ready(session.id))).await);
    let reported = cancel.run_until_cancelled(report).await.ok_or(WorkError::Cancelled)?;
    reported.map_err(|status| WorkError::Refused { what, status })?;
    info!("ready for run {}", run.name);
    Ok(())
}

/// All that work on the run needs, prepared if it is not there.
///
/// # Errors
/// As [`prepare`].
pub async fn material(
    context: &Context,
    run: &RunId,
    cancel: &CancellationToken,
) -> Result<Arc<Material>, WorkError> {
    let mut prepared = context.material.lock().await;
    if let Some(material) = prepared.as_ref().filter(|material| material.run == *run) {
        return Ok(material.clone());
    }
    let directory = context.state.run(&run.name)?;
    let (description, toml, tokenizer) = match kept(&directory, run) {
        Some(kept) => kept,
        None => {
            let fetching = fetch(context, &directory, run);
            cancel.run_until_cancelled(fetching).await.ok_or(WorkError::Cancelled)??
        }
    };
    let spec = RunSpec::parse(&toml)?;
    let manifest_digest = spec.model.manifest().digest();
    if manifest_digest != description.manifest_digest {
        return Err(WorkError::Manifest { ours: manifest_digest, theirs: description.manifest_digest });
    }
    let dataset = tokenise(context, run, &spec, &tokenizer, cancel).await?;
    let plan = spec.chunk_plan();
    let material = Material {
        run: run.clone(),
        site: context.site.clone(),
        spec,
        manifest_digest,
        plan,
        directory,
        dataset,
    };
    Ok(prepared.insert(Arc::new(material)).clone())
}

/// What an earlier preparation kept, if it is whole and of this run.
fn kept(directory: &RunDirectory, run: &RunId) -> Option<(Description, String, Vec<u8>)> {
    let description: Description = serde_json::from_slice(&fs::read(directory.description()).ok()?).ok()?;
    let toml = fs::read_to_string(directory.specification()).ok()?;
    let tokenizer = fs::read(directory.tokenizer()).ok()?;
    let whole = description.spec_digest == run.spec_digest
        && RunSpec::digest(&toml) == run.spec_digest
        && Digest::of(&tokenizer) == description.tokenizer_digest;
    whole.then_some((description, toml, tokenizer))
}

/// Asks the aggregator, and keeps what it says.
async fn fetch(
    context: &Context,
    directory: &RunDirectory,
    run: &RunId,
) -> Result<(Description, String, Vec<u8>), WorkError> {
    let what = "describing the run";
    let call = context.link.call(what, async |mut session| {
        let describe = DescribeRunRequest { session_id: session.id, run: run.name.to_string() };
        session.client.describe_run(request(describe)).await
    });
    let described = call.await.map_err(|status| WorkError::Refused { what, status })?.into_inner();
    let description = check(&described, run)?;
    let activity = context.reporter.begin(&run.name, 0, ClientActivity::Preparing, 0);
    let tokenizer =
        download_tokenizer(&context.link, &run.name, description.tokenizer_digest, &activity).await?;

    // Whatever lies there is of another run with this name.
    directory.clear()?;
    write_atomically(&directory.specification(), described.spec_toml.as_bytes())
        .map_err(StateError::Write)?;
    write_atomically(&directory.tokenizer(), &tokenizer).map_err(StateError::Write)?;
    let json = serde_json::to_vec_pretty(&description).unwrap_or_default();
    write_atomically(&directory.description(), &json).map_err(StateError::Write)?;
    Ok((description, described.spec_toml, tokenizer))
}

fn check(described: &DescribeRunResponse, run: &RunId) -> Result<Description, WorkError> {
    let digest = |name: &str, bytes: &[u8]| {
        Digest::try_from(bytes).map_err(|error| WorkError::Inconsistent(format!("{name} is {error}")))
    };
    if RunSpec::digest(&described.spec_toml) != run.spec_digest {
        return Err(WorkError::Inconsistent(format!(
            "specification of run {} is not the one of its instruction",
            run.name
        )));
    }
    Ok(Description {
        spec_digest: run.spec_digest,
        manifest_digest: digest("manifest digest", &described.manifest_digest)?,
        tokenizer_digest: digest("tokenizer digest", &described.tokenizer_digest)?,
    })
}

async fn tokenise(
    context: &Context,
    run: &RunId,
    spec: &RunSpec,
    tokenizer: &[u8],
    cancel: &CancellationToken,
) -> Result<Dataset, WorkError> {
    let request = PrepareRequest {
        sources: context.sources.clone(),
        cache: context.state.text(),
        tokenizer: Tokenizer::for_run(&spec.tokenizer, tokenizer)?,
        held_out_fraction: spec.evaluation.held_out_fraction,
        vocabulary_size: spec.model.vocab_size(),
    };
    let activity = context.reporter.begin(&run.name, 0, ClientActivity::Preparing, 0);
    let cancel = cancel.clone();
    let preparing = tokio::task::spawn_blocking(move || {
        let progress =
            |progress: PrepareProgress| activity.done_of(progress.bytes_read, progress.bytes_total);
        data::prepare(&request, &progress, &|| cancel.is_cancelled())
    });
    let dataset = preparing.await.map_err(|error| WorkError::Internal(error.to_string()))??;
    for stats in &dataset.stats.sources {
        info!(
            "text of {:?}: {} files, {} documents (counted on each side of the split), {} tokens to train on, {} \
             held out",
            stats.name,
            stats.files,
            stats.documents(),
            units::count(stats.train.tokens),
            units::count(stats.held_out.tokens)
        );
    }
    for (source, skipped) in dataset.stats.skipped() {
        warn!("skipped in {source:?}: {skipped}");
    }
    Ok(dataset)
}
