//! Models that are uploaded for runs that do not exist yet.

use consort_common::{ids::RunName, units::UnixMs};

use super::{
    Store, StoreError,
    values::{Columns, count, sorted},
};

impl Store {
    /// Notes that a model is being uploaded for the run of that name.
    pub async fn touch_start_upload(&self, run: &RunName, now: UnixMs) -> Result<(), StoreError> {
        const ATTEMPT: &str = "note an upload";
        let mut transaction = self.connections.begin(ATTEMPT).await?;
        sqlx::query(
            "INSERT INTO start_uploads (run, touched_ms) VALUES ($1, $2) \
             ON CONFLICT (run) DO UPDATE SET touched_ms = excluded.touched_ms",
        )
        .bind(run.as_str())
        .bind(count("start_uploads.touched_ms", now)?)
        .execute(&mut *transaction)
        .await
        .map_err(StoreError::of(ATTEMPT))?;
        transaction.commit(ATTEMPT).await
    }

    /// Names for which models were uploaded that are wanted no more: their run exists, or nothing came since
    /// `before`.
    pub async fn spent_start_uploads(&self, before: UnixMs) -> Result<Vec<RunName>, StoreError> {
        let rows = sqlx::query(
            "SELECT run FROM start_uploads WHERE touched_ms < $1 OR run IN (SELECT name FROM runs)",
        )
        .bind(count("start_uploads.touched_ms", before)?)
        .fetch_all(&*self.connections.reader())
        .await
        .map_err(StoreError::of("list uploads"))?;
        sorted(rows.iter().map(|row| Columns(row).parsed("run")), RunName::clone)
    }

    /// Forgets an upload, of which nothing is left.
    pub async fn forget_start_upload(&self, run: &RunName) -> Result<(), StoreError> {
        const ATTEMPT: &str = "forget an upload";
        let mut transaction = self.connections.begin(ATTEMPT).await?;
        sqlx::query("DELETE FROM start_uploads WHERE run = $1")
            .bind(run.as_str())
            .execute(&mut *transaction)
            .await
            .map_err(StoreError::of(ATTEMPT))?;
        transaction.commit(ATTEMPT).await
    }
}

#[cfg(test)]
mod tests {
    use consort_common::ids::Digest;

    use super::*;
    use crate::store::{Location, NewRun, StartOrigin};

    fn name(text: &str) -> RunName {
        text.parse().unwrap()
    }

    fn run(run: &str, start: Option<StartOrigin>) -> NewRun {
        NewRun {
            name: name(run),
            spec_toml: String::new(),
            spec_digest: Digest::of(b"spec"),
            manifest_digest: Digest::of(b"manifest"),
            tokenizer_digest: Digest::of(b"tokenizer"),
            architecture: "llama".to_owned(),
            parameters: 7,
            state_json: "{}".to_owned(),
            version_digest: Digest::of(b"version 0"),
            start,
            created_ms: 1,
        }
    }

    #[tokio::test]
    async fn what_a_run_starts_from_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&Location::File(folder.path().join("consort.db"))).await.unwrap();
        let start = StartOrigin { name: "gpt2-small".to_owned(), digest: Digest::of(b"weights") };
        store.create_run(&run("pilot", Some(start.clone()))).await.unwrap();
        assert_eq!(store.run(&name("pilot")).await.unwrap().unwrap().start, Some(start));
    }

    #[tokio::test]
    async fn an_upload_is_spent_when_nothing_comes_or_its_run_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&Location::File(folder.path().join("consort.db"))).await.unwrap();
        for (run, touched) in [("old", 100), ("new", 300), ("made", 300)] {
            store.touch_start_upload(&name(run), touched).await.unwrap();
        }
        store.create_run(&run("made", None)).await.unwrap();
        assert_eq!(store.spent_start_uploads(200).await.unwrap(), [name("made"), name("old")]);
        store.touch_start_upload(&name("old"), 250).await.unwrap();
        assert_eq!(store.spent_start_uploads(200).await.unwrap(), [name("made")]);
        store.forget_start_upload(&name("made")).await.unwrap();
        assert_eq!(store.spent_start_uploads(200).await.unwrap(), [] as [RunName; 0]);
    }

    #[tokio::test]
    async fn a_database_from_before_there_were_starts_is_taken_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("consort.db");
        let store = Store::open(&Location::File(path.clone())).await.unwrap();
        store.create_run(&run("pilot", None)).await.unwrap();
        for statement in [
            "ALTER TABLE runs DROP COLUMN start_origin",
            "ALTER TABLE runs DROP COLUMN start_digest",
            "DROP TABLE start_uploads",
            "DELETE FROM _sqlx_migrations WHERE version = 2",
        ] {
            sqlx::query(statement).execute(&store.connections.writer).await.unwrap();
        }
        store.close().await;
        let store = Store::open(&Location::File(path.clone())).await.unwrap();
        assert_eq!(store.run(&name("pilot")).await.unwrap().unwrap().start, None);
        store.touch_start_upload(&name("next"), 1).await.unwrap();
    }
}
