//! Rounds and the versions that they make: their evaluations, their checkpoints.

use std::path::PathBuf;

use consort_common::{
    ids::{Digest, RunName, SiteName},
    units::UnixMs,
};
use sqlx::{AnyConnection, any::AnyRow};

use super::{
    Store, StoreError, contributions,
    values::{Columns, KEEPS_FLOATS_THAT_MAY_BE_NULL, count, finite, sorted},
};
use crate::engine::{RoundStatistics, TensorNorms, Treatment};

/// A committed round.
#[derive(Debug, Clone, PartialEq)]
pub struct RoundRow {
    /// From 1; also the version that it made.
    pub round: u32,
    /// When its first attempt began.
    pub started_ms: UnixMs,
    /// When it was committed.
    pub committed_ms: UnixMs,
    /// Times that sites were selected for it.
    pub attempts: u32,
    /// The run's cumulative step before it.
    pub first_step: u64,
    /// Tokens trained, all contributors.
    pub tokens: u64,
    /// Weighted mean over the contributors, nats per token.
    pub train_loss: f64,
    /// L2 norm of the averaged delta.
    pub delta_norm: f64,
    /// L2 norm of the update that the outer optimizer applied.
    pub update_norm: f64,
    /// How else it moved the model; none for a round of an older version.
    pub statistics: Option<RoundStatistics>,
    /// Model payload sent for it.
    pub bytes_down: u64,
    /// Model payload received for it.
    pub bytes_up: u64,
    /// Digest of the model that it made.
    pub digest: Digest,
    /// Deltas that were reduced. Not stored: counted.
    pub contributors: u32,
}

/// A round to be committed.
#[derive(Debug, Clone, PartialEq)]
pub struct RoundCommit {
    /// Its row; `contributors` is ignored.
    pub row: RoundRow,
    /// What became of every delta that was reduced; each was recorded before.
    pub treatments: Vec<Treatment>,
    /// Norms of the model's tensors, in the manifest's order.
    pub tensors: Vec<TensorNorms>,
}

/// Held-out loss of a version at a site.
#[derive(Debug, Clone, PartialEq)]
pub struct EvaluationRow {
    /// Which version.
    pub version: u32,
    /// Which site.
    pub site: SiteName,
    /// Mean cross-entropy, nats per token.
    pub loss: f64,
    /// Tokens predicted.
    pub tokens: u64,
    /// UTF-8 bytes of the text that they encode.
    pub text_bytes: u64,
}

/// A published checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct CheckpointRow {
    /// Which version.
    pub version: u32,
    /// Its directory.
    pub path: PathBuf,
    /// Total of its files.
    pub bytes: u64,
    /// When it was published.
    pub created_ms: UnixMs,
    /// Digest of the model's flat vector.
    pub digest: Digest,
}

/// Token-weighted mean of the sites' losses of one version, nats per token; none without tokens. Summed in
/// the order given, which the store's queries fix.
pub fn mean_loss<'a>(evaluations: impl IntoIterator<Item = &'a EvaluationRow>) -> Option<f64> {
    #[allow(clippy::cast_precision_loss)]
    let (sum, tokens) = evaluations.into_iter().fold((0.0, 0.0), |(sum, tokens), evaluation| {
        (sum + evaluation.loss * evaluation.tokens as f64, tokens + evaluation.tokens as f64)
    });
    (tokens > 0.0).then_some(sum / tokens)
}

/// 64 is [`consort_common::spec::STALENESS_MAX`], with which the rows are found by their table's key.
const SELECT_ROUND: &str = "SELECT rounds.*, (SELECT COUNT(*) FROM contributions WHERE contributions.run = rounds.run \
    AND contributions.round BETWEEN rounds.round - 64 AND rounds.round \
    AND contributions.round + contributions.age = rounds.round AND contributions.weight IS NOT NULL) \
    AS contributors FROM rounds";
const _: () = assert!(consort_common::spec::STALENESS_MAX == 64);

impl Store {
    /// The run's committed rounds, ascending.
    pub async fn rounds(&self, run: &RunName) -> Result<Vec<RoundRow>, StoreError> {
        let rows = sqlx::query(&format!("{SELECT_ROUND} WHERE rounds.run = $1 ORDER BY rounds.round"))
            .bind(run.as_str())
            .fetch_all(&*self.connections.reader())
            .await
            .map_err(StoreError::of("list a run's rounds"))?;
        rows.iter().map(round_row).collect()
    }

    /// One committed round.
    pub async fn round(&self, run: &RunName, round: u32) -> Result<Option<RoundRow>, StoreError> {
        let row = sqlx::query(&format!("{SELECT_ROUND} WHERE rounds.run = $1 AND rounds.round = $2"))
            .bind(run.as_str())
            .bind(i64::from(round))
            .fetch_optional(&*self.connections.reader())
            .await
            .map_err(StoreError::of("read a round"))?;
        row.as_ref().map(round_row).transpose()
    }

    /// Norms of the model's tensors in one committed round, in the manifest's order; none where an older version
    /// committed it.
    pub async fn tensor_norms(&self, run: &RunName, round: u32) -> Result<Vec<TensorNorms>, StoreError> {
        let row = sqlx::query("SELECT norms FROM round_tensors WHERE run = $1 AND round = $2")
            .bind(run.as_str())
            .bind(i64::from(round))
            .fetch_optional(&*self.connections.reader())
            .await
            .map_err(StoreError::of("read a round's tensors"))?;
        let norms = |row: AnyRow| Columns(&row).known("norms", |text| serde_json::from_str(text).ok());
        row.map_or_else(|| Ok(Vec::new()), norms)
    }

    /// The run and round that made the model of that digest; the oldest of several.
    pub async fn version_with_digest(&self, digest: Digest) -> Result<Option<(RunName, u32)>, StoreError> {
        let row =
            sqlx::query("SELECT run, round FROM rounds WHERE digest = $1 ORDER BY committed_ms, run LIMIT 1")
                .bind(digest.to_string())
                .fetch_optional(&*self.connections.reader())
                .await
                .map_err(StoreError::of("look for a model"))?;
        let version = |row: AnyRow| Ok((Columns(&row).parsed("run")?, Columns(&row).count("round")?));
        row.map(version).transpose()
    }

    /// The run's evaluations, by version and site.
    pub async fn evaluations(&self, run: &RunName) -> Result<Vec<EvaluationRow>, StoreError> {
        let rows = sqlx::query("SELECT * FROM evaluations WHERE run = $1")
            .bind(run.as_str())
            .fetch_all(&*self.connections.reader())
            .await
            .map_err(StoreError::of("list a run's evaluations"))?;
        sorted(rows.iter().map(evaluation_row), |row| (row.version, row.site.clone()))
    }

    /// The run's published checkpoints, by version.
    pub async fn checkpoints(&self, run: &RunName) -> Result<Vec<CheckpointRow>, StoreError> {
        let rows = sqlx::query("SELECT * FROM checkpoints WHERE run = $1 ORDER BY version")
            .bind(run.as_str())
            .fetch_all(&*self.connections.reader())
            .await
            .map_err(StoreError::of("list a run's checkpoints"))?;
        rows.iter().map(checkpoint_row).collect()
    }
}

/// The round's commit point: its row, what became of the deltas, and the run's new version.
pub(super) async fn commit_round(
    connection: &mut AnyConnection,
    run: &RunName,
    commit: &RoundCommit,
) -> Result<(), StoreError> {
    let row = &commit.row;
    let updated =
        sqlx::query("UPDATE runs SET version = $2, version_digest = $3 WHERE name = $1 AND version = $2 - 1")
            .bind(run.as_str())
            .bind(i64::from(row.round))
            .bind(row.digest.to_string())
            .execute(&mut *connection)
            .await
            .map_err(StoreError::of("commit a round"))?;
    if updated.rows_affected() != 1 {
        return Err(StoreError::NotNext { run: run.clone(), round: row.round });
    }
    insert_round(connection, run, row).await?;
    insert_tensors(connection, run, row.round, &commit.tensors).await?;
    for treatment in &commit.treatments {
        contributions::set_treatment(connection, run, treatment).await?;
    }
    Ok(())
}

async fn insert_round(
    connection: &mut AnyConnection,
    run: &RunName,
    row: &RoundRow,
) -> Result<(), StoreError> {
    let statistics = row.statistics.as_ref();
    let optional = |column, value: Option<f64>| value.map(|value| finite(column, value)).transpose();
    sqlx::query(
        "INSERT INTO rounds (run, round, started_ms, committed_ms, attempts, first_step, tokens, train_loss, \
         delta_norm, update_norm, bytes_down, bytes_up, digest, parameter_norm, momentum_norm, update_cosine, \
         spread) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17)",
    )
    .bind(run.as_str())
    .bind(i64::from(row.round))
    .bind(count("rounds.started_ms", row.started_ms)?)
    .bind(count("rounds.committed_ms", row.committed_ms)?)
    .bind(i64::from(row.attempts))
    .bind(count("rounds.first_step", row.first_step)?)
    .bind(count("rounds.tokens", row.tokens)?)
    .bind(finite("rounds.train_loss", row.train_loss)?)
    .bind(finite("rounds.delta_norm", row.delta_norm)?)
    .bind(finite("rounds.update_norm", row.update_norm)?)
    .bind(count("rounds.bytes_down", row.bytes_down)?)
    .bind(count("rounds.bytes_up", row.bytes_up)?)
    .bind(row.digest.to_string())
    .bind(optional("rounds.parameter_norm", statistics.map(|one| one.parameter_norm))?)
    .bind(optional("rounds.momentum_norm", statistics.and_then(|one| one.momentum_norm))?)
    .bind(optional("rounds.update_cosine", statistics.and_then(|one| one.update_cosine))?)
    .bind(optional("rounds.spread", statistics.and_then(|one| one.spread))?)
    .persistent(KEEPS_FLOATS_THAT_MAY_BE_NULL)
    .execute(connection)
    .await
    .map_err(StoreError::of("commit a round"))?;
    Ok(())
}

async fn insert_tensors(
    connection: &mut AnyConnection,
    run: &RunName,
    round: u32,
    tensors: &[TensorNorms],
) -> Result<(), StoreError> {
    let norms = serde_json::to_string(tensors).map_err(|error| StoreError::Unstorable {
        column: "round_tensors.norms",
        value: error.to_string(),
    })?;
    sqlx::query("INSERT INTO round_tensors (run, round, norms) VALUES ($1, $2, $3)")
        .bind(run.as_str())
        .bind(i64::from(round))
        .bind(norms)
        .execute(connection)
        .await
        .map_err(StoreError::of("commit a round"))?;
    Ok(())
}

pub(super) async fn upsert_evaluation(
    connection: &mut AnyConnection,
    run: &RunName,
    row: &EvaluationRow,
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO evaluations (run, version, site, loss, tokens, text_bytes) VALUES ($1, $2, $3, $4, $5, $6) \
         ON CONFLICT (run, version, site) DO UPDATE SET loss = excluded.loss, tokens = excluded.tokens, \
         text_bytes = excluded.text_bytes",
    )
    .bind(run.as_str())
    .bind(i64::from(row.version))
    .bind(row.site.as_str())
    .bind(finite("evaluations.loss", row.loss)?)
    .bind(count("evaluations.tokens", row.tokens)?)
    .bind(count("evaluations.text_bytes", row.text_bytes)?)
    .execute(connection)
    .await
    .map_err(StoreError::of("record an evaluation"))?;
    Ok(())
}

pub(super) async fn upsert_checkpoint(
    connection: &mut AnyConnection,
    run: &RunName,
    row: &CheckpointRow,
) -> Result<(), StoreError> {
    let path = row.path.to_str().ok_or_else(|| StoreError::Unstorable {
        column: "checkpoints.path",
        value: row.path.display().to_string(),
    })?;
    sqlx::query(
        "INSERT INTO checkpoints (run, version, path, bytes, created_ms, digest) VALUES ($1, $2, $3, $4, $5, $6) \
         ON CONFLICT (run, version) DO UPDATE SET path = excluded.path, bytes = excluded.bytes, \
         created_ms = excluded.created_ms, digest = excluded.digest",
    )
    .bind(run.as_str())
    .bind(i64::from(row.version))
    .bind(path)
    .bind(count("checkpoints.bytes", row.bytes)?)
    .bind(count("checkpoints.created_ms", row.created_ms)?)
    .bind(row.digest.to_string())
    .execute(connection)
    .await
    .map_err(StoreError::of("record a checkpoint"))?;
    Ok(())
}

pub(super) async fn delete_checkpoint(
    connection: &mut AnyConnection,
    run: &RunName,
    version: u32,
) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM checkpoints WHERE run = $1 AND version = $2")
        .bind(run.as_str())
        .bind(i64::from(version))
        .execute(connection)
        .await
        .map_err(StoreError::of("retire a checkpoint"))?;
    Ok(())
}

fn round_row(row: &AnyRow) -> Result<RoundRow, StoreError> {
    let row = Columns(row);
    Ok(RoundRow {
        round: row.count("round")?,
        started_ms: row.count("started_ms")?,
        committed_ms: row.count("committed_ms")?,
        attempts: row.count("attempts")?,
        first_step: row.count("first_step")?,
        tokens: row.count("tokens")?,
        train_loss: row.float("train_loss")?,
        delta_norm: row.float("delta_norm")?,
        update_norm: row.float("update_norm")?,
        statistics: statistics(&row)?,
        bytes_down: row.count("bytes_down")?,
        bytes_up: row.count("bytes_up")?,
        digest: row.parsed("digest")?,
        contributors: row.count("contributors")?,
    })
}

fn statistics(row: &Columns<'_>) -> Result<Option<RoundStatistics>, StoreError> {
    let Some(parameter_norm) = row.optional_float("parameter_norm")? else { return Ok(None) };
    Ok(Some(RoundStatistics {
        parameter_norm,
        momentum_norm: row.optional_float("momentum_norm")?,
        update_cosine: row.optional_float("update_cosine")?,
        spread: row.optional_float("spread")?,
    }))
}

fn evaluation_row(row: &AnyRow) -> Result<EvaluationRow, StoreError> {
    let row = Columns(row);
    Ok(EvaluationRow {
        version: row.count("version")?,
        site: row.parsed("site")?,
        loss: row.float("loss")?,
        tokens: row.count("tokens")?,
        text_bytes: row.count("text_bytes")?,
    })
}

fn checkpoint_row(row: &AnyRow) -> Result<CheckpointRow, StoreError> {
    let row = Columns(row);
    Ok(CheckpointRow {
        version: row.count("version")?,
        path: row.text("path")?.into(),
        bytes: row.count("bytes")?,
        created_ms: row.count("created_ms")?,
        digest: row.parsed("digest")?,
    })
}
