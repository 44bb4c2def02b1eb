//! What happened in a run, in sentences.

use consort_common::{ids::RunName, units::UnixMs};
use sqlx::{AnyConnection, any::AnyRow};

use super::{
    Store, StoreError,
    values::{Columns, count, storable},
};

/// Events that are kept per run, newest first.
pub const EVENTS_MAX: u32 = 10_000;

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventRow {
    /// Counts from 1 within the run.
    pub id: u64,
    /// When.
    pub time_ms: UnixMs,
    /// A sentence.
    pub text: String,
}

impl Store {
    /// Records an event that is not part of a step of the round engine.
    pub async fn add_event(&self, run: &RunName, time_ms: UnixMs, text: &str) -> Result<(), StoreError> {
        const ATTEMPT: &str = "record an event";
        let mut transaction = self.connections.begin(ATTEMPT).await?;
        insert_event(&mut transaction, run, time_ms, text).await?;
        transaction.commit(ATTEMPT).await
    }

    /// The run's events with an id above `id`, oldest first, at most `limit`: the newest of them.
    pub async fn events_since(
        &self,
        run: &RunName,
        id: u64,
        limit: u32,
    ) -> Result<Vec<EventRow>, StoreError> {
        let rows = sqlx::query("SELECT * FROM events WHERE run = $1 AND id > $2 ORDER BY id DESC LIMIT $3")
            .bind(run.as_str())
            .bind(count("events.id", id)?)
            .bind(i64::from(limit))
            .fetch_all(&*self.connections.reader())
            .await
            .map_err(StoreError::of("list a run's events"))?;
        rows.iter().rev().map(event_row).collect()
    }
}

/// Adds an event and removes the one that is too many. The newest is never removed, so its id plus one is
/// free.
pub(super) async fn insert_event(
    connection: &mut AnyConnection,
    run: &RunName,
    time_ms: UnixMs,
    text: &str,
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO events (run, id, time_ms, text) \
         SELECT $1, COALESCE(MAX(id), 0) + 1, $2, $3 FROM events WHERE run = $1",
    )
    .bind(run.as_str())
    .bind(count("events.time_ms", time_ms)?)
    .bind(storable(text))
    .execute(&mut *connection)
    .await
    .map_err(StoreError::of("record an event"))?;
    sqlx::query(
        "DELETE FROM events WHERE run = $1 AND id <= (SELECT MAX(id) FROM events WHERE run = $1) - $2",
    )
    .bind(run.as_str())
    .bind(i64::from(EVENTS_MAX))
    .execute(connection)
    .await
    .map_err(StoreError::of("remove old events"))?;
    Ok(())
}

fn event_row(row: &AnyRow) -> Result<EventRow, StoreError> {
    let row = Columns(row);
    Ok(EventRow { id: row.count("id")?, time_ms: row.count("time_ms")?, text: row.text("text")? })
}
