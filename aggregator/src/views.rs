//! What people see of runs, rounds, clients and checkpoints: read from the database and the driver's
//! state, never written.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use consort_common::{
    ids::{RunName, SiteName},
    model::TensorSpec,
    units::unix_ms_now,
};
use consort_proto::v1;

use crate::{
    driver::{Core, Driver, DriverError, LiveRun},
    engine::{Participation, Phase, RunStatus, TensorNorms},
    store::{ClientRow, ContributionRow, EvaluationRow, RoundRow, RunRow, RunSiteRow, mean_loss},
};

/// Contributions shown of one client.
const CLIENT_CONTRIBUTIONS_MAX: u32 = 50;
/// Events that a watcher is told of at first, and at most in one snapshot.
const FIRST_EVENTS: u32 = 8;
const EVENTS_MAX: u32 = 200;

/// Every run, oldest first.
pub async fn runs(driver: &Driver) -> Result<Vec<v1::RunSummary>, DriverError> {
    let rows = driver.store().runs().await?;
    let mut losses = BTreeMap::new();
    for row in &rows {
        let evaluations = driver.store().evaluations(&row.name).await?;
        losses.insert(row.name.clone(), newest_loss(&by_version(&evaluations)));
    }
    let core = driver.core().await;
    let summary = |row: RunRow| {
        let loss = losses.get(&row.name).copied().flatten();
        Some(summary(core.runs.get(&row.name)?, &row, loss))
    };
    Ok(rows.into_iter().filter_map(summary).collect())
}

/// One run in a line.
pub async fn run_summary(driver: &Driver, run: &RunName) -> Result<v1::RunSummary, DriverError> {
    let row = run_row(driver, run).await?;
    let evaluations = driver.store().evaluations(run).await?;
    let core = driver.core().await;
    Ok(summary(core.run(run)?, &row, newest_loss(&by_version(&evaluations))))
}

/// One run, whole.
pub async fn run(driver: &Driver, run: &RunName) -> Result<v1::GetRunResponse, DriverError> {
    let summary = run_summary(driver, run).await?;
    let start = run_row(driver, run).await?.start;
    let core = driver.core().await;
    let live = core.run(run)?;
    let state = live.run.state();
    Ok(v1::GetRunResponse {
        run: Some(summary),
        spec_toml: live.material.spec_toml.clone(),
        spec_digest: live.material.spec_digest.to_vec(),
        manifest_digest: live.material.manifest_digest.to_vec(),
        version: state.version,
        version_digest: live.version_digest.to_vec(),
        reason: match &state.status {
            RunStatus::Aborted { reason } => reason.clone(),
            _ => String::new(),
        },
        start: start.map(|start| v1::StartModel { digest: start.digest.to_vec(), origin: start.name }),
    })
}

/// The committed rounds, ascending.
pub async fn rounds(driver: &Driver, run: &RunName) -> Result<Vec<v1::RoundSummary>, DriverError> {
    run_row(driver, run).await?;
    let rows = driver.store().rounds(run).await?;
    let evaluations = by_version(&driver.store().evaluations(run).await?);
    Ok(rows.iter().map(|row| round_summary(row, &evaluations)).collect())
}

/// One committed round, with what is needed to reproduce it.
pub async fn round(driver: &Driver, run: &RunName, round: u32) -> Result<v1::GetRoundResponse, DriverError> {
    let rows = driver.store().rounds(run).await?;
    let evaluations = by_version(&driver.store().evaluations(run).await?);
    let contributions = driver.store().contributions(run, round).await?;
    let norms = driver.store().tensor_norms(run, round).await?;
    let core = driver.core().await;
    let material = &core.run(run)?.material;
    let newest = rows.last().map_or(0, |row| row.round);
    let row = rows.iter().find(|row| row.round == round);
    let row = row.ok_or_else(|| DriverError::NoSuchRound { run: run.clone(), round, newest })?;
    Ok(v1::GetRoundResponse {
        round: Some(round_summary(row, &evaluations)),
        contributions: contributions.iter().map(contribution).collect(),
        evaluations: evaluations
            .into_iter()
            .find(|one| one.version == round)
            .map_or_else(Vec::new, |one| one.sites),
        spec_digest: material.spec_digest.to_vec(),
        manifest_digest: material.manifest_digest.to_vec(),
        seed: material.spec.seed,
        aggregation: material.spec.outer.aggregation.name().to_owned(),
        tensors: material.spec.model.manifest().tensors().iter().zip(norms).map(tensor_norms).collect(),
    })
}

/// Every site that ever joined, with its part in `run` (absent: in the current one).
pub async fn clients(driver: &Driver, run: Option<&RunName>) -> Result<Vec<v1::ClientSummary>, DriverError> {
    let rows = driver.store().clients().await?;
    let run = match run {
        Some(run) => Some(run.clone()),
        None => driver.core().await.current().map(|live| live.material.name.clone()),
    };
    let ready = match &run {
        Some(run) => driver.store().run_sites(run).await?,
        None => Vec::new(),
    };
    let ready: BTreeMap<SiteName, RunSiteRow> =
        ready.into_iter().map(|row| (row.site.clone(), row)).collect();
    let core = driver.core().await;
    let live = run.and_then(|run| core.runs.get(&run));
    Ok(rows.iter().map(|row| client_summary(&core, live, row, ready.get(&row.site))).collect())
}

/// One site and what it did.
pub async fn client(driver: &Driver, site: &SiteName) -> Result<v1::GetClientResponse, DriverError> {
    let client = clients(driver, None).await?.into_iter().find(|client| client.site == site.as_str());
    let client = client.ok_or_else(|| DriverError::NoSuchSite(site.clone()))?;
    let contributions = driver.store().client_contributions(site, CLIENT_CONTRIBUTIONS_MAX).await?;
    let contributions = contributions.iter().map(|row| v1::ClientContribution {
        run: row.run.to_string(),
        round: row.round,
        contribution: Some(contribution(row)),
    });
    Ok(v1::GetClientResponse { client: Some(client), contributions: contributions.collect() })
}

/// The published checkpoints, ascending.
pub async fn checkpoints(driver: &Driver, run: &RunName) -> Result<Vec<v1::Checkpoint>, DriverError> {
    run_row(driver, run).await?;
    let rows = driver.store().checkpoints(run).await?;
    let checkpoint = |row: crate::store::CheckpointRow| v1::Checkpoint {
        run: run.to_string(),
        version: row.version,
        path: row.path.display().to_string(),
        bytes: row.bytes,
        created_unix_ms: row.created_ms,
        digest: row.digest.to_vec(),
    };
    Ok(rows.into_iter().map(checkpoint).collect())
}

/// The files of a checkpoint (absent: of the newest), as (name, path).
pub async fn checkpoint_files(
    driver: &Driver,
    run: &RunName,
    version: Option<u32>,
) -> Result<Vec<(String, PathBuf)>, DriverError> {
    run_row(driver, run).await?;
    let rows = driver.store().checkpoints(run).await?;
    let row = match version {
        Some(version) => rows.into_iter().find(|row| row.version == version),
        None => rows.into_iter().next_back(),
    };
    let row = row.ok_or_else(|| DriverError::NoSuchCheckpoint { run: run.clone(), version })?;
    let what = row.path.display().to_string();
    files_in(&row.path).map_err(|source| DriverError::Read { what, source })
}

fn files_in(directory: &Path) -> std::io::Result<Vec<(String, PathBuf)>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            files.push((entry.file_name().to_string_lossy().into_owned(), entry.path()));
        }
    }
    files.sort();
    Ok(files)
}

/// One watcher's position in a run's log.
pub struct Watch {
    run: RunName,
    last_event: u64,
    begun: bool,
}

impl Watch {
    /// Watches from now on.
    pub async fn begin(driver: &Driver, run: &RunName) -> Result<Self, DriverError> {
        run_row(driver, run).await?;
        Ok(Self { run: run.clone(), last_event: 0, begun: false })
    }

    /// One look at the run.
    pub async fn snapshot(&mut self, driver: &Arc<Driver>) -> Result<v1::RunSnapshot, DriverError> {
        // The state first: a snapshot that says that the run is over is the last, and must have all that
        // was recorded until then.
        let live = driver.core().await.run(&self.run)?.clone();
        let row = run_row(driver, &self.run).await?;
        let evaluations = by_version(&driver.store().evaluations(&self.run).await?);
        let limit = if self.begun { EVENTS_MAX } else { FIRST_EVENTS };
        let events = driver.store().events_since(&self.run, self.last_event, limit).await?;
        let clients = clients(driver, Some(&self.run)).await?;
        self.begun = true;
        self.last_event = events.last().map_or(self.last_event, |event| event.id);

        let now = unix_ms_now();
        Ok(v1::RunSnapshot {
            run: Some(summary(&live, &row, newest_loss(&evaluations))),
            waiting_for: live.run.waiting_for(&live.material.rounds, now),
            deadline_unix_ms: live.run.deadline_ms().unwrap_or_default(),
            clients,
            evaluations,
            events: events
                .into_iter()
                .map(|event| v1::RunEvent { id: event.id, time_unix_ms: event.time_ms, text: event.text })
                .collect(),
            server_time_unix_ms: now,
        })
    }
}

/// Whether nothing more will happen to the run.
pub fn is_over(snapshot: &v1::RunSnapshot) -> bool {
    let status = snapshot.run.as_ref().map(v1::RunSummary::status);
    matches!(status, Some(v1::RunStatus::Finished | v1::RunStatus::Aborted))
}

async fn run_row(driver: &Driver, run: &RunName) -> Result<RunRow, DriverError> {
    driver.store().run(run).await?.ok_or_else(|| DriverError::NoSuchRun(run.clone()))
}

fn summary(live: &LiveRun, row: &RunRow, validation_loss: Option<f64>) -> v1::RunSummary {
    let state = live.run.state();
    let material = &live.material;
    v1::RunSummary {
        name: row.name.to_string(),
        status: status(&state.status).into(),
        round: state.round().min(material.spec.rounds),
        rounds: material.spec.rounds,
        phase: phase(&state.phase).into(),
        parameters: material.plan.parameters(),
        tokens: row.tokens,
        bytes_down: row.bytes_down,
        bytes_up: row.bytes_up,
        created_unix_ms: row.created_ms,
        started_unix_ms: row.started_ms.unwrap_or_default(),
        finished_unix_ms: row.finished_ms.unwrap_or_default(),
        validation_loss,
        architecture: material.spec.model.name().to_owned(),
    }
}

fn status(status: &RunStatus) -> v1::RunStatus {
    match status {
        RunStatus::Created => v1::RunStatus::Created,
        RunStatus::Active => v1::RunStatus::Active,
        RunStatus::Paused => v1::RunStatus::Paused,
        RunStatus::Finished => v1::RunStatus::Finished,
        RunStatus::Aborted { .. } => v1::RunStatus::Aborted,
    }
}

fn phase(phase: &Phase) -> v1::Phase {
    match phase {
        Phase::Waiting => v1::Phase::Waiting,
        Phase::Training(_) => v1::Phase::Training,
        Phase::Reducing(_) => v1::Phase::Reducing,
        Phase::Evaluating(_) => v1::Phase::Evaluating,
        Phase::Done => v1::Phase::Done,
    }
}

fn round_summary(row: &RoundRow, evaluations: &[v1::VersionEvaluation]) -> v1::RoundSummary {
    v1::RoundSummary {
        round: row.round,
        started_unix_ms: row.started_ms,
        committed_unix_ms: row.committed_ms,
        attempts: row.attempts,
        contributors: row.contributors,
        tokens: row.tokens,
        train_loss: row.train_loss,
        delta_norm: row.delta_norm,
        update_norm: row.update_norm,
        statistics: row.statistics.map(|statistics| v1::RoundStatistics {
            parameter_norm: statistics.parameter_norm,
            momentum_norm: statistics.momentum_norm,
            update_cosine: statistics.update_cosine,
            spread: statistics.spread,
        }),
        validation_loss: evaluations.iter().find(|one| one.version == row.round).map(|one| one.loss),
        bytes_down: row.bytes_down,
        bytes_up: row.bytes_up,
        digest: row.digest.to_vec(),
    }
}

fn contribution(row: &ContributionRow) -> v1::Contribution {
    v1::Contribution {
        site: row.site.to_string(),
        weight: row.weight.unwrap_or_default(),
        tokens: row.tokens,
        steps: row.steps,
        train_loss: row.train_loss,
        train_seconds: row.train_seconds,
        delta_norm: row.delta_norm,
        bytes: row.bytes,
        delta_digest: row.delta_digest.to_vec(),
        accepted_unix_ms: row.accepted_ms,
        age: row.age,
        measured_norm: row.measured_norm,
        clip: row.clip,
        selected: row.selected,
    }
}

fn tensor_norms((tensor, norms): (&TensorSpec, TensorNorms)) -> v1::TensorNorms {
    v1::TensorNorms {
        name: tensor.name.clone(),
        parameters: tensor.parameters() as u64,
        delta_norm: norms.delta,
        momentum_norm: norms.momentum,
        parameter_norm: norms.parameters,
    }
}

fn client_summary(
    core: &Core,
    live: Option<&LiveRun>,
    row: &ClientRow,
    ready: Option<&RunSiteRow>,
) -> v1::ClientSummary {
    let session = core.sessions.get(&row.site);
    let participation = live.map_or(Participation::NotSelected, |live| live.run.participation(&row.site));
    v1::ClientSummary {
        site: row.site.to_string(),
        connected: session.is_some_and(crate::sessions::Session::connected),
        participation: match participation {
            Participation::NotSelected => v1::Participation::NotSelected,
            Participation::Working => v1::Participation::Working,
            Participation::Delivered => v1::Participation::Delivered,
            Participation::Replaced => v1::Participation::Replaced,
            Participation::Behind => v1::Participation::Behind,
        }
        .into(),
        progress: session.and_then(|session| session.progress.clone()),
        device: row.device.clone(),
        software_version: row.software_version.clone(),
        first_seen_unix_ms: row.first_seen_ms,
        last_seen_unix_ms: session.map_or(row.last_seen_ms, |session| session.last_seen_ms),
        train_tokens: ready.map_or(0, |ready| ready.train_tokens),
        held_out_tokens: ready.map_or(0, |ready| ready.held_out_tokens),
        ready: live.is_some_and(|live| live.run.ready().contains_key(&row.site)),
    }
}

/// Evaluations gathered by version, ascending, with their token-weighted mean.
fn by_version(rows: &[EvaluationRow]) -> Vec<v1::VersionEvaluation> {
    let of_one_version = |rows: &[EvaluationRow]| {
        let sites = rows.iter().map(|row| v1::SiteEvaluation {
            site: row.site.to_string(),
            evaluation: Some(v1::Evaluation {
                version: row.version,
                loss: row.loss,
                tokens: row.tokens,
                text_bytes: row.text_bytes,
            }),
        });
        v1::VersionEvaluation {
            version: rows[0].version,
            loss: mean_loss(rows).unwrap_or_default(),
            sites: sites.collect(),
        }
    };
    rows.chunk_by(|a, b| a.version == b.version).map(of_one_version).collect()
}

fn newest_loss(evaluations: &[v1::VersionEvaluation]) -> Option<f64> {
    evaluations.last().map(|one| one.loss)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_over_sites_is_weighted_by_tokens() {
        let row = |version, site: &str, loss, tokens| EvaluationRow {
            version,
            site: site.parse().unwrap(),
            loss,
            tokens,
            text_bytes: tokens,
        };
        let rows = [row(0, "a", 5.0, 100), row(0, "b", 5.0, 1), row(2, "a", 1.0, 300), row(2, "b", 2.0, 100)];
        let evaluations = by_version(&rows);
        assert_eq!(
            evaluations.iter().map(|one| (one.version, one.loss)).collect::<Vec<_>>(),
            [(0, 5.0), (2, 1.25)]
        );
        assert_eq!(newest_loss(&evaluations), Some(1.25));
    }
}
