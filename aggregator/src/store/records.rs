//! One step of the round engine as one transaction: its new state and the records that it produced.

use consort_common::{ids::RunName, units::UnixMs};
use sqlx::AnyConnection;

use super::{
    Store, StoreError, contributions,
    contributions::ContributionRow,
    events, rounds,
    rounds::{CheckpointRow, EvaluationRow, RoundCommit},
    values::count,
};

/// Something that a step of the round engine wants remembered.
#[derive(Debug, Clone, PartialEq)]
pub enum Record {
    /// The run was started; the first time counts.
    Started(UnixMs),
    /// The run finished or was aborted.
    Finished(UnixMs),
    /// A delta was accepted.
    Contribution(ContributionRow),
    /// A round is committed: this is what makes its version real.
    Round(RoundCommit),
    /// A site measured a version.
    Evaluation(EvaluationRow),
    /// A checkpoint was published.
    Checkpoint(CheckpointRow),
    /// The checkpoint of this version was retired.
    CheckpointRetired(u32),
    /// Something happened.
    Event {
        /// When.
        time_ms: UnixMs,
        /// A sentence.
        text: String,
    },
}

impl Store {
    /// Stores the round engine's new state together with the records of the step that led to it, in their
    /// order: all or nothing.
    ///
    /// # Errors
    /// [`StoreError::NoSuchRun`]; [`StoreError::NotNext`] and [`StoreError::NoContribution`] for a round that
    /// cannot be committed; [`StoreError::Unstorable`]; or the database's.
    pub async fn save_state(
        &self,
        run: &RunName,
        state_json: &str,
        records: &[Record],
    ) -> Result<(), StoreError> {
        const ATTEMPT: &str = "store a run's state";
        let mut transaction = self.connections.begin(ATTEMPT).await?;
        let updated = sqlx::query("UPDATE runs SET state_json = $2 WHERE name = $1")
            .bind(run.as_str())
            .bind(state_json)
            .execute(&mut *transaction)
            .await
            .map_err(StoreError::of(ATTEMPT))?;
        if updated.rows_affected() == 0 {
            return Err(StoreError::NoSuchRun(run.clone()));
        }
        for record in records {
            save_record(&mut transaction, run, record).await?;
        }
        transaction.commit(ATTEMPT).await
    }
}

async fn save_record(
    connection: &mut AnyConnection,
    run: &RunName,
    record: &Record,
) -> Result<(), StoreError> {
    match record {
        Record::Started(time_ms) => {
            let sql = "UPDATE runs SET started_ms = COALESCE(started_ms, $2) WHERE name = $1";
            set_time(connection, run, sql, *time_ms).await
        }
        Record::Finished(time_ms) => {
            let sql = "UPDATE runs SET finished_ms = COALESCE(finished_ms, $2) WHERE name = $1";
            set_time(connection, run, sql, *time_ms).await
        }
        Record::Contribution(row) => contributions::insert_contribution(connection, run, row).await,
        Record::Round(commit) => rounds::commit_round(connection, run, commit).await,
        Record::Evaluation(row) => rounds::upsert_evaluation(connection, run, row).await,
        Record::Checkpoint(row) => rounds::upsert_checkpoint(connection, run, row).await,
        Record::CheckpointRetired(version) => rounds::delete_checkpoint(connection, run, *version).await,
        Record::Event { time_ms, text } => events::insert_event(connection, run, *time_ms, text).await,
    }
}

async fn set_time(
    connection: &mut AnyConnection,
    run: &RunName,
    sql: &str,
    time_ms: UnixMs,
) -> Result<(), StoreError> {
    sqlx::query(sql)
        .bind(run.as_str())
        .bind(count("runs.started_ms, runs.finished_ms", time_ms)?)
        .execute(connection)
        .await
        .map_err(StoreError::of("store a run's state"))?;
    Ok(())
}
