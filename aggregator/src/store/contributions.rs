//! Accepted deltas.

use consort_common::{
    codec::Encoding,
    ids::{Digest, RunName, SiteName},
    spec::STALENESS_MAX,
    units::UnixMs,
};
use sqlx::{AnyConnection, any::AnyRow};

use super::{
    Store, StoreError,
    values::{Columns, KEEPS_FLOATS_THAT_MAY_BE_NULL, count, finite, sorted},
};
use crate::engine::Treatment;

/// An accepted delta.
#[derive(Debug, Clone, PartialEq)]
pub struct ContributionRow {
    /// Whose.
    pub site: SiteName,
    /// For which run. The run of the call that records it.
    pub run: RunName,
    /// For which round it was trained.
    pub round: u32,
    /// How many rounds later than that it counts.
    pub age: u32,
    /// Share of the average, 0 to 1; none while the round is open or if it was not averaged.
    pub weight: Option<f64>,
    /// Tokens trained.
    pub tokens: u64,
    /// Local steps taken.
    pub steps: u32,
    /// Mean training loss, nats per token.
    pub train_loss: f64,
    /// Seconds of local training.
    pub train_seconds: f64,
    /// L2 norm before encoding.
    pub delta_norm: f64,
    /// Encoded payload, in bytes.
    pub bytes: u64,
    /// How it was encoded.
    pub encoding: Encoding,
    /// Digest over its chunk digests.
    pub delta_digest: Digest,
    /// When it was accepted.
    pub accepted_ms: UnixMs,
    /// L2 norm of what it decodes to, where the rule of aggregation looks at it; like the rest, none while the round
    /// is open.
    pub measured_norm: Option<f64>,
    /// By what it was scaled, 0 to 1, where the rule clips.
    pub clip: Option<f64>,
    /// Whether it was averaged, where the rule selects.
    pub selected: Option<bool>,
}

impl Store {
    /// The deltas accepted for the average of a round, by site and round: they may have been trained for earlier
    /// rounds.
    pub async fn contributions(&self, run: &RunName, round: u32) -> Result<Vec<ContributionRow>, StoreError> {
        // The first condition on the round finds the rows by the table's key.
        let rows = sqlx::query(
            "SELECT * FROM contributions WHERE run = $1 AND round BETWEEN $2 - $3 AND $2 AND round + age = $2",
        )
        .bind(run.as_str())
        .bind(i64::from(round))
        .bind(i64::from(STALENESS_MAX))
        .fetch_all(&*self.connections.reader())
        .await
        .map_err(StoreError::of("list a round's contributions"))?;
        sorted(rows.iter().map(contribution_row), |row| (row.site.clone(), row.round))
    }

    /// A site's newest contributions over all runs, newest first.
    pub async fn client_contributions(
        &self,
        site: &SiteName,
        limit: u32,
    ) -> Result<Vec<ContributionRow>, StoreError> {
        let rows = sqlx::query(
            "SELECT * FROM contributions WHERE site = $1 ORDER BY accepted_ms DESC, run, round DESC LIMIT $2",
        )
        .bind(site.as_str())
        .bind(i64::from(limit))
        .fetch_all(&*self.connections.reader())
        .await
        .map_err(StoreError::of("list a site's contributions"))?;
        rows.iter().map(contribution_row).collect()
    }
}

/// Records a delta, in place of one that the site delivered for the same round before.
pub(super) async fn insert_contribution(
    connection: &mut AnyConnection,
    run: &RunName,
    row: &ContributionRow,
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO contributions (run, round, site, weight, tokens, steps, train_loss, train_seconds, delta_norm, \
         bytes, encoding, delta_digest, accepted_ms, age) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14) \
         ON CONFLICT (run, round, site) DO UPDATE SET weight = excluded.weight, tokens = excluded.tokens, \
         steps = excluded.steps, train_loss = excluded.train_loss, train_seconds = excluded.train_seconds, \
         delta_norm = excluded.delta_norm, bytes = excluded.bytes, encoding = excluded.encoding, delta_digest = excluded.delta_digest, \
         accepted_ms = excluded.accepted_ms, age = excluded.age",
    )
    .bind(run.as_str())
    .bind(i64::from(row.round))
    .bind(row.site.as_str())
    .bind(row.weight.map(|weight| finite("contributions.weight", weight)).transpose()?)
    .bind(count("contributions.tokens", row.tokens)?)
    .bind(i64::from(row.steps))
    .bind(finite("contributions.train_loss", row.train_loss)?)
    .bind(finite("contributions.train_seconds", row.train_seconds)?)
    .bind(finite("contributions.delta_norm", row.delta_norm)?)
    .bind(count("contributions.bytes", row.bytes)?)
    .bind(row.encoding.name())
    .bind(row.delta_digest.to_string())
    .bind(count("contributions.accepted_ms", row.accepted_ms)?)
    .bind(i64::from(row.age))
    .persistent(KEEPS_FLOATS_THAT_MAY_BE_NULL)
    .execute(connection)
    .await
    .map_err(StoreError::of("record a contribution"))?;
    Ok(())
}

/// Records what became of a contribution.
pub(super) async fn set_treatment(
    connection: &mut AnyConnection,
    run: &RunName,
    treatment: &Treatment,
) -> Result<(), StoreError> {
    let Treatment { site, round, weight, norm, clip, selected } = treatment;
    let optional = |column, value: Option<f64>| value.map(|value| finite(column, value)).transpose();
    let updated = sqlx::query(
        "UPDATE contributions SET weight = $4, measured_norm = $5, clip = $6, selected = $7 \
         WHERE run = $1 AND round = $2 AND site = $3",
    )
    .bind(run.as_str())
    .bind(i64::from(*round))
    .bind(site.as_str())
    .bind(finite("contributions.weight", *weight)?)
    .bind(optional("contributions.measured_norm", *norm)?)
    .bind(optional("contributions.clip", *clip)?)
    .bind(selected.map(i64::from))
    .persistent(KEEPS_FLOATS_THAT_MAY_BE_NULL)
    .execute(connection)
    .await
    .map_err(StoreError::of("commit a round"))?;
    if updated.rows_affected() == 1 {
        Ok(())
    } else {
        Err(StoreError::NoContribution { run: run.clone(), round: *round, site: site.clone() })
    }
}

fn contribution_row(row: &AnyRow) -> Result<ContributionRow, StoreError> {
    let row = Columns(row);
    Ok(ContributionRow {
        site: row.parsed("site")?,
        run: row.parsed("run")?,
        round: row.count("round")?,
        age: row.count("age")?,
        weight: row.optional_float("weight")?,
        tokens: row.count("tokens")?,
        steps: row.count("steps")?,
        train_loss: row.float("train_loss")?,
        train_seconds: row.float("train_seconds")?,
        delta_norm: row.float("delta_norm")?,
        bytes: row.count("bytes")?,
        encoding: row.known("encoding", Encoding::parse)?,
        delta_digest: row.parsed("delta_digest")?,
        accepted_ms: row.count("accepted_ms")?,
        measured_norm: row.optional_float("measured_norm")?,
        clip: row.optional_float("clip")?,
        selected: row.optional_count::<u8>("selected")?.map(|selected| selected != 0),
    })
}
